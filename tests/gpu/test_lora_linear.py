"""lora_linear's GPU kernels."""

from __future__ import annotations

import pytest
import torch
from gpus import DTYPES

from fastrl.ops.lora_linear import _dropout
from fastrl.reference.lora_linear import dropout_keep


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (5, 130), (0, 8)], ids=str)
def test_dropout_is_the_references(gpu_backend, device, dtype, shape):
    """T23: forward, backward and reference must agree on every element's mask."""
    seed = torch.tensor([0x1234567890ABCDE], device=device)
    matrix = torch.ones(shape, dtype=dtype, device=device)
    _dropout(gpu_backend, matrix, seed, 0.3)
    assert torch.equal(matrix.bool(), dropout_keep(*shape, 0.3, seed))
