"""Hidden states below the head, without padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.models.heads import decoder
from fastrl.models.packed_attention import NAME as PACKED_SDPA
from fastrl.models.packed_attention import sequences_of
from fastrl.models.virtual import virtual_tokens, with_virtual_tokens

VIRTUAL_TOKENS = (
    "packing: expected none with virtual tokens (prefix, prompt, p-tuning), which would stand before the first sequence"
    " of a row alone; use --packing none"
)


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, T) position of each kept token among its row's kept tokens; 0 on padding, either side."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


@cache
def arguments(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the arguments that a function takes."""
    return frozenset(inspect.signature(function).parameters)


def final_hidden(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, packed_positions: Tensor | None = None
) -> Tensor:
    """(B, T, H) hidden states below the head, from the backbone alone; logits are never formed.

    Padding costs nothing, wherever it is: kept tokens are moved to the left, where a causal model needs no mask, and
    their hidden states are moved back. What a position that is not kept returns is unspecified. Virtual tokens of the
    model stand before every row; their hidden states are taken off.

    With `packed_positions` (B, T) a row holds several sequences, each counted from 0: from where the count starts anew
    transformers masks what stands before. That a family heeds it is for `fastrl.models.probe.check_packing` to measure.
    The square of a row is not computed after `fastrl.models.packed_attention.attend_by_sequence`.

    Raises:
        ValueError: sequences are packed and the backbone takes no position ids, or the model has virtual tokens, which
            only the first sequence of a row would see.
    """
    backbone: Any = decoder(model)
    accepted = arguments(type(backbone).forward)
    if packed_positions is not None:
        if "position_ids" not in accepted:
            raise ValueError(f"packing: {type(backbone).__name__} takes no position_ids; use --packing none")
        if virtual_tokens(model):
            raise ValueError(VIRTUAL_TOKENS)
        if "flash" in str(backbone.config._attn_implementation):
            return _in_one_row(backbone, input_ids, attention_mask.bool(), packed_positions)
    lengths = attention_mask.sum(-1)
    width = max(int(lengths.max()), 1)
    columns = torch.arange(width, device=input_ids.device)
    kept_first = attention_mask.logical_not().long().argsort(dim=-1, stable=True)[:, :width]
    real = columns < lengths[:, None]  # (B, W)
    inputs: dict[str, Any] = {"input_ids": torch.where(real, input_ids.gather(1, kept_first), 0)}
    if packed_positions is not None:
        positions = inputs["position_ids"] = torch.where(real, packed_positions.gather(1, kept_first), 0)
        if backbone.config._attn_implementation == PACKED_SDPA and "kwargs" in accepted:
            inputs["fastrl_sequences"] = sequences_of(positions, lengths)
    elif "position_ids" in accepted:
        inputs["position_ids"] = columns.expand_as(real)
    hidden = backbone(**with_virtual_tokens(model, inputs), use_cache=False).last_hidden_state[:, -width:]
    places = position_ids(attention_mask)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, places)


def _in_one_row(backbone: Any, input_ids: Tensor, kept: Tensor, positions: Tensor) -> Tensor:
    """Flash attention finds the sequences in a batch of one row alone."""
    found = backbone(input_ids=input_ids[kept][None], position_ids=positions[kept][None], use_cache=False)
    hidden = found.last_hidden_state[0]
    return hidden.new_zeros(*kept.shape, hidden.shape[-1]).masked_scatter(kept[..., None], hidden)
