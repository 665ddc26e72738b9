"""Cross-entropy of labels, from hidden states and the head's weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrl.checks import check
from fastrl.ops.backend import choose
from fastrl.ops.linear_head import autocast, check_head
from fastrl.ops.linear_logprobs import linear_logprobs
from fastrl.reference import linear_cross_entropy as reference
from fastrl.reference.token_logprobs import check_range

OP = "linear_cross_entropy"
IGNORED = -100  # torch.nn.functional.cross_entropy's ignore_index


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    lora: Sequence[Any] | None = None,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    denominator: float | torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Cross-entropy of the labels under softmax((hidden @ weight.T + bias) / temperature), without the logits.

        loss = -sum over kept positions of log p(label) / denominator

    Same value as ``F.cross_entropy(hidden @ weight.T, labels)``: label -100 drops a position, as the mask does.

    Args:
        hidden: (..., H) float32, bfloat16 or float16 (float64 runs on `reference`).
        weight: (V, H), the dtype of hidden.
        labels: (...) int64 or int32 in [0, V), or -100 to drop the position.
        bias: (V,), the dtype of hidden.
        lora: (lora_a (r, H), lora_b (V, r), scaling) adds scaling * (hidden @ lora_a.T) @ lora_b.T to the logits.
        mask: (...) bool, True = keep. Dropped positions count nothing, get zero gradient, and may hold anything.
        temperature: > 0, divides the (soft-capped) logits.
        softcap: > 0; logits become softcap * tanh(logits / softcap) first.
        denominator: a positive number or 0-d tensor; None is the number of kept positions (1 if none). For
            micro-batches pass the count of the whole batch.
        backend: None chooses; else one of reference, cpu, triton, cuda.
    Returns:
        0-d float32 loss in nats; 0 with zero gradients if nothing is kept.
    Raises:
        ValueError: shape, dtype, device or value does not fit, or a kept label is outside [0, V).
    """
    hidden, weight, bias, lora = autocast(hidden, weight, bias, lora)
    check_head(OP, hidden, weight, labels, "labels", bias, lora, mask, temperature, softcap)
    if isinstance(denominator, torch.Tensor):
        check(denominator.ndim == 0, OP, "denominator", "a number or a 0-d tensor", tuple(denominator.shape))
    elif denominator is not None:
        check(denominator > 0, OP, "denominator", "a positive number", denominator)
    keep = labels != IGNORED if mask is None else mask & (labels != IGNORED)
    backend = choose(OP, hidden, backend)
    if backend == "reference":
        return reference.linear_cross_entropy(
            hidden, weight, labels, bias, lora, keep, temperature, softcap or 0.0, denominator
        )
    check_range(torch.where(keep, labels, 0), len(weight), OP, "labels")
    logprobs = linear_logprobs(
        hidden,
        weight,
        labels,
        bias=bias,
        lora=lora,
        mask=keep,
        temperature=temperature,
        softcap=softcap,
        backend=backend,
    )
    assert isinstance(logprobs, torch.Tensor)
    return -logprobs.sum() / (keep.sum().clamp(min=1) if denominator is None else denominator)
