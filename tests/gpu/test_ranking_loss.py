"""ranking_loss's GPU kernels against the reference in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from gpus import HAS_GPU
from oracle import assert_as_accurate

from fastrl.ops import ranking_loss


def case(size, groups, device, seed=0):
    """scores, group ids in any order, ranks with ties, margins."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(size, generator=g) * 3
    group_ids = torch.randint(-groups, groups, (size,), generator=g) * 1000
    tensors = scores, group_ids, torch.randint(0, 4, (size,), generator=g), torch.rand(size, generator=g)
    return [t.to(device) for t in tensors]


def gradients(scores, group_ids, ranks, upstream=1.0, **options):
    leaf = scores.detach().clone().requires_grad_()
    loss, stats = ranking_loss(leaf, group_ids, ranks, **options)
    (loss * upstream).backward()
    return loss.detach(), stats, leaf.grad


def test_by_hand(gpu_backend, device):
    """Group 7: ranks 0 < 1 = 1, two pairs with differences 0 and log 3; group -2: one pair, difference -log 3.

    -log sigmoid: log 2, log 4/3, log 4; loss = ((log 2 + log 4/3) / 2 + log 4) / 2. The answer of group 5 has no rival.
    """
    log3 = math.log(3)
    scores = torch.tensor([1.0, 9.0, log3, 1.0, 0.0, 1 - log3], device=device)
    group_ids = torch.tensor([7, 5, -2, 7, -2, 7], dtype=torch.int32, device=device)
    ranks = torch.tensor([0, 0, 5, 1, 2, 1], device=device)
    loss, stats, dscores = gradients(scores, group_ids, ranks, backend=gpu_backend)
    assert loss.item() == pytest.approx(((math.log(2) + math.log(4 / 3)) / 2 + math.log(4)) / 2)
    assert [s.item() for s in stats[:4]] == pytest.approx([0.5, 3, 2, 0], abs=1e-6)
    want = torch.tensor([-3 / 16, 0, 3 / 8, 1 / 8, -3 / 8, 1 / 16], device=device)
    torch.testing.assert_close(dscores, want)


# Around a warp with every number of groups; around a block, which takes longer, with one number each.
CASES = [*itertools.product((1, 2, 3, 31, 33), (1, 5, 60)), (256, 5), (257, 1), (257, 60)]


