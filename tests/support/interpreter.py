"""Triton's interpreter, made quicker and made to compute in bfloat16 as a GPU does.

A scan or reduction with a function of our own takes it a call of Python for every element; here it takes log2(n) calls
on whole arrays, in the tree-like order of a GPU. It cuts off what a bfloat16 cannot hold, where a GPU rounds, and
multiplies bfloat16 matrices as if their bits were integers.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def amend() -> None:
    interpreter.ScanOps.generic_scan = _scan
    if not hasattr(interpreter, "convert_float_of_triton"):
        interpreter.convert_float_of_triton = interpreter._convert_float
        interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _dot


def _convert_float(values, from_dtype, to_dtype, rounding):
    """Bits of `values` in another format."""
    if from_dtype == tl.bfloat16 and to_dtype == tl.float32:
        return _widen(values)
    if from_dtype == tl.float32 and to_dtype == tl.bfloat16:
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to nearest, ties to even
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
    return interpreter.convert_float_of_triton(values, from_dtype, to_dtype, rounding)


def _widen(bits):
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """d + a @ b, summed in the format of d."""
    left, right = (_widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
    return interpreter.TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _scan(self, inputs):
    """Inclusive scan (Hillis and Steele 1986); `inputs` are flipped already where the scan is reversed."""
    arrays = [t.handle.data for t in inputs]
    size = arrays[0].shape[self.axis]
    index = np.arange(size).reshape([-1 if d == self.axis else 1 for d in range(arrays[0].ndim)])
    step = 1
    while step < size:
        before = [np.roll(a, step, self.axis) for a in arrays]
        operands = [
            self.to_tensor(a, t.dtype) for group in (before, arrays) for a, t in zip(group, inputs, strict=True)
        ]
        combined = self.combine_fn.fn(*operands)
        combined = combined if isinstance(combined, tuple) else (combined,)
        arrays = [np.where(index < step, a, c.handle.data) for a, c in zip(arrays, combined, strict=True)]
        step *= 2
    return [self.to_tensor(a, t.dtype) for a, t in zip(arrays, inputs, strict=True)]
