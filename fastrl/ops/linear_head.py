"""A language-model head as linear_logprobs and linear_cross_entropy share it: arguments, kernels, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastrl.checks import (
    check,
    check_device,
    check_float,
    check_ids,
    check_mask,
    check_number,
    check_plain,
    check_shape,
)
from fastrl.ops import linear_head_cpu, linear_head_gpu
from fastrl.ops.autograd import differentiable_once
from fastrl.ops.logit_options import present
from fastrl.ops.native import autocast_dtype, native_op


class LoRAHead(NamedTuple):
    """Adapter on the output head: logits += (hidden @ lora_a.T) @ lora_b.T * scaling."""

    lora_a: torch.Tensor  # (r, H)
    lora_b: torch.Tensor  # (V, r)
    scaling: float


def check_head(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    ids_name: str,
    bias: torch.Tensor | None,
    lora: Sequence[Any] | None,
    mask: torch.Tensor | None,
) -> None:
    check(hidden.ndim >= 1, op, "hidden", "shape (..., H)", tuple(hidden.shape))
    check_plain(op, "weight", weight)
    check(weight.ndim == 2, op, "weight", "shape (V, H); a sharded head must be gathered first", tuple(weight.shape))
    vocab, width = weight.shape[0], hidden.shape[-1]
    check_shape(op, "weight", weight, (vocab, width))
    check(vocab > 0, op, "weight", "a vocabulary of at least 1", tuple(weight.shape))
    _check_like_hidden(op, "weight", weight, hidden)
    if bias is not None:
        check_plain(op, "bias", bias)
        check_shape(op, "bias", bias, (vocab,))
        _check_like_hidden(op, "bias", bias, hidden)
    if lora is not None:
        got = f"{len(lora)} items" if isinstance(lora, Sequence) else type(lora).__name__
        check(got == "3 items", op, "lora", "(lora_a, lora_b, scaling)", got)
        lora_a, lora_b, scaling = lora
        for name, tensor in (("lora: lora_a", lora_a), ("lora: lora_b", lora_b)):
            check_float(op, name, tensor)
            check_device(op, name, tensor, hidden)
        check_number(op, "lora: scaling", scaling)
        check(lora_a.ndim == 2 and len(lora_a) > 0, op, "lora", "lora_a (r, H), r at least 1", tuple(lora_a.shape))
        check_shape(op, "lora: lora_a", lora_a, (len(lora_a), width))
        check_shape(op, "lora: lora_b", lora_b, (vocab, len(lora_a)))
    check_ids(op, ids_name, ids, hidden.shape[:-1], hidden)
    check_mask(op, mask, hidden.shape[:-1], hidden)


def _check_like_hidden(op: str, name: str, tensor: torch.Tensor, hidden: torch.Tensor) -> None:
    if tensor.dtype != hidden.dtype:
        check(False, op, name, f"{hidden.dtype} as hidden (cast one of them, or use torch.autocast)", tensor.dtype)
    check_device(op, name, tensor, hidden)


def autocast(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora: Sequence[Any] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Sequence[Any] | None]:
    """The arguments of a linear layer as torch.autocast would hand them to nn.Linear."""
    dtype = autocast_dtype(hidden)
    if dtype is None:
        return hidden, weight, bias, lora
    if lora is not None:
        lora = (lora[0].to(dtype), lora[1].to(dtype), lora[2])
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), lora


def head_logprobs(
    hidden, weight, bias, lora, token_ids, mask, temperature, softcap, return_entropy, return_top1, backend,
    detach_entropy=False,
):  # fmt: skip
    """What linear_logprobs returns, by a native backend, of arguments that are checked."""
    lora_a, lora_b, scaling = lora if lora is not None else (None, None, 1.0)
    needs_direction = torch.is_grad_enabled() and (
        hidden.requires_grad or (lora_a is not None and lora_a.requires_grad)
    )
    return _HeadLogprobs.apply(
        hidden, weight, bias, lora_a, lora_b, token_ids, mask, (float(scaling), temperature, softcap), return_entropy,
        return_top1, detach_entropy, needs_direction, backend,
    )  # fmt: skip


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, lora_a, lora_b, token_ids, mask, options, return_entropy, return_top1,
        detach_entropy, needs_direction, backend,
    ):  # fmt: skip
        shape = hidden.shape[:-1]
        rows = hidden.reshape(-1, hidden.shape[-1])
        token_ids = token_ids.reshape(-1).long().contiguous()
        mask = None if mask is None else mask.reshape(-1).contiguous()
        count, width = rows.shape[0], rows.shape[1] + (0 if lora_a is None else len(lora_a))
        logprobs = hidden.new_empty(shape, dtype=torch.float32)
        row_stats = hidden.new_empty((count, 2), dtype=torch.float32)
        entropy = hidden.new_empty(shape, dtype=torch.float32) if return_entropy else None
        top1 = hidden.new_empty(shape, dtype=torch.bool) if return_top1 else None
        trained_entropy = None if detach_entropy else entropy
        direction = hidden.new_empty((count, width)) if needs_direction else None
        entropy_direction = (
            hidden.new_empty((count, width)) if needs_direction and trained_entropy is not None else None
        )
        head_forward(
            backend, rows, weight, token_ids, mask, bias, lora_a, lora_b, *options,
            logprobs.view(-1), row_stats, *(None if t is None else t.view(-1) for t in (entropy, top1)),
            direction, entropy_direction, None, None, None, None,
        )  # fmt: skip
        # Copies, as the caller may change the outputs in place; the gradient of hidden alone needs none.
        needs_outputs = any(ctx.needs_input_grad[i] for i in (1, 2, 4))
        ctx.save_for_backward(
            hidden, weight, bias, lora_a, lora_b, token_ids, mask, row_stats,
            logprobs.reshape(-1).clone() if needs_outputs else None,
            trained_entropy.reshape(-1).clone() if needs_outputs and trained_entropy is not None else None,
            direction, entropy_direction,
        )  # fmt: skip
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        if entropy is not None and detach_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs if entropy is None and top1 is None else present(logprobs, entropy, top1)

    @staticmethod
    @differentiable_once("linear_logprobs")
    def backward(ctx, dlogprobs, dentropy=None, _=None):
        # Without the entropy the second upstream is that of top1, which is None.
        hidden, weight, bias, lora_a, lora_b, token_ids, mask, *results = ctx.saved_tensors
        row_stats, logprobs, entropy, direction, entropy_direction = results
        need_hidden, need_weight, need_bias, need_lora_a, need_lora_b = ctx.needs_input_grad[:5]
        if dlogprobs is None and dentropy is None:
            return (None,) * 13
        dlogprobs = row_stats.new_zeros(len(row_stats)) if dlogprobs is None else dlogprobs.reshape(-1).contiguous()
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
            _head_backward_weights(
                ctx.backend, rows, weight, token_ids, mask, bias, lora_a, lora_b, *ctx.options, row_stats, logprobs,
                None if dentropy is None else entropy, dlogprobs, dentropy, dweight, dbias, dlora_b,
            )  # fmt: skip
        return dhidden, dweight, dbias, dlora_a, dlora_b, *(None,) * 8


def input_gradients(
    backend, hidden, lora_a, scaling, mask, direction, entropy_direction, dlogprobs, dentropy
):  # fmt: skip
    """(dhidden, dlora_a) from the saved directions; dlora_a is None if lora_a is."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    dinputs = torch.empty_like(direction)
    _head_backward_hidden(backend, direction, entropy_direction, mask, dlogprobs, dentropy, dinputs)
    dhidden = dinputs[:, : rows.shape[1]].view(hidden.shape)
    if lora_a is None:
        return dhidden, None
    kept = rows if mask is None else torch.where(mask[:, None], rows, 0)
    inner = dinputs[:, rows.shape[1] :].to(lora_a.dtype)
    return dhidden, torch.mm(inner.t(), kept.to(lora_a.dtype)) * scaling


