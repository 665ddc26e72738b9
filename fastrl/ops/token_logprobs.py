"""Log-probability (entropy, arg max) of given tokens, from logits."""

from __future__ import annotations

import torch

from fastrl.checks import check, check_flag, check_float, check_ids, check_mask, check_range, debugging
from fastrl.ops.autograd import differentiable_once
from fastrl.ops.backend import choose
from fastrl.ops.logit_options import check_logit_options, present, without_scale
from fastrl.ops.native import (
    _C,
    DTYPE_CODES,
    cuda_workspace,
    empty_large,
    launch_cuda,
    native_op,
    row_layout,
    threads_for,
    triton_kernel,
    with_simple_rows,
)
from fastrl.reference import token_logprobs as reference

OP = "token_logprobs"


def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    return_top1: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Log-probability of each given token under softmax(cap(logits * logit_scale) / temperature).

        y[...] = x[..., i] - log sum_v exp x[..., v],   x = cap(logits * logit_scale) / temperature,  i = token_ids[...]

    Without a softcap, cap(z) = z, this is
    ``(logits.float() * logit_scale / temperature).log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]`` without
    the fp32 copy of the logits. The entropy is ``-(p * p.log()).sum(-1)`` in nats, and `top1`, whether the token is the
    likeliest, is ``logits.argmax(-1) == token_ids``, the first of equals (scale, cap and temperature keep the order);
    both are from the same pass.

    Args:
        logits: (..., V) float32, bfloat16 or float16 (float64 runs on `reference`). Any leading strides; copied only if
            the last dimension is not contiguous or more than two leading strides remain. -inf bans a token.
        token_ids: (...) int64 or int32 in [0, V).
        mask: (...) bool, True = keep. Dropped positions return 0, get zero gradient, and may hold anything.
        temperature: > 0, divides the (scaled, soft-capped) logits.
        logit_scale: > 0, multiplies the logits first: Cohere's logit_scale, 1 / Granite's logits_scaling.
        softcap: > 0; scaled logits become softcap * tanh(logits / softcap); -inf stays -inf.
        return_entropy: also return the entropy of each kept position.
        return_top1: also return, for each position, whether it is kept and its token the arg max.
        backend: None chooses; else one of reference, cpu, triton, cuda.
    Returns:
        (...) float32 log-probs in nats, never above 0; with `return_entropy` or `return_top1` the tuple (logprobs,
        [entropy], [top1]) of what is asked for; top1 is bool and has no gradient.
        A row of -inf alone gives log-prob -inf, entropy 0 and no gradient. A NaN logit gives NaN; its arg max is
        torch's: the first NaN.
    Raises:
        ValueError: shape, dtype, device or value does not fit, or a kept token id is outside [0, V). On a GPU such
            an id gives NaN (top1 False) at its position, without a host sync; FASTRL_DEBUG=1 raises there too.
    Numerics: arithmetic and sums in fp32, relative to the row's maximum (a common offset costs no digits);
        the target's gradient is -expm1(log p), exact where p is near 1; a row's bits do not depend on the batch (on
        `triton`: of logits with the same stride of rows and the same alignment).
        The gradient has the dtype of the logits. Differentiable once.
    Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (online softmax).
    """
    _check(logits, token_ids, mask)
    check_flag(OP, "return_entropy", return_entropy)
    check_flag(OP, "return_top1", return_top1)
    check_logit_options(OP, temperature, logit_scale, softcap)
    backend = choose(OP, logits, backend)
    if backend == "reference":
        return reference.token_logprobs(
            logits, token_ids, mask, temperature, logit_scale, softcap or 0.0, return_entropy, return_top1
        )
    if backend != "cpu" and debugging():
        check_range(token_ids if mask is None else torch.where(mask, token_ids, 0), logits.shape[-1])
    arguments = (
        with_simple_rows(logits), token_ids.long().contiguous(), None if mask is None else mask.contiguous(),
        *without_scale(temperature, logit_scale, softcap), return_entropy, return_top1, backend,
    )  # fmt: skip
    if torch.is_grad_enabled() and logits.requires_grad:
        return _TokenLogprobs.apply(*arguments)
    logprobs, entropy, top1, _ = _evaluate(*arguments)
    return logprobs if entropy is None and top1 is None else present(logprobs, entropy, top1)


def _check(logits, token_ids, mask):
    check_float(OP, "logits", logits)
    check(logits.ndim >= 1, OP, "logits", "shape (..., V)", tuple(logits.shape))
    check(logits.shape[-1] > 0, OP, "logits", "a vocabulary of at least 1", tuple(logits.shape))
    check_ids(OP, "token_ids", token_ids, logits.shape[:-1], logits)
    check_mask(OP, mask, logits.shape[:-1], logits)


def _evaluate(logits, token_ids, mask, temperature, softcap, return_entropy, return_top1, backend):
    """(logprobs, entropy, top1, row_stats); entropy and top1 are None if they are not asked for."""
    shape = logits.shape[:-1]
    logprobs = logits.new_empty(shape, dtype=torch.float32)
    row_stats = logits.new_empty((*shape, 2), dtype=torch.float32)
    entropy = logits.new_empty(shape, dtype=torch.float32) if return_entropy else None
    top1 = logits.new_empty(shape, dtype=torch.bool) if return_top1 else None
    _forward(backend, logits, token_ids, mask, temperature, softcap, logprobs, row_stats, entropy, top1)
    return logprobs, entropy, top1, row_stats


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, token_ids, mask, temperature, softcap, return_entropy, return_top1, backend):
        logprobs, entropy, top1, row_stats = _evaluate(
            logits, token_ids, mask, temperature, softcap, return_entropy, return_top1, backend
        )
        # Copies, as the caller may change the outputs in place.
        kept_entropy = None if entropy is None else entropy.clone()
        ctx.save_for_backward(logits, token_ids, mask, row_stats, logprobs.clone(), kept_entropy)
        ctx.options = (temperature, softcap, backend)
        ctx.set_materialize_grads(False)
        return logprobs if entropy is None and top1 is None else present(logprobs, entropy, top1)

    @staticmethod
    @differentiable_once(OP)
    def backward(ctx, dlogprobs, dentropy=None, _=None):
        # Without the entropy the second upstream is that of top1, which is None.
        logits, token_ids, mask, row_stats, logprobs, entropy = ctx.saved_tensors
        temperature, softcap, backend = ctx.options
        dlogits = None
        if ctx.needs_input_grad[0] and not (dlogprobs is None and dentropy is None):
            if dlogprobs is None:
                dlogprobs = torch.zeros_like(logprobs)
            dlogits = empty_large(logits.shape, like=logits)
            _backward(
                backend, logits, token_ids, mask, temperature, softcap, row_stats, logprobs, entropy,
                dlogprobs.contiguous(), None if dentropy is None else dentropy.contiguous(), dlogits,
            )  # fmt: skip
        return dlogits, None, None, None, None, None, None, None


def _forward_cpu(logits, *rest):
    _C.token_logprobs_fwd(*_native_arguments(logits, *rest), threads_for(logits.numel()))


def _backward_cpu(logits, *rest):
    *rest, dlogits = _native_arguments(logits, *rest)
    _C.token_logprobs_bwd(*rest, row_layout(dlogits), threads_for(logits.numel()))


def _forward_cuda(logits, token_ids, *rest):
    sizes = (token_ids.numel(), logits.shape[-1], DTYPE_CODES[logits.dtype])
    workspace = cuda_workspace("token_logprobs", *sizes, like=logits, dtype=torch.uint8)
    launch_cuda("token_logprobs_fwd", logits, *_native_arguments(logits, token_ids, *rest), workspace)


def _backward_cuda(logits, *rest):
    *rest, dlogits = _native_arguments(logits, *rest)
    launch_cuda("token_logprobs_bwd", logits, *rest, row_layout(dlogits))


def _native_arguments(logits, token_ids, mask, temperature, *rest):
    """With sizes in front, rows where they begin, and the inverse of the temperature."""
    return token_ids.numel(), logits.shape[-1], row_layout(logits), token_ids, mask, 1.0 / temperature, *rest


_forward = native_op(
    "token_logprobs_fwd",
    "Tensor logits, Tensor token_ids, Tensor? mask, float temperature, float softcap, "
    "Tensor(a!) logprobs, Tensor(b!) row_stats, Tensor(c!)? entropy, Tensor(d!)? top1",
    {"cpu": _forward_cpu, "cuda": _forward_cuda, "triton": triton_kernel(OP, "forward")},
)
_backward = native_op(
    "token_logprobs_bwd",
    "Tensor logits, Tensor token_ids, Tensor? mask, float temperature, float softcap, Tensor row_stats, "
    "Tensor logprobs, Tensor? entropy, Tensor dlogprobs, Tensor? dentropy, Tensor(a!) dlogits",
    {"cpu": _backward_cpu, "cuda": _backward_cuda, "triton": triton_kernel(OP, "backward")},
)
