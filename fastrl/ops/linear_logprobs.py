"""Log-probability (and entropy) of given tokens, from hidden states and the head's weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastrl.ops import linear_head_cpu, linear_head_gpu
from fastrl.ops.backend import choose, native_op
from fastrl.ops.linear_head import autocast, check_head
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
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
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
        backend: None chooses; else one of reference, cpu, triton, cuda.
    Returns:
        (...) float32 log-probs in nats, never above 0; with `return_entropy` the pair (logprobs, entropy).
    Raises:
        ValueError: shape, dtype, device or value does not fit, or a kept token id is outside [0, V). On a GPU that id
            makes its position NaN instead, so that nothing waits; FASTRL_DEBUG=1 raises there too.
    Numerics: the target's logit, all sums and every gradient's accumulation are in float32; the other logits have the
        precision of a matrix product in the dtype of hidden. log p = -log(1 + odds against), exact near 0. The same
        call gives the same bits, with or without gradients; a row's bits may change with the number of kept rows, as
        those of a library product do (on a GPU, FASTRL_BATCH_INVARIANT=1 keeps them: see linear_head_chunks.py).
        Differentiable once.
    Cost, in products of 2 M V H FLOPs: 1 without gradients; 2 for a frozen head, all in the forward pass, which saves
        the (M, H) direction W_i - sum_v p_v W_v for any upstream (1 more with entropy); 4 for a trained head; 3 where
        only an adapter or bias is trained.
    Source: Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135 (rescaled sums).
    """
    hidden, weight, bias, lora = autocast(hidden, weight, bias, lora)
    check_head(OP, hidden, weight, token_ids, "token_ids", bias, lora, mask)
    check_logit_options(OP, temperature, logit_scale, softcap)
    backend = choose(OP, hidden, backend)
    if backend == "reference":
        return reference.linear_logprobs(
            hidden, weight, token_ids, bias, lora, mask, temperature, logit_scale, softcap or 0.0, return_entropy
        )
    lora_a, lora_b, scaling = lora if lora is not None else (None, None, 1.0)
    needs_direction = torch.is_grad_enabled() and (
        hidden.requires_grad or (lora_a is not None and lora_a.requires_grad)
    )
    logprobs, entropy = _LinearLogprobs.apply(
        hidden,
        weight,
        bias,
        lora_a,
        lora_b,
        token_ids,
        mask,
        (float(scaling), *without_scale(temperature, logit_scale, softcap)),
        return_entropy,
        needs_direction,
        backend,
    )
    return (logprobs, entropy) if return_entropy else logprobs


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, lora_a, lora_b, token_ids, mask, options, return_entropy, needs_direction, backend
    ):
        shape = hidden.shape[:-1]
        rows = hidden.reshape(-1, hidden.shape[-1])
        token_ids = token_ids.reshape(-1).long().contiguous()
        mask = None if mask is None else mask.reshape(-1).contiguous()
        count, width = rows.shape[0], rows.shape[1] + (0 if lora_a is None else len(lora_a))
        logprobs = hidden.new_empty(count, dtype=torch.float32)
        row_stats = hidden.new_empty((count, 2), dtype=torch.float32)
        entropy = hidden.new_empty(count if return_entropy else 0, dtype=torch.float32)
        direction = hidden.new_empty((count, width)) if needs_direction else None
        entropy_direction = hidden.new_empty((count, width)) if needs_direction and return_entropy else None
        _forward(
            backend, rows, weight, token_ids, mask, bias, lora_a, lora_b, *options,
            logprobs, row_stats, entropy if return_entropy else None, direction, entropy_direction,
        )  # fmt: skip
        ctx.save_for_backward(
            hidden, weight, bias, lora_a, lora_b, token_ids, mask,
            row_stats, logprobs, entropy, direction, entropy_direction,
        )  # fmt: skip
        ctx.options = options
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return logprobs.view(shape), entropy.view(shape if return_entropy else (0,))

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogprobs, dentropy):
        hidden, weight, bias, lora_a, lora_b, token_ids, mask, *results = ctx.saved_tensors
        row_stats, logprobs, entropy, direction, entropy_direction = results
        need_hidden, need_weight, need_bias, need_lora_a, need_lora_b = ctx.needs_input_grad[:5]
        if entropy.numel() == 0:
            dentropy = None
        if dlogprobs is None and dentropy is None:
            return (None,) * 11
        dlogprobs = torch.zeros_like(logprobs) if dlogprobs is None else dlogprobs.reshape(-1).contiguous()
        dentropy = None if dentropy is None else dentropy.reshape(-1).contiguous()
        rows = hidden.reshape(-1, hidden.shape[-1])
        dhidden = dlora_a = None
        if need_hidden or need_lora_a:
            dhidden, dlora_a = input_gradients(
                ctx.backend, hidden, lora_a if need_lora_a else None, ctx.options[0], mask,
                direction, entropy_direction, dlogprobs, dentropy,
            )  # fmt: skip
        dweight = empty(weight) if need_weight else None
        dbias = empty(bias) if need_bias else None
        dlora_b = empty(lora_b) if need_lora_b else None
        if need_weight or need_bias or need_lora_b:
            _backward_weights(
                ctx.backend, rows, weight, token_ids, mask, bias, lora_a, lora_b, *ctx.options, row_stats, logprobs,
                None if dentropy is None else entropy, dlogprobs, dentropy, dweight, dbias, dlora_b,
            )  # fmt: skip
        return dhidden, dweight, dbias, dlora_a, dlora_b, None, None, None, None, None, None


