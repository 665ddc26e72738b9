"""Which implementation of an op runs, and how native ones are called.

Backends: `reference` (plain torch, any device and dtype), `cpu` (C++), `cuda` (C++), `triton`. The order of choice is
the explicit argument, the environment variable FASTRL_BACKEND, then the best that the tensor's device and dtype allow.
A request that cannot be met raises and lists what can; nothing falls back silently.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
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

HAS_TRITON = importlib.util.find_spec("triton") is not None

BACKENDS = ("reference", "cpu", "triton", "cuda")

# The devices whose tensors a native backend takes.
DEVICES: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}
OLDEST_GPU = (8, 0)  # compute capability

# Native backends of every op, best first for the device they take; `reference` is always there.
NATIVE_BACKENDS: dict[str, tuple[str, ...]] = {
    "token_logprobs": ("cpu", "cuda", "triton"),
    "linear_logprobs": ("cpu", "cuda", "triton"),
    "linear_cross_entropy": ("cpu", "cuda", "triton"),
    "lora_linear": ("cpu", "cuda", "triton"),
    "lora_linear_group": ("cpu", "cuda", "triton"),
    "gae": ("cpu", "cuda", "triton"),
    "ppo_advantages": ("cpu", "cuda", "triton"),
    "ppo_loss": ("cpu", "cuda", "triton"),
    "ranking_loss": ("cpu", "cuda", "triton"),
}

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/dtypes.h


def why_not(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The reason why `backend` cannot run `op` on such tensors; empty if it can."""
    if backend == "reference":
        return ""
    if backend not in NATIVE_BACKENDS[op]:
        return f"{op} has no {backend} kernel in this version"
    if backend == "triton":
        if not HAS_TRITON:
            return "triton is not installed"
    elif _C is None:
        return f"the native module fastrl._C is missing ({NATIVE_ERROR})"
    elif backend == "cuda" and cuda is None:
        return "fastrl._C was built without CUDA (FASTRL_CUDA=on needs nvcc)"
    if device.type not in DEVICES[backend]:
        return f"tensors are on {device.type}"
    if device.type == "cuda":
        capability = compute_capability(device.index)
        if capability < OLDEST_GPU:
            major, minor = capability
            return f"the GPU has compute capability {major}.{minor}; the kernels need {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
        problem = (driver_problem() or build_problem(capability)) if backend == "cuda" else ""
        if problem:
            return problem
    if dtype not in DTYPE_CODES:
        return f"dtype {dtype} (native kernels take float32, bfloat16, float16)"
    return ""


@torch.compiler.assume_constant_result
def compute_capability(index: int | None) -> tuple[int, int]:
    return _compute_capability(torch.cuda.current_device() if index is None else index)


@functools.cache  # asked on every call of an op
def _compute_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@torch.compiler.assume_constant_result
def driver_problem() -> str:
    """Why the driver cannot run the CUDA kernels; empty if it can. `cuda` must be there."""
    return _driver_problem()


@functools.cache
def _driver_problem() -> str:
    driver, runtime = _C.cuda_driver_version(), _C.cuda_runtime_version()
    if driver // 1000 >= runtime // 1000:  # within a major version any driver will do
        return ""
    offers, needs = dotted(driver), dotted(runtime)
    return (
        f"the driver supports CUDA up to {offers}, the kernels were built with CUDA {needs}; "
        f"update the driver, or build fastrl with nvcc {offers} or older"
    )


@torch.compiler.assume_constant_result
def build_problem(capability: tuple[int, int]) -> str:
    """Why a GPU cannot run the CUDA kernels as they were built; empty if it can. `cuda` must be there."""
    return _build_problem(capability)


@functools.cache
def _build_problem(capability: tuple[int, int]) -> str:
    built, (major, minor) = _C.cuda_architectures, capability
    if any(_has_code(name, capability) for name in built.split(",")):
        return ""
    return (
        f"fastrl._C was built for CUDA architectures {built} alone, the GPU has compute capability {major}.{minor}; "
        f"build with FASTRL_CUDA_ARCHITECTURES={major}{minor}-real, or without that variable"
    )


