"""A simulated CUDA device, for the loops on a machine without one.

Its tensors are tensors of the CPU in a wrapper that says `cuda:0`. An operator whose tensors are on different devices
raises as on a GPU, so a tensor that was left behind shows; kernels get the address of the real memory. Not simulated:
streams, memory, and operators that only a GPU has, but for products with float32 results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastrl import checks
from fastrl.ops import backend, native

DEVICE = torch.device("cuda:0")
WIDE_PRODUCTS = (torch.ops.aten.mm.dtype, torch.ops.aten.mm.dtype_out)
MOVES = ("aten::_to_copy", "aten::copy_")
TAKE_INDICES_FROM_ANYWHERE = ("aten::index", "aten::index_put", "aten::index_put_")


class OnDevice(torch.Tensor):
    """Torch itself takes it for a tensor of the CPU, so that autograd works; everyone else is told otherwise."""

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: torch.Tensor):
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, requires_grad=value.requires_grad, **layout)

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"OnDevice({self.value})"

    def __deepcopy__(self, memo) -> torch.Tensor:
        copied = OnDevice(self.detach().value.clone()).requires_grad_(self.requires_grad)
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def tolist(self) -> list:
        return self.value.tolist()

    def cpu(self) -> torch.Tensor:
        return self.detach().value

    def to(self, *args, **kwargs) -> torch.Tensor:
        device, dtype = _asked(args, kwargs)
        if device is not None and not _names_cuda(device):
            return self.detach().value.to(*args, **kwargs)
        return self if dtype in (None, self.dtype) else super().to(dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _asked(args, kwargs):
    """Device and dtype of the arguments of Tensor.to."""
    options = {name: kwargs[name] for name in ("device", "dtype", "non_blocking") if name in kwargs}
    return torch._C._nn._parse_to(*args, **options)[:2]


def _names_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _run(func, args, kwargs):
    """The operator on the real tensors; its results are on the device of its arguments."""
    name, flat = func._schema.name, tree_flatten((args, kwargs))
    tensors = [x for x in flat[0] if isinstance(x, torch.Tensor)]
    on_device = any(isinstance(x, OnDevice) for x in tensors)
    left_behind = [tuple(x.shape) for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0]
    if on_device and left_behind and name not in (*MOVES, *TAKE_INDICES_FROM_ANYWHERE):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found on the CPU: {left_behind}")
    if "device" in kwargs and name != "aten::_to_copy":  # autograd casts to what it takes for the device, the CPU
        on_device = _names_cuda(kwargs["device"])
    elif name == "aten::copy_":
        on_device = isinstance(args[0], OnDevice)
    else:
        on_device = on_device or _names_cuda(kwargs.get("device"))
    values, options = tree_unflatten([x.value if isinstance(x, OnDevice) else x for x in flat[0]], flat[1])
    if options.get("device") is not None:
        options["device"] = torch.device("cpu")
    result = _wide_product(values, options) if func in WIDE_PRODUCTS else func(*values, **options)
    if not on_device:
        return result
    result = tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, result)
    return return_and_correct_aliasing(func, args, kwargs, result)


def _wide_product(values, options):
    """torch.mm(a, b, out_dtype=torch.float32), perhaps with `out`, which torch has on GPUs alone."""
    a, b, dtype = values
    return torch.mm(a.to(dtype), b.to(dtype), **options)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = x.dtype
        return torch.ops.aten._to_copy(x, dtype=dtype, device=DEVICE)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(ctx.dtype), None


class _Functions(TorchFunctionMode):
    """What asks for a real device before it reaches an operator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _names_cuda(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is torch.Tensor.to and not isinstance(args[0], OnDevice):
            device, dtype = _asked(args[1:], kwargs)
            if _names_cuda(device):
                return _Copy.apply(args[0], dtype)
        return func(*args, **kwargs)


def use_kernels(monkeypatch, kernels) -> None:
    """Dispatch takes the simulated device for a GPU that runs `kernels`, the CUDA kernels compiled for the host."""
    for module in (backend, native):
        monkeypatch.setattr(module, "cuda", kernels)
    harmless = checks._is_harmless_subclass
    monkeypatch.setattr(checks, "_is_harmless_subclass", lambda x: isinstance(x, OnDevice) or harmless(x))
    for problem in ("driver_problem", "build_problem"):
        monkeypatch.setattr(backend, problem, lambda *args: "")
    monkeypatch.setattr(backend, "compute_capability", lambda index: (9, 0))
    monkeypatch.setattr(native, "raw_stream", lambda index: 0)


@contextmanager
def simulated_cuda(monkeypatch) -> Iterator[None]:
    """torch believes that it has a GPU."""

    class Generator:
        def __new__(cls, device="cpu", generator=torch.Generator):
            return generator()

    with monkeypatch.context() as patched:
        patched.setattr(torch, "Generator", Generator)
        for name, value in {
            "is_available": True,
            "_lazy_init": None,
            "current_device": 0,
            "is_current_stream_capturing": False,
            "max_memory_allocated": 0,
            "synchronize": None,
            "get_device_name": "simulated GPU",
        }.items():
            patched.setattr(torch.cuda, name, lambda *args, value=value: value)
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with _Functions(), _Dispatch():
                yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