def empty(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


_HEAD = (
    "Tensor hidden, Tensor weight, Tensor token_ids, Tensor? mask, Tensor? bias, Tensor? lora_a, Tensor? lora_b, "
    "float scaling, float temperature, float softcap, "
)
head_forward = native_op(
    "linear_head_fwd",
    _HEAD + "Tensor(a!) logprobs, Tensor(b!) row_stats, Tensor(c!)? entropy, Tensor(d!)? top1, "
    "Tensor(e!)? direction, Tensor(f!)? entropy_direction, Tensor? upstream, Tensor(g!)? dweight, Tensor(h!)? dbias, "
    "Tensor(i!)? dlora_b",
    {"cpu": linear_head_cpu.forward, **linear_head_gpu.on_each_backend(linear_head_gpu.forward)},
)
_head_backward_hidden = native_op(
    "linear_head_bwd_hidden",
    "Tensor direction, Tensor? entropy_direction, Tensor? mask, Tensor dlogprobs, Tensor? dentropy, Tensor(a!) dinputs",
    {
        "cpu": linear_head_cpu.backward_hidden,
        "cuda": linear_head_gpu.backward_hidden,
        "triton": linear_head_gpu.backward_hidden,
    },
)
_head_backward_weights = native_op(
    "linear_head_bwd_weights",
    _HEAD + "Tensor row_stats, Tensor logprobs, Tensor? entropy, Tensor dlogprobs, Tensor? dentropy, "
    "Tensor(a!)? dweight, Tensor(b!)? dbias, Tensor(c!)? dlora_b",
    {"cpu": linear_head_cpu.backward_weights, **linear_head_gpu.on_each_backend(linear_head_gpu.backward_weights)},
)
