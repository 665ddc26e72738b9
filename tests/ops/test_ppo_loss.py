import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, assert_as_accurate, strided_variants

from fastrl.ops import PPOStats, ppo_loss
from fastrl.ops.backend import choose

NATIVE = "cpu"
BACKENDS = ["reference", NATIVE]
NAMES = ["logprobs", "values", "old_logprobs", "old_values", "advantages", "returns", "mask"]


def case(rows, steps, dtype=torch.float32, seed=0, spread=0.3):
    """The seven inputs by name, and an entropy; a mask with holes and one row that keeps nothing."""
    g = torch.Generator().manual_seed(seed)
    old_logprobs, old_values, advantages, returns, a, b = torch.randn(6, rows, steps, generator=g).unbind()
    mask = torch.rand(rows, steps, generator=g) > 0.3
    mask[2:3] = False
    floats = [old_logprobs + spread * a, old_values + spread * b, old_logprobs, old_values, advantages, returns]
    inputs = dict(zip(NAMES, [*(t.to(dtype) for t in floats), mask], strict=True))
    return inputs, torch.rand(rows, steps, generator=g).to(dtype)


def gradients(inputs, entropy=None, upstream=1.0, **options):
    """(loss, stats, dlogprobs, dvalues, dentropy)"""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in ("logprobs", "values")}
    bonus = None if entropy is None else entropy.detach().clone().requires_grad_()
    loss, stats = ppo_loss(**{**inputs, **leaves}, entropy=bonus, **options)
    (loss * upstream).backward()
    return loss.detach(), stats, leaves["logprobs"].grad, leaves["values"].grad, None if bonus is None else bonus.grad


def doubled(inputs):
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def test_native_is_the_default():
    assert choose("ppo_loss", torch.empty(1, 1)) == NATIVE


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """pitfalls 11, 37, 39: every formula on two rows of three tokens, the last of row 1 dropped; 5 tokens count.

    r = [[1, 2, 1/2], [2, 1/2, -]], A = [[1, 1, 1], [-1, -1, -]], clip 0.2:
      max(-A r, -A clip r) = [[-1, -1.2, -.5], [2, .8, -]], so two tokens are clipped; sum 0.1.
    V = [[0, 1, 1], [0, 0, -]], V_old = 0, G = [[1, 0, 2], [0, 1, -]], clip 0.5:
      squared errors [[1, 1, 1], [0, 1, -]], of the clipped value [[1, .25, 2.25], [0, 1, -]];
      half the larger: [[.5, .5, 1.125], [0, .5, -]], one of them clipped; sum 2.625.
    """
    log2 = math.log(2)
    inputs = dict(
        logprobs=torch.tensor([[-1, -1 + log2, -1 - log2], [-1 + log2, -1 - log2, 5]]),
        values=torch.tensor([[0.0, 1, 1], [0, 0, 9]]),
        old_logprobs=torch.full((2, 3), -1.0),
        old_values=torch.zeros(2, 3),
        advantages=torch.tensor([[1.0, 1, 1], [-1, -1, 9]]),
        returns=torch.tensor([[1.0, 0, 2], [0, 1, 9]]),
        mask=torch.tensor([[True, True, True], [True, True, False]]),
    )
    entropy = torch.full((2, 3), 2.0)
    options = dict(vf_clip_coef=0.5, vf_coef=0.4, ent_coef=0.01, backend=backend)
    loss, stats, dlogprobs, dvalues, dentropy = gradients(inputs, entropy, **options)
    assert loss.item() == pytest.approx((0.1 + 0.4 * 2.625 - 0.01 * 10) / 5, abs=1e-6)
    k3 = (2 - 1 - log2, 0.5 - 1 + log2)
    want = dict(
        tokens=5, policy_loss=0.1 / 5, value_loss=2.625 / 5, entropy=2, approx_kl=(2 * k3[0] + 2 * k3[1]) / 5,
        clip_frac=2 / 5, vf_clip_frac=1 / 5, ratio_mean=6 / 5, ratio_max=2,
        explained_variance=1 - 0.64 / 0.56,
    )  # fmt: skip
    for name, value in want.items():
        assert getattr(stats, name).item() == pytest.approx(value, abs=1e-6), name
    close = dict(rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dlogprobs, torch.tensor([[-1.0, 0, -0.5], [2, 0, 0]]) / 5, **close)
    torch.testing.assert_close(dvalues, 0.4 * torch.tensor([[-1.0, 1, 0], [0, -1, 0]]) / 5, **close)
    torch.testing.assert_close(dentropy, -0.01 * torch.tensor([[1.0, 1, 1], [1, 1, 0]]) / 5, **close)
    assert gradients(inputs, None, dual_clip=1.5, backend=backend)[1].policy_loss.item() == pytest.approx(-0.4 / 5)
    assert gradients(inputs, None, dual_clip=1.5, backend=backend)[2][1].tolist() == [0, 0, 0]
    unclipped = gradients(inputs, None, vf_clip_coef=None, backend=backend)[1]
    assert unclipped.value_loss.item() == pytest.approx(2 / 5) and unclipped.vf_clip_frac.item() == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 31, 32, 33, 1023])
