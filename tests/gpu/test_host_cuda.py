"""The machine that runs CUDA kernels on the host reports what would be wrong on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import host_cuda
import pytest
import torch
from gpu import every_op
from gpus import HAS_GPU
from once import once

from fastrl.ops import backend, native

pytestmark = pytest.mark.skipif(HAS_GPU, reason="with a GPU the kernels run there, under compute-sanitizer")


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    def build(folder):
        here = host_cuda.MACHINE
        host_cuda.build(folder, [here / "faults.cu"], [here / "faults_module.cpp"])

    return host_cuda.load(once(tmp_path_factory, "host_cuda_faults", build))


FAULTS = [  # kernel, argument without the fault, with it, blocks, what is reported
    ("outside", 0, 0, (2, 3), "write of 4 bytes outside of every array"),
    ("misaligned", 4, 5, (1, 1), "an address that is not aligned for its type"),
    ("reverse", 0, 1, (1, 1), "what another thread may be"),
    ("neighbour", 0, 1, (1, 1), "what another thread may be"),
    ("same_element", 0, 1, (2, 2), "write of what another thread may be reading or writing"),
    ("shuffle_with_returned_lanes", 32, 20, (1, 1), "a lane that has returned is waited for"),
    ("shuffle_in_two_places", 32, 16, (1, 1), "threads wait for each other at two different places"),
    ("read_the_other_block", 0, 1, (2, 2), "shared memory of a block that has ended"),
    ("reuse_what_the_other_block_reads", 0, 1, (2, 2), "what another thread may be"),
    ("arrive_twice", 0, 1, (2, 2), "cluster_arrive() and cluster_wait() do not take turns"),
    ("copy", 0, 1, (1, 1), "a copy that its thread did not wait for"),
]


@pytest.mark.parametrize(("kernel", "right", "wrong", "blocks", "report"), FAULTS, ids=[f[0] for f in FAULTS])
def test_every_fault_is_reported(faults, monkeypatch, kernel, right, wrong, blocks, report):
    host_cuda.watch_addresses(faults, monkeypatch)
    for argument, count, expected in ((right, blocks[0], False), (wrong, blocks[1], True)):
        x = torch.zeros(192)
        faults.run_fault(kernel, x[:128].data_ptr(), argument, count)
        found = host_cuda.reports(faults)
        assert bool(found) == expected, found
    assert any(report in line and "faults.cu" in line for line in found), found


@pytest.mark.slow
def test_every_op_reaches_every_kernel(host_cuda_kernels, monkeypatch):
    """What compute-sanitizer watches: all that the module offers, rows on clusters of eight, memory beyond 48 KiB."""
    called = set()

    def noted(name):
        function = getattr(host_cuda_kernels, name)
        return lambda *args: called.add(name) or function(*args)

    offered = {name for name in dir(host_cuda_kernels) if not name.startswith("_") and name != "device"}
    kernels = SimpleNamespace(**{name: noted(name) for name in offered})
    for module in (backend, native):
        monkeypatch.setattr(module, "cuda", kernels)
    monkeypatch.setitem(backend.DEVICES, "cuda", ("cuda", "cpu"))
    monkeypatch.setattr(every_op, "SHAPES", [shape for shape in every_op.SHAPES if shape["tokens"] < 1000])  # slow here
    host_cuda_kernels.device.take_launches()
    monkeypatch.setitem(every_op.BACKENDS, "cpu", ("cuda",))
    assert every_op.main("cpu") == 0
    assert called == offered
    assert any(blocks == 8 and shared > 48 << 10 for blocks, shared in host_cuda_kernels.device.take_launches())
