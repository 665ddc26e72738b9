"""The clipped PPO loss of policy and critic with its statistics."""

from __future__ import annotations

from functools import partial
from math import inf
from typing import NamedTuple

import torch

from fastrl.checks import (
    check,
    check_above_one,
    check_data,
    check_device,
    check_float,
    check_mask,
    check_non_negative,
    check_plain,
    check_positive,
)
from fastrl.masked import compute_dtype
from fastrl.ops.autograd import differentiable_once
from fastrl.ops.backend import choose_for
from fastrl.ops.native import _C, as_data, cuda_workspace, launch_cuda, native_op, threads_for, triton_kernel
from fastrl.ops.scale_gradient import scale_gradient
from fastrl.reference import ppo_loss as reference

OP = "ppo_loss"


class PPOStats(NamedTuple):
    """Float32 0-d tensors on the inputs' device, detached: means over kept tokens, 0 where none is kept.

    They are averaged over this call's own tokens whatever `denominator` is; weight them by `tokens` to combine calls.
    log r is bounded at +-20 in all of them. One token can then add 20 / tokens to `kl`, but e^20 = 4.9e8 / tokens to
    `approx_kl` and the ratios: a limit on the KL should look at `kl` as well.
    """

    tokens: torch.Tensor  # kept tokens
    policy_loss: torch.Tensor
    value_loss: torch.Tensor  # with its factor 1/2, without vf_coef
    entropy: torch.Tensor  # nats; 0 if none was given
    approx_kl: torch.Tensor  # k3 estimate of KL(old policy || policy), r - 1 - log r: never negative
    clip_frac: torch.Tensor  # share of tokens whose policy term took the clipped branch
    vf_clip_frac: torch.Tensor  # share of tokens whose value term took the clipped branch
    ratio_mean: torch.Tensor
    ratio_max: torch.Tensor
    explained_variance: torch.Tensor  # 1 - variance(returns - values) / variance(returns); 0 if that is 0 or rounding
    kl: torch.Tensor  # k1 estimate of the same, -log r, which can be negative: verl's ppo_kl, CleanRL's old_approx_kl


def ppo_loss(
    logprobs: torch.Tensor,
    values: torch.Tensor,
    old_logprobs: torch.Tensor,
    old_values: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    entropy: torch.Tensor | None = None,
    clip_coef: float = 0.2,
    vf_clip_coef: float | None = 0.2,
    vf_coef: float = 0.1,
    ent_coef: float = 0.0,
    dual_clip: float | None = None,
    denominator: float | torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, PPOStats]:
    """Clipped policy loss + vf_coef * clipped value loss - ent_coef * entropy, over the kept tokens.

        r      = exp(logprobs - old_logprobs)
        policy = max(-A r, -A clamp(r, 1 - clip_coef, 1 + clip_coef));   A < 0: at most -A dual_clip
        value  = max((V - G)^2, (clamp(V, V_old +- vf_clip_coef) - G)^2) / 2
        loss   = sum over kept tokens of (policy + vf_coef * value - ent_coef * entropy) / denominator

    Same value as these lines in torch; loss, gradients and statistics come from one pass, without a host sync.

    Args:
        logprobs, values: (B, R) float32, bfloat16 or float16 (float64 runs on `reference`), any strides;
            differentiable.
        old_logprobs, old_values: (B, R) as they were at rollout. advantages A, returns G: (B, R) from
            `ppo_advantages`. No gradient flows into these four.
        mask: (B, R) bool, True = keep. Dropped slots add nothing, get zero gradient, and may hold anything.
        entropy: (B, R) per-token entropy in nats, differentiable; needed if ent_coef > 0, else only reported.
        clip_coef: > 0, half-width of the ratio's range.
        vf_clip_coef: > 0, half-width of the value's range around old_values; None = no clipping.
        vf_coef, ent_coef: >= 0, weights of the value loss and of the entropy bonus.
        dual_clip: > 1; bounds the policy term at -dual_clip * A where A < 0. None = unbounded.
        denominator: what the sums are divided by, a positive number or 0-d tensor; None = this call's kept tokens (1 if
            none). For micro-batches pass the whole batch's count: their gradients then add up to the batch's.
        backend: None chooses; else one of reference, cpu, triton, cuda.
    Returns:
        (loss, PPOStats): loss is a 0-d float32 tensor (float64 if an input is).
    Raises:
        ValueError: shape, dtype, device or value does not fit.
    Numerics: float32; sums in a fixed order, so bits do not depend on the thread count. At a tie of two branches the
        unclipped one is taken, so r = 1 has the whole gradient -A. log r is clamped to +-20 (gradient 0 outside), as
        verl does: float32 overflows at 88, and inf * 0 in backward is NaN. Gradients have the dtype of their inputs.
    Source: Schulman et al. 2017, arXiv:1707.06347, equation 7; dual clip: Ye et al. 2020, arXiv:1912.09729.
    """
    _check(logprobs, values, old_logprobs, old_values, advantages, returns, mask, entropy)
    _check_options(clip_coef, vf_clip_coef, vf_coef, ent_coef, entropy, dual_clip)
    _check_denominator(denominator, logprobs)
    dtype = compute_dtype(logprobs, values, old_logprobs, old_values, advantages, returns, entropy)
    backend = choose_for(OP, logprobs.device, dtype, backend)
    if isinstance(denominator, torch.Tensor):
        denominator = denominator.to(dtype)
    elif denominator is not None:  # filled on the device: a copy from the host would wait
        denominator = torch.full((), denominator, dtype=dtype, device=logprobs.device)
    logprobs, values = logprobs.to(dtype).contiguous(), values.to(dtype).contiguous()
    entropy = None if entropy is None else entropy.to(dtype).contiguous()
    old_logprobs, old_values, advantages, returns = (
        as_data(t, dtype) for t in (old_logprobs, old_values, advantages, returns)
    )
    run = reference.ppo_loss if backend == "reference" else partial(_native, backend)
    loss, stats = run(
        logprobs, values, entropy, old_logprobs, old_values, advantages, returns, mask.contiguous(), denominator,
        clip_coef, vf_clip_coef, vf_coef, ent_coef, dual_clip,
    )  # fmt: skip
    return loss, PPOStats(*stats.unbind())


