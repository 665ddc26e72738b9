"""How native kernels are called: the module `_C`, registration with torch, launches, and the layout of arguments.

Which backend runs is chosen in backend.py.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch  # before _C, so that both share one OpenMP runtime
from torch._C import _TorchDispatchModeKey as ModeKey
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

try:
    from fastrl import _C

    NATIVE_ERROR = ""
except ImportError as error:
    _C = None  # type: ignore[assignment]
    NATIVE_ERROR = str(error)

cuda: Any = getattr(_C, "cuda", None)  # the CUDA kernels; None where the module was built without them

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/dtypes.h

_LIBRARY = torch.library.Library("fastrl", "DEF")


def native_op(name: str, schema: str, kernels: dict[str, Callable[..., None]]) -> Callable[..., None]:
    """Makes `kernels` (backend -> function) callable in eager mode and under torch.compile.

    `schema` lists the arguments after `str backend`, first a tensor that the others are like; outputs are preallocated
    and marked `Tensor(a!)`, nothing is returned, so no shape function is needed. Eager calls go straight to the kernel;
    while compiling, and of fake tensors, they become the operator torch.ops.fastrl.<name>, which the compiler keeps as
    one node of the graph.
    """
    _LIBRARY.define(f"{name}(str backend, {schema}) -> ()")

    def run(backend: str, *args: Any) -> None:
        if torch._C._is_any_autocast_enabled():  # it would round what the kernels multiply in float32
            with torch.autocast(args[0].device.type, enabled=False):
                kernels[backend](*args)
        else:
            kernels[backend](*args)

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"fastrl::{name}", lambda *args: None, lib=_LIBRARY)
    operator = getattr(torch.ops.fastrl, name).default

    def call(backend: str, *args: Any) -> None:
        if torch.compiler.is_compiling() or _traced(args[0]):
            operator(backend, *args)
        else:
            run(backend, *args)

    return call


def _traced(tensor: torch.Tensor) -> bool:
    """Whether the call goes to the registered op: a fake tensor, or a mode of torch's that makes fakes or graphs."""
    if torch._C._len_torch_dispatch_stack() and any(map(torch._C._get_dispatch_mode, TRACING_MODES)):
        return True
    return type(tensor) is FakeTensor


TRACING_MODES = (ModeKey.FAKE, ModeKey.PROXY, ModeKey.FUNCTIONAL)


def triton_kernel(op: str, name: str) -> Callable[..., None]:
    """The launcher `name` of kernels/<op>.py; Triton is imported at the first call."""

    @functools.cache
    def launcher() -> Callable[..., None]:
        return getattr(importlib.import_module(f"fastrl.kernels.{op}"), name)

    return lambda *args: launcher()(*args)


def cuda_workspace(name: str, *sizes: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The workspace that `name` of csrc/cuda asks for at these sizes; None if it asks for none."""
    elements = getattr(cuda, f"{name}_workspace")(*sizes)
    return like.new_empty(elements, dtype=dtype) if elements else None


def ask_cuda(name: str, tensor: torch.Tensor, *args: Any) -> Any:
    """What `name` of csrc/cuda says of the device of `tensor`."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return getattr(cuda, name)(*args)
    with torch.cuda.device(tensor.device):
        return getattr(cuda, name)(*args)


def launch_cuda(name: str, tensor: torch.Tensor, *args: Any) -> None:
    """Calls `name` of csrc/cuda on the device of `tensor` and torch's current stream there; does not wait."""
    function = getattr(cuda, name)
    device = tensor.device
    if device.type != "cuda":  # kernels compiled for the host, in tests
        function(*args, 0)
    elif device.index == torch.cuda.current_device():  # the guard would cost as much as a launch
        function(*args, raw_stream(device.index))
    else:
        with torch.cuda.device(device):
            function(*args, raw_stream(device.index))


# torch's current stream on a device, as an integer; what Triton and torch's own compiler call (absent from CPU builds).
raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # type: ignore[assignment]


def row_layout(tensor: torch.Tensor) -> tuple[torch.Tensor, int, int, int, int]:
    """How C++ addresses the rows of a tensor that `with_simple_rows` leaves as it is: `Rows` in csrc/rows.h."""
    code = DTYPE_CODES[tensor.dtype]
    if tensor.ndim == 1:
        return tensor, code, 1, 0, 0
    (inner, outer_stride, inner_stride) = _collapse(tensor)  # type: ignore[misc]
    return tensor, code, inner, outer_stride, inner_stride


def with_simple_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself if its last dimension is contiguous and the leading ones collapse to two; else a copy."""
    if tensor.is_contiguous():
        return tensor
    scattered = tensor.ndim == 1 or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1)
    return tensor.contiguous() if scattered or _collapse(tensor) is None else tensor


def _collapse(tensor: torch.Tensor) -> tuple[int, int, int] | None:
    """(inner, outer_stride, inner_stride) of the leading dimensions; None if they need more than two."""
    if tensor.ndim == 2:
        count = tensor.shape[0]
        return (count, 0, tensor.stride(0)) if count > 1 else (1, 0, 0)
    if tensor.is_contiguous():  # asked on every call: the loop below takes four times as long
        count = tensor.shape[:-1].numel()
        return (count, 0, tensor.shape[-1]) if count > 1 else (1, 0, 0)
    dims: list[tuple[int, int]] = []  # (size, stride), innermost first
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        return None
    dims += [(1, 0)] * (2 - len(dims))
    return max(dims[0][0], 1), dims[1][1], dims[0][1]


def as_data(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Detached, contiguous, in that dtype: most tensors are that already, and each of the three calls costs 0.5 us."""
    if forward_ad._current_level >= 0:
        tensor = forward_ad.unpack_dual(tensor).primal
    if tensor.dtype == dtype and not tensor.requires_grad and tensor.is_contiguous():
        return tensor
    return tensor.detach().to(dtype).contiguous()


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast asks for on the tensor's device; None where it asks for none."""
    device_type = tensor.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type) or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device_type)


ELEMENTS_PER_THREAD = 1 << 16


def threads_for(elements: int) -> int:
    """Threads for a pass over so many elements: at most torch's, and each with enough work to be worth its start."""
    return max(1, min(torch.get_num_threads(), elements // ELEMENTS_PER_THREAD))


HUGE_PAGES_FROM = 8 << 20  # bytes


def empty_large(shape: tuple[int, ...] | torch.Size, like: torch.Tensor) -> torch.Tensor:
    """torch.empty with the dtype and device of `like`; a large CPU buffer asks for huge pages."""
    tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
    if torch.compiler.is_compiling() or type(tensor) is FakeTensor:
        return tensor
    if _C is not None and tensor.device.type == "cpu":
        bytes_ = tensor.numel() * tensor.element_size()
        if bytes_ >= HUGE_PAGES_FROM:
            _C.advise_huge_pages(tensor, bytes_)
    return tensor
