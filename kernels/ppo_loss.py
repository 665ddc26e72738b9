"""Triton kernels of ppo_loss: gradients and sums of blocks of tokens; all sums in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastrl.kernels.launch import launch
from fastrl.kernels.maths import (
    MAX_LOG_RATIO,
    clamp,
    element,
    exp,
    exp_minus_linear,
    explained_variance,
    row_moments,
    sum_parts,
    total_moments,
)

BLOCK = 2048
AT_ONCE = 1024  # blocks whose parts are added at once

# A block's part: n, then sums of policy, value, entropy, approx_kl, clipped, value_clipped, ratio (as in PPOStats);
# the greatest ratio; mean and M2 of returns and of returns - values; the sum of kl.
SUMS = tl.constexpr(8)
PARTS = 14


@triton.jit
def _kept(pointer, at, inside, keep):
    return tl.where(keep, tl.load(pointer + at, mask=inside, other=0.0), 0.0)


@triton.jit
def divisor(denominator, COUNTED: tl.constexpr):
    """What the loss is divided by; a count of kept tokens may be 0."""
    total = tl.load(denominator).to(tl.float32)
    return tl.maximum(total, 1.0) if COUNTED else total


@triton.jit
def ppo_blocks_kernel(
    logprobs, values, entropy, old_logprobs, old_values, advantages, returns, mask, denominator, size,
    ratio_low, ratio_high, vf_clip_coef, vf_coef, ent_coef, dual_clip, dlogprobs, dvalues, dentropy, parts,
    COUNTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < size
    keep = inside & tl.load(mask + at, mask=inside, other=0).to(tl.int1)
    scale = tl.div_rn(1.0, divisor(denominator, COUNTED))

    log_ratio = _kept(logprobs, at, inside, keep) - _kept(old_logprobs, at, inside, keep)
    bounded = clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = exp(bounded)
    advantage = _kept(advantages, at, inside, keep)
    unclipped = -advantage * ratio
    clipped = -advantage * clamp(ratio, ratio_low, ratio_high)
    is_clipped = clipped > unclipped
    policy = tl.where(is_clipped, clipped, unclipped)
    bound = -dual_clip * advantage
    is_bounded = (advantage < 0.0) & (policy > bound)
    policy = tl.where(is_bounded, bound, policy)
    if dlogprobs is not None:  # d(-A r) / d logprob = -A r; the clipped and bounded branches are constant
        constant = is_clipped | is_bounded | (tl.abs(log_ratio) > MAX_LOG_RATIO)
        tl.store(dlogprobs + at, tl.where(constant, 0.0, unclipped) * scale, mask=inside)

    value, old_value = _kept(values, at, inside, keep), _kept(old_values, at, inside, keep)
    target = _kept(returns, at, inside, keep)
    error = value - target
    near = clamp(value, old_value - vf_clip_coef, old_value + vf_clip_coef) - target
    value_clipped = near * near > error * error
    if dvalues is not None:
        tl.store(dvalues + at, tl.where(value_clipped, 0.0, error) * (vf_coef * scale), mask=inside)
    squared_error = tl.where(value_clipped, near * near, error * error)

    n = tl.sum(keep.to(tl.float32), 1)
    blocks = tl.num_programs(0).to(tl.int64)
    parts += tl.program_id(0) + tl.arange(0, 1)
    tl.store(parts, n)
    tl.store(parts + blocks, tl.sum(policy, 1))
    tl.store(parts + 2 * blocks, tl.sum(0.5 * squared_error, 1))
    if entropy is not None:
        tl.store(parts + 3 * blocks, tl.sum(_kept(entropy, at, inside, keep), 1))
        if dentropy is not None:
            tl.store(dentropy + at, tl.where(keep, -ent_coef * scale, 0.0), mask=inside)
    else:
        tl.store(parts + 3 * blocks, tl.zeros((1,), tl.float64))
    kept_ratio = tl.where(keep, ratio, 0.0)
    tl.store(parts + 4 * blocks, tl.sum(tl.where(keep, exp_minus_linear(bounded, ratio), 0.0), 1))
    tl.store(parts + 5 * blocks, tl.sum(is_clipped.to(tl.float32), 1))
    tl.store(parts + 6 * blocks, tl.sum(value_clipped.to(tl.float32), 1))
    tl.store(parts + 7 * blocks, tl.sum(kept_ratio, 1))
    tl.store(parts + 8 * blocks, tl.max(kept_ratio, 1))
    mean, m2 = row_moments(target, keep, n)
    tl.store(parts + 9 * blocks, mean)
    tl.store(parts + 10 * blocks, m2)
    mean, m2 = row_moments(target - value, keep, n)
    tl.store(parts + 11 * blocks, mean)
    tl.store(parts + 12 * blocks, m2)
    tl.store(parts + 13 * blocks, tl.sum(-bounded, 1))  # log_ratio is 0 where nothing is kept


@triton.jit
def greatest(parts, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total = tl.maximum(total, tl.load(parts + i, mask=i < count, other=0.0))
    return tl.max(total, 0)


@triton.jit(do_not_specialize=["blocks"])
def ppo_totals_kernel(
    parts, blocks, denominator, vf_coef, ent_coef, loss, stats, COUNTED: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: the loss, and statistics in the order of PPOStats."""
    blocks = blocks.to(tl.int64)
    sums = sum_parts(parts, blocks, SUMS, BLOCK)
    n = element(sums, 0, SUMS)
    policy, value, entropy = element(sums, 1, SUMS), element(sums, 2, SUMS), element(sums, 3, SUMS)
    total = policy + vf_coef * value - ent_coef * entropy
    tl.store(loss, (total / divisor(denominator, COUNTED).to(tl.float64)).to(tl.float32))

    tokens = tl.maximum(n, 1.0)
    index = tl.arange(0, SUMS)
    tl.store(stats + index, (sums / tl.where(index == 0, 1.0, tokens)).to(tl.float32))
    ratio_sum, ratio_max = element(sums, 7, SUMS), greatest(parts + 8 * blocks, blocks, BLOCK)
    tl.store(stats + 8, tl.where(ratio_sum == ratio_sum, ratio_max, ratio_sum).to(tl.float32))  # NaN stays NaN
    mean, m2 = total_moments(parts, parts + 9 * blocks, parts + 10 * blocks, blocks, n, BLOCK)
    _, residual_m2 = total_moments(parts, parts + 11 * blocks, parts + 12 * blocks, blocks, n, BLOCK)
    tl.store(stats + 9, explained_variance(residual_m2 / tokens, m2 / tokens, mean).to(tl.float32))
    kl = sum_parts(parts + 13 * blocks, blocks, 1, BLOCK)
    tl.store(stats + 10 + tl.arange(0, 1), (kl / tokens).to(tl.float32))