def _has_code(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs what nvcc makes for an architecture in CMake's words: 80-real, 90a-real, 100, 100-virtual."""
    match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    if match is None:  # native, all, all-major
        return True
    built, letter = (int(match[1]), int(match[2])), match[3]
    if letter == "a":
        return built == capability
    # Machine code runs on later minor versions, PTX on anything later.
    same_major = letter == "f" or match[4] == "-real"
    return built <= capability and (built[0] == capability[0] or not same_major)


def dotted(version: int) -> str:
    """13.0 for CUDA's 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"


def choose(op: str, tensor: torch.Tensor, backend: str | None = None, *, eager: bool = False) -> str:
    """The backend that runs `op` on tensors like `tensor`."""
    return choose_for(op, tensor.device, tensor.dtype, backend, eager=eager)


def choose_for(
    op: str, device: torch.device, dtype: torch.dtype, backend: str | None = None, *, eager: bool = False
) -> str:
    """See `choose`; `eager`: plain torch was measured faster at this shape and runs unless a backend is asked for."""
    source = "backend" if backend is not None else "FASTRL_BACKEND"
    requested = backend if backend is not None else os.environ.get("FASTRL_BACKEND") or None
    if requested is not None:
        return _require(op, requested, source, device, dtype)
    if eager or transforming():
        return "reference"
    for candidate in NATIVE_BACKENDS[op]:
        if not why_not(candidate, op, device, dtype):
            return candidate
    return "reference"


@torch.compiler.assume_constant_result
def transforming() -> bool:
    """Whether torch.func (grad, vmap, ...) or forward-mode AD looks into the call: plain torch then, which it knows."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _require(op: str, requested: str, source: str, device: torch.device, dtype: torch.dtype) -> str:
    if not isinstance(requested, str) or requested not in BACKENDS:
        raise ValueError(f"{op}: {source}: expected one of {', '.join(BACKENDS)}, got {requested!r}")
    reason = why_not(requested, op, device, dtype)
    if not reason and requested != "reference" and transforming():
        raise ValueError(
            f"{op}: {source}={requested!r} is not possible under torch.func or forward-mode AD; use 'reference'"
        )
    if reason:
        able = [b for b in BACKENDS if not why_not(b, op, device, dtype)]
        raise ValueError(f"{op}: {source}={requested!r} is not possible: {reason}; possible here: {', '.join(able)}")
    return requested


def explain(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """(op, backend that would run, reason) for every op; what `fastrl doctor` prints."""
    rows = []
    for op, candidates in NATIVE_BACKENDS.items():
        chosen = choose_for(op, device, dtype)
        if os.environ.get("FASTRL_BACKEND"):
            reason = "FASTRL_BACKEND asks for it"
        elif chosen != "reference":
            reason = f"native kernel ({_C.cpu_isa()})" if chosen == "cpu" else "native kernel"
        else:
            reason = "; ".join(f"{b}: {why_not(b, op, device, dtype)}" for b in candidates)
        rows.append((op, chosen, reason))
    return rows


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


def rows(tensor: torch.Tensor) -> tuple[int, int, int, int, int]:
    """How C++ addresses the rows of `tensor` (see csrc/rows.h); `has_simple_rows` must hold."""
    code = DTYPE_CODES[tensor.dtype]
    if tensor.ndim == 1:
        return _address(tensor), code, 1, 0, 0
    (inner, outer_stride, inner_stride) = _collapse(tensor)  # type: ignore[misc]
    return _address(tensor), code, inner, outer_stride, inner_stride


def with_simple_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself if its last dimension is contiguous and the leading ones collapse to two; else a copy."""
    if tensor.ndim <= 1:
        return tensor.contiguous()
    if (tensor.shape[-1] > 1 and tensor.stride(-1) != 1) or _collapse(tensor) is None:
        return tensor.contiguous()
    return tensor


def _collapse(tensor: torch.Tensor) -> tuple[int, int, int] | None:
    """(inner, outer_stride, inner_stride) of the leading dimensions; None if they need more than two."""
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


def address(tensor: torch.Tensor | None) -> int:
    """The address of the first element; 0 stands for an absent tensor."""
    return 0 if tensor is None else _address(tensor)


def _address(tensor: torch.Tensor) -> int:
    pointer = tensor.data_ptr()
    if pointer == 0 and tensor.numel() > 0:
        raise RuntimeError(f"fastrl: expected tensors with memory, got a {type(tensor).__name__} of {tensor.numel()}")
    return pointer


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast asks for on the tensor's device; None where it asks for none."""
    device_type = tensor.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type) or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device_type)


ELEMENTS_PER_THREAD = 1 << 16


def team(elements: int) -> int:
    """Threads for a pass over so many elements: at most torch's, and none that would wait longer than it works."""
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
            _C.advise_huge_pages(tensor.data_ptr(), bytes_)
    return tensor
