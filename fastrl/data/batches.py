"""Items in batches: shuffled order, padding, micro-batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastrl.data.criteria import criterion_columns
from fastrl.data.load import Example, Preference

Item = TypeVar("Item")


def shuffled_batches(count: int, batch_size: int, *, seed: int, epoch: int) -> Iterator[list[int]]:
    """Batches of the indices 0..count-1 in an order fixed by (seed, epoch); the last may be short."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    for start in range(0, count, batch_size):
        yield order[start : start + batch_size]


def pad(sequences: Sequence[Sequence[int]], pad_value: int, *, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences as one tensor: (B, T) int64 and the (B, T) bool mask of what is no padding.

    `side` is `left` (for sampling) or `right`. The mask comes from the lengths, never from
    `pad_value`, which may equal a real token such as eos.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got '{side}'")
    width = max((len(sequence) for sequence in sequences), default=0)
    tokens = torch.full((len(sequences), width), pad_value, dtype=torch.int64)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        if not len(sequence):
            continue
        part = slice(width - len(sequence), width) if side == "left" else slice(len(sequence))
        tokens[row, part] = torch.as_tensor(sequence, dtype=torch.int64)
        mask[row, part] = True
    return tokens, mask


class SFTBatch(NamedTuple):
    """Right-padded rows; `loss_mask[b, t]` says that token t is a target that counts."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T) bool
    loss_mask: Tensor  # (B, T) bool
    packed_positions: Tensor | None = None  # (B, T), from 0 in each sequence of a row; None: a row is one sequence


class RankingBatch(NamedTuple):
    """Prompt + response sequences, right-padded; all responses of a prompt share its group id."""

    input_ids: Tensor  # (N, T)
    attention_mask: Tensor  # (N, T) bool
    group_ids: Tensor  # (N,)
    ranks: Tensor  # (N,) lower is better
    margins: Tensor  # (N,) margin of the row's prompt
    columns: Tensor  # (N, C) the score columns that compare the row; see `criterion_columns`


def sft_batch(examples: Sequence[Example], pad_id: int, device: str | torch.device = "cpu") -> SFTBatch:
    """Pad examples into one batch."""
    input_ids, attention_mask = pad([e.input_ids for e in examples], pad_id, side="right")
    loss_mask, _ = pad([[int(m) for m in e.loss_mask] for e in examples], 0, side="right")
    return SFTBatch(input_ids.to(device), attention_mask.to(device), loss_mask.bool().to(device))


def ranking_batch(
    preferences: Sequence[Preference],
    pad_id: int,
    device: str | torch.device = "cpu",
    names: Sequence[str] = ("score",),
) -> RankingBatch:
    """Every response of every prompt as one row, for a head whose scores have these names."""
    rows = [[*p.prompt_ids, *response] for p in preferences for response in p.responses]
    input_ids, attention_mask = pad(rows, pad_id, side="right")
    counts = torch.tensor([len(p.responses) for p in preferences])
    group_ids = torch.arange(len(preferences)).repeat_interleave(counts)
    ranks = torch.tensor([rank for p in preferences for rank in p.ranks])
    margins = torch.tensor([p.margin for p in preferences], dtype=torch.float32)[group_ids]
    columns = criterion_columns([p.criterion for p in preferences], names)[group_ids]
    return RankingBatch(*(x.to(device) for x in (input_ids, attention_mask, group_ids, ranks, margins, columns)))


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive slices of at most `size` items."""
    if size < 1:
        raise ValueError(f"micro_batch_size: expected at least 1, got {size}")
    return (items[start : start + size] for start in range(0, len(items), size))


def supervised_tokens(examples: Sequence[Example]) -> int:
    """Number of targets: kept tokens other than the first, which nothing predicts."""
    return sum(sum(e.loss_mask[1:]) for e in examples)
