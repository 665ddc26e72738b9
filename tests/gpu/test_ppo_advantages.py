"""ppo_advantages' GPU kernels against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from gpus import HAS_GPU
from oracle import assert_as_accurate

from fastrl.ops import gae, ppo_advantages

NAMES = ["advantages", "returns", "rewards", "kl"]


def case(rows, steps, device, seed=0):
    """logprobs, ref_logprobs, values, scores, mask; rows of every kind of mask."""
    g = torch.Generator().manual_seed(seed)
    logprobs, ref_logprobs, values = torch.randn(3, rows, steps, generator=g).unbind()
    mask = torch.rand(rows, steps, generator=g) > 0.3
    mask[1:2] = True
    mask[2:3] = False
    mask[3:4, steps // 2 :] = False
    mask[4:5, -1:] = False
    tensors = logprobs, ref_logprobs, values, torch.randn(rows, generator=g), mask
    return [t.to(device) for t in tensors]


def doubled(inputs):
    return [t.double() if t.is_floating_point() else t for t in inputs]


def check(gpu_backend, inputs, **options):
    actual = ppo_advantages(*inputs, backend=gpu_backend, **options)
    eager = ppo_advantages(*inputs, backend="reference", **options)
    truth = ppo_advantages(*doubled(inputs), backend="reference", **options)
    for name in NAMES:
        assert_as_accurate(getattr(actual, name), getattr(eager, name), getattr(truth, name), name)
    for name, a, t in zip(truth.stats._fields, actual.stats, truth.stats, strict=True):
        torch.testing.assert_close(a, t, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# The estimator is of one token, so that one length shows it.
CASES = [*((steps, "k3") for steps in (1, 2, 3, 4, 5, 31, 32, 33, 100, 129)), (33, "k1"), (33, "k2")]


@pytest.mark.parametrize(("steps", "estimator"), CASES)
def test_matches_float64(gpu_backend, device, steps, estimator):
    """T28: every output and statistic, lengths around a lane, a warp and a block."""
    inputs = case(19, steps, device)
    check(gpu_backend, inputs, kl_estimator=estimator, kl_clip=1.5, score_clip=0.7, gamma=0.98, kl_coef=0.2)


@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize(("center", "scale"), [(True, True), (True, False), (False, True), (False, False)])
def test_whitening(gpu_backend, device, rows, center, scale):
    """pitfall 12: either part of whitening, both or none."""
    check(gpu_backend, case(rows, 23, device), center=center, scale=scale)


@pytest.mark.parametrize(("rows", "steps"), [(5, 1023), (3, 4097), (2, 2048)])
def test_long_rows(gpu_backend, device, rows, steps):
    """Rows of more than one chunk: state, last kept token and statistics carry over."""
    inputs = case(rows, steps, device)
    inputs[4][0, steps // 4 :] = False  # the last chunks keep nothing
    check(gpu_backend, inputs, gamma=0.99)


@pytest.mark.slow
def test_many_rows(gpu_backend, device):
    """More rows than are summed at once."""
    check(gpu_backend, case(300, 9, device))


def test_is_gae_of_its_rewards(gpu_backend, device):
    """T38: one definition of GAE."""
    inputs = case(7, 140, device)
    result = ppo_advantages(*inputs, gamma=0.9, gae_lambda=0.8, center=False, scale=False, backend=gpu_backend)
    want = gae(result.rewards, inputs[2], inputs[4], gamma=0.9, gae_lambda=0.8, backend="reference")
    torch.testing.assert_close(result.advantages, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.returns, want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [20, 300])
def test_score_lands_on_the_last_kept_token(gpu_backend, device, steps):
    """pitfalls 5, 43, T27: full rows, short rows, a hole at the end, one token; 0.0 is a score; no token, no score."""
    mask = torch.ones(5, steps, dtype=torch.bool, device=device)
    mask[1, 9:] = False
    mask[2, [3, steps - 2, steps - 1]] = False
    mask[3, 1:] = False
    mask[4] = False
    scores = torch.tensor([1.0, 2.0, 3.0, 0.0, 5.0], device=device)
    zeros = torch.zeros(5, steps, device=device)
    result = ppo_advantages(zeros, zeros, zeros, scores, mask, backend=gpu_backend)
    want = torch.zeros(5, steps, device=device)
    want[0, -1], want[1, 8], want[2, -3] = 1, 2, 3
    assert torch.equal(result.rewards, want)
    assert result.stats.score_mean.item() == pytest.approx(1.5)  # of four rows: 0.0 counts, row 4 does not
    clipped = ppo_advantages(zeros, zeros, zeros, scores, mask, score_clip=2.5, backend=gpu_backend)
    assert torch.equal(clipped.rewards, want.clamp(max=2.5))


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("steps", [1, 77, 200])
def test_whitening_of_one_token_and_of_equal_tokens(gpu_backend, device, rows, steps):
    """T25, pitfall 13: one kept token in all, or no variance, gives finite numbers (0 when centred)."""
    zeros, scores = torch.zeros(rows, steps, device=device), torch.full((rows,), 0.1, device=device)
    for mask in (zeros == 0, torch.zeros_like(zeros, dtype=torch.bool).index_fill(1, zeros.new_zeros(1).long(), True)):
        inputs = zeros, zeros, zeros, scores, mask
        result = ppo_advantages(*inputs, gae_lambda=1.0, backend=gpu_backend)
        assert result.advantages.abs().max() < 1e-6
        assert result.stats.advantage_std.item() < 1e-6
        scaled = ppo_advantages(*inputs, gae_lambda=1.0, center=False, backend=gpu_backend)
        assert scaled.advantages.isfinite().all()


@pytest.mark.parametrize("steps", [6, 33, 200])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_positions_may_hold_anything(gpu_backend, device, steps, poison):
    """T20, pitfalls 9, 10, 38, 39: poison where the mask drops changes nothing; dropped slots of outputs are 0."""
    logprobs, ref_logprobs, values, scores, mask = case(6, steps, device)
    clean = ppo_advantages(logprobs, ref_logprobs, values, scores, mask, kl_estimator="k3", backend=gpu_backend)
    logprobs[~mask] = ref_logprobs[~mask] = values[~mask] = scores[2] = poison
    result = ppo_advantages(logprobs, ref_logprobs, values, scores, mask, kl_estimator="k3", backend=gpu_backend)
    for name in NAMES:
        assert torch.equal(getattr(result, name), getattr(clean, name)), name
        assert (getattr(result, name)[~mask] == 0).all(), name
    assert torch.equal(torch.stack(result.stats), torch.stack(clean.stats))
    nothing = ppo_advantages(logprobs, ref_logprobs, values, scores, mask & False, backend=gpu_backend)
    assert all((getattr(nothing, name) == 0).all() for name in NAMES)
    assert (torch.stack(nothing.stats) == 0).all()


def test_nan_in_a_kept_slot_is_seen(gpu_backend, device):
    for which in range(4):
        inputs = case(5, 20, device)
        inputs[4][:] = True
        inputs[which].view(-1)[3] = torch.nan
        result = ppo_advantages(*inputs, backend=gpu_backend)
        assert result.advantages.isnan().all() and result.stats.advantage_std.isnan()  # through the mean


@pytest.mark.parametrize("k1", [-200.0, -20.0, 0.0, 20.0, 200.0])
def test_extreme_log_ratios(gpu_backend, device, k1):
    """T19: k3's exponent is bounded, so it is finite and never negative; kl_clip bounds what enters the reward."""
    logprobs = torch.full((2, 20), k1, device=device)
    zeros = torch.zeros_like(logprobs)
    for estimator in ("k1", "k2", "k3"):
        options = dict(kl_estimator=estimator, kl_clip=10.0)
        inputs = logprobs, zeros, zeros, zeros[:, 0], zeros == 0
        result = ppo_advantages(*inputs, backend=gpu_backend, **options)
        assert all(torch.isfinite(t).all() for t in (*result[:4], *result.stats))
        assert result.kl.abs().max() <= 10
        want = ppo_advantages(*doubled(inputs), backend="reference", **options)
        torch.testing.assert_close(torch.stack(result.stats[:9]), torch.stack(want.stats[:9]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [7, 8, 300])
def test_repeatable(gpu_backend, device, steps):
    """T15, pitfall 44: same bits on every run; unwhitened rows do not depend on the batch, nor on alignment (T10)."""
    inputs = case(9, steps, device)
    want = ppo_advantages(*inputs, kl_estimator="k3", backend=gpu_backend)
    again = ppo_advantages(*inputs, kl_estimator="k3", backend=gpu_backend)
    assert all(torch.equal(a, b) for a, b in zip((*want[:4], *want.stats), (*again[:4], *again.stats), strict=True))
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t) for t in inputs]
    alone = ppo_advantages(*(t[5:6] for t in shifted), kl_estimator="k3", backend=gpu_backend)
    for name in ("returns", "rewards", "kl"):
        assert torch.equal(getattr(alone, name), getattr(want, name)[5:6])


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_empty(gpu_backend, device, shape):
    empty = torch.empty(shape, device=device)
    result = ppo_advantages(empty, empty, empty, torch.ones(shape[0], device=device), empty.bool(), backend=gpu_backend)
    assert all(getattr(result, name).shape == shape for name in NAMES)
    assert (torch.stack(result.stats) == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize(("rows", "steps"), [(70_000, 5), (512, 2048), (8192, 301)])
def test_large(gpu_backend, device, rows, steps):
    """T12: more rows than a grid's second dimension allows, many parts of statistics."""
    inputs = case(rows, steps, device)
    got = ppo_advantages(*inputs, kl_estimator="k3", backend=gpu_backend)
    want = ppo_advantages(*(t.cpu() for t in doubled(inputs)), kl_estimator="k3", backend="reference")
    for name in NAMES:
        torch.testing.assert_close(getattr(got, name).cpu().double(), getattr(want, name), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(got.stats).cpu(), torch.stack(want.stats), rtol=1e-4, atol=1e-4)
