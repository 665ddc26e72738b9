"""Cross-entropy of labels, from hidden states and the head's weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrl.checks import check, check_device, check_float, check_plain, check_positive, check_range, debugging
from fastrl.ops.autograd import differentiable_once
from fastrl.ops.backend import choose
from fastrl.ops.linear_head import autocast, check_head, empty, head_forward, head_logprobs, input_gradients
from fastrl.ops.logit_options import check_logit_options, without_scale
from fastrl.ops.scale_gradient import scale_gradient
from fastrl.reference import linear_cross_entropy as reference

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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    denominator: float | torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Cross-entropy of the labels under softmax(cap((hidden @ weight.T + bias) * logit_scale) / temperature).

        loss = -sum over kept positions of log p(label) / denominator

    Same value as ``F.cross_entropy(hidden @ weight.T, labels)`` without the logits; label
    -100 drops a position, as the mask does. Without a softcap cap(z) = z.

    Args:
        hidden: (..., H) float32, bfloat16 or float16 (float64 runs on `reference`).
        weight: (V, H), the dtype of hidden.
        labels: (...) int64 or int32 in [0, V), or -100 to drop the position.
        bias: (V,), the dtype of hidden.
        lora: (lora_a (r, H), lora_b (V, r), scaling) adds scaling * (hidden @ lora_a.T) @ lora_b.T to the logits.
        mask: (...) bool, True = keep. Dropped positions do not count, get zero gradient, and may hold anything.
        temperature: > 0, divides the (scaled, soft-capped) logits.
        logit_scale: > 0, multiplies the logits first: Cohere's logit_scale, 1 / Granite's logits_scaling.
        softcap: > 0; scaled logits become softcap * tanh(logits / softcap).
        denominator: a positive number or 0-d tensor; None is the number of kept positions (1 if none). For
            micro-batches pass the count of the whole batch.
        backend: None chooses; else one of reference, cpu, triton, cuda.
    Returns:
        0-d float32 loss in nats; 0 with zero gradients if nothing is kept.
    Raises:
        ValueError: shape, dtype, device or value does not fit, or a kept label is outside [0, V). On a GPU such a label
            makes the loss NaN instead, without a host sync; FASTRL_DEBUG=1 raises there too.
    Numerics: as `linear_logprobs`; the gradients of the parameters are summed in float32 and rounded once.
    Cost, in products of 2 M V H FLOPs: 1 without gradients, 2 for a frozen head, 3 for a trained one; all gradients are
        formed in the forward pass and the backward pass scales them. Differentiable once.
    """
    check_float(OP, "hidden", hidden)
    hidden, weight, bias, lora = autocast(hidden, weight, bias, lora)
    check_head(OP, hidden, weight, labels, "labels", bias, lora, mask)
    check_logit_options(OP, temperature, logit_scale, softcap)
    if isinstance(denominator, torch.Tensor):
        check_plain(OP, "denominator", denominator)
        check(denominator.ndim == 0, OP, "denominator", "a number or a 0-d tensor", tuple(denominator.shape))
        check_device(OP, "denominator", denominator, hidden)
    elif denominator is not None:
        check_positive(OP, "denominator", denominator)
    keep = labels != IGNORED if mask is None else mask & (labels != IGNORED)
    backend = choose(OP, hidden, backend)
    if backend == "reference":
        return reference.linear_cross_entropy(
            hidden, weight, labels, bias, lora, keep, temperature, logit_scale, softcap or 0.0, denominator
        )
    if backend == "cpu" or debugging():
        check_range(torch.where(keep, labels, 0), len(weight), OP, "labels")
    if denominator is None:
        denominator = keep.sum().clamp(min=1)
    temperature, softcap = without_scale(temperature, logit_scale, softcap)
    lora_a, lora_b, scaling = lora if lora is not None else (None, None, 1.0)
    multiplies_logits = [tensor for tensor in (weight, bias, lora_b) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in multiplies_logits):
        if isinstance(denominator, torch.Tensor):
            upstream = -1.0 / denominator.to(torch.float32)
        else:  # filled on the device: a copy from the host would wait
            upstream = torch.full((), -1.0 / denominator, dtype=torch.float32, device=hidden.device)
        options = (float(scaling), temperature, softcap)
        return _LinearCrossEntropy.apply(
            hidden, weight, bias, lora_a, lora_b, labels, keep, upstream.detach(), options, backend
        )
    logprobs = head_logprobs(hidden, weight, bias, lora, labels, keep, temperature, softcap, False, False, backend)
    return -logprobs.sum() / denominator


class _LinearCrossEntropy(torch.autograd.Function):
    """For a trained head: every gradient is formed in the forward pass; backward scales by the loss's upstream."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, lora_a, lora_b, labels, keep, upstream, options, backend):
        rows = hidden.reshape(-1, hidden.shape[-1])
        keep = keep.reshape(-1).contiguous()
        count, width = rows.shape[0], rows.shape[1] + (0 if lora_a is None else len(lora_a))
        logprobs = hidden.new_empty(count, dtype=torch.float32)
        row_stats = hidden.new_empty((count, 2), dtype=torch.float32)
        needs = ctx.needs_input_grad
        direction = hidden.new_empty((count, width)) if needs[0] or needs[3] else None
        dweight = empty(weight) if needs[1] else None
        dbias = empty(bias) if bias is not None and needs[2] else None
        dlora_b = empty(lora_b) if lora_b is not None and needs[4] else None
        head_forward(
            backend, rows, weight, labels.reshape(-1).long().contiguous(), keep, bias, lora_a, lora_b, *options,
            logprobs, row_stats, None, None, direction, None, upstream, dweight, dbias, dlora_b,
        )  # fmt: skip
        ctx.save_for_backward(hidden, lora_a, keep, upstream, direction, dweight, dbias, dlora_b)
        ctx.options, ctx.backend, ctx.inputs = options, backend, (weight, bias, lora_b)
        return logprobs.sum() * upstream

    @staticmethod
    @differentiable_once(OP)
    def backward(ctx, dloss):
        hidden, lora_a, keep, upstream, direction, *gradients = ctx.saved_tensors
        dhidden = dlora_a = None
        if direction is not None:
            dlogprobs = (dloss * upstream).expand(len(keep)).contiguous()
            dhidden, dlora_a = input_gradients(
                ctx.backend, hidden, lora_a if ctx.needs_input_grad[3] else None, ctx.options[0], keep,
                direction, None, dlogprobs, None,
            )  # fmt: skip
        dweight, dbias, dlora_b = (None if g is None else scale_gradient(ctx.backend, g, dloss) for g in gradients)
        return dhidden, dweight, dbias, dlora_a, dlora_b, None, None, None, None, None
