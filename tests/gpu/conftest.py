"""The GPU kernels' tests run anywhere: on a GPU as they are; without one Triton runs in its interpreter and CUDA's
kernels run on the host, every thread a fiber (host_cuda/machine.h). tests/conftest.py sets TRITON_INTERPRET where it is
needed.
"""

from __future__ import annotations

from pathlib import Path

import host_cuda
import pytest
import torch
from gpus import HAS_GPU
from interpreter import amend

from fastrl.ops import backend, native

amend()
HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """On a machine with a GPU `-m gpu` means all of these tests."""
    for item in items:
        if HAS_GPU and item.path.is_relative_to(HERE):
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def memory_for_others():
    """Several workers share a GPU, and torch keeps what a test has freed."""
    yield
    if HAS_GPU:
        torch.cuda.empty_cache()


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
        for module in (backend, native):
            monkeypatch.setattr(module, "cuda", request.getfixturevalue("host_cuda_kernels"))
    monkeypatch.setitem(backend.DEVICES, name, ("cuda", "cpu"))
    return name


@pytest.fixture(autouse=True)
def kernels_touch_only_what_they_may(request, monkeypatch):
    """Out of bounds, misaligned or unordered accesses of CUDA kernels on the host fail the test that launched them."""
    if HAS_GPU or "host_cuda_kernels" not in request.fixturenames and "gpu_backend" not in request.fixturenames:
        yield
        return
    module = request.getfixturevalue("host_cuda_kernels")
    host_cuda.watch_addresses(module, monkeypatch)
    module.device.take_reports()
    yield
    assert not (found := host_cuda.reports(module)), "\n".join(found)
