"""How the CPU multiplies: in which dtype, and a block at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch


@torch.compiler.assume_constant_result
def multiply_dtype(dtype: torch.dtype) -> torch.dtype:
    """`dtype` where oneDNN multiplies it natively; else float32: torch's own loops are 6 to 90 times slower."""
    return _multiply_dtype(dtype)


@functools.cache
def _multiply_dtype(dtype: torch.dtype) -> torch.dtype:
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype in native and native[dtype]() else torch.float32


def is_widened(dtype: torch.dtype) -> bool:
    """Whether matrices of that dtype are multiplied in float32."""
    return dtype in (torch.bfloat16, torch.float16) and multiply_dtype(dtype) == torch.float32


def spans(length: int, at_most: int) -> Iterator[tuple[int, int]]:
    """Spans of (nearly) equal length that cover range(length); none is longer than the first."""
    if length > 0:
        step = -(-length // -(-length // at_most))
        for begin in range(0, length, step):
            yield begin, min(begin + step, length)