def _check(logprobs, values, old_logprobs, old_values, advantages, returns, mask, entropy):
    check_float(OP, "logprobs", logprobs)
    check(logprobs.ndim == 2, OP, "logprobs", "shape (B, R)", tuple(logprobs.shape))
    shape = logprobs.shape
    check_data(OP, "values", values, shape, logprobs)
    check_data(OP, "old_logprobs", old_logprobs, shape, logprobs)
    check_data(OP, "old_values", old_values, shape, logprobs)
    check_data(OP, "advantages", advantages, shape, logprobs)
    check_data(OP, "returns", returns, shape, logprobs)
    check_mask(OP, mask, shape, logprobs)
    if entropy is not None:
        check_data(OP, "entropy", entropy, shape, logprobs)


def _check_options(clip_coef, vf_clip_coef, vf_coef, ent_coef, entropy, dual_clip):
    check_positive(OP, "clip_coef", clip_coef)
    if vf_clip_coef is not None:
        check_positive(OP, "vf_clip_coef", vf_clip_coef)
    check_non_negative(OP, "vf_coef", vf_coef)
    check_non_negative(OP, "ent_coef", ent_coef)
    check(entropy is not None or ent_coef == 0, OP, "entropy", "a (B, R) tensor, because ent_coef > 0", None)
    if dual_clip is not None:
        check_above_one(OP, "dual_clip", dual_clip)


def _check_denominator(denominator, logprobs):
    if isinstance(denominator, torch.Tensor):
        check_plain(OP, "denominator", denominator)
        check(denominator.ndim == 0, OP, "denominator", "a 0-d tensor", f"shape {tuple(denominator.shape)}")
        check_device(OP, "denominator", denominator, logprobs)
    elif denominator is not None:
        check_positive(OP, "denominator", denominator)


def _native(
    backend, logprobs, values, entropy, old_logprobs, old_values, advantages, returns, mask, denominator,
    clip_coef, vf_clip_coef, vf_coef, ent_coef, dual_clip,
):  # fmt: skip
    options = (
        float(clip_coef), inf if vf_clip_coef is None else float(vf_clip_coef), float(vf_coef), float(ent_coef),
        inf if dual_clip is None else float(dual_clip),
    )  # fmt: skip
    graph = torch.is_grad_enabled()
    wanted = [graph and t is not None and t.requires_grad for t in (logprobs, values, entropy)]
    return _PPOLoss.apply(
        logprobs, values, entropy, old_logprobs, old_values, advantages, returns, mask, denominator,
        options, wanted, backend,
    )  # fmt: skip


class _PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logprobs, values, entropy, old_logprobs, old_values, advantages, returns, mask, denominator,
        options, wanted, backend,
    ):  # fmt: skip
        loss, stats = logprobs.new_empty(()), logprobs.new_empty(len(PPOStats._fields))
        gradients = [torch.empty_like(logprobs) if want else None for want in wanted]
        _loss(
            backend, logprobs, values, entropy, old_logprobs, old_values, advantages, returns, mask, denominator,
            *options, loss, stats, *gradients,
        )  # fmt: skip
        ctx.save_for_backward(*gradients)
        ctx.inputs, ctx.backend = (logprobs, values, entropy), backend
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @differentiable_once(OP)
    def backward(ctx, dloss, _):
        gradients = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(
            scale_gradient(ctx.backend, g, dloss) if g is not None and needed else None for g, needed in gradients
        ), *[None] * 9


def _loss_cpu(logprobs, *rest):
    size = logprobs.numel()
    _C.ppo_loss(size, logprobs, *rest, threads_for(size))


def _loss_cuda(logprobs, *rest):
    size = logprobs.numel()
    workspace = cuda_workspace(OP, size, like=logprobs, dtype=torch.float64)
    launch_cuda(OP, logprobs, size, logprobs, *rest, workspace)


_loss = native_op(
    "ppo_loss",
    "Tensor logprobs, Tensor values, Tensor? entropy, Tensor old_logprobs, Tensor old_values, Tensor advantages, "
    "Tensor returns, Tensor mask, Tensor? denominator, float clip_coef, float vf_clip_coef, float vf_coef, "
    "float ent_coef, float dual_clip, Tensor(a!) loss, Tensor(b!) stats, Tensor(c!)? dlogprobs, "
    "Tensor(d!)? dvalues, Tensor(e!)? dentropy",
    {"cpu": _loss_cpu, "cuda": _loss_cuda, "triton": triton_kernel("ppo_loss", "ppo_loss")},
)
