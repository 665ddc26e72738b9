"""linear_logprobs in plain torch: any device, differentiable, in float64 when the inputs are. Holds all logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrl.checks import check_range
from fastrl.reference.token_logprobs import token_logprobs


def head_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora: Sequence[Any] | None
) -> torch.Tensor:
    """hidden @ weight.T (+ bias) (+ scaling * (hidden @ lora_a.T) @ lora_b.T), in the dtype of hidden."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if lora is None:
        return logits
    lora_a, lora_b, scaling = lora
    update = torch.nn.functional.linear(torch.nn.functional.linear(hidden.to(lora_a.dtype), lora_a), lora_b)
    return (logits + update * scaling).to(logits.dtype)


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    bias: torch.Tensor | None,
    lora: Sequence[Any] | None,
    mask: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    return_entropy: bool,
    return_top1: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """See `fastrl.ops.linear_logprobs`; softcap 0 means none. Returns float64 for float64 inputs."""
    if mask is not None:
        token_ids = torch.where(mask, token_ids.long(), 0)
        hidden = torch.where(mask[..., None], hidden, 0)
    check_range(token_ids, weight.shape[0], "linear_logprobs")
    logits = head_logits(hidden, weight, bias, lora)
    return token_logprobs(logits, token_ids, mask, temperature, logit_scale, softcap, return_entropy, return_top1)
