"""Triton kernels of ppo_advantages: KL, rewards, GAE and each row's sums; all sums in order; whitening."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastrl.kernels.gae import first_column, next_kept, tile_advantages, tile_of
from fastrl.kernels.launch import launch
from fastrl.kernels.maths import (
    add_moments,
    clamp,
    element,
    explained_variance,
    kl_estimate,
    row_moments,
    sum_parts,
    total_moments,
)

WHITEN_EPS = tl.constexpr(1e-8)  # see fastrl.constants

# A row's part: n, 1 if n > 0, sums of kl, rewards and values, score; mean and M2 of advantages and of returns.
PARTS = 10
SUMS = tl.constexpr(8)  # the first six, and two more for a power of two


@triton.jit(do_not_specialize=["rows"])
def advantage_rows_kernel(
    logprobs, ref_logprobs, values, scores, mask, kl_coef, kl_clip, score_clip, gamma, gae_lambda,
    advantages, returns, rewards, kl, parts, rows, steps,
    ESTIMATOR: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    score = tl.load(scores + row, mask=in_rows, other=0.0)
    clipped_score = clamp(score, -score_clip, score_clip)[:, None]
    zero = tl.zeros((ROWS,), tl.float32)
    decay = zero + gamma * gae_lambda
    after, carry = zero, zero
    n, kl_sum, reward_sum, value_sum = zero, zero, zero, zero
    advantage_m2, return_m2 = zero, zero
    advantage_mean, return_mean = zero.to(tl.float64), zero.to(tl.float64)
    chunks = tl.cdiv(steps, STEPS)
    for i in range(chunks):
        step = (chunks - 1 - i) * STEPS + tl.arange(0, STEPS)[None, :]
        at = row[:, None] * steps + step
        inside = in_rows[:, None] & (step < steps)
        right_inside = in_rows[:, None] & (step + 1 < steps)
        keep = inside & tl.load(mask + at, mask=inside, other=0).to(tl.int1)
        right_keep = right_inside & tl.load(mask + at + 1, mask=right_inside, other=0).to(tl.int1)
        value = tl.load(values + at, mask=inside, other=0.0)
        right_value = tl.load(values + at + 1, mask=right_inside, other=0.0)
        k1 = tl.load(logprobs + at, mask=inside, other=0.0) - tl.load(ref_logprobs + at, mask=inside, other=0.0)

        followed, next_value = next_kept(right_value, right_keep, after)
        after = first_column(tl.where(keep, value, next_value), STEPS)
        estimate = tl.where(keep, kl_estimate(k1, ESTIMATOR), 0.0)
        clipped = clamp(estimate, -kl_clip, kl_clip)
        last = keep & ~followed & (n == 0.0)[:, None]
        reward = tl.where(keep, -kl_coef * clipped, 0.0) + tl.where(last, clipped_score, 0.0)
        tl.store(kl + at, clipped, mask=inside)
        tl.store(rewards + at, reward, mask=inside)
        kl_sum += tl.sum(estimate, 1)
        reward_sum += tl.sum(reward, 1)
        value_sum += tl.sum(tl.where(keep, value, 0.0), 1)

        advantage = tile_advantages(reward + gamma * next_value - value, keep, None, decay, carry)
        carry = first_column(advantage, STEPS)
        tl.store(advantages + at, tl.where(keep, advantage, 0.0), mask=inside)
        tl.store(returns + at, tl.where(keep, advantage + value, 0.0), mask=inside)
        count = tl.sum(keep.to(tl.float32), 1)
        mean, m2 = row_moments(advantage, keep, count)
        advantage_mean, advantage_m2 = add_moments(n, advantage_mean, advantage_m2, count, mean, m2)
        mean, m2 = row_moments(advantage + value, keep, count)
        return_mean, return_m2 = add_moments(n, return_mean, return_m2, count, mean, m2)
        n += count
    parts += row
    stride = rows.to(tl.int64)
    tl.store(parts, n, mask=in_rows)
    tl.store(parts + stride, (n > 0.0).to(tl.float32), mask=in_rows)
    tl.store(parts + 2 * stride, kl_sum, mask=in_rows)
    tl.store(parts + 3 * stride, reward_sum, mask=in_rows)
    tl.store(parts + 4 * stride, value_sum, mask=in_rows)
    tl.store(parts + 5 * stride, tl.where(n > 0.0, score, 0.0), mask=in_rows)
    tl.store(parts + 6 * stride, advantage_mean, mask=in_rows)
    tl.store(parts + 7 * stride, advantage_m2, mask=in_rows)
    tl.store(parts + 8 * stride, return_mean, mask=in_rows)
    tl.store(parts + 9 * stride, return_m2, mask=in_rows)


@triton.jit(do_not_specialize=["rows"])
def advantage_totals_kernel(
    parts, rows, moments, stats, whitening, CENTER: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: statistics in the order of AdvantageStats; whitening = (shift, factor)."""
    rows = rows.to(tl.int64)
    sums = sum_parts(parts, rows, SUMS, BLOCK)
    n, sequences = element(sums, 0, SUMS), element(sums, 1, SUMS)
    tokens, rows_kept = tl.maximum(n, 1.0), tl.maximum(sequences, 1.0)
    mean, m2 = total_moments(parts, parts + 6 * rows, parts + 7 * rows, rows, n, BLOCK)
    return_mean, return_m2 = total_moments(parts, parts + 8 * rows, parts + 9 * rows, rows, n, BLOCK)
    variance, return_variance = m2 / tokens, return_m2 / tokens
    tl.store(moments, n)
    tl.store(moments + 1, mean)
    tl.store(moments + 2, m2)
    tl.store(stats, n.to(tl.float32))
    tl.store(stats + 1, sequences.to(tl.float32))
    tl.store(stats + 2, (element(sums, 2, SUMS) / tokens).to(tl.float32))
    tl.store(stats + 3, (element(sums, 2, SUMS) / rows_kept).to(tl.float32))
    tl.store(stats + 4, (element(sums, 3, SUMS) / rows_kept).to(tl.float32))
    tl.store(stats + 5, (element(sums, 5, SUMS) / rows_kept).to(tl.float32))
    tl.store(stats + 6, (element(sums, 4, SUMS) / tokens).to(tl.float32))
    tl.store(stats + 7, return_mean.to(tl.float32))
    tl.store(stats + 8, return_variance.to(tl.float32))
    tl.store(stats + 9, mean.to(tl.float32))
    tl.store(stats + 10, tl.sqrt(variance).to(tl.float32))
    tl.store(stats + 11, explained_variance(variance, return_variance, return_mean).to(tl.float32))
    tl.store(whitening, mean.to(tl.float32) if CENTER else 0.0)
    tl.store(whitening + 1, (1.0 / tl.sqrt(variance + WHITEN_EPS)).to(tl.float32) if SCALE else 1.0)


