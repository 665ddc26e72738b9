import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, assert_as_accurate, strided_variants

from fastrl.ops import gae, ppo_advantages
from fastrl.ops.backend import choose
from fastrl.reference.ppo_advantages import moments, whiten

NATIVE = "cpu"
BACKENDS = ["reference", NATIVE]
NAMES = ["advantages", "returns", "rewards", "kl"]


def case(rows, steps, dtype=torch.float32, seed=0):
    """logprobs, ref_logprobs, values, scores, mask with holes; row 2 keeps nothing."""
    g = torch.Generator().manual_seed(seed)
    logprobs, ref_logprobs, values = (torch.randn(rows, steps, generator=g).to(dtype) for _ in range(3))
    mask = torch.rand(rows, steps, generator=g) > 0.3
    mask[2:3] = False
    return logprobs, ref_logprobs, values, torch.randn(rows, generator=g).to(dtype), mask


def doubled(inputs):
    return [t.double() if t.is_floating_point() else t for t in inputs]


def test_native_is_the_default():
    assert choose("ppo_advantages", torch.empty(1, 1)) == NATIVE


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """pitfalls 5, 6, 12, 15, 38: two rows of three tokens, the second without its last one; gamma = lambda = 1.

    k1 = [[1, 0, -1], [2, 0, -]]; rewards = -k1 / 2, score on the last kept token: [[-.5, 0, 4.5], [-1, -2, -]].
    Reward-to-go [[4, 4.5, 4.5], [-3, -2, -]] = returns; less values 1: advantages [[3, 3.5, 3.5], [-4, -3, -]].
    Their mean is 0.6 and their population variance (2.4^2 + 2 * 2.9^2 + 4.6^2 + 3.6^2) / 5 = 11.34.
    """
    ref_logprobs = torch.tensor([[-2.0, -1.0, 0.0], [-3.0, -1.0, 7.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    inputs = torch.full((2, 3), -1.0), ref_logprobs, torch.ones(2, 3), torch.tensor([4.0, -2.0]), mask
    options = dict(kl_coef=0.5, gae_lambda=1.0, backend=backend)
    result = ppo_advantages(*inputs, center=False, scale=False, **options)
    assert result.kl.tolist() == [[1, 0, -1], [2, 0, 0]]
    assert result.rewards.tolist() == [[-0.5, 0, 4.5], [-1, -2, 0]]
    assert result.returns.tolist() == [[4, 4.5, 4.5], [-3, -2, 0]]
    assert result.advantages.tolist() == [[3, 3.5, 3.5], [-4, -3, 0]]
    want = dict(
        tokens=5, sequences=2, kl_mean=0.4, kl_sum_mean=1, reward_sum_mean=0.5, score_mean=1, value_mean=1,
        return_mean=1.6, return_variance=11.34, advantage_mean=0.6, advantage_std=11.34**0.5, explained_variance=0,
    )  # fmt: skip
    for name, value in want.items():
        assert getattr(result.stats, name).item() == pytest.approx(value, abs=1e-6), name
    centered = ppo_advantages(*inputs, scale=False, **options).advantages
    scaled = ppo_advantages(*inputs, center=False, **options).advantages
    both = ppo_advantages(*inputs, **options).advantages
    torch.testing.assert_close(centered, torch.where(mask, result.advantages - 0.6, 0))
    torch.testing.assert_close(scaled, result.advantages / 11.34**0.5)
    torch.testing.assert_close(both, centered / 11.34**0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_estimators_in_closed_form(backend):
    """pitfall 21: k1, k2, k3 by name, in the reward, in the statistics (unclipped) and in `kl` (clipped)."""
    k1 = torch.tensor([[0.0, 0.5, -0.5, 2.0, -2.0, 1e-3]])
    mask = torch.ones(1, 6, dtype=torch.bool)
    want = {"k1": k1, "k2": k1**2 / 2, "k3": (torch.expm1(-k1.double()) + k1.double()).float()}
    for name, kl in want.items():
        run = dict(kl_estimator=name, kl_coef=0.25, backend=backend)
        result = ppo_advantages(k1, torch.zeros_like(k1), torch.zeros_like(k1), torch.zeros(1), mask, **run)
        torch.testing.assert_close(result.kl, kl, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(result.rewards, -0.25 * kl)
        clipped = ppo_advantages(k1, torch.zeros(1, 6), torch.zeros(1, 6), torch.zeros(1), mask, kl_clip=0.4, **run)
        torch.testing.assert_close(clipped.kl, kl.clamp(-0.4, 0.4), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(clipped.rewards, -0.25 * clipped.kl)
        torch.testing.assert_close(clipped.stats.kl_mean, kl.mean())
        torch.testing.assert_close(clipped.stats.kl_sum_mean, kl.sum())


@pytest.mark.parametrize("steps", [1, 2, 3, 31, 32, 33, 1023])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_matches_float64(steps, estimator):
    """T28: every output and statistic, lengths around a tile."""
    inputs = case(19, steps)
    options = dict(kl_estimator=estimator, kl_clip=1.5, score_clip=0.7, gamma=0.98, kl_coef=0.2)
    actual = ppo_advantages(*inputs, backend=NATIVE, **options)
    eager = ppo_advantages(*inputs, backend="reference", **options)
    truth = ppo_advantages(*doubled(inputs), **options)
    for name in NAMES:
        assert getattr(truth, name).dtype == torch.float64
        assert_as_accurate(getattr(actual, name), getattr(eager, name), getattr(truth, name), name)
    for name, a, t in zip(truth.stats._fields, actual.stats, truth.stats, strict=True):
        torch.testing.assert_close(a, t, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_gae_of_its_rewards(backend):
    """T38: one definition of GAE: returns and raw advantages are those of `gae` on the shaped rewards."""
    inputs = case(7, 40)
    result = ppo_advantages(*inputs, gamma=0.9, gae_lambda=0.8, center=False, scale=False, backend=backend)
    want = gae(result.rewards, inputs[2], inputs[4], gamma=0.9, gae_lambda=0.8, backend=backend)
    assert torch.equal(result.advantages, want[0]) and torch.equal(result.returns, want[1])
    whitened = ppo_advantages(*inputs, gamma=0.9, gae_lambda=0.8, backend=backend)
    assert torch.equal(whitened.returns, want[1])  # returns come from unwhitened advantages


@pytest.mark.parametrize("backend", BACKENDS)
def test_score_lands_on_the_last_kept_token(backend):
    """pitfalls 5, 43, T27: full rows, short rows, a hole at the end, one token; 0.0 is a score; no token, no score."""
    mask = torch.ones(5, 20, dtype=torch.bool)
    mask[1, 9:] = False
    mask[2, [3, 18, 19]] = False
    mask[3, 1:] = False
    mask[4] = False
    scores = torch.tensor([1.0, 2.0, 3.0, 0.0, 5.0])
    zeros = torch.zeros(5, 20)
    result = ppo_advantages(zeros, zeros, zeros, scores, mask, backend=backend)
    want = torch.zeros(5, 20)
    want[0, 19], want[1, 8], want[2, 17] = 1, 2, 3
    assert torch.equal(result.rewards, want)
    assert result.stats.score_mean.item() == pytest.approx(1.5)  # of four rows: 0.0 counts, row 4 does not
    clipped = ppo_advantages(zeros, zeros, zeros, scores, mask, score_clip=2.5, backend=backend)
    assert torch.equal(clipped.rewards, want.clamp(max=2.5))
    assert clipped.stats.score_mean.item() == pytest.approx(1.5)


def test_whitening_sanity():
    """pitfalls 12, 13: 1.2, 1.3 .. 2.0 as 3 x 3 has population variance 0.0667, not 0.0750."""
    x = torch.linspace(1.2, 2.0, 9).reshape(3, 3)
    keep = torch.ones(3, 3, dtype=torch.bool)
    n, mean, m2 = moments(x, keep).tolist()
    assert n == 9 and mean == pytest.approx(1.6) and m2 / n == pytest.approx(0.0667, abs=5e-5)
    torch.testing.assert_close(whiten(x, keep, moments(x, keep), True, True), (x - 1.6) / (0.2 / 3) ** 0.5)
    scores, zeros = x.reshape(9), torch.zeros(9, 1)  # through the op: one token per row, its advantage is the score
    for backend in BACKENDS:
        result = ppo_advantages(zeros, zeros, zeros, scores, torch.ones(9, 1, dtype=torch.bool), backend=backend)
        assert result.stats.return_variance.item() == pytest.approx(0.0667, abs=5e-5)
        torch.testing.assert_close(result.advantages[:, 0], (scores - 1.6) / (0.2 / 3) ** 0.5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whitening_of_one_token_and_of_equal_tokens(backend):
    """T25, pitfall 13: one kept token, or no variance, gives finite numbers (0 when centred)."""
    for rows in (1, 64):
        zeros, scores = torch.zeros(rows, 1), torch.full((rows,), 0.1)
        result = ppo_advantages(zeros, zeros, zeros, scores, torch.ones(rows, 1, dtype=torch.bool), backend=backend)
        assert result.advantages.abs().max() < 1e-3
        assert result.stats.advantage_std.item() < 1e-6 and result.stats.explained_variance.item() == 0
        kept = torch.ones(rows, 1, dtype=torch.bool)
        scaled = ppo_advantages(zeros, zeros, zeros, scores, kept, center=False, backend=backend)
        assert scaled.advantages.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_positions_may_hold_anything(backend, poison):
    """T20, pitfalls 9, 10, 38, 39: poison where the mask drops changes nothing; dropped slots of outputs are 0."""
    logprobs, ref_logprobs, values, scores, mask = case(6, 33)
    clean = ppo_advantages(logprobs, ref_logprobs, values, scores, mask, kl_estimator="k3", backend=backend)
    logprobs[~mask] = ref_logprobs[~mask] = values[~mask] = scores[2] = poison
    result = ppo_advantages(logprobs, ref_logprobs, values, scores, mask, kl_estimator="k3", backend=backend)
    for name in NAMES:
        assert torch.equal(getattr(result, name), getattr(clean, name)), name
        assert (getattr(result, name)[~mask] == 0).all(), name
    assert torch.equal(torch.stack(result.stats), torch.stack(clean.stats))
    nothing = ppo_advantages(logprobs, ref_logprobs, values, scores, mask & False, backend=backend)
    assert all((getattr(nothing, name) == 0).all() for name in NAMES)
    assert (torch.stack(nothing.stats) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_kept_slot_is_seen(backend):
    for which in range(4):
        inputs = list(case(5, 20))
        inputs[4][:] = True
        inputs[which].view(-1)[3] = torch.nan
        result = ppo_advantages(*inputs, backend=backend)
        assert result.advantages.isnan().all() and result.stats.advantage_std.isnan()  # through the mean


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k1", [-200.0, -20.0, 0.0, 20.0, 200.0])
def test_extreme_log_ratios(backend, k1):
    """T19: k3's exponent is bounded, so it is finite and never negative; kl_clip bounds what enters the reward."""
    logprobs = torch.full((2, 20), k1)
    zeros, mask = torch.zeros(2, 20), torch.ones(2, 20, dtype=torch.bool)
    for estimator in ("k1", "k2", "k3"):
        result = ppo_advantages(
            logprobs, zeros, zeros, zeros[:, 0], mask, kl_estimator=estimator, kl_clip=10.0, backend=backend
        )
        assert all(torch.isfinite(t).all() for t in (*result[:4], *result.stats))
        assert result.kl.abs().max() <= 10
        assert estimator == "k1" or result.stats.kl_mean >= 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_dtypes(dtype):
    """T21: slices and transposes give the contiguous result; results are float32."""
    inputs = case(6, 37, dtype)
    want = ppo_advantages(*inputs, backend=NATIVE)
    assert all(t.dtype == torch.float32 for t in (*want[:4], *want.stats))
    scores = torch.stack([inputs[3], inputs[3]], 1)[:, 0]  # a strided column
    variants = [list(strided_variants(t)) for t in (*inputs[:3], inputs[4])]
    for (name, logprobs), (_, ref), (_, values), (_, mask) in zip(*variants, strict=True):
        got = ppo_advantages(logprobs, ref, values, scores, mask, backend=NATIVE)
        for field in NAMES:
            assert torch.equal(getattr(got, field), getattr(want, field)), (name, field)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_empty(shape, backend):
    empty = torch.empty(shape)
    result = ppo_advantages(empty, empty, empty, torch.ones(shape[0]), empty.bool(), backend=backend)
    assert all(getattr(result, name).shape == shape for name in NAMES)
    assert (torch.stack(result.stats) == 0).all()


def test_repeatable_on_any_number_of_threads():
    """T15, pitfall 44: same bits on every run and thread count; unwhitened rows do not depend on the batch."""
    inputs = case(77, 900)
    threads = torch.get_num_threads()
    want = ppo_advantages(*inputs, kl_estimator="k3", backend=NATIVE)
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        again = ppo_advantages(*inputs, kl_estimator="k3", backend=NATIVE)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip((*want[:4], *want.stats), (*again[:4], *again.stats), strict=True))
    alone = ppo_advantages(*(t[20:21] for t in inputs), kl_estimator="k3", backend=NATIVE)
    for name in ("returns", "rewards", "kl"):
        assert torch.equal(getattr(alone, name), getattr(want, name)[20:21])


def test_inputs_are_left_alone_and_get_no_gradient():
    """T36: nothing holds a graph, so nothing is kept alive across batches."""
    inputs = case(5, 20)
    copies = [t.clone() for t in inputs]
    inputs[0].requires_grad_(), inputs[2].requires_grad_()
    result = ppo_advantages(*inputs, backend=NATIVE)
    assert not any(t.requires_grad for t in (*result[:4], *result.stats))
    assert all(torch.equal(now.detach(), before) for now, before in zip(inputs, copies, strict=True))


TWO_RANKS = """
import json, sys, torch, torch.distributed as dist
from fastrl.ops import ppo_advantages
rank, path = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
g = torch.Generator().manual_seed(0)
logprobs, ref, values = torch.randn(3, 7, 30, generator=g).unbind()
scores, mask = torch.randn(7, generator=g), torch.rand(7, 30, generator=g) > 0.3
rows = slice(0, 5) if rank == 0 else slice(5, 7)
results = []
for keep in (mask, mask & (torch.arange(7) < 5)[:, None]):  # then a rank with nothing kept
    inputs = [t[rows] for t in (logprobs, ref, values, scores, keep)]
    for backend in ("reference", "cpu"):
        for center, scale in ((True, True), (False, True)):
            part = ppo_advantages(*inputs, center=center, scale=scale, process_group=dist.group.WORLD, backend=backend)
            whole = ppo_advantages(logprobs, ref, values, scores, keep, center=center, scale=scale, backend=backend)
            results.append((part.advantages - whole.advantages[rows]).abs().max().item())
            results.append((part.returns - whole.returns[rows]).abs().max().item())
print(json.dumps(results))
dist.destroy_process_group()
"""


@pytest.mark.ranks
def test_two_ranks_equal_one(tmp_path):
    """T26, pitfall 14: mean and variance over all ranks; a rank with nothing kept takes part."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p or os.getcwd() for p in sys.path))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path / "store")],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in ranks:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        differences = json.loads(output.splitlines()[-1])
        assert len(differences) == 16 and max(differences) < 1e-5


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    """T32: fullgraph=True, equal to eager."""

    def run(*inputs):
        result = ppo_advantages(*inputs, kl_estimator="k3", kl_clip=5.0, backend=NATIVE)
        return *result[:4], *result.stats

    inputs = case(5, 20)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs), run(*inputs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.slow
def test_opcheck():
    outputs = [torch.empty(3, 9) for _ in range(4)] + [torch.empty(3, dtype=torch.float64), torch.empty(12)]
    args = (NATIVE, *case(3, 9), 0.05, 3, 10.0, float("inf"), 1.0, 0.95, True, True, *outputs)
    torch.library.opcheck(torch.ops.fastrl.ppo_advantages.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    names = ["logprobs", "ref_logprobs", "values", "scores", "mask"]
    good = dict(zip(names, case(3, 4), strict=True))
    bad = [
        (dict(logprobs=good["logprobs"][0]), "logprobs"),
        (dict(logprobs=good["logprobs"].long()), "logprobs"),
        (dict(ref_logprobs=good["ref_logprobs"][:, :3]), "ref_logprobs"),
        (dict(values=good["values"].long()), "values"),
        (dict(values=good["values"].to("meta")), "values"),
        (dict(scores=good["values"]), "scores"),
        (dict(scores=good["scores"].long()), "scores"),
        (dict(mask=good["mask"].float()), "mask"),
        (dict(mask=good["mask"][:2]), "mask"),
        (dict(kl_coef=-0.1), "kl_coef"),
        (dict(kl_estimator="k4"), "kl_estimator"),
        (dict(kl_clip=0.0), "kl_clip"),
        (dict(score_clip=-1.0), "score_clip"),
        (dict(gamma=1.01), "gamma"),
        (dict(gae_lambda=-0.01), "gae_lambda"),
    ]
    for change, argument in bad:
        with pytest.raises(ValueError, match=f"ppo_advantages: {argument}: expected .*, got"):
            ppo_advantages(**{**good, **change}, backend=backend)
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        ppo_advantages(**good, kl_estimator="kl", backend=backend)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_properties(rows, steps, seed, gamma, gae_lambda):
    """Centred advantages have masked mean 0, scaled ones variance 1; k3 >= 0; rows commute with the batch."""
    inputs = case(rows, steps, seed=seed)
    mask = inputs[4]
    options = dict(gamma=gamma, gae_lambda=gae_lambda, kl_estimator="k3", backend=NATIVE)
    result = ppo_advantages(*inputs, **options)
    assert (result.kl >= 0).all()
    if mask.any():
        kept = result.advantages[mask].double()
        assert abs(kept.mean()) < 1e-4
        spread = result.stats.advantage_std.item()
        if spread > 1e-2:
            assert abs((kept**2).mean() - 1) < 1e-3
    order = torch.randperm(rows)
    shuffled = ppo_advantages(*(t[order] for t in inputs), **options)
    assert torch.equal(shuffled.returns, result.returns[order])
    torch.testing.assert_close(shuffled.advantages, result.advantages[order], rtol=1e-4, atol=1e-4)
