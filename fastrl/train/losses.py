"""The losses of the SFT and reward loops over batches."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from fastrl.data.batches import RankingBatch, SFTBatch
from fastrl.models import final_hidden, last_token_scores
from fastrl.models.heads import lm_head
from fastrl.ops import linear_cross_entropy, linear_logprobs, ranking_loss


def sft_loss(model: nn.Module, batch: SFTBatch, *, denominator: int) -> Tensor:
    """Sum of -log p(token) over the supervised tokens, divided by `denominator`.

    Pass the supervised tokens of the whole optimizer step, so that micro-batches add up to the
    full batch's loss and gradient exactly.
    """
    head = lm_head(model)
    hidden = final_hidden(model, batch.input_ids, batch.attention_mask)[:, :-1]  # (B, T-1, H)
    return linear_cross_entropy(
        hidden,
        head.weight,
        batch.input_ids[:, 1:],
        mask=batch.loss_mask[:, 1:],
        denominator=denominator,
        **head.options(),
    )


def sft_logprobs(model: nn.Module, batch: SFTBatch) -> Tensor:
    """(B, T-1) log-probability of each next token, 0 where it is not supervised."""
    head = lm_head(model)
    hidden = final_hidden(model, batch.input_ids, batch.attention_mask)[:, :-1]
    logprobs = linear_logprobs(
        hidden,
        head.weight,
        batch.input_ids[:, 1:],
        mask=batch.loss_mask[:, 1:],
        **head.options(),
    )
    return cast(Tensor, logprobs)


def reward_loss(model: nn.Module, batch: RankingBatch, *, center_coef: float = 0.0) -> tuple[Tensor, Tensor]:
    """K-wise ranking loss of the batch, a mean over its prompts; also the (N,) detached scores."""
    scores = last_token_scores(model, batch.input_ids, batch.attention_mask)
    loss, _ = ranking_loss(scores, batch.group_ids, batch.ranks, margins=batch.margins, center_coef=center_coef)
    return loss, scores.detach()
