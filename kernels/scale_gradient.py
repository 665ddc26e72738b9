"""Triton kernel of what a backward pass does with a gradient that its forward pass has formed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastrl.kernels.launch import launch

BLOCK = 4096


@triton.jit
def scale_gradient_kernel(gradient, size, factor, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by != 1.0:  # it is 1 where backward() was called on the loss itself
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        scaled = by * tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(gradient + at, scaled.to(gradient.dtype.element_ty), mask=inside)


def scale_gradient(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """gradient *= factor, a 0-d float32 tensor of the same device; the gradient is contiguous."""
    size = gradient.numel()
    launch(scale_gradient_kernel, (triton.cdiv(size, BLOCK),), gradient, gradient, size, factor, BLOCK=BLOCK)
