"""Hidden states below the head, without padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.models.heads import decoder
from fastrl.models.virtual import with_virtual_tokens


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, T) position of each kept token among its row's kept tokens; 0 on padding, either side."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


@cache
def arguments(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the arguments that a function takes."""
    return frozenset(inspect.signature(function).parameters)


def final_hidden(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T, H) hidden states below the head, from the backbone alone; logits are never formed.

    Padding costs nothing, wherever it is: kept tokens are moved to the left, where a causal model needs no mask, and
    their hidden states are moved back. What a position that is not kept returns is unspecified. Virtual tokens of the
    model stand before every row; their hidden states are taken off.
    """
    backbone: Any = decoder(model)
    lengths = attention_mask.sum(-1)
    width = max(int(lengths.max()), 1)
    columns = torch.arange(width, device=input_ids.device)
    kept_first = attention_mask.logical_not().long().argsort(dim=-1, stable=True)[:, :width]
    compact = torch.where(columns < lengths[:, None], input_ids.gather(1, kept_first), 0)  # (B, W)
    inputs = {"input_ids": compact}
    if "position_ids" in arguments(type(backbone).forward):
        inputs["position_ids"] = columns.expand_as(compact)
    hidden = backbone(**with_virtual_tokens(model, inputs), use_cache=False).last_hidden_state[:, -width:]
    places = position_ids(attention_mask)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, places)
