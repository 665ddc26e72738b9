"""Every tensor argument and upstream gradient of every op, in every layout that a caller may hand over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conformance.calls import Call, all_calls, assert_same, evaluate, label
from torch import Tensor

from fastrl.ops.backend import NATIVE_BACKENDS

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
CASES = [
    pytest.param(call, tolerance, id=f"{label(call)} {str(dtype).removeprefix('torch.')}")
    for dtype, tolerance in TOLERANCE.items()
    for call in all_calls(dtype=dtype)
]


def laid_out(tensor: Tensor, strides: list[int], offset: int) -> Tensor:
    """A copy with these strides; the memory around it is NaN, ids of -7, or True."""
    size = offset + 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True)) + 3
    filler = torch.nan if tensor.is_floating_point() else True if tensor.dtype == torch.bool else -7
    view = torch.full((size,), filler, dtype=tensor.dtype).as_strided(tensor.shape, strides, offset)
    return view.copy_(tensor)


def dense(shape: list[int]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides[: len(shape)]


def layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    shape = list(tensor.shape)
    plain = dense(shape)
    yield "odd offset", laid_out(tensor, plain, 1)
    yield "every second element", laid_out(tensor, [2 * stride for stride in plain], 1)
    if tensor.ndim >= 2:
        yield "columns of a wider tensor", laid_out(tensor, dense([*shape[:-1], shape[-1] + 3]), 1)
        yield "last dimension first", laid_out(tensor, dense(shape[::-1])[::-1], 0)
    if tensor.ndim >= 3:
        swapped = dense([shape[1], shape[0], *shape[2:]])
        yield "first two dimensions swapped", laid_out(tensor, [swapped[1], swapped[0], *swapped[2:]], 0)
        yield "rows of a longer tensor", laid_out(tensor, dense([shape[0], shape[1] + 2, *shape[2:]]), 5)


def expansions(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for dim, size in enumerate(tensor.shape):
        if size > 1:
            yield f"expanded along {dim}", tensor.select(dim, 0).unsqueeze(dim).expand_as(tensor)


@pytest.mark.parametrize(("call", "tolerance"), CASES)
def test_every_argument_in_every_layout(call: Call, tolerance: float):
    """T10, T21, pitfall 24: the result and the gradients of the contiguous copy; nothing around a view is read."""
    expected = evaluate(call)
    tried = 0
    for name, tensor in call.tensors.items():
        for layout, view in layouts(tensor):
            assert torch.equal(view, tensor)
            found = evaluate(call, {**call.tensors, name: view})
            assert_same(call, found, expected, tolerance, f"{name}, {layout}")
            tried += not view.is_contiguous()
        for layout, view in expansions(tensor):
            want = evaluate(call, {**call.tensors, name: view.clone(memory_format=torch.contiguous_format)})
            assert_same(call, evaluate(call, {**call.tensors, name: view}), want, tolerance, f"{name}, {layout}")
    assert tried >= len(call.tensors)


@pytest.mark.parametrize("call", all_calls(), ids=label)
def test_all_arguments_strided_at_once(call: Call):
    """T21: no argument's strides are taken for another's."""
    strided = {name: list(layouts(tensor))[-1][1] for name, tensor in call.tensors.items()}
    assert_same(call, evaluate(call, strided), evaluate(call), 1e-5, "all strided")


def test_every_op_is_called():
    assert {call.name.split(",")[0] for call in all_calls()} == set(NATIVE_BACKENDS)
