"""`fastrl doctor`: what is installed, whether the native kernels load, and which backend each op would use."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

import fastrl
from fastrl.versions import versions

OPENMP = re.compile(r"(/\S*/lib(?:gomp|omp|iomp5)[^/\s]*\.so\S*)")


def main(argv: Sequence[str]) -> None:
    """Print the report; nothing in it needs a GPU, the native module or a network."""
    parser = argparse.ArgumentParser(prog="fastrl doctor", description=__doc__)
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="dtype for which backends are chosen (default: float32)",
    )
    options = parser.parse_args(list(argv))
    found = versions()
    found["fastrl"] += f"  {Path(fastrl.__file__).parent}"
    print(_table(list(found.items())))
    try:
        import torch
    except ImportError as error:
        print(f"\ntorch does not load, so no op can run: {error}\n  to do: pip install torch")
        return
    print()
    print(_table(native_module() + cuda()))
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        print(f"\nbackend of each op for {options.dtype} tensors on {device}:")
        print(backends(device, options.dtype))


def native_module() -> list[tuple[str, str]]:
    """Whether fastrl._C loads, the instruction set it uses, threads, and the OpenMP runtimes in this process."""
    import torch

    from fastrl.ops import backend

    native = backend._C
    if native is None:
        rows = [
            ("native module", f"missing: {backend.NATIVE_ERROR}"),
            ("", "ops run on `reference`; to do: pip install . (or python setup.py build_ext --inplace)"),
        ]
    else:
        forced = os.environ.get("FASTRL_CPU_ISA")
        rows = [
            ("native module", f"{native.__file__}"),
            ("instruction set", native.cpu_isa() + (f" (FASTRL_CPU_ISA={forced})" if forced else "")),
        ]
    rows.append(("threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs (torch.set_num_threads)"))
    runtimes = openmp_runtimes()
    if len(runtimes) > 1:
        note = "  more than one: thread pools compete; import torch before other OpenMP users"
    else:
        note = "  shared by torch and fastrl" if native is not None else ""
    rows.append(("OpenMP", (", ".join(runtimes) or "none found") + note))
    requested = os.environ.get("FASTRL_BACKEND")
    return rows + ([("FASTRL_BACKEND", requested)] if requested else [])


def openmp_runtimes() -> list[str]:
    """File names of the OpenMP libraries loaded in this process (Linux)."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted({Path(path).name for path in OPENMP.findall(maps)})


def cuda() -> list[tuple[str, str]]:
    """CUDA as torch sees it, the CUDA part of the native module, and whether its kernels run."""
    import torch

    from fastrl.ops import backend

    if torch.version.cuda is None:
        rows = [("CUDA", "this torch is built without CUDA")]
    elif not torch.cuda.is_available():
        rows = [("CUDA", f"torch is built for CUDA {torch.version.cuda}, but sees no device")]
    else:
        rows = [("CUDA", f"torch is built for CUDA {torch.version.cuda}")]
        rows += [(f"GPU {n}", _gpu(n)) for n in range(torch.cuda.device_count())]
    if backend._C is None:
        return rows
    if backend.cuda is None:
        return [*rows, ("native CUDA part", "not built (no nvcc, or FASTRL_CUDA=off)")]
    built = f"built with CUDA {backend.dotted(backend._C.cuda_runtime_version())} for {backend._C.cuda_architectures}"
    return [*rows, ("native CUDA part", built), *_driver()]


def _gpu(number: int) -> str:
    """Name, memory and compute capability of a device; whether the kernels support it."""
    import torch

    from fastrl.ops.backend import OLDEST_GPU

    properties = torch.cuda.get_device_properties(number)
    capability = (properties.major, properties.minor)
    text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {_numbers(capability)}"
    return text if capability >= OLDEST_GPU else f"{text}: too old, the kernels need {_numbers(OLDEST_GPU)}"


def _driver() -> list[tuple[str, str]]:
    """The driver as the native module sees it, and what a first kernel says."""
    from fastrl.ops import backend

    native = backend._C
    if native.cuda_driver_version() == 0:
        return [("driver", "none found; the CUDA kernels need one")]
    rows = [("driver", f"supports CUDA up to {backend.dotted(native.cuda_driver_version())}")]
    if backend.driver_problem():
        return [*rows, ("", f"too old: {backend.driver_problem()}")]
    if native.cuda_device_count() == 0:
        return [*rows, ("", "sees no device (CUDA_VISIBLE_DEVICES?)")]
    outcome = native.cuda_probe()
    return [*rows, ("first kernel", "runs" if outcome == "no error" else f"fails: {outcome}")]


def _numbers(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def backends(device: str, dtype: str) -> str:
    """Table of op, chosen backend and the reason of the choice."""
    import torch

    from fastrl.ops import backend

    try:
        rows = [
            (op, chosen, reason or "no native kernel in this version")
            for op, chosen, reason in backend.explain(torch.device(device), getattr(torch, dtype))
        ]
    except ValueError as error:
        return f"  {error}"
    return _table([("op", "backend", "reason"), *rows])


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [f"{cell:{width}}" for cell, width in zip(row[:-1], widths, strict=True)]
        lines.append("  ".join(["", *cells, row[-1]]).rstrip())
    return "\n".join(lines)
