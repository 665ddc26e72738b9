"""Device functions that several ops share: exponentials, KL estimates, means and variances."""

from __future__ import annotations

import triton
import triton.language as tl

MAX_LOG_RATIO = tl.constexpr(20.0)  # see fastrl.constants

LOG2_E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693145751953125)  # few bits: whole multiples of it are exact
LN2_LOW = tl.constexpr(1.428606765330187e-06)


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def exp(x):
    """e^x for x <= 88, at least e^-87. The device's exp2 of x * log2(e) alone would lose the digits of large |x|."""
    x = tl.where(x < -87.0, -87.0, x)
    n = tl.floor(x * LOG2_E + 0.5)
    rest = (x - n * LN2_HIGH) - n * LN2_LOW
    return tl.exp2(n) * tl.exp2(rest * LOG2_E)


@triton.jit
def exp_minus_linear(d, exp_d):
    """exp_d - 1 - d for exp_d = e^d, never negative; a Taylor polynomial keeps the digits for small d."""
    p = d * (1.0 / 362880) + 1.0 / 40320
    p = p * d + 1.0 / 5040
    p = p * d + 1.0 / 720
    p = p * d + 1.0 / 120
    p = p * d + 1.0 / 24
    p = p * d + 1.0 / 6
    p = p * d + 0.5
    exact = exp_d - 1.0 - d
    return tl.where(tl.abs(d) < 0.5, p * d * d, tl.where(exact < 0.0, 0.0, exact))


@triton.jit
def kl_estimate(k1, ESTIMATOR: tl.constexpr):
    """The estimator of that number from k1 = logprob - ref_logprob; see fastrl.ops.ppo_advantages."""
    if ESTIMATOR == 1:
        return k1
    elif ESTIMATOR == 2:
        return 0.5 * k1 * k1
    else:
        d = -k1
        return exp_minus_linear(d, exp(tl.where(d > MAX_LOG_RATIO, MAX_LOG_RATIO, d)))


@triton.jit
def row_moments(x, keep, count):
    """Mean (float64) and sum of squared deviations of each row of a tile over its `count` kept elements.

    Deviations are from the rounded mean; their own mean corrects it: equal elements have that element as their mean.
    """
    scale = 1.0 / tl.maximum(count, 1.0)
    mean = tl.sum(tl.where(keep, x, 0.0), 1) * scale
    deviation = tl.where(keep, x - mean[:, None], 0.0)
    total = tl.sum(deviation, 1)
    m2 = tl.sum(deviation * deviation, 1) - total * total * scale
    correction = tl.where(total == total, total * scale, 0.0)  # an infinite mean has no deviations
    return mean.to(tl.float64) + correction.to(tl.float64), tl.where(m2 < 0.0, 0.0, m2)


@triton.jit
def add_moments(n, mean, m2, more_n, more_mean, more_m2):
    """Mean and M2 of two samples together, (n, mean, M2) each (Chan, Golub and LeVeque 1983)."""
    share = more_n / tl.maximum(n + more_n, 1.0)
    difference = more_mean - mean
    rounded = difference.to(tl.float32)
    return mean + difference * share, m2 + more_m2 + rounded * rounded * n * share


@triton.jit
def sum_parts(parts, count, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the first ROWS rows of a float64 (rows, count) array, in a fixed order."""
    row = tl.arange(0, ROWS).to(tl.int64)[:, None] * count
    total = tl.zeros((ROWS, BLOCK), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]
        total += tl.load(parts + row + i, mask=i < count, other=0.0)
    return tl.sum(total, 1)


@triton.jit
def element(vector, INDEX: tl.constexpr, SIZE: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SIZE) == INDEX, vector, 0.0), 0)


@triton.jit
def total_moments(n, mean, m2, count, total_n, BLOCK: tl.constexpr):
    """Mean and M2 in float64 of all samples from `count` parts; `total_n` is the sum of their n."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        part_n = tl.load(n + i, mask=i < count, other=0.0)
        total += part_n * tl.load(mean + i, mask=i < count, other=0.0)
    total_mean = tl.sum(total, 0) / tl.maximum(total_n, 1.0)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        part_n = tl.load(n + i, mask=i < count, other=0.0)
        difference = tl.load(mean + i, mask=i < count, other=0.0) - total_mean
        total += tl.load(m2 + i, mask=i < count, other=0.0) + part_n * difference * difference
    return total_mean, tl.sum(total, 0)


@triton.jit
def explained_variance(residual, total, mean):
    """1 - residual / total; 0 where there is no variance to explain, but for the rounding of the mean."""
    rounding = 1e-6 * mean
    nothing = total <= rounding * rounding
    return tl.where(nothing, 0.0, 1.0 - residual / tl.where(nothing, 1.0, total))
