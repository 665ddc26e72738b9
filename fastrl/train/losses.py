"""The losses of the SFT and reward loops over batches, of a model or of the module around one."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from fastrl.data.batches import RankingBatch, SFTBatch
from fastrl.models import as_policy, last_token_scores
from fastrl.ops import ranking_loss


def sft_loss(policy: nn.Module, batch: SFTBatch, *, denominator: int) -> Tensor:
    """Sum of -log p(token) over the supervised tokens, divided by `denominator`.

    Pass the supervised tokens of the whole optimizer step, so that micro-batches add up to the
    full batch's loss and gradient exactly.
    """
    mask = batch.loss_mask[:, 1:]
    return cast(Tensor, as_policy(policy)(batch.input_ids, batch.attention_mask, mask, denominator=denominator))


def sft_logprobs(policy: nn.Module, batch: SFTBatch, *, return_top1: bool = False) -> Any:
    """(B, T-1) log-probability of each next token, 0 where it is not supervised; with `return_top1` also whether it is
    supervised and the likeliest.
    """
    mask = batch.loss_mask[:, 1:]
    return as_policy(policy)(batch.input_ids, batch.attention_mask, mask, return_top1=return_top1)


def reward_loss(scorer: nn.Module, batch: RankingBatch, *, center_coef: float = 0.0) -> tuple[Tensor, Tensor]:
    """K-wise ranking loss of the batch, a mean over its prompts; also the (N,) detached scores."""
    scores = last_token_scores(scorer, batch.input_ids, batch.attention_mask)
    loss, _ = ranking_loss(scores, batch.group_ids, batch.ranks, margins=batch.margins, center_coef=center_coef)
    return loss, scores.detach()