def input_gradients(
    backend, hidden, lora_a, scaling, mask, direction, entropy_direction, dlogprobs, dentropy
):  # fmt: skip
    """(dhidden, dlora_a) from the saved directions; dlora_a is None if lora_a is."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    dinputs = torch.empty_like(direction)
    _backward_hidden(backend, direction, entropy_direction, mask, dlogprobs, dentropy, dinputs)
    dhidden = dinputs[:, : rows.shape[1]].view(hidden.shape)
    if lora_a is None:
        return dhidden, None
    kept = rows if mask is None else torch.where(mask[:, None], rows, 0)
    inner = dinputs[:, rows.shape[1] :].to(lora_a.dtype)
    return dhidden, torch.mm(inner.t(), kept.to(lora_a.dtype)) * scaling


def empty(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


HEAD_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor token_ids, Tensor? mask, Tensor? bias, Tensor? lora_a, Tensor? lora_b, "
    "float scaling, float temperature, float softcap, "
)
_forward = native_op(
    "linear_logprobs_fwd",
    HEAD_SCHEMA + "Tensor(a!) logprobs, Tensor(b!) row_stats, Tensor(c!)? entropy, Tensor(d!)? direction, "
    "Tensor(e!)? entropy_direction",
    {"cpu": linear_head_cpu.forward, **linear_head_gpu.on_each_backend(linear_head_gpu.forward)},
)
_backward_hidden = native_op(
    "linear_logprobs_bwd_hidden",
    "Tensor direction, Tensor? entropy_direction, Tensor? mask, Tensor dlogprobs, Tensor? dentropy, Tensor(a!) dinputs",
    {
        "cpu": linear_head_cpu.backward_hidden,
        "cuda": linear_head_gpu.backward_hidden,
        "triton": linear_head_gpu.backward_hidden,
    },
)
_backward_weights = native_op(
    "linear_logprobs_bwd_weights",
    HEAD_SCHEMA + "Tensor row_stats, Tensor logprobs, Tensor? entropy, Tensor dlogprobs, Tensor? dentropy, "
    "Tensor(a!)? dweight, Tensor(b!)? dbias, Tensor(c!)? dlora_b",
    {"cpu": linear_head_cpu.backward_weights, **linear_head_gpu.on_each_backend(linear_head_gpu.backward_weights)},
)
