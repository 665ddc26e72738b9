"""Argument checks that the ops share. A failure is a ValueError: op, argument, expected, got."""

from __future__ import annotations

import numbers
import os
from math import inf

import torch
from torch._subclasses.fake_tensor import FakeTensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class NonFiniteError(RuntimeError):
    """A loss, gradient or weight is NaN or infinite; nothing was updated or written."""


def check(ok: bool, op: str, argument: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def check_plain(op: str, argument: str, tensor: torch.Tensor) -> None:
    """A tensor that kernels can take: see `is_plain`."""
    if not is_plain(tensor):
        check(False, op, argument, "a strided torch.Tensor that holds its own numbers", _kind(tensor))


def is_plain(tensor: object) -> bool:
    """Whether a tensor is strided numbers in memory that it shows as they are.

    Fake tensors count: theirs go to the registered ops. Sharded, nested, quantised or otherwise wrapped ones do not.
    """
    if torch.compiler.is_dynamo_compiling():  # which knows its tensors
        return True
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and not _is_harmless_subclass(tensor):
        return False
    return tensor.layout is torch.strided and not (tensor.is_neg() or tensor.is_nested)  # type: ignore[attr-defined]


def _is_harmless_subclass(tensor: object) -> bool:
    if not isinstance(tensor, torch.Tensor):
        return False
    own = type(tensor).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl  # type: ignore[comparison-overlap]
    return own or isinstance(tensor, FakeTensor)


def _kind(tensor: object) -> str:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:  # type: ignore[attr-defined]
        return "a nested tensor"
    if tensor.is_neg():  # type: ignore[attr-defined]
        return "a negated view (call resolve_neg())"
    return f"a {tensor.layout} tensor"  # type: ignore[attr-defined]


def check_float(op: str, argument: str, tensor: torch.Tensor) -> None:
    check_plain(op, argument, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        check(False, op, argument, "float32, bfloat16, float16 or float64", tensor.dtype)


def check_shape(op: str, argument: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        check(False, op, argument, f"shape {tuple(shape)}", tuple(tensor.shape))


def check_device(op: str, argument: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.device != like.device:
        check(False, op, argument, f"a tensor on {like.device}", tensor.device)


def check_ids(op: str, argument: str, ids: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    check_plain(op, argument, ids)
    if ids.dtype not in (torch.int64, torch.int32):
        check(False, op, argument, "int64 or int32", ids.dtype)
    check_shape(op, argument, ids, shape)
    check_device(op, argument, ids, like)


def check_mask(
    op: str,
    mask: torch.Tensor | None,
    shape: tuple[int, ...],
    like: torch.Tensor,
    name: str = "mask",
    meaning: str = "keep",
) -> None:
    if mask is None:
        return
    check_plain(op, name, mask)
    if mask.dtype != torch.bool:
        check(False, op, name, f"bool, True = {meaning}", mask.dtype)
    check_shape(op, name, mask, shape)
    check_device(op, name, mask, like)


def is_number(value: object) -> bool:
    """A finite number as an option takes it: no bool, and no tensor, whose gradient would be lost."""
    number = type(value) is float or (isinstance(value, numbers.Real) and not isinstance(value, bool))
    return number and -inf < value < inf  # type: ignore[operator]


def check_number(op: str, argument: str, value: float) -> None:
    if not is_number(value):
        _refuse(op, argument, "a finite number", value)


def check_positive(op: str, argument: str, value: float) -> None:
    if not (is_number(value) and value > 0):
        _refuse(op, argument, "a positive number", value)


def check_above_one(op: str, argument: str, value: float) -> None:
    if not (is_number(value) and value > 1):
        _refuse(op, argument, "a number above 1", value)


def check_non_negative(op: str, argument: str, value: float) -> None:
    if not (is_number(value) and value >= 0):
        _refuse(op, argument, "a number of at least 0", value)


def check_unit(op: str, argument: str, value: float) -> None:
    if not (is_number(value) and 0 <= value <= 1):
        _refuse(op, argument, "a number in [0, 1]", value)


def check_flag(op: str, argument: str, value: bool) -> None:
    if value is not True and value is not False:
        _refuse(op, argument, "True or False", value)


def _refuse(op: str, argument: str, expected: str, value: object) -> None:
    got = "a tensor (its .item() is a number)" if isinstance(value, torch.Tensor) else repr(value)
    check(False, op, argument, expected, got)


def check_data(op: str, argument: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """A float tensor of that shape on the device of `like`."""
    check_float(op, argument, tensor)
    check_shape(op, argument, tensor, shape)
    check_device(op, argument, tensor, like)


def capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which no value of a tensor can be read."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a value of the tensor can be read here: not in a compiler, a graph capture or under torch.func."""
    return not (
        torch.compiler.is_compiling()
        or tensor.is_meta
        or isinstance(tensor, FakeTensor)
        or torch._C._are_functorch_transforms_active()
        or capturing(tensor)
    )


def debugging() -> bool:
    """Whether FASTRL_DEBUG=1 asks for the checks that have to wait for a GPU: token ids in range."""
    return os.environ.get("FASTRL_DEBUG", "") not in ("", "0")


def check_range(token_ids: torch.Tensor, vocab: int, op: str = "token_logprobs", name: str = "token_ids") -> None:
    """Raises where an id is outside [0, vocab); skipped where no value can be read."""
    if token_ids.numel() == 0 or not has_values(token_ids):
        return
    low, high = int(token_ids.min()), int(token_ids.max())
    check(0 <= low and high < vocab, op, name, f"ids in [0, {vocab})", low if low < 0 else high)