def _aligned(tensor):
    """Triton adds in another order where addresses are no multiples of 16: a copy keeps the bits."""
    return tensor.clone() if tensor is not None and tensor.data_ptr() % 16 else tensor


def ppo_loss(
    logprobs: torch.Tensor,
    values: torch.Tensor,
    entropy: torch.Tensor | None,
    old_logprobs: torch.Tensor,
    old_values: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    denominator: torch.Tensor | None,
    clip_coef: float,
    vf_clip_coef: float,
    vf_coef: float,
    ent_coef: float,
    dual_clip: float,
    loss: torch.Tensor,
    stats: torch.Tensor,
    dlogprobs: torch.Tensor | None,
    dvalues: torch.Tensor | None,
    dentropy: torch.Tensor | None,
) -> None:
    logprobs, values, old_logprobs, old_values = map(_aligned, (logprobs, values, old_logprobs, old_values))
    advantages, returns, mask, entropy = map(_aligned, (advantages, returns, mask, entropy))
    size = logprobs.numel()
    blocks = triton.cdiv(size, BLOCK)
    parts = logprobs.new_empty(PARTS * blocks, dtype=torch.float64)
    counted = denominator is None
    if denominator is None:
        denominator = mask.sum()
    launch(
        ppo_blocks_kernel, (blocks,), logprobs,
        logprobs, values, entropy, old_logprobs, old_values, advantages, returns, mask, denominator, size,
        1.0 - clip_coef, 1.0 + clip_coef, vf_clip_coef, vf_coef, ent_coef, dual_clip, dlogprobs, dvalues, dentropy,
        parts, COUNTED=counted, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    launch(
        ppo_totals_kernel, (1,), logprobs,
        parts, blocks, denominator, vf_coef, ent_coef, loss, stats, COUNTED=counted, BLOCK=AT_ONCE, num_warps=16,
    )  # fmt: skip
