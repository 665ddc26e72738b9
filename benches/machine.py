"""What the benches say about the machine: its name, its versions, and how fast it can go at best."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastrl
from fastrl.ops.native import _C, cuda

PEERS = ("transformers", "peft", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")  # what may be beside it
ROOT = Path(__file__).resolve().parents[1]


def cache_bytes(device: str) -> int:
    """Size of the last-level cache; what a timing must exceed to be a timing of memory."""
    if device != "cpu":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=32 << 20)


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def environment(device: str) -> dict[str, str]:
    """The columns that are the same in every row of a run; what is not known is empty."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "device": device_name(device),
        "threads": str(torch.get_num_threads()) if device == "cpu" else "",
        "isa": _C.cpu_isa() if device == "cpu" and _C is not None else "",
        "fastrl": fastrl.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": cuda_versions() if device != "cpu" else "",
        "peers": ", ".join(f"{name} {_version(name)}" for name in PEERS if _version(name)),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short=12", "HEAD") or os.environ.get("FASTRL_COMMIT", ""),
        "dirty": "" if changes is None else "yes" if changes else "no",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }


def cuda_versions() -> str:
    """CUDA of torch, of the native module and of the driver."""
    versions = {"torch": torch.version.cuda}
    if cuda is not None:
        for name, number in (("fastrl", _C.cuda_runtime_version()), ("driver", _C.cuda_driver_version())):
            versions[name] = f"{number // 1000}.{number % 1000 // 10}"
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str | None:
    """Output of git in the source tree; None for an installed package or where git is missing or refuses."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return None if done.returncode else done.stdout.strip()


def ceilings(device: str, dtypes: set[torch.dtype], seconds: float, size: int | None = None) -> dict[str, float]:
    """Best measured rates: `read` and `copy` in GB/s, `gemm <dtype>` in GFLOP/s.

    read: a sum over an array of twice the last-level cache or more; copy: bytes read plus bytes written by `copy_`;
    gemm: a square product of `size`, by default 2048 (GPU: 8192), of random numbers. On a GPU also `datasheet`, the
    bandwidth that its memory's clock and width come to.
    """
    gpu = device != "cpu"
    words = max(2 * cache_bytes(device), (1 << 30) if gpu else (256 << 20)) // 8
    size = size or (8192 if gpu else 2048)
    source = torch.ones(words, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    rates = {
        "read": words * 8 / best_seconds(source.sum, seconds, device) / 1e9,
        "copy": words * 16 / best_seconds(partial(target.copy_, source), seconds, device) / 1e9,
    }
    for dtype in sorted(dtypes, key=str):
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        rates[f"gemm {short(dtype)}"] = 2 * size**3 / best_seconds(product, seconds, device) / 1e9
    return rates | datasheet(device)


def datasheet(device: str) -> dict[str, float]:
    """`datasheet`: GB/s of the GPU's memory, two transfers a clock; nothing where torch does not say."""
    properties = torch.cuda.get_device_properties(device) if device != "cpu" else None
    clock, width = (getattr(properties, f"memory_{name}", 0) for name in ("clock_rate", "bus_width"))
    return {"datasheet": 2 * clock * 1e3 * width / 8 / 1e9} if clock and width else {}  # kHz, bits


def best_seconds(call: Callable[[], object], seconds: float, device: str) -> float:
    """The shortest time of a call within `seconds`, after one to warm up."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        times.append(seconds_of(call, 1, device))
    return min(times)


def seconds_of(call: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds per call of so many in a row; on a GPU between two events of its stream."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def host_seconds(call: Callable[[], object], device: str) -> float:
    """Median seconds until a call on an idle GPU returns to the host."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return sorted(times)[len(times) // 2]


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]
