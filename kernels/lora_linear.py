"""Triton kernels of lora_linear and lora_linear_group: dropout, made again from its seed wherever it is needed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastrl.kernels.launch import launch
from fastrl.reference.lora_linear import dropout_threshold

COUNTERS = tl.constexpr(16)  # Philox counters of one block of 64 columns, four words each


@triton.jit
def keep_mask(m, k, seed, threshold):
    """Which elements (m, k) dropout keeps: see fastrl.reference.lora_linear.dropout_keep."""
    counter = (k // (4 * COUNTERS) * COUNTERS + k % COUNTERS).to(tl.uint32)
    row = m.to(tl.uint64)
    zero = tl.zeros_like(counter)
    w0, w1, w2, w3 = tl.philox(seed, counter, row.to(tl.uint32), (row >> 32).to(tl.uint32), zero)
    word = k // COUNTERS % 4
    bits = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return bits >= threshold.to(tl.uint32)


@triton.jit
def dropout_kernel(matrix, seed_ptr, size, cols, threshold, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    dropped = ~keep_mask(i // cols, (i % cols).to(tl.int32), tl.load(seed_ptr), threshold)
    tl.store(matrix + i, tl.zeros((BLOCK,), tl.float32), mask=inside & dropped)


def dropout(matrix: torch.Tensor, seed: torch.Tensor, probability: float) -> None:
    """Zeroes the dropped elements of a contiguous matrix in place."""
    block = 1024
    launch(
        dropout_kernel, (triton.cdiv(matrix.numel(), block),), matrix,
        matrix, seed, matrix.numel(), matrix.shape[1], dropout_threshold(probability), BLOCK=block, num_warps=4,
    )  # fmt: skip
