"""`fastrl doctor`: what is installed, whether the native kernels load, and which backend each op would use."""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "peft", "datasets", "accelerate")
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
    print(_table(versions()))
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


def versions() -> list[tuple[str, str]]:
    """(name, version) of fastrl, Python, the system and the packages fastrl uses."""
    from fastrl import __version__

    rows = [
        ("fastrl", f"{__version__}  {Path(__file__).parent}"),
        ("python", platform.python_version()),
        ("system", f"{platform.system()} {platform.machine()}"),
    ]
    return rows + [(name, _version(name)) for name in PACKAGES]


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
    """CUDA as torch sees it, and whether the native module carries CUDA kernels."""
    import torch

    from fastrl.ops import backend

    if torch.version.cuda is None:
        seen = "this torch is built without CUDA"
    elif not torch.cuda.is_available():
        seen = f"torch is built for CUDA {torch.version.cuda}, but sees no device"
    else:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        seen = f"{torch.cuda.get_device_name()} (sm {capability}), CUDA {torch.version.cuda}"
    rows = [("CUDA", seen)]
    if backend._C is not None:
        rows.append(("native CUDA part", "built" if backend._C.has_cuda else "not built (no nvcc, or FASTRL_CUDA=off)"))
    return rows


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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [f"{cell:{width}}" for cell, width in zip(row[:-1], widths, strict=True)]
        lines.append("  ".join(["", *cells, row[-1]]).rstrip())
    return "\n".join(lines)
