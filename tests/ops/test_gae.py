import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, assert_as_accurate, strided_variants

from fastrl.ops import gae
from fastrl.ops.backend import choose

NATIVE = "cpu"
BACKENDS = ["reference", NATIVE]


def case(rows, steps, dtype=torch.float32, seed=0):
    """rewards, values, mask with holes, dones, bootstrap values, one lambda per row."""
    g = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(rows, steps, generator=g).to(dtype) for _ in range(2))
    mask = torch.rand(rows, steps, generator=g) > 0.3
    dones = torch.rand(rows, steps, generator=g) > 0.8
    return rewards, values, mask, dones, torch.randn(rows, generator=g), torch.rand(rows, generator=g)


def loop(rewards, values, gamma, gae_lambda, next_value=0.0):
    """Equations 11, 12 and 16 of arXiv:1506.02438 on one row of Python numbers."""
    advantages, carry = [], 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        carry = reward + gamma * next_value - value + gamma * gae_lambda * carry
        next_value = value
        advantages.insert(0, carry)
    return advantages


def test_native_is_the_default():
    assert choose("gae", torch.empty(1, 1)) == NATIVE
    assert choose("gae", torch.empty(1, 1, dtype=torch.float64)) == "reference"


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """pitfall 6: gamma 1/2, lambda 1/2, so gamma * lambda = 1/4; the last value is used, lambda < 1 matters.

    Row 0: deltas 1 + 1 - 1 = 1, 0 + 2 - 2 = 0, 8 - 4 = 4; advantages 4, 0 + 1 = 1, 1 + 1/4.
    """
    rewards = torch.tensor([[1.0, 0.0, 8.0], [0.0, 0.0, 1.0]])
    values = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    advantages, returns = gae(rewards, values, gamma=0.5, gae_lambda=0.5, backend=backend)
    assert advantages.tolist() == [[1.25, 1.0, 4.0], [0.0625, 0.25, 1.0]]
    assert returns.tolist() == [[2.25, 3.0, 8.0], [0.0625, 0.25, 1.0]]


