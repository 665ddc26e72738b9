"""What C++ makes of the arguments that Python hands it (csrc/python.h)."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastrl.ops.native import _C, row_layout, with_simple_rows

pytestmark = pytest.mark.skipif(_C is None, reason="the native module is not built")


def dropout(matrix, *, dtype=0, rows=2, threads=1):
    """Zeroes every element."""
    _C.lora_dropout(matrix, dtype, rows, 3, torch.tensor([7]), 2**32 - 1, threads)


def test_any_object_with_a_data_ptr_is_a_tensor():
    class Wrapper:
        def __init__(self, tensor):
            self.data_ptr = tensor.data_ptr

    x = torch.ones(2, 3)
    dropout(Wrapper(x))
    assert not x.any()


def test_a_tensor_without_memory_is_refused():
    with pytest.raises(RuntimeError, match="fastrl: expected tensors with memory, got a Tensor of 6"):
        dropout(torch.ones(2, 3, device="meta"))
    dropout(torch.ones(0, 3), rows=0)


def test_a_number_in_the_place_of_a_tensor_is_no_address():
    ones, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(AttributeError, match="'int' object has no attribute 'data_ptr'"):
        _C.gae(2, 3, 3, ones, mask, None, None, None, 1.0, 1.0, ones, ones, 1)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        dropout(torch.ones(2, 3), rows=2.5)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.gae(2, 3, ones)


def test_a_kernel_s_error_is_raised():
    with pytest.raises(ValueError, match="dtype code: expected 0 .* got 7"):
        dropout(torch.ones(2, 3), dtype=7)


LAYOUTS = [
    (torch.empty(5), (1, 0, 0)),
    (torch.empty(4, 6), (4, 0, 6)),
    (torch.empty(4, 6)[:, :5], (4, 0, 6)),
    (torch.empty(1, 6), (1, 0, 0)),
    (torch.empty(2, 3, 6), (6, 0, 6)),
    (torch.empty(2, 4, 6)[:, :3], (3, 24, 6)),
    (torch.empty(3, 2, 6).transpose(0, 1), (3, 6, 12)),
]


@pytest.mark.parametrize(("tensor", "expected"), LAYOUTS)
def test_rows_are_found_by_two_strides(tensor, expected):
    assert with_simple_rows(tensor) is tensor
    found, code, inner, outer_stride, inner_stride = row_layout(tensor)
    assert found is tensor and code == 0 and (inner, outer_stride, inner_stride) == expected
    for m, index in enumerate(itertools.product(*map(range, tensor.shape[:-1]))):
        offset = m // inner * outer_stride + m % inner * inner_stride
        assert tensor[index].data_ptr() == tensor.data_ptr() + 4 * offset
