"""The GPU's kernels that multiply a gradient by an upstream which the host does not know."""

from __future__ import annotations

import pytest
import torch

from fastrl.ops import scale_gradient

SIZES = [0, 1, 7, 8, 9, 2047, 2048, 2049, 90001]  # the last is more than the host's blocks take at once


def scaled(gpu_backend, gradient, factor):
    """What becomes of the gradient's memory."""
    found = gradient.clone()
    scale_gradient._scale(gpu_backend, found, torch.tensor(factor, device=gradient.device))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_is_the_product_rounded_once(gpu_backend, device, size, dtype):
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(device, dtype)
    for factor in (1.0, -0.3, 0.0, 1 / 3, 65536.0, float("nan")):
        expected = (gradient.float() * factor).to(dtype)
        torch.testing.assert_close(scaled(gpu_backend, gradient, factor), expected, rtol=0, atol=0, equal_nan=True)


def test_memory_that_begins_anywhere(gpu_backend, device):
    memory = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    for begin in range(9):
        found = memory.clone()
        scale_gradient._scale(gpu_backend, found[begin:99], torch.tensor(0.5, device=device))
        expected = torch.cat([memory[:begin], 0.5 * memory[begin:99], memory[99:]])
        assert found.equal(expected)
