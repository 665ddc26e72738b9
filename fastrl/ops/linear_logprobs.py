"""Log-probability (and entropy) of given tokens, from hidden states and the head's weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrl.ops.backend import choose
from fastrl.ops.linear_head import autocast, check_head
from fastrl.reference import linear_logprobs as reference

OP = "linear_logprobs"


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    lora: Sequence[Any] | None = None,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each given token under softmax((hidden @ weight.T + bias) / temperature).

    Same value as ``token_logprobs(hidden @ weight.T, token_ids)`` without holding the (M, V) logits.

    Args:
        hidden: (..., H) float32, bfloat16 or float16 (float64 runs on `reference`).
        weight: (V, H), the dtype of hidden.
        token_ids: (...) int64 or int32 in [0, V).
        bias: (V,), the dtype of hidden.
        lora: (lora_a (r, H), lora_b (V, r), scaling) adds scaling * (hidden @ lora_a.T) @ lora_b.T to the logits.
        mask: (...) bool, True = keep. Dropped positions return 0, get zero gradient, and may hold anything.
        temperature: > 0, divides the (soft-capped) logits.
        softcap: > 0; logits become softcap * tanh(logits / softcap) first.
        return_entropy: also return the entropy of each kept position.
        backend: None chooses; else one of reference, cpu, triton, cuda.
    Returns:
        (...) float32 log-probs in nats, never above 0; with `return_entropy` the pair (logprobs, entropy).
    Raises:
        ValueError: shape, dtype, device or value does not fit, or a kept token id is outside [0, V).
    """
    hidden, weight, bias, lora = autocast(hidden, weight, bias, lora)
    check_head(OP, hidden, weight, token_ids, "token_ids", bias, lora, mask, temperature, softcap)
    choose(OP, hidden, backend)
    return reference.linear_logprobs(
        hidden, weight, token_ids, bias, lora, mask, temperature, softcap or 0.0, return_entropy
    )
