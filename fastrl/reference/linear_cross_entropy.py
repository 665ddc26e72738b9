"""linear_cross_entropy in plain torch: any device, differentiable, in float64 when the inputs are. Holds all logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrl.checks import check_range
from fastrl.reference.linear_logprobs import head_logits
from fastrl.reference.token_logprobs import token_logprobs


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    lora: Sequence[Any] | None,
    keep: torch.Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float,
    denominator: float | torch.Tensor | None,
) -> torch.Tensor:
    """See `fastrl.ops.linear_cross_entropy`; `keep` is the mask without ignored labels, softcap 0 means none."""
    labels = torch.where(keep, labels.long(), 0)
    check_range(labels, weight.shape[0], "linear_cross_entropy", "labels")
    logits = head_logits(torch.where(keep[..., None], hidden, 0), weight, bias, lora)
    logprobs = token_logprobs(logits, labels, keep, temperature, logit_scale, softcap, False)
    assert isinstance(logprobs, torch.Tensor)
    if denominator is None:
        denominator = keep.sum().clamp(min=1)
    return -logprobs.sum() / denominator
