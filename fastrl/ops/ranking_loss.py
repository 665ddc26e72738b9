"""Reward-model loss over ranked answers: pairwise and K-wise."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastrl.checks import (
    FLOAT_DTYPES,
    check,
    check_data,
    check_device,
    check_float,
    check_ids,
    check_non_negative,
    check_plain,
    check_shape,
)
from fastrl.masked import compute_dtype
from fastrl.ops.autograd import differentiable_once
from fastrl.ops.backend import choose_for
from fastrl.ops.native import _C, as_data, native_op, threads_for
from fastrl.ops.scale_gradient import scale_gradient
from fastrl.reference import ranking_loss as reference

OP = "ranking_loss"


class RankingStats(NamedTuple):
    """Float32 0-d tensors on the inputs' device, detached; 0 where there is nothing to average."""

    accuracy: torch.Tensor  # share of pairs whose better answer scores higher; equal scores count half
    pairs: torch.Tensor  # number of pairs
    groups: torch.Tensor  # number of groups that have a pair
    margin_mean: torch.Tensor  # mean over pairs of the score difference, better less worse
    score_mean: torch.Tensor  # over all answers
    score_std: torch.Tensor  # population standard deviation over all answers


def ranking_loss(
    scores: torch.Tensor,
    group_ids: torch.Tensor,
    ranks: torch.Tensor,
    *,
    margins: torch.Tensor | None = None,
    center_coef: float = 0.0,
    backend: str | None = None,
) -> tuple[torch.Tensor, RankingStats]:
    """Bradley-Terry loss over every ordered pair of every group (InstructGPT's K-wise loss).

        pair (i, j): same group, ranks_i < ranks_j (i is better)
        l_ij = -log sigmoid(s_i - s_j - margins_i) + center_coef * (s_i + s_j)^2
        loss = mean over groups that have a pair of the mean of l_ij over the group's pairs

    Two answers per group give the usual ``-F.logsigmoid(chosen - rejected - margin).mean()``.

    Args:
        scores: (N,) float32, bfloat16 or float16 (float64 runs on `reference`); differentiable.
        group_ids: (N,) int64 or int32, any numbers in any order; answers to one prompt share one.
        ranks: (N,) integer or float, not NaN; lower is better, equal ranks form no pair. On a GPU a NaN makes the
            loss NaN instead, without a host sync, and raises with FASTRL_DEBUG=1.
        margins: (N,) float, what answer i must beat each worse answer of its group by; a pair's margin m goes to the
            chosen answer's slot. None = 0. No gradient flows into it.
        center_coef: >= 0, pulls the scores of each pair towards a sum of 0 (TRL's center_rewards_coefficient).
        backend: None chooses; else reference or cpu. On a GPU it is `reference`: a handful of torch's own kernels over
            the N x N pairs, of which there are few beside the model that gave the scores.
    Returns:
        (loss, RankingStats): loss is a 0-d float32 tensor (float64 if an input is); 0 with zero gradient if no group
        has a pair.
    Raises:
        ValueError: shape, dtype, device or value does not fit.
    Numerics: float32; log sigmoid is exact to rounding for differences of any size.
    Source: Ouyang et al. 2022, arXiv:2203.02155, equation 1; margins: Touvron et al. 2023, arXiv:2307.09288.
    """
    _check(scores, group_ids, ranks, margins, center_coef)
    dtype = compute_dtype(scores, margins)
    backend = choose_for(OP, scores.device, dtype, backend)
    scores, margins = (
        scores.to(dtype).contiguous(),
        None if margins is None else as_data(margins, dtype),
    )
    if backend == "reference":
        loss, stats = reference.ranking_loss(scores, group_ids, ranks, margins, center_coef)
    else:
        group_ids, ranks = group_ids.long().contiguous(), ranks.double().contiguous()
        loss, stats = _RankingLoss.apply(scores, group_ids, ranks, margins, float(center_coef), backend)
    return loss, RankingStats(*stats.unbind())


def _check(scores, group_ids, ranks, margins, center_coef):
    check_float(OP, "scores", scores)
    check(scores.ndim == 1, OP, "scores", "shape (N,)", tuple(scores.shape))
    check_ids(OP, "group_ids", group_ids, scores.shape, scores)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    check_plain(OP, "ranks", ranks)
    check(ranks.dtype in (*integers, *FLOAT_DTYPES), OP, "ranks", "integer or float", ranks.dtype)
    check_shape(OP, "ranks", ranks, scores.shape)
    check_device(OP, "ranks", ranks, scores)
    if margins is not None:
        check_data(OP, "margins", margins, scores.shape, scores)
    check_non_negative(OP, "center_coef", center_coef)


class _RankingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, group_ids, ranks, margins, center_coef, backend):
        loss, stats = scores.new_empty(()), scores.new_empty(len(RankingStats._fields))
        dscores = torch.empty_like(scores)
        _loss(backend, scores, group_ids, ranks, margins, center_coef, loss, stats, dscores)
        ctx.save_for_backward(dscores)
        ctx.inputs, ctx.backend = (scores,), backend
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @differentiable_once(OP)
    def backward(ctx, dloss, _):
        (dscores,) = ctx.saved_tensors
        return scale_gradient(ctx.backend, dscores, dloss), None, None, None, None, None


def _loss_cpu(scores, *rest):
    size = scores.numel()
    _C.ranking_loss(size, scores, *rest, threads_for(size))


_loss = native_op(
    "ranking_loss",
    "Tensor scores, Tensor group_ids, Tensor ranks, Tensor? margins, float center_coef, Tensor(a!) loss, "
    "Tensor(b!) stats, Tensor(c!) dscores",
    {"cpu": _loss_cpu},
)
