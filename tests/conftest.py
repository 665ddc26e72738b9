"""Options that all tests share."""

import os

import pytest
import torch
from once import once

# Triton's decorators decide at import whether a kernel is compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Workers share the cores. What depends on the number of threads sets it; the sanitizers' job runs on two.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# With less cuBLAS may use what differs from run to run, and raises where torch is asked for deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


OWN_JOBS = ("sanitize", "ptxas", "families", "wheel", "hosts", "ranks")  # marks of tests that take long each


def pytest_collection_modifyitems(config, items):
    """Tests with such a mark run only where `-m` asks for it."""
    for mark in OWN_JOBS:
        if mark in config.getoption("-m"):
            continue
        skip = pytest.mark.skip(reason=f"run with -m {mark}")
        for item in items:
            if item.get_closest_marker(mark):
                item.add_marker(skip)


@pytest.fixture
def one_thread():
    """Small tensors: one thread is fastest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def host_cuda_kernels(tmp_path_factory):
    """fastrl._C.cuda compiled for the host, with checks of every access to memory."""
    import host_cuda

    return host_cuda.load(once(tmp_path_factory, "host_cuda_kernels", host_cuda.build_kernels))
