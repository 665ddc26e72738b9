"""Triton kernels on rows of logits: log-probs and entropies, and their gradients with respect to the logits.

Forward cuts every row into pieces of a fixed size, one program each, and a second kernel combines the pieces of a row
in order, so a few long rows fill the GPU as well as many rows do, and a row's bits do not depend on the others; but on
its address and on the stride of rows, as far as Triton loads rows that begin at 16-byte boundaries in wider pieces.
The target is kept out of the sums: log p = -log(1 + the others' odds) is exact where p is near 1.

A logit's exponent is d_v = (x_v - offset) * scale with scale = log2(e) / temperature, x_v the (soft-capped) logit and
offset the largest x of the row. row_stats holds (offset, log2 sum_v 2^d_v); the offset is -inf where no logit is above.
Rows are addressed as fastrl.ops.native.row_layout does: (m // inner) * outer_stride + (m % inner) * inner_stride.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastrl.kernels.launch import launch
from fastrl.ops.native import row_layout

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
LOWEST_LOG2 = tl.constexpr(-150.0)  # 2^d is 0 below; the bound keeps (-inf) * 0 out of weighted sums
# Of a piece: its largest x; the sums of 2^d and 2^d d relative to it, without the target; whether it beats the target.
PARTIAL = tl.constexpr(4)
PIECES = 32  # combined at once

# Elements and warps of a piece, by the size of the vocabulary: enough loads in flight, 32 values a thread at most.
SMALL, LARGE = (1024, 4), (8192, 8)
# Elements and warps of a program that writes gradients.
GRADIENT_SMALL, GRADIENT_LARGE = (1024, 4), (4096, 8)


@triton.jit
def row_start(m, inner, outer_stride, inner_stride):
    """Offset of row m, an int32: no 64-bit division, whose cost would show in a program of few elements a thread."""
    return (m // inner).to(tl.int64) * outer_stride + (m % inner).to(tl.int64) * inner_stride


@triton.jit
def load_columns(row, start, columns, BLOCK: tl.constexpr):
    """float32 logits [start, start + BLOCK) of a row, -inf beyond the last; wide loads where none is beyond."""
    at = row + start + tl.arange(0, BLOCK)
    if start + BLOCK <= columns:
        logit = tl.load(at)
    else:
        logit = tl.load(at, mask=start + tl.arange(0, BLOCK) < columns, other=float("-inf"))
    return logit.to(tl.float32)


@triton.jit
def store_columns(row, start, columns, value, BLOCK: tl.constexpr):
    at = row + start + tl.arange(0, BLOCK)
    value = value.to(row.dtype.element_ty)
    if start + BLOCK <= columns:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=start + tl.arange(0, BLOCK) < columns)


@triton.jit
def capped(logit, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(logit / softcap); -inf stays -inf, so that banned tokens stay banned."""
    if SOFTCAP:
        e = tl.exp2(logit * (2.0 * LOG2E / softcap))  # tanh(y) = 1 - 2 / (e^2y + 1)
        logit = tl.where(logit == float("-inf"), logit, softcap - 2.0 * softcap / (e + 1.0))
    return logit


