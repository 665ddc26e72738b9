"""Which implementation of an op runs; how native ones are called is in native.py.

Backends: `reference` (plain torch, any device and dtype), `cpu` (C++), `cuda` (C++), `triton`. The order of choice is
the explicit argument, the environment variable FASTRL_BACKEND (for the ops that have such kernels), then the best that
the tensor's device and dtype allow.
A request that cannot be met raises and lists what can; nothing falls back silently.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re

import torch
from torch.autograd import forward_ad

from fastrl.constants import OPS
from fastrl.ops.native import _C, DTYPE_CODES, NATIVE_ERROR, cuda

HAS_TRITON = importlib.util.find_spec("triton") is not None

BACKENDS = ("reference", "cpu", "triton", "cuda")

# The devices whose tensors a native backend takes.
DEVICES: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}
OLDEST_GPU = (8, 0)  # compute capability

# Native backends of every op, best first for the device they take; `reference` is always there. On a GPU the few scores
# of a ranking_loss are compared as fast by torch's own kernels.
NATIVE_BACKENDS: dict[str, tuple[str, ...]] = dict.fromkeys(OPS, ("cpu", "cuda", "triton")) | {"ranking_loss": ("cpu",)}


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
        if torch.version.hip:
            return f"this torch is built for ROCm {torch.version.hip}; the GPU kernels are for NVIDIA's GPUs"
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
    if backend is not None:
        return _require(op, backend, "backend", device, dtype)
    wanted = _wanted(op)
    if wanted is not None:
        return _require(op, wanted, "FASTRL_BACKEND", device, dtype)
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


def _wanted(op: str) -> str | None:
    """What FASTRL_BACKEND asks of an op: one that has no kernel of that backend runs as without it."""
    wanted = os.environ.get("FASTRL_BACKEND") or None
    return None if wanted in DEVICES and wanted not in NATIVE_BACKENDS[op] else wanted


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
        if _wanted(op):
            reason = "FASTRL_BACKEND asks for it"
        elif chosen != "reference":
            reason = f"native kernel ({_C.cpu_isa()})" if chosen == "cpu" else "native kernel"
        else:
            reason = "; ".join(f"{b}: {why_not(b, op, device, dtype)}" for b in candidates)
        rows.append((op, chosen, reason))
    return rows