@pytest.mark.parametrize("vf_clip_coef", [None, 0.2])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_matches_float64(steps, vf_clip_coef, dual_clip):
    """T38: loss, statistics and all gradients, sizes around a vector and a chunk, any upstream and denominator."""
    inputs, entropy = case(9, steps)
    for denominator in (None, 7, torch.tensor(11.0)):
        options = dict(
            vf_clip_coef=vf_clip_coef, dual_clip=dual_clip, ent_coef=0.01, denominator=denominator, upstream=-1.7
        )
        actual = gradients(inputs, entropy, backend=NATIVE, **options)
        eager = gradients(inputs, entropy, backend="reference", **options)
        truth = gradients(doubled(inputs), entropy.double(), **options)
        assert truth[0].dtype == torch.float64
        for i, name in ((0, "loss"), (2, "dlogprobs"), (3, "dvalues"), (4, "dentropy")):
            assert_as_accurate(actual[i], eager[i], truth[i], name)
        for name, a, t in zip(truth[1]._fields, actual[1], truth[1], strict=True):
            torch.testing.assert_close(a, t, rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_before_any_update(backend):
    """pitfall 1: ratio 1, KL 0, nothing clipped, and at the tie the whole gradient -A and V - G."""
    inputs, _ = case(5, 40, spread=0.0)
    _, stats, dlogprobs, dvalues, _ = gradients(inputs, vf_coef=0.5, denominator=1, backend=backend)
    assert stats.ratio_mean == 1 and stats.ratio_max == 1
    assert stats.approx_kl == 0 and stats.clip_frac == 0 and stats.vf_clip_frac == 0
    mask = inputs["mask"]
    assert torch.equal(dlogprobs, torch.where(mask, -inputs["advantages"], 0))
    torch.testing.assert_close(dvalues, torch.where(mask, 0.5 * (inputs["values"] - inputs["returns"]), 0))


@pytest.mark.parametrize(
    ("backend", "dtype"), [(NATIVE, torch.float32), ("reference", torch.float32), ("reference", torch.float64)]
)
@pytest.mark.parametrize("log_ratio", [-200.0, -20.5, -20.0, -1.0, 0.0, 1.0, 20.0, 20.5, 200.0, 3e38])
def test_extreme_log_ratios(backend, dtype, log_ratio):
    """T19: finite loss, gradients never NaN, 0 outside +-20; at 20 it is still -A r; dropped slots do not care."""
    inputs, _ = case(2, 40, dtype)
    inputs["mask"][:] = True
    inputs["mask"][1, 20:] = False
    inputs["logprobs"] = inputs["old_logprobs"].zero_() + log_ratio
    inputs["advantages"] = torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0).to(dtype).expand(2, 40)
    loss, stats, dlogprobs, _, _ = gradients(inputs, denominator=1, backend=backend)
    assert torch.isfinite(loss) and torch.isfinite(dlogprobs).all()
    assert all(torch.isfinite(s) for s in stats) and stats.approx_kl >= 0
    ratio = math.exp(max(-20.0, min(20.0, log_ratio)))
    assert stats.ratio_max.item() == pytest.approx(ratio, rel=1e-5)
    for column, advantage in ((0, 1.0), (1, -1.0)):
        constant = abs(log_ratio) > 20 or (ratio > 1.2 if advantage > 0 else ratio < 0.8)
        want = 0.0 if constant else -advantage * ratio
        assert dlogprobs[0, column].item() == pytest.approx(want, rel=1e-5)
    assert (dlogprobs[1, 20:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_positions_may_hold_anything(backend, poison):
    """T20, pitfalls 9, 10, 38, 39: poison where the mask drops; loss, statistics and gradients as without it."""
    inputs, entropy = case(6, 33)
    clean = gradients(inputs, entropy, ent_coef=0.1, backend=backend)
    mask = inputs["mask"]
    for name in NAMES[:-1]:
        inputs[name][~mask] = poison
    entropy[~mask] = poison
    result = gradients(inputs, entropy, ent_coef=0.1, backend=backend)
    assert torch.equal(result[0], clean[0]) and torch.equal(torch.stack(result[1]), torch.stack(clean[1]))
    for got, want in zip(result[2:], clean[2:], strict=True):
        assert torch.equal(got, want) and (got[~mask] == 0).all()
    inputs["mask"] = mask & False
    loss, stats, *grads = gradients(inputs, entropy, ent_coef=0.1, backend=backend)
    assert loss == 0 and (torch.stack(stats) == 0).all() and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["logprobs", "values", "old_logprobs", "advantages", "returns", "entropy"])
def test_nan_in_a_kept_slot_is_seen(backend, name):
    inputs, entropy = case(3, 40)
    inputs["mask"][:] = True
    (entropy if name == "entropy" else inputs[name])[1, 5] = torch.nan
    loss, stats, dlogprobs, dvalues, _ = gradients(inputs, entropy, ent_coef=0.1, backend=backend)
    assert loss.isnan()
    if name in ("logprobs", "old_logprobs", "advantages"):
        assert dlogprobs[1, 5].isnan() and stats.policy_loss.isnan()
    elif name != "entropy":
        assert dvalues[1, 5].isnan() and stats.value_loss.isnan()
    assert dlogprobs.isnan().sum() + dvalues.isnan().sum() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_add_up(backend):
    """pitfalls 11, 16: with the whole batch's token count, 1 x 8 and 8 x 1 rows of ragged lengths give one gradient."""
    inputs, entropy = case(8, 30)
    inputs["mask"] = torch.arange(30) < torch.tensor([30, 3, 0, 7, 30, 1, 12, 25])[:, None]
    tokens = int(inputs["mask"].sum())
    whole = gradients(inputs, entropy, ent_coef=0.01, backend=backend)
    for denominator in (tokens, float(tokens), torch.tensor(tokens)):
        parts = [
            gradients(
                {name: t[b : b + 1] for name, t in inputs.items()}, entropy[b : b + 1], ent_coef=0.01,
                denominator=denominator, backend=backend,
            )
            for b in range(8)
        ]  # fmt: skip
        torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
        for i in (2, 3, 4):
            torch.testing.assert_close(torch.cat([p[i] for p in parts]), whole[i])
        mean = sum(p[1].policy_loss * p[1].tokens for p in parts) / tokens
        torch.testing.assert_close(mean, whole[1].policy_loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_dtypes(dtype):
    """T21, T30, pitfall 24: slices and transposes give the contiguous result; gradients have their input's dtype."""
    inputs, entropy = case(6, 37, dtype)
    want = gradients(inputs, entropy, ent_coef=0.1, backend=NATIVE)
    assert want[0].dtype == torch.float32 and want[2].dtype == want[3].dtype == want[4].dtype == dtype
    variants = [list(strided_variants(t)) for t in (*inputs.values(), entropy)]
    for combination in zip(*variants, strict=True):
        *tensors, bonus = [t for _, t in combination]
        strided = dict(zip(NAMES, tensors, strict=True))
        leaves = [strided["logprobs"].requires_grad_(), strided["values"].requires_grad_(), bonus.requires_grad_()]
        loss, _ = ppo_loss(**strided, entropy=bonus, ent_coef=0.1, backend=NATIVE)
        got = torch.autograd.grad(loss, leaves)
        assert torch.equal(loss, want[0]), combination[0][0]
        assert all(torch.equal(g, w) for g, w in zip(got, want[2:], strict=True)), combination[0][0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_empty(shape, backend):
    inputs = dict.fromkeys(NAMES, torch.empty(shape))
    inputs["mask"] = torch.empty(shape, dtype=torch.bool)
    loss, stats, dlogprobs, _, _ = gradients(inputs, backend=backend)
    assert loss == 0 and (torch.stack(stats) == 0).all() and dlogprobs.shape == shape


def test_repeatable_on_any_number_of_threads():
    """T15, pitfall 44: same bits on every run and thread count."""
    inputs, entropy = case(77, 900)
    threads = torch.get_num_threads()
    want = gradients(inputs, entropy, ent_coef=0.1, backend=NATIVE)
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        again = gradients(inputs, entropy, ent_coef=0.1, backend=NATIVE)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(want[0], again[0]) and torch.equal(torch.stack(want[1]), torch.stack(again[1]))
    assert all(torch.equal(a, b) for a, b in zip(want[2:], again[2:], strict=True))


def test_second_backward_repeats_and_double_backward_raises():
    """T13: retain_graph gives the same gradient, inputs are left alone, a loss used twice adds up."""
    inputs, _ = case(3, 40)
    before = {name: t.clone() for name, t in inputs.items()}
    leaf = inputs["logprobs"].clone().requires_grad_()
    loss, stats = ppo_loss(**{**inputs, "logprobs": leaf}, backend=NATIVE)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (twice,) = torch.autograd.grad(loss + loss, leaf, retain_graph=True)
    assert torch.equal(first, second) and torch.equal(twice, 2 * first)
    assert all(torch.equal(inputs[name], t) for name, t in before.items())
    assert not any(s.requires_grad for s in stats)
    (once,) = torch.autograd.grad(loss**2, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        once.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_asked(backend):
    """T36: only logprobs, values and entropy get gradients; without any no graph is made."""
    inputs, entropy = case(3, 10)
    for name in ("old_logprobs", "old_values", "advantages", "returns"):
        inputs[name].requires_grad_()
    assert not ppo_loss(**inputs, backend=backend)[0].requires_grad
    values = inputs["values"].clone().requires_grad_()
    ppo_loss(**{**inputs, "values": values}, entropy=entropy, backend=backend)[0].backward()
    assert values.grad is not None and all(inputs[n].grad is None for n in NAMES)
    with torch.no_grad():
        assert not ppo_loss(**{**inputs, "values": values}, backend=backend)[0].requires_grad


def test_reference_gradcheck():
    inputs, entropy = case(4, 6, torch.float64)
    leaves = [t.requires_grad_() for t in (inputs["logprobs"], inputs["values"], entropy)]

    def loss(logprobs, values, entropy):
        named = {**inputs, "logprobs": logprobs, "values": values}
        return ppo_loss(**named, entropy=entropy, ent_coef=0.1, dual_clip=1.3)[0]

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    """T32: fullgraph=True, forward and backward, equal to eager."""
    inputs, entropy = case(5, 20)
    rest = [inputs[name] for name in NAMES[2:]]

    def run(logprobs, values, entropy):
        loss, stats = ppo_loss(logprobs * 1, values, *rest, entropy=entropy, ent_coef=0.1, backend=NATIVE)
        return loss * 3, stats.approx_kl

    results = []
    for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (inputs["logprobs"], inputs["values"], entropy)]
        loss, approx_kl = f(*leaves)
        loss.backward()
        results.append([loss.detach(), approx_kl, *(t.grad for t in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_opcheck():
    inputs, entropy = case(3, 9)
    ordered = [inputs["logprobs"], inputs["values"], entropy, *(inputs[name] for name in NAMES[2:])]
    outputs = [torch.empty(()), torch.empty(len(PPOStats._fields)), torch.empty(3, 9), torch.empty(3, 9), None]
    args = (NATIVE, *ordered, torch.tensor(3.0), 0.2, 0.2, 0.1, 0.0, float("inf"), *outputs)
    torch.library.opcheck(torch.ops.fastrl.ppo_loss.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    good, entropy = case(3, 4)
    bad = [
        *((dict([(name, good[name][:, :3])]), name) for name in NAMES[1:]),
        *((dict([(name, good[name].long())]), name) for name in NAMES),
        (dict(logprobs=good["logprobs"][0]), "logprobs"),
        (dict(values=good["values"].to("meta")), "values"),
        (dict(entropy=entropy[:2]), "entropy"),
        (dict(ent_coef=0.1), "entropy"),
        (dict(clip_coef=0.0), "clip_coef"),
        (dict(vf_clip_coef=-0.2), "vf_clip_coef"),
        (dict(vf_coef=-0.1), "vf_coef"),
        (dict(ent_coef=-0.1), "ent_coef"),
        (dict(dual_clip=1.0), "dual_clip"),
        (dict(denominator=0), "denominator"),
        (dict(denominator=float("nan")), "denominator"),
        (dict(denominator=torch.ones(2)), "denominator"),
        (dict(denominator=torch.ones((), device="meta")), "denominator"),
    ]
    for change, argument in bad:
        with pytest.raises(ValueError, match=f"ppo_loss: {argument}: expected .*, got"):
            ppo_loss(**{**good, **change}, backend=backend)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 10**6), st.floats(0.0, 3.0))
def test_properties(rows, steps, seed, spread):
    """approx_kl >= 0; shares in [0, 1]; the clipped loss is never below the unclipped one; rows commute."""
    inputs, _ = case(rows, steps, seed=seed, spread=spread)
    loss, stats, dlogprobs, dvalues, _ = gradients(inputs, vf_coef=0.5, backend=NATIVE)
    assert stats.approx_kl >= 0 and 0 <= stats.clip_frac <= 1 and 0 <= stats.vf_clip_frac <= 1
    loose, _ = ppo_loss(**inputs, clip_coef=1e6, vf_clip_coef=None, vf_coef=0.5, backend=NATIVE)
    assert loss >= loose - 1e-4 * (1 + abs(loose))
    order = torch.randperm(rows)
    shuffled = gradients({name: t[order] for name, t in inputs.items()}, vf_coef=0.5, backend=NATIVE)
    torch.testing.assert_close(shuffled[0], loss, rtol=1e-4, atol=1e-5)
    assert torch.equal(shuffled[2], dlogprobs[order]) and torch.equal(shuffled[3], dvalues[order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_explain(backend):
    """Returns that differ by rounding alone have an explained variance of 0."""
    returns = torch.full((7, 1), 0.3)
    rest = dict.fromkeys(("logprobs", "old_logprobs", "old_values", "advantages"), torch.zeros(7, 1))
    values, mask = torch.linspace(0, 1, 7)[:, None], torch.ones(7, 1, dtype=torch.bool)
    for scale in (1.0, 1e4, -3e-4):
        _, stats = ppo_loss(**rest, values=values, returns=scale * returns, mask=mask, backend=backend)
        assert stats.explained_variance.item() == 0
