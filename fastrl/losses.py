"""Batches of examples and preferences, and the losses of the SFT and reward loops over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from fastrl.data import Example, Preference, pad
from fastrl.heads import lm_head
from fastrl.models import final_hidden, last_token_scores
from fastrl.ops import linear_cross_entropy, linear_logprobs, ranking_loss

Item = TypeVar("Item")


class SFTBatch(NamedTuple):
    """Right-padded sequences; `loss_mask[b, t]` says that token t is a target that counts."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T) bool
    loss_mask: Tensor  # (B, T) bool


class RankingBatch(NamedTuple):
    """Prompt + response sequences, right-padded; all responses of a prompt share its group id."""

    input_ids: Tensor  # (N, T)
    attention_mask: Tensor  # (N, T) bool
    group_ids: Tensor  # (N,)
    ranks: Tensor  # (N,) lower is better
    margins: Tensor  # (N,) margin of the row's prompt


def sft_batch(examples: Sequence[Example], pad_id: int, device: str | torch.device = "cpu") -> SFTBatch:
    """Pad examples into one batch."""
    input_ids, attention_mask = pad([e.input_ids for e in examples], pad_id, side="right")
    loss_mask, _ = pad([[int(m) for m in e.loss_mask] for e in examples], 0, side="right")
    return SFTBatch(input_ids.to(device), attention_mask.to(device), loss_mask.bool().to(device))


def ranking_batch(preferences: Sequence[Preference], pad_id: int, device: str | torch.device = "cpu") -> RankingBatch:
    """Every response of every prompt as one row."""
    rows = [[*p.prompt_ids, *response] for p in preferences for response in p.responses]
    input_ids, attention_mask = pad(rows, pad_id, side="right")
    counts = torch.tensor([len(p.responses) for p in preferences])
    group_ids = torch.arange(len(preferences)).repeat_interleave(counts)
    ranks = torch.tensor([rank for p in preferences for rank in p.ranks])
    margins = torch.tensor([p.margin for p in preferences], dtype=torch.float32)[group_ids]
    return RankingBatch(*(x.to(device) for x in (input_ids, attention_mask, group_ids, ranks, margins)))


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive slices of at most `size` items."""
    if size < 1:
        raise ValueError(f"micro_batch_size: expected at least 1, got {size}")
    return (items[start : start + size] for start in range(0, len(items), size))


def supervised_tokens(examples: Sequence[Example]) -> int:
    """Number of targets: kept tokens other than the first, which nothing predicts."""
    return sum(sum(e.loss_mask[1:]) for e in examples)


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
