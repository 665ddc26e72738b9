"""gae's GPU kernels against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from gpus import HAS_GPU
from oracle import assert_as_accurate

from fastrl.ops import gae

STEPS = [1, 2, 3, 4, 5, 17, 31, 32, 33, 100, 128, 129]


def case(rows, steps, device, seed=0):
    """rewards, values, mask with holes, dones, bootstrap values, one lambda per row; rows of every kind of mask."""
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, steps, generator=g).unbind()
    mask = torch.rand(rows, steps, generator=g) > 0.3
    mask[1:2] = False
    mask[2:3] = True
    mask[3:4, steps // 2 :] = False
    mask[4:5, -1:] = False
    dones = torch.rand(rows, steps, generator=g) > 0.9
    tensors = rewards, values, mask, dones, torch.randn(rows, generator=g), torch.rand(rows, generator=g)
    return [t.to(device) for t in tensors]


def check(gpu_backend, rewards, values, mask, **options):
    actual = gae(rewards, values, mask, backend=gpu_backend, **options)
    eager = gae(rewards, values, mask, backend="reference", **options)
    truth = gae(rewards.double(), values, mask, backend="reference", **options)
    for name, a, e, t in zip(["advantages", "returns"], actual, eager, truth, strict=True):
        assert_as_accurate(a, e, t, name)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_matches_float64(gpu_backend, device, rows, steps):
    """T28: lengths around a lane, a warp and a block; mask, dones, bootstrap and lambda per row, or none of them."""
    rewards, values, mask, dones, bootstrap, lambdas = case(rows, steps, device)
    check(gpu_backend, rewards, values, mask, gamma=0.97, gae_lambda=lambdas, dones=dones, bootstrap_value=bootstrap)
    check(gpu_backend, rewards, values, None)


@pytest.mark.parametrize(("rows", "steps"), [(5, 1023), (3, 4097), (2, 2048)])
def test_long_rows(gpu_backend, device, rows, steps):
    """Rows of more than one chunk hand their state on, whatever the mask."""
    rewards, values, mask, dones, bootstrap, _ = case(rows, steps, device)
    check(gpu_backend, rewards, values, mask, gae_lambda=1.0, bootstrap_value=bootstrap)
    check(gpu_backend, rewards, values, mask, gamma=0.99, dones=dones)


@pytest.mark.parametrize("steps", [7, 64, 300])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_holes_equal_the_compacted_row(gpu_backend, device, steps, poison):
    """T20, T27, pitfalls 8, 9: dropped slots may hold anything and hand the right on to the left."""
    rewards, values, mask, dones, bootstrap, _ = case(6, steps, device)
    rewards[~mask] = values[~mask] = poison
    dones[~mask] = True
    bootstrap[1] = poison  # of a row that keeps nothing
    options = dict(gamma=0.9, backend=gpu_backend)
    advantages, returns = gae(rewards, values, mask, dones=dones, bootstrap_value=bootstrap, **options)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    for b in range(6):
        kept = mask[b]
        row = [t[b][kept][None] for t in (rewards, values)]
        options["backend"] = "reference"
        want = gae(*row, dones=dones[b][kept][None], bootstrap_value=bootstrap[b : b + 1], **options)
        torch.testing.assert_close(advantages[b][kept][None], want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(returns[b][kept][None], want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [20, 200])
def test_nan_passes_to_the_left_up_to_a_done(gpu_backend, device, steps):
    rewards, values, *_ = case(3, steps, device)
    dones = torch.zeros(3, steps, dtype=torch.bool, device=device)
    dones[1, 2] = True
    rewards[1, 10] = torch.nan
    advantages, _ = gae(rewards, values, dones=dones, backend=gpu_backend)
    assert advantages[1, 3:11].isnan().all() and advantages[1, 11:].isfinite().all()
    assert advantages[1, :3].isfinite().all() and advantages[[0, 2]].isfinite().all()
    dones[:, -1] = True  # the bootstrap value does not reach past the end
    ended = gae(
        values, values, dones=dones, bootstrap_value=torch.full((3,), torch.nan, device=device), backend=gpu_backend
    )
    assert ended[0].isfinite().all()


@pytest.mark.parametrize("steps", [6, 8, 300])
def test_rows_do_not_depend_on_the_batch(gpu_backend, device, steps):
    """T15, pitfall 44: same bits on every run, alone or in a batch, at any alignment (T10)."""
    rewards, values, mask, *_ = case(9, steps, device)
    want = gae(rewards, values, mask, backend=gpu_backend)
    again = gae(rewards, values, mask, backend=gpu_backend)
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t) for t in (rewards, values, mask)]
    alone = gae(*(t[5:6] for t in shifted), backend=gpu_backend)
    for w, a, one in zip(want, again, alone, strict=True):
        assert torch.equal(w, a) and torch.equal(w[5:6], one)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_empty(gpu_backend, device, shape):
    empty = torch.empty(shape, device=device)
    for result in gae(
        empty, empty, empty.bool(), bootstrap_value=torch.ones(shape[0], device=device), backend=gpu_backend
    ):
        assert result.shape == shape


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize(("rows", "steps"), [(70_000, 3), (512, 2048), (4, 100_003)])
def test_large(gpu_backend, device, rows, steps):
    """T12: more rows than a grid's second dimension allows; long rows. The reference runs in float64 on the CPU."""
    rewards, values, mask, *_ = case(rows, steps, device)
    got = gae(rewards, values, mask, backend=gpu_backend)
    want = gae(rewards.cpu().double(), values.cpu(), mask.cpu(), backend="reference")
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.cpu().double(), w, rtol=1e-4, atol=1e-4)