@triton.jit
def slope(logit, x, softcap):
    """d capped / d logit."""
    t = x / softcap
    return tl.where(logit == float("-inf"), 0.0, 1.0 - t * t)


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0, of full relative accuracy near 0."""
    series = x * (1.0 - x * (0.5 - x * (0.33333334 - x * (0.25 - x * 0.2))))
    return tl.where(x < 0.03125, series, tl.log2(1.0 + x) * LN2)


@triton.jit
def one_minus_exp(x):
    """1 - e^x of x <= 0, of full relative accuracy near 0."""
    series = -x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * 0.008333334))))
    return tl.where(x > -0.03125, series, 1.0 - tl.exp2(x * LOG2E))


@triton.jit
def beats_target(logit, columns, target, target_logit):
    """1 if a logit comes before the target's as the arg max, else 0: the largest does, the first of equals, and NaN is
    above all numbers. Scale, soft cap and temperature keep the order of logits, so they are compared as they are.
    """
    if target_logit != target_logit:
        beats = (logit != logit) & (columns < target)
    else:  # not of comparisons that hold: with NaN none does
        beats = tl.where(columns < target, (logit < target_logit) == 0, (logit <= target_logit) == 0)
    return tl.max(beats.to(tl.int32), 0)


@triton.jit(do_not_specialize=["inner"])
def token_logprobs_fwd_kernel(
    logits, token_ids, mask, partials,
    vocab, inner, outer_stride, inner_stride, scale, softcap,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pieces = tl.cdiv(vocab, BLOCK)
    m = tl.program_id(0) // pieces
    if mask is not None:
        if tl.load(mask + m) == 0:
            return
    start = tl.program_id(0) % pieces * BLOCK
    row = logits + row_start(m, inner, outer_stride, inner_stride)
    logit = load_columns(row, start, vocab, BLOCK)
    x = capped(logit, softcap, SOFTCAP)
    top = tl.max(x, 0)
    d = (x - tl.where(top == float("-inf"), 0.0, top)) * scale  # a piece of -inf adds 2^-inf = 0
    e = tl.exp2(d)
    target = tl.load(token_ids + m) - start
    if (target >= 0) & (target < BLOCK):
        e = tl.where(tl.arange(0, BLOCK) == target.to(tl.int32), 0.0, e)
    at = partials + tl.program_id(0).to(tl.int64) * PARTIAL
    tl.store(at, top)
    tl.store(at + 1, tl.sum(e, 0))
    if ENTROPY:
        tl.store(at + 2, tl.sum(e * tl.maximum(d, LOWEST_LOG2), 0))
    if TOP1:
        token_id = tl.load(token_ids + m)
        in_range = (token_id >= 0) & (token_id < vocab)
        target_logit = tl.load(row + token_id, mask=in_range, other=0.0).to(tl.float32)
        tl.store(at + 3, beats_target(logit, start + tl.arange(0, BLOCK), token_id, target_logit).to(tl.float32))


@triton.jit(do_not_specialize=["inner", "pieces"])
def token_logprobs_combine_kernel(
    logits, token_ids, mask, partials, logprobs, row_stats, entropy, top1,
    vocab, pieces, inner, outer_stride, inner_stride, scale, softcap,
    SOFTCAP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0)
    if mask is not None:
        if tl.load(mask + m) == 0:
            tl.store(logprobs + m, 0.0)
            if row_stats is not None:
                tl.store(row_stats + 2 * m, 0.0)
                tl.store(row_stats + 2 * m + 1, 0.0)
            if entropy is not None:
                tl.store(entropy + m, 0.0)
            if top1 is not None:
                tl.store(top1 + m, False)
            return
    first = partials + m.to(tl.int64) * pieces * PARTIAL
    lane = tl.arange(0, CHUNK)
    tops = tl.full((CHUNK,), float("-inf"), tl.float32)
    for begin in range(0, pieces, CHUNK):
        at = first + (begin + lane) * PARTIAL
        tops = tl.maximum(tops, tl.load(at, mask=begin + lane < pieces, other=float("-inf")))
    offset = tl.max(tops, 0)
    base = tl.where(offset == float("-inf"), 0.0, offset)
    sums = tl.zeros((CHUNK,), tl.float32)
    weighted_sums = tl.zeros((CHUNK,), tl.float32)
    beats = tl.zeros((CHUNK,), tl.float32)
    for begin in range(0, pieces, CHUNK):
        inside = begin + lane < pieces
        at = first + (begin + lane) * PARTIAL
        top = tl.load(at, mask=inside, other=float("-inf"))
        total = tl.load(at + 1, mask=inside, other=0.0)
        shift = tl.maximum((top - base) * scale, LOWEST_LOG2)
        factor = tl.exp2(shift)  # times the sum, even where it is 0: a sum that is NaN stays so
        sums += total * factor
        if entropy is not None:
            weighted_sums += (tl.load(at + 2, mask=inside, other=0.0) + shift * total) * factor
        if top1 is not None:
            beats += tl.load(at + 3, mask=inside, other=0.0)
    rest = tl.sum(sums, 0)

    token_id = tl.load(token_ids + m)
    in_range = (token_id >= 0) & (token_id < vocab)
    row = logits + row_start(m, inner, outer_stride, inner_stride)
    target = tl.load(row + token_id, mask=in_range, other=0.0).to(tl.float32)
    d = (capped(target, softcap, SOFTCAP) - base) * scale
    total = rest + tl.exp2(d)
    log_sum = tl.log2(total)
    # The odds of the others are finite where the target's power of two is not 0.
    logprob = tl.where(d > -100.0, -log1p(rest * tl.exp2(-d)), (d - log_sum) * LN2)

    dead = (offset == float("-inf")) & (total == 0.0)
    poisoned = (total != total) | (in_range == 0)
    tl.store(logprobs + m, tl.where(poisoned, float("nan"), tl.where(dead, float("-inf"), logprob)))
    if row_stats is not None:
        tl.store(row_stats + 2 * m, tl.where(poisoned, 0.0, offset))
        tl.store(row_stats + 2 * m + 1, tl.where(poisoned, float("nan"), tl.where(dead, 0.0, log_sum)))
    if entropy is not None:
        weighted = tl.sum(weighted_sums, 0) + tl.exp2(d) * tl.maximum(d, LOWEST_LOG2)
        nats = (log_sum - weighted / total) * LN2
        tl.store(entropy + m, tl.where(poisoned, float("nan"), tl.where(dead, 0.0, nats)))
    if top1 is not None:
        tl.store(top1 + m, in_range & (tl.sum(beats, 0) == 0.0))


@triton.jit(do_not_specialize=["begin", "inner", "out_inner"])
def token_logprobs_bwd_kernel(
    logits, token_ids, mask, row_stats, logprobs, entropy, dlogprobs, dentropy, out, entropy_out,
    begin, columns, inner, outer_stride, inner_stride, out_inner, out_outer_stride, out_inner_stride,
    inv_temperature, softcap,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out: d (dlogprobs log p + dentropy H) / d logit, each 1 if absent; with `entropy_out` (in the layout of `out`)
    dentropy is absent, out is the gradient of log p alone and entropy_out that of H. `out` may be `logits`.
    """
    tiles = tl.cdiv(columns, BLOCK)
    m = tl.program_id(0) // tiles
    start = tl.program_id(0) % tiles * BLOCK
    out_start = row_start(m, out_inner, out_outer_stride, out_inner_stride)
    offset = tl.load(row_stats + 2 * m)
    log_sum = tl.load(row_stats + 2 * m + 1)
    has_gradient = offset != float("-inf")  # no distribution, no gradient
    if mask is not None:
        has_gradient &= tl.load(mask + m) != 0
    if has_gradient == 0:
        zeros = tl.zeros((BLOCK,), tl.float32)
        store_columns(out + out_start, start, columns, zeros, BLOCK)
        if entropy_out is not None:
            store_columns(entropy_out + out_start, start, columns, zeros, BLOCK)
        return
    logprob = tl.load(logprobs + m)
    from_logprob = inv_temperature
    if dlogprobs is not None:
        from_logprob *= tl.load(dlogprobs + m)
    target = tl.load(token_ids + m) - begin - start
    has_target = (target >= 0) & (target < BLOCK)
    is_target = tl.arange(0, BLOCK) == target.to(tl.int32)

    row = logits + row_start(m, inner, outer_stride, inner_stride)
    logit = load_columns(row, start, columns, BLOCK)
    x = capped(logit, softcap, SOFTCAP)
    log2p = (x - offset) * (inv_temperature * LOG2E) - log_sum
    p = tl.exp2(log2p)
    d = p * -from_logprob
    if has_target:
        d = tl.where(is_target, from_logprob * one_minus_exp(logprob), d)
    if entropy is not None:
        if has_target:
            log2p = tl.where(is_target, logprob * LOG2E, log2p)
            p = tl.where(is_target, tl.exp2(logprob * LOG2E), p)
        of_entropy = p * (tl.maximum(log2p, LOWEST_LOG2) * LN2 + tl.load(entropy + m)) * -inv_temperature
        if entropy_out is None:
            d += tl.load(dentropy + m) * of_entropy
        elif SOFTCAP:
            of_entropy *= slope(logit, x, softcap)
    if SOFTCAP:
        d *= slope(logit, x, softcap)
    if entropy_out is not None:
        store_columns(entropy_out + out_start, start, columns, of_entropy, BLOCK)
    store_columns(out + out_start, start, columns, d, BLOCK)