@triton.jit
def whiten_kernel(advantages, mask, whitening, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    keep = tl.load(mask + i, mask=inside, other=0).to(tl.int1)
    advantage = tl.load(advantages + i, mask=inside, other=0.0)
    white = (advantage - tl.load(whitening)) * tl.load(whitening + 1)
    tl.store(advantages + i, tl.where(keep, white, 0.0), mask=inside)


def ppo_advantages(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    mask: torch.Tensor,
    kl_coef: float,
    kl_estimator: int,
    kl_clip: float,
    score_clip: float,
    gamma: float,
    gae_lambda: float,
    center: bool,
    scale: bool,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    rewards: torch.Tensor,
    kl: torch.Tensor,
    moments: torch.Tensor,
    stats: torch.Tensor,
) -> None:
    rows, steps = logprobs.shape
    tile_rows, tile_steps, warps = tile_of(steps)
    parts = logprobs.new_empty(PARTS * rows, dtype=torch.float64)
    whitening = logprobs.new_empty(2)
    launch(
        advantage_rows_kernel, (triton.cdiv(rows, tile_rows),), logprobs,
        logprobs, ref_logprobs, values, scores, mask, kl_coef, kl_clip, score_clip, gamma, gae_lambda,
        advantages, returns, rewards, kl, parts, rows, steps,
        ESTIMATOR=kl_estimator, ROWS=tile_rows, STEPS=tile_steps, num_warps=warps,
    )  # fmt: skip
    launch(
        advantage_totals_kernel, (1,), logprobs,
        parts, rows, moments, stats, whitening, CENTER=center, SCALE=scale, BLOCK=1024, num_warps=16,
    )  # fmt: skip
    if center or scale:
        block = 2048
        launch(
            whiten_kernel, (triton.cdiv(logprobs.numel(), block),), logprobs,
            advantages, mask, whitening, logprobs.numel(), BLOCK=block, num_warps=4,
        )  # fmt: skip
