"""Attention in rows that hold several sequences, each by itself: a row costs what its sequences cost alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastrl.models.heads import base_model

NAME = "fastrl_packed_sdpa"  # of the attention that `attend_by_sequence` gives a model, in transformers' list

Places = list[list[tuple[int, int]]]  # of each row: where its sequences begin and end


def attend_by_sequence(model: Any) -> None:
    """From now on a model with transformers' sdpa attends within each sequence of a packed row, in place of masking a
    square of the whole row. Rows of one sequence give the same bits as before; other attentions stay as they are.
    """
    base = base_model(model)
    if base.config.get_text_config()._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, packed_sdpa)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        base.set_attn_implementation(NAME)


def sequences_of(positions: Tensor, lengths: Tensor) -> Places:
    """The sequences in rows (B, T) of positions; what follows a row's `lengths` (B,) tokens, all at 0, is one more."""
    columns = torch.arange(positions.shape[1], device=positions.device)
    starts = ((positions == 0) & (columns <= lengths[:, None])) | (columns == 0)
    rows: list[list[int]] = [[] for _ in positions]
    for row, column in starts.nonzero().tolist():
        rows[row].append(column)
    return [list(pairwise([*row, len(columns)])) for row in rows]


def packed_sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    fastrl_sequences: Places | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa, (B, heads, T, D) to (B, T, heads, D), on one of `fastrl_sequences` after the other.

    The mask is transformers' (windows and all), of which each sequence takes its block: what stands beside the blocks
    is masked anyway. So the whole square gives the same, in more time, where a family does not pass the sequences on.
    """
    if fastrl_sequences is None or attention_mask is None or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    masks = attention_mask.expand(len(query), -1, -1, -1)
    rows = []
    for row, places in enumerate(fastrl_sequences):
        parts = []
        for start, end in places:
            q, k, v = (x[row : row + 1, :, start:end] for x in (query, key, value))
            mask = masks[row : row + 1, :, start:end, start:end]
            parts.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows), None