def _layout_in_a_batch(logits: torch.Tensor) -> tuple[int, int, int]:
    """Where rows begin. A single row gets the stride that it has in a batch: Triton adds in another order where strides
    are multiples of 16, which 0 would be.
    """
    inner, outer_stride, inner_stride = row_layout(logits)[2:]
    if inner == 1 and outer_stride == 0:
        inner_stride = logits.stride(-2) if logits.ndim > 1 else logits.shape[-1]
    return inner, outer_stride, inner_stride


def statistics(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    softcap: float,
    logprobs: torch.Tensor,
    row_stats: torch.Tensor | None,
    entropy: torch.Tensor | None,
    top1: torch.Tensor | None,
) -> None:
    """token_logprobs forward; also fills `row_stats` if it is given."""
    count, vocab = token_ids.numel(), logits.shape[-1]
    block, warps = SMALL if vocab <= SMALL[0] else LARGE
    pieces = triton.cdiv(vocab, block)
    partials = torch.empty(count * pieces * PARTIAL.value, dtype=torch.float32, device=logits.device)
    layout = _layout_in_a_batch(logits)
    scale = LOG2E.value / temperature
    launch(
        token_logprobs_fwd_kernel, (count * pieces,), logits,
        logits, token_ids, mask, partials, vocab, *layout, scale, softcap,
        SOFTCAP=softcap > 0, ENTROPY=entropy is not None, TOP1=top1 is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    launch(
        token_logprobs_combine_kernel, (count,), logits,
        logits, token_ids, mask, partials, logprobs, row_stats, entropy, top1, vocab, pieces, *layout, scale, softcap,
        SOFTCAP=softcap > 0, CHUNK=PIECES, num_warps=1,
    )  # fmt: skip


def gradient(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    mask: torch.Tensor | None,
    row_stats: torch.Tensor,
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    dlogprobs: torch.Tensor | None,
    dentropy: torch.Tensor | None,
    begin: int,
    temperature: float,
    softcap: float,
    out: torch.Tensor,
    entropy_out: torch.Tensor | None = None,
) -> None:
    """See `token_logprobs_bwd_kernel`; `logits` holds the columns of the vocabulary from `begin` on."""
    count, columns = token_ids.numel(), logits.shape[-1]
    block, warps = GRADIENT_SMALL if columns <= GRADIENT_SMALL[0] else GRADIENT_LARGE
    launch(
        token_logprobs_bwd_kernel, (count * triton.cdiv(columns, block),), logits,
        logits, token_ids, mask, row_stats, logprobs, entropy, dlogprobs, dentropy, out, entropy_out,
        begin, columns, *row_layout(logits)[2:], *row_layout(out)[2:], 1.0 / temperature, softcap,
        SOFTCAP=softcap > 0, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def forward(logits, token_ids, mask, temperature, softcap, logprobs, row_stats, entropy, top1):
    """See fastrl.ops.token_logprobs."""
    statistics(logits, token_ids, mask, temperature, softcap, logprobs, row_stats, entropy, top1)


def backward(logits, token_ids, mask, temperature, softcap, row_stats, logprobs, entropy, dlogprobs, dentropy, dlogits):
    """See fastrl.ops.token_logprobs."""
    entropy = None if dentropy is None else entropy
    gradient(
        logits, token_ids, mask, row_stats, logprobs, entropy, dlogprobs, dentropy, 0, temperature, softcap, dlogits
    )
