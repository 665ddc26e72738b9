"""Triton kernels of lora_linear and lora_linear_group: the products with a side of the rank's length.

Dropout's mask is made again from its seed in every kernel that needs it. Sixteen counters of Philox give the mask of 64
columns, one word of each for every 16 of them (see fastrl.reference.lora_linear.dropout_keep), so the kernels go
through columns as four slices of 16. Products accumulate in float32; those over all rows are split among programs, and
a second kernel adds the parts in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastrl.constants import dropout_threshold
from fastrl.kernels.launch import launch

SLICE = tl.constexpr(16)  # columns that take the same word of their counters
COLUMNS = tl.constexpr(64)

SUM_PARTS, SUM_ELEMENTS = 16, 128  # tile of lora_sum_kernel


@triton.jit
def _kept(word, threshold):
    """-1 where word >= threshold, else 0; without a comparison, whose bits Triton 3.9 cannot take to a dot's layout."""
    return ~((word.to(tl.int64) - threshold) >> 63).to(tl.int32)


@triton.jit
def _keep(rows, block, seed, threshold):
    """Masks (see _kept) of four slices of columns, those from 64 * block, of some rows."""
    counter = (tl.arange(0, SLICE) + block * SLICE).to(tl.uint32)[None, :]
    row = rows.to(tl.uint64)[:, None]
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), counter, low, high, tl.zeros_like(counter))
    return _kept(w0, threshold), _kept(w1, threshold), _kept(w2, threshold), _kept(w3, threshold)


@triton.jit
def _select(x, mask):
    """x where the mask is -1, 0 where it is 0, whatever x holds."""
    bits: tl.constexpr = tl.int16 if x.dtype.primitive_bitwidth == 16 else tl.int32
    return (x.to(bits, bitcast=True) & mask.to(bits)).to(x.dtype, bitcast=True)


@triton.jit
def _slice(matrix, stride, r, row_count, c, column_count):
    """The tile of rows `r` and columns `c` of a row-major matrix; 0 outside it. Its offsets are 32-bit numbers."""
    inside = (r < row_count)[:, None] & (c < column_count)[None, :]
    return tl.load(matrix + (r[:, None] * stride + c[None, :]), mask=inside, other=0.0)


@triton.jit
def _add_product(total, x, keep, lora_a, r, rank, c, cols):
    """total + (x where kept) (rows r and columns c of lora_a)^T"""
    a = tl.trans(_slice(lora_a, cols, r, rank, c, cols))
    return tl.dot(_select(x, keep), a, total, input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "threshold"])
