"""Log-probability (entropy, arg max) of given tokens, from hidden states and the head's weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrl.checks import check_flag, check_float
from fastrl.ops.backend import choose
from fastrl.ops.linear_head import autocast, check_head, head_logprobs
from fastrl.ops.logit_options import check_logit_options, without_scale
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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    return_top1: bool = False,
    detach_entropy: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Log-probability of each given token under softmax(cap((hidden @ weight.T + bias) * logit_scale) / temperature).

        y[m] = x[m, i] - log sum_v exp x[m, v],   i = token_ids[m]
        x = cap((hidden @ weight.T + bias) * logit_scale) / temperature,   cap(z) = z without a softcap

    Same value as ``token_logprobs(hidden @ weight.T, token_ids)`` without holding the (M, V) logits: only a block of
    them exists at a time. Masked rows are not multiplied, and a weight's gradient is formed only if it requires one.

    Args:
        hidden: (..., H) float32, bfloat16 or float16 (float64 runs on `reference`).
        weight: (V, H), the dtype of hidden.
        token_ids: (...) int64 or int32 in [0, V).
        bias: (V,), the dtype of hidden.
        lora: (lora_a (r, H), lora_b (V, r), scaling) adds scaling * (hidden @ lora_a.T) @ lora_b.T to the logits.
        mask: (...) bool, True = keep. Dropped positions return 0, get zero gradient, and may hold anything.
        temperature: > 0, divides the (scaled, soft-capped) logits.
        logit_scale: > 0, multiplies the logits first: Cohere's logit_scale, 1 / Granite's logits_scaling.
        softcap: > 0; scaled logits become softcap * tanh(logits / softcap).
        return_entropy: also return the entropy of each kept position.
        return_top1: also return, for each position, whether it is kept and its token the arg max, the first of equals,
            of the logits that the matrix product gives; as in `token_logprobs`.
        detach_entropy: the entropy has no gradient, as one that is only reported, which saves a product.
        backend: None chooses; else one of reference, cpu, triton, cuda.
    Returns:
        (...) float32 log-probs in nats, never above 0; with `return_entropy` or `return_top1` the tuple (logprobs,
        [entropy], [top1]) of what is asked for; top1 is bool and has no gradient.
    Raises:
        ValueError: shape, dtype, device or value does not fit, or a kept token id is outside [0, V). On a GPU such
            an id gives NaN (top1 False) at its position, without a host sync; FASTRL_DEBUG=1 raises there too.
    Numerics: the target's logit, all sums and every gradient's accumulation are in float32; the other logits have the
        precision of a matrix product in the dtype of hidden. log p = -log(1 + odds against), exact near 0. The same
        call gives the same bits, with or without gradients; a row's bits may change with the number of kept rows, as
        those of a library product do (on a GPU, FASTRL_BATCH_INVARIANT=1 keeps them: see linear_head_chunks.py).
        Differentiable once.
    Cost, in products of 2 M V H FLOPs: 1 without gradients; 2 for a frozen head, all in the forward pass, which saves
        the (M, H) direction W_i - sum_v p_v W_v for any upstream (1 more with an entropy that is not detached); 4 for a
        trained head; 3 where only an adapter or bias is trained.
    Source: Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135 (rescaled sums).
    """
    check_float(OP, "hidden", hidden)
    hidden, weight, bias, lora = autocast(hidden, weight, bias, lora)
    check_head(OP, hidden, weight, token_ids, "token_ids", bias, lora, mask)
    check_flag(OP, "return_entropy", return_entropy)
    check_flag(OP, "return_top1", return_top1)
    check_flag(OP, "detach_entropy", detach_entropy)
    check_logit_options(OP, temperature, logit_scale, softcap)
    backend = choose(OP, hidden, backend)
    if backend == "reference":
        results = reference.linear_logprobs(
            hidden, weight, token_ids, bias, lora, mask, temperature, logit_scale, softcap or 0.0, return_entropy,
            return_top1,
        )  # fmt: skip
        return (results[0], results[1].detach(), *results[2:]) if return_entropy and detach_entropy else results
    return head_logprobs(
        hidden, weight, bias, lora, token_ids, mask, *without_scale(temperature, logit_scale, softcap), return_entropy,
        return_top1, backend, detach_entropy,
    )  # fmt: skip