@pytest.mark.parametrize("steps", [1, 2, 3, 31, 32, 33, 1023, 4097])
@pytest.mark.parametrize("rows", [1, 7, 17])
def test_matches_float64(steps, rows):
    """T28: lengths around a tile, with mask, dones, bootstrap and a lambda per row; rows around a block."""
    rewards, values, mask, dones, bootstrap, lambdas = case(rows, steps)
    options = dict(gamma=0.97, gae_lambda=lambdas, dones=dones, bootstrap_value=bootstrap)
    for keep in (mask, None):
        actual = gae(rewards, values, keep, backend=NATIVE, **options)
        eager = gae(rewards, values, keep, backend="reference", **options)
        truth = gae(rewards.double(), values, keep, **options)
        for name, a, e, t in zip(["advantages", "returns"], actual, eager, truth, strict=True):
            assert_as_accurate(a, e, t, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_published_case(backend):
    """The 20 x 40 case of lm-human-preference-details: gamma 1, lambda 0.95, against the plain loop."""
    rewards, values, *_ = case(20, 40, torch.float64)
    want = [loop(r, v, 1.0, 0.95) for r, v in zip(rewards.tolist(), values.tolist(), strict=True)]
    dtype = torch.float64 if backend == "reference" else torch.float32
    advantages, returns = gae(rewards.to(dtype), values.to(dtype), backend=backend)
    torch.testing.assert_close(advantages.double(), torch.tensor(want).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, advantages + values.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_holes_equal_the_compacted_row(backend, poison):
    """T20, T27, pitfalls 8, 9: dropped slots inside and at the end, holding anything, hand the right on to the left."""
    rewards, values, mask, dones, bootstrap, _ = case(9, 50)
    mask[3], mask[4] = False, True
    mask[5, -20:] = False
    rewards[~mask], values[~mask], dones[~mask] = poison, poison, True
    bootstrap[3] = poison
    advantages, returns = gae(rewards, values, mask, gamma=0.9, dones=dones, bootstrap_value=bootstrap, backend=backend)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    for b in range(9):
        kept = mask[b]
        if kept.any():
            row = [t[b][kept][None] for t in (rewards, values)]
            want = gae(*row, gamma=0.9, dones=dones[b][kept][None], bootstrap_value=bootstrap[b : b + 1])
            torch.testing.assert_close(advantages[b][kept][None], want[0])
            torch.testing.assert_close(returns[b][kept][None], want[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_kept_slot_is_seen(backend):
    rewards, values, *_ = case(3, 20)
    rewards[1, 10] = torch.nan
    advantages, _ = gae(rewards, values, backend=backend)
    assert advantages[1, :11].isnan().all() and advantages[1, 11:].isfinite().all()
    assert advantages[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dones_cut_a_row_into_episodes(backend):
    rewards, values, _, _, bootstrap, _ = case(1, 12)
    dones = torch.zeros(1, 12, dtype=torch.bool)
    dones[0, [4, 7]] = True
    actual = gae(rewards, values, dones=dones, bootstrap_value=bootstrap, backend=backend)[0][0]
    want = []
    for begin, end, after in ((0, 5, 0.0), (5, 8, 0.0), (8, 12, bootstrap.item())):
        want += loop(rewards[0, begin:end].tolist(), values[0, begin:end].tolist(), 1.0, 0.95, after)
    torch.testing.assert_close(actual, torch.tensor(want), rtol=1e-5, atol=1e-5)
    dones[0, -1] = True  # the bootstrap value does not reach past the end
    ended = gae(rewards, values, dones=dones, bootstrap_value=bootstrap * torch.nan, backend=backend)[0]
    assert ended.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_dtypes(dtype):
    """T21: slices and transposes give the contiguous result; results are float32."""
    rewards, values, mask, *_ = case(6, 37, dtype)
    want = gae(rewards, values, mask, backend=NATIVE)
    assert want[0].dtype == want[1].dtype == torch.float32
    for (name, r), (_, v), (_, m) in zip(*map(strided_variants, (rewards, values, mask)), strict=True):
        for got, expected in zip(gae(r, v, m, backend=NATIVE), want, strict=True):
            assert torch.equal(got, expected), name
    expanded = gae(rewards[:1].expand(6, 37), values, backend=NATIVE)[0]
    assert torch.equal(expanded, gae(rewards[:1].repeat(6, 1), values, backend=NATIVE)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_empty(shape, backend):
    empty = torch.empty(shape)
    for result in gae(empty, empty, empty.bool(), bootstrap_value=torch.ones(shape[0]), backend=backend):
        assert result.shape == shape


def test_repeatable_and_batch_invariant():
    """T15, pitfall 44: same bits on every run, with any number of threads, alone or in a batch."""
    rewards, values, mask, *_ = case(77, 900)
    want = gae(rewards, values, mask, backend=NATIVE)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        again = gae(rewards, values, mask, backend=NATIVE)
    finally:
        torch.set_num_threads(threads)
    alone = gae(rewards[20:21], values[20:21], mask[20:21], backend=NATIVE)
    for w, a, one in zip(want, again, alone, strict=True):
        assert torch.equal(w, a) and torch.equal(w[20:21], one)


def test_inputs_are_left_alone_and_get_no_gradient():
    rewards, values, mask, dones, bootstrap, lambdas = case(5, 20)
    copies = [t.clone() for t in (rewards, values, mask, dones, bootstrap, lambdas)]
    values.requires_grad_()
    result = gae(rewards, values, mask, dones=dones, bootstrap_value=bootstrap, gae_lambda=lambdas, backend=NATIVE)
    assert not any(t.requires_grad for t in result)
    for now, before in zip((rewards, values, mask, dones, bootstrap, lambdas), copies, strict=True):
        assert torch.equal(now.detach(), before)


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    """T32: fullgraph=True, equal to eager."""

    def run(rewards, values, mask, dones, bootstrap, lambdas):
        plain = gae(rewards * 2, values, gamma=0.9, backend=NATIVE)
        full = gae(rewards, values, mask, dones=dones, bootstrap_value=bootstrap, gae_lambda=lambdas, backend=NATIVE)
        return *plain, *full

    inputs = case(5, 20)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs), run(*inputs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.slow
def test_opcheck():
    rewards, values, mask, dones, bootstrap, lambdas = case(3, 9)
    out = torch.empty(3, 9), torch.empty(3, 9)
    for optional in ((None,) * 4, (mask, dones, lambdas, bootstrap)):
        torch.library.opcheck(torch.ops.fastrl.gae.default, (NATIVE, rewards, values, *optional, 0.9, 0.95, *out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    rewards, values, mask, dones, bootstrap, lambdas = case(3, 4)
    bad = [
        (dict(rewards=rewards[0]), "rewards"),
        (dict(rewards=rewards.long()), "rewards"),
        (dict(values=values[:2]), "values"),
        (dict(values=values.to("meta")), "values"),
        (dict(mask=mask[:, :3]), "mask"),
        (dict(mask=mask.float()), "mask"),
        (dict(dones=dones.float()), "dones"),
        (dict(dones=dones[:2]), "dones"),
        (dict(bootstrap_value=bootstrap[:2]), "bootstrap_value"),
        (dict(bootstrap_value=bootstrap.long()), "bootstrap_value"),
        (dict(gamma=-0.1), "gamma"),
        (dict(gamma=1.1), "gamma"),
        (dict(gamma=float("nan")), "gamma"),
        (dict(gae_lambda=1.5), "gae_lambda"),
        (dict(gae_lambda=lambdas[:2]), "gae_lambda"),
        (dict(gae_lambda=lambdas + 1), "gae_lambda"),
        (dict(gae_lambda=lambdas * torch.nan), "gae_lambda"),
    ]
    for change, argument in bad:
        arguments = {"rewards": rewards, "values": values, **change}
        with pytest.raises(ValueError, match=f"gae: {argument}: expected .*, got"):
            gae(**arguments, backend=backend)


shapes = st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(0, 10**6))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes, st.floats(0, 1))
def test_properties(shape, gamma):
    """lambda 1 = discounted return less value; lambda 0 = TD error; rows commute with the batch; dropped values never
    matter (pitfall 7)."""
    rewards, values, mask, _, bootstrap, _ = case(*shape[:2], seed=shape[2])
    returns = torch.zeros_like(rewards)
    carry = bootstrap
    for t in reversed(range(shape[1])):
        carry = returns[:, t] = rewards[:, t] + gamma * carry
    options = dict(gamma=gamma, bootstrap_value=bootstrap, backend=NATIVE)
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gae(rewards, values, gae_lambda=1.0, **options)[0], returns - values, **close)
    td_error = rewards + gamma * torch.cat([values[:, 1:], bootstrap[:, None]], 1) - values
    torch.testing.assert_close(gae(rewards, values, gae_lambda=0.0, **options)[0], td_error, **close)
    order = torch.randperm(shape[0])
    whole = gae(rewards, values, mask, **options)[0]
    options["bootstrap_value"] = bootstrap[order]
    assert torch.equal(gae(rewards[order], values[order], mask[order], **options)[0], whole[order])
    options["bootstrap_value"] = bootstrap
    masked = torch.where(mask, values, 1e6)
    assert torch.equal(gae(rewards, masked, mask, **options)[0], whole)