def lora_down_kernel(
    x, x_stride, lora_a, seed, threshold, down, rows, cols, rank, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):
    """down = D(x) lora_a^T"""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    x += first * x_stride
    left = tl.minimum(rows - first, BLOCK_M).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for block in range(tl.cdiv(cols, COLUMNS)):
        k0, k1, k2, k3 = _keep(first + m, block, seed, threshold)
        c = tl.arange(0, SLICE) + block * COLUMNS
        total = _add_product(total, _slice(x, x_stride, m, left, c, cols), k0, lora_a, r, rank, c, cols)
        c += SLICE
        total = _add_product(total, _slice(x, x_stride, m, left, c, cols), k1, lora_a, r, rank, c, cols)
        c += SLICE
        total = _add_product(total, _slice(x, x_stride, m, left, c, cols), k2, lora_a, r, rank, c, cols)
        c += SLICE
        total = _add_product(total, _slice(x, x_stride, m, left, c, cols), k3, lora_a, r, rank, c, cols)
    inside = (m < left)[:, None] & (r < rank)[None, :]
    tl.store(down + first * rank + (m[:, None] * rank + r[None, :]), total, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def lora_up_backward_kernel(
    dy, down, down_stride, lora_b, ddown_parts, dlora_b_parts, rows, cols, rank,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, SPLIT_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Parts of dy lora_b over SPLIT_O columns, and of dy^T down over BLOCK_M rows, from one reading of dy."""
    first, split = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1)
    left = tl.minimum(rows - first, BLOCK_M).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    dy += first * cols
    s = _slice(down + first * down_stride, down_stride, m, left, r, rank)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(split * SPLIT_O, tl.minimum(split * SPLIT_O + SPLIT_O, cols), BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        g = _slice(dy, cols, m, left, o, cols)
        if ddown_parts is not None:
            total = tl.dot(g, _slice(lora_b, rank, o, cols, r, rank), total, input_precision="ieee")
        if dlora_b_parts is not None:
            part = tl.dot(tl.trans(g), s, input_precision="ieee")
            at = dlora_b_parts + tl.program_id(0).to(tl.int64) * cols * rank
            tl.store(at + (o[:, None] * rank + r[None, :]), part, mask=(o < cols)[:, None] & (r < rank)[None, :])
    if ddown_parts is not None:
        at = ddown_parts + (split.to(tl.int64) * rows + first) * rank
        tl.store(at + (m[:, None] * rank + r[None, :]), total, mask=(m < left)[:, None] & (r < rank)[None, :])


@triton.jit
def _dropped(x, x_stride, m, rows, c, cols, keep, DROPOUT: tl.constexpr):
    tile = _slice(x, x_stride, m, rows, c, cols)
    return _select(tile, keep) if DROPOUT else tile


@triton.jit(do_not_specialize=["rows", "threshold"])
def lora_down_backward_kernel(
    ddown, x, x_stride, seed, threshold, parts, rows, cols, rank,
    BLOCK_M: tl.constexpr, SPLIT_M: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Parts of ddown^T D(x) over SPLIT_M rows."""
    block, split = tl.program_id(0), tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    c0 = tl.arange(0, SLICE) + block * COLUMNS
    c1, c2, c3 = c0 + SLICE, c0 + 2 * SLICE, c0 + 3 * SLICE
    t0 = tl.zeros((BLOCK_R, SLICE), tl.float32)
    t1, t2, t3 = t0, t0, t0
    first = split.to(tl.int64) * SPLIT_M
    left = tl.minimum(rows - first, SPLIT_M).to(tl.int32)
    ddown += first * rank
    x += first * x_stride
    for start in range(0, left, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        g = tl.trans(_slice(ddown, rank, m, left, r, rank))
        k0, k1, k2, k3 = 0, 0, 0, 0
        if DROPOUT:
            k0, k1, k2, k3 = _keep(first + m, block, seed, threshold)
        t0 = tl.dot(g, _dropped(x, x_stride, m, left, c0, cols, k0, DROPOUT), t0, input_precision="ieee")
        t1 = tl.dot(g, _dropped(x, x_stride, m, left, c1, cols, k1, DROPOUT), t1, input_precision="ieee")
        t2 = tl.dot(g, _dropped(x, x_stride, m, left, c2, cols, k2, DROPOUT), t2, input_precision="ieee")
        t3 = tl.dot(g, _dropped(x, x_stride, m, left, c3, cols, k3, DROPOUT), t3, input_precision="ieee")
    at = parts + split.to(tl.int64) * rank * cols + r[:, None] * cols
    inside = (r < rank)[:, None]
    tl.store(at + c0[None, :], t0, mask=inside & (c0 < cols)[None, :])
    tl.store(at + c1[None, :], t1, mask=inside & (c1 < cols)[None, :])
    tl.store(at + c2[None, :], t2, mask=inside & (c2 < cols)[None, :])
    tl.store(at + c3[None, :], t3, mask=inside & (c3 < cols)[None, :])


@triton.jit(do_not_specialize=["rows", "threshold"])
def lora_input_gradient_kernel(
    ddown, lora_a, seed, threshold, dx, rows, cols, rank, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):
    """dx = D(ddown lora_a)"""
    first, block = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1)
    left = tl.minimum(rows - first, BLOCK_M).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    ddown += first * rank
    c0 = tl.arange(0, SLICE) + block * COLUMNS
    c1, c2, c3 = c0 + SLICE, c0 + 2 * SLICE, c0 + 3 * SLICE
    t0 = tl.zeros((BLOCK_M, SLICE), tl.float32)
    t1, t2, t3 = t0, t0, t0
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        g = _slice(ddown, rank, m, left, r, rank)
        t0 = tl.dot(g, _slice(lora_a, cols, r, rank, c0, cols), t0, input_precision="ieee")
        t1 = tl.dot(g, _slice(lora_a, cols, r, rank, c1, cols), t1, input_precision="ieee")
        t2 = tl.dot(g, _slice(lora_a, cols, r, rank, c2, cols), t2, input_precision="ieee")
        t3 = tl.dot(g, _slice(lora_a, cols, r, rank, c3, cols), t3, input_precision="ieee")
    k0, k1, k2, k3 = _keep(first + m, block, seed, threshold)
    at = dx + first * cols + m[:, None] * cols
    inside = (m < left)[:, None]
    tl.store(at + c0[None, :], _select(t0, k0), mask=inside & (c0 < cols)[None, :])
    tl.store(at + c1[None, :], _select(t1, k1), mask=inside & (c1 < cols)[None, :])
    tl.store(at + c2[None, :], _select(t2, k2), mask=inside & (c2 < cols)[None, :])
    tl.store(at + c3[None, :], _select(t3, k3), mask=inside & (c3 < cols)[None, :])


@triton.jit(do_not_specialize=["count"])
def lora_sum_kernel(parts, count, size, scale, out, out_stride, cols, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out = scale * the sum of `count` float32 matrices of `size` elements and `cols` columns, in a fixed order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, PARTS):
        p = start + tl.arange(0, PARTS).to(tl.int64)
        inside = (p < count)[:, None] & (i < size)[None, :]
        total += tl.sum(tl.load(parts + p[:, None] * size + i[None, :], mask=inside, other=0.0), 0)
    tl.store(out + i // cols * out_stride + i % cols, total * scale, mask=i < size)


def _sum(parts: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    launch(
        lora_sum_kernel, (triton.cdiv(out.numel(), SUM_ELEMENTS),), out,
        parts, len(parts), out.numel(), scale, out, out.stride(0), out.shape[1],
        PARTS=SUM_PARTS, BLOCK=SUM_ELEMENTS, num_warps=4,
    )  # fmt: skip


def _float32(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _rank_block(rank: int, dtype: torch.dtype) -> int:
    """Ranks are padded to a power of two that the tensor cores take; large ones are cut, lest registers spill."""
    return min(max(16, triton.next_power_of_2(rank)), 16 if dtype == torch.float32 else 64)


def down_projection(
    x: torch.Tensor, lora_a: torch.Tensor, seed: torch.Tensor, probability: float, down: torch.Tensor
) -> None:
    """down (M, r) = D(x) lora_a^T for x (M, K) with contiguous rows."""
    (rows, cols), rank = x.shape, len(lora_a)
    block_m, block_r = 64 if rows > 4096 and x.dtype != torch.float32 else 32, _rank_block(rank, x.dtype)
    launch(
        lora_down_kernel, (triton.cdiv(rows, block_m), triton.cdiv(rank, block_r)), x,
        x, x.stride(0), lora_a, seed, dropout_threshold(probability), down, rows, cols, rank,
        BLOCK_M=block_m, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip


def up_backward(
    dy: torch.Tensor,
    down: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    ddown: torch.Tensor | None,
    dlora_b: torch.Tensor | None,
) -> None:
    """ddown (M, r) = scaling dy lora_b, dlora_b (O, r) = scaling dy^T down, for contiguous dy (M, O)."""
    (rows, cols), rank = dy.shape, down.shape[1]
    block_r, split_o = _rank_block(rank, dy.dtype), 512
    block_m, block_o = (32, 16) if dy.dtype == torch.float32 else (256, 64) if block_r == 16 else (128, 32)
    m_splits, o_splits = triton.cdiv(rows, block_m), triton.cdiv(cols, split_o)
    ddown_parts = None if ddown is None else _float32(dy, o_splits, rows, rank)
    dlora_b_parts = None if dlora_b is None else _float32(dy, m_splits, cols, rank)
    launch(
        lora_up_backward_kernel, (m_splits, o_splits, triton.cdiv(rank, block_r)), dy,
        dy, down, down.stride(0), lora_b, ddown_parts, dlora_b_parts, rows, cols, rank,
        BLOCK_M=block_m, BLOCK_O=block_o, SPLIT_O=split_o, BLOCK_R=block_r, num_warps=8, num_stages=2,
    )  # fmt: skip
    if ddown is not None and ddown_parts is not None:
        _sum(ddown_parts, scaling, ddown)
    if dlora_b is not None and dlora_b_parts is not None:
        _sum(dlora_b_parts, scaling, dlora_b)


def down_backward(
    ddown: torch.Tensor, x: torch.Tensor, seed: torch.Tensor | None, probability: float, dlora_a: torch.Tensor
) -> None:
    """dlora_a (r, K) = ddown^T D(x) for contiguous ddown (M, r) and x (M, K) with contiguous rows."""
    (rows, cols), rank = x.shape, ddown.shape[1]
    block_r, block_m, split_m = _rank_block(rank, x.dtype), 32 if x.dtype == torch.float32 else 64, 512
    splits = triton.cdiv(rows, split_m)
    parts = _float32(x, splits, rank, cols)
    launch(
        lora_down_backward_kernel, (triton.cdiv(cols, COLUMNS.value), splits, triton.cdiv(rank, block_r)), x,
        ddown, x, x.stride(0), seed, dropout_threshold(probability), parts, rows, cols, rank,
        BLOCK_M=block_m, SPLIT_M=split_m, BLOCK_R=block_r, DROPOUT=seed is not None, num_warps=4,
    )  # fmt: skip
    _sum(parts, 1.0, dlora_a)


def input_gradient(
    ddown: torch.Tensor, lora_a: torch.Tensor, seed: torch.Tensor, probability: float, dx: torch.Tensor
) -> None:
    """dx (M, K) = D(ddown lora_a) for contiguous tensors."""
    (rows, rank), cols = ddown.shape, lora_a.shape[1]
    launch(
        lora_input_gradient_kernel, (triton.cdiv(rows, 64), triton.cdiv(cols, COLUMNS.value)), dx,
        ddown, lora_a, seed, dropout_threshold(probability), dx, rows, cols, rank,
        BLOCK_M=64, BLOCK_R=_rank_block(rank, dx.dtype), num_warps=4,
    )  # fmt: skip
