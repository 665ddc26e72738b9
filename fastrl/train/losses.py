"""The losses of the SFT and reward loops over batches, of a model or of the module around one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastrl.data.batches import RankingBatch, SFTBatch
from fastrl.models import as_policy, as_scorer
from fastrl.ops import RankingStats, ranking_loss


def sft_loss(policy: nn.Module, batch: SFTBatch, *, denominator: int) -> Tensor:
    """Sum of -log p(token) over the supervised tokens, divided by `denominator`.

    Pass the supervised tokens of the whole optimizer step, so that micro-batches add up to the
    full batch's loss and gradient exactly.
    """
    return cast(Tensor, _forward(policy, batch, denominator=denominator))


def sft_logprobs(policy: nn.Module, batch: SFTBatch, *, return_top1: bool = False) -> Any:
    """(B, T-1) log-probability of each next token, 0 where it is not supervised; with `return_top1` also whether it is
    supervised and the likeliest.
    """
    return _forward(policy, batch, return_top1=return_top1)


def _forward(policy: nn.Module, batch: SFTBatch, **options: Any) -> Any:
    return as_policy(policy)(
        batch.input_ids,
        batch.attention_mask,
        batch.loss_mask[:, 1:],
        packed_positions=batch.packed_positions,
        **options,
    )


def reward_loss(scorer: nn.Module, batch: RankingBatch, *, center_coef: float = 0.0) -> tuple[Tensor, Tensor]:
    """K-wise ranking loss of the batch, a mean over its prompts; also the (N, C) detached scores."""
    scores = as_scorer(scorer)(batch.input_ids, batch.attention_mask, last_only=True)
    return rank_scores(scores, batch, center_coef=center_coef)[0], scores.detach()


def rank_scores(scores: Tensor, batch: RankingBatch, *, center_coef: float = 0.0) -> tuple[Tensor, RankingStats]:
    """`ranking_loss` of scores (N, C), one column a criterion: a comparison counts by its criterion's column, one that
    names none by the mean over the columns. Margins and centring are of each column.
    """
    count = scores.shape[1]
    groups = batch.group_ids[:, None] * count + torch.arange(count, device=scores.device)
    ranks, margins = (x.repeat_interleave(count) for x in (batch.ranks, batch.margins))
    own = scores.gather(1, batch.columns).flatten()
    return ranking_loss(own, groups.flatten(), ranks, margins=margins, center_coef=center_coef)
