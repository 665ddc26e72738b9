"""The GPU kernels' tests run anywhere: on a GPU as they are; without one Triton runs in its interpreter and CUDA's
kernels run on the host, every thread a fiber (host_cuda.h). tests/conftest.py sets TRITON_INTERPRET where it is needed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest
import torch
from gpus import HAS_GPU
from interpreter import speed_up_scans

from fastrl.ops import backend

ROOT = Path(__file__).parents[2]

speed_up_scans()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request, monkeypatch) -> str:
    """A backend of the GPU, made to take CPU tensors where there is no GPU."""
    name = request.param
    if HAS_GPU:
        if name == "cuda" and backend.cuda is None:
            pytest.skip("fastrl was built without CUDA")
        return name
    if name == "cuda":
        monkeypatch.setattr(backend, "cuda", request.getfixturevalue("host_cuda_kernels"))
    monkeypatch.setitem(backend.DEVICES, name, ("cuda", "cpu"))
    return name


@pytest.fixture(scope="session")
def host_cuda_kernels(tmp_path_factory):
    """fastrl._C.cuda compiled for the host."""
    folder = tmp_path_factory.mktemp("host_cuda")
    path = folder / "host_cuda_kernels.so"
    here = Path(__file__).parent
    sources = [here / "host_module.cpp", ROOT / "csrc/cuda/bindings.cpp"]
    kernels = [p for p in sorted((ROOT / "csrc/cuda").glob("*.cu")) if p.name != "device.cu"]
    includes = [ROOT / "csrc", here, pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wno-unknown-pragmas", "-DFASTRL_CUDA_ON_HOST", "-fvisibility=hidden"]
    command = [os.environ.get("CXX", "g++"), *flags, *(f"-I{p}" for p in includes)]
    jobs = []
    for source in [*sources, *kernels]:
        output = folder / f"{source.stem}{source.suffix}.o"
        jobs.append((output, subprocess.Popen([*command, "-x", "c++", "-c", str(source), "-o", str(output)])))
    for output, job in jobs:
        assert job.wait() == 0, f"compiling {output.stem} for the host failed"
    subprocess.run([command[0], "-shared", *(str(o) for o, _ in jobs), "-o", str(path)], check=True)
    spec = importlib.util.spec_from_file_location("host_cuda_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