@pytest.mark.parametrize(("size", "groups"), CASES)
def test_matches_float64(gpu_backend, device, size, groups):
    """K-wise groups of any size in any order, ties, margins, centring, any upstream; one block and several."""
    scores, group_ids, ranks, margins = case(size, groups, device)
    for options in ({}, dict(margins=margins, center_coef=0.1)):
        actual = gradients(scores, group_ids, ranks, upstream=-1.7, backend=gpu_backend, **options)
        eager = gradients(scores, group_ids, ranks, upstream=-1.7, backend="reference", **options)
        truth = gradients(scores.double(), group_ids, ranks.double(), upstream=-1.7, backend="reference", **options)
        assert_as_accurate(actual[0], eager[0], truth[0], "loss")
        assert_as_accurate(actual[2], eager[2], truth[2], "dscores")
        for name, a, t in zip(truth[1]._fields, actual[1], truth[1], strict=True):
            torch.testing.assert_close(a, t, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_many_answers(gpu_backend, device, monkeypatch):
    """More answers than are summed at once; of one large group and of many small ones."""
    if gpu_backend == "triton":
        monkeypatch.setattr("fastrl.kernels.ranking_loss.TILE", 128)
    for groups in (1, 200):
        scores, group_ids, ranks, margins = case(530, groups, device)
        actual = gradients(scores, group_ids, ranks, margins=margins, backend=gpu_backend)
        eager = gradients(scores, group_ids, ranks, margins=margins, backend="reference")
        truth = gradients(scores.double(), group_ids, ranks, margins=margins, backend="reference")
        assert_as_accurate(actual[0], eager[0], truth[0], "loss")
        assert_as_accurate(actual[2], eager[2], truth[2], "dscores")
        torch.testing.assert_close(torch.stack(actual[1]), torch.stack(truth[1]), rtol=1e-5, atol=1e-5)


def test_extreme_differences(gpu_backend, device):
    """log sigmoid is stable for +-1e4, and keeps its digits where the loss is tiny."""
    ids, ranks = torch.zeros(2, dtype=torch.long, device=device), torch.tensor([0, 1], device=device)
    for difference, want, slope in ((1e4, 0.0, 0.0), (-1e4, 1e4, -1.0), (20.0, 2.0611536e-9, -2.0611536e-9)):
        loss, _, dscores = gradients(torch.tensor([difference, 0.0], device=device), ids, ranks, backend=gpu_backend)
        assert loss.item() == pytest.approx(want, rel=1e-5)
        assert dscores.tolist() == pytest.approx([slope, -slope], rel=1e-5)


@pytest.mark.parametrize("size", [0, 1, 4, 300])
def test_no_pair_at_all(gpu_backend, device, size):
    """pitfall 10: nothing to compare gives loss 0 with zero gradient, not 0 / 0."""
    ids, zeros = torch.arange(size, device=device), torch.zeros(size, dtype=torch.long, device=device)
    for group_ids, ranks in ((ids, ids), (zeros, zeros.float())):
        scores = torch.ones(size, device=device)
        loss, stats, dscores = gradients(scores, group_ids, ranks, center_coef=0.1, backend=gpu_backend)
        assert loss == 0 and (dscores == 0).all() and dscores.shape == (size,)
        assert stats.pairs == 0 and stats.groups == 0 and stats.accuracy == 0


def test_nan_is_seen(gpu_backend, device):
    scores, group_ids, ranks, _ = case(6, 1, device)
    group_ids = torch.tensor([0, 0, 1, 1, 2, 3], device=device)
    ranks = torch.tensor([0, 1, 0, 1, 0, 0], device=device)
    scores[2] = torch.nan
    loss, _, dscores = gradients(scores, group_ids, ranks, backend=gpu_backend)
    assert loss.isnan() and dscores[2:4].isnan().all() and dscores[[0, 1, 4, 5]].isfinite().all()


def test_a_rank_that_is_nan(gpu_backend, device, monkeypatch):
    """The loss is NaN; with FASTRL_DEBUG=1 it is an error."""
    scores, group_ids, ranks, _ = case(9, 1, device)
    ranks = ranks.float()
    ranks[4] = torch.nan
    monkeypatch.delenv("FASTRL_DEBUG", raising=False)
    assert ranking_loss(scores, group_ids, ranks, backend=gpu_backend)[0].isnan()
    monkeypatch.setenv("FASTRL_DEBUG", "1")
    with pytest.raises(ValueError, match="ranking_loss: ranks: expected numbers, got nan"):
        ranking_loss(scores, group_ids, ranks, backend=gpu_backend)


def test_losers_margins_are_not_read(gpu_backend, device):
    scores = torch.tensor([1.0, 0.0], device=device)
    ids, ranks = torch.zeros(2, dtype=torch.long, device=device), torch.tensor([0, 1], device=device)
    margins = torch.tensor([0.5, torch.nan], device=device)
    loss, _, dscores = gradients(scores, ids, ranks, margins=margins, backend=gpu_backend)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5))) and dscores.isfinite().all()


@pytest.mark.parametrize("size", [200, 300])
def test_repeatable(gpu_backend, device, size):
    """T15, pitfall 44: same bits on every run."""
    scores, group_ids, ranks, margins = case(size, 9, device)
    want = gradients(scores, group_ids, ranks, margins=margins, backend=gpu_backend)
    again = gradients(scores, group_ids, ranks, margins=margins, backend=gpu_backend)
    assert torch.equal(want[0], again[0]) and torch.equal(want[2], again[2])
    assert torch.equal(torch.stack(want[1]), torch.stack(again[1]))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_large(gpu_backend, device):
    scores, group_ids, ranks, margins = case(8000, 900, device)
    got = gradients(scores, group_ids, ranks, margins=margins, backend=gpu_backend)
    truth = gradients(scores.double(), group_ids, ranks, margins=margins, backend="reference")
    torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[2].double(), truth[2], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(torch.stack(got[1]), torch.stack(truth[1]), rtol=1e-5, atol=1e-5)
