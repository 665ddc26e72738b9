"""CUDA's kernels compiled for the host (tests/gpu/host_cuda) and what they are watched for."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import torch

ROOT = Path(__file__).parents[2]
MACHINE = ROOT / "tests/gpu/host_cuda"
MODULE = "module.so"

FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-Wno-unknown-pragmas",
    "-DFASTRL_CUDA_ON_HOST",
]
CHECKS = ["-fsanitize=thread", "-fsanitize=alignment"]  # instrumentation alone: checks.cpp is the runtime


def build_kernels(folder: Path) -> None:
    """fastrl._C.cuda, to be loaded."""
    kernels = [p for p in sorted((ROOT / "csrc/cuda").glob("*.cu")) if p.name != "device.cu"]
    build(folder, kernels, [ROOT / "csrc/cuda/bindings.cpp", MACHINE / "module.cpp"])


def build(folder: Path, kernels: list[Path], plain: list[Path]) -> None:
    """A module in `folder` from kernels, which get checks, and plain sources."""
    includes = [ROOT / "csrc", MACHINE, pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [os.environ.get("CXX", "g++"), *FLAGS, *(f"-I{p}" for p in includes)]
    jobs = []
    for source in [*kernels, *plain, MACHINE / "machine.cpp", MACHINE / "checks.cpp"]:
        output = folder / f"{source.stem}{source.suffix}.o"
        checks = CHECKS if source in kernels else []
        compile_one = [*command, *checks, "-x", "c++", "-c", str(source), "-o", str(output)]
        jobs.append((output, subprocess.Popen(compile_one)))
    for output, job in jobs:
        assert job.wait() == 0, f"compiling {output.stem} for the host failed"
    subprocess.run([command[0], "-shared", *(str(o) for o, _ in jobs), "-o", str(folder / MODULE)], check=True)


def load(folder: Path):
    """The module built in `folder`, which is called like it."""
    name, path = folder.name, folder / MODULE
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.device.set_static_shared(static_shared(path))
    return module


def static_shared(path: Path) -> list[tuple[int, int]]:
    """Offset and size of what the kernels declare as __shared__: the variables that are local to their functions."""
    symbols = subprocess.run(["nm", "-S", "--defined-only", str(path)], capture_output=True, text=True, check=True)
    fields = [line.split() for line in symbols.stdout.splitlines()]
    local = [f for f in fields if len(f) == 4 and f[2] == "b" and re.match("_ZZNK?6fastrl4cuda", f[3])]
    return [(int(offset, 16), int(size, 16)) for offset, size, *_ in local]


def watch_addresses(module, monkeypatch):
    """Allows the kernels every tensor whose address is asked for, up to its last element, and nothing beside it."""
    data_ptr = torch.Tensor.data_ptr

    def watched(tensor):
        address = data_ptr(tensor)
        if tensor.numel() > 0:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            module.device.allow(address, (last + 1) * tensor.element_size())
        return address

    monkeypatch.setattr(torch.Tensor, "data_ptr", watched)


def reports(module) -> list[str]:
    """What the kernels did wrong, and where."""
    found = module.device.take_reports()
    if not found:
        return []
    command = ["addr2line", "-e", module.__file__, "-f", "-C", "-i", "-p", *(hex(offset) for _, offset in found)]
    places = subprocess.run(command, capture_output=True, text=True).stdout.replace("\n (inlined by)", " <-")
    return [f"{what}: {place}" for (what, _), place in zip(found, places.splitlines(), strict=False)]
