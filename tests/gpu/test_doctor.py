"""What `fastrl doctor` says about CUDA, on machines that this one is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastrl.commands import doctor
from fastrl.ops import backend


@pytest.fixture
def machine(monkeypatch):
    """A GPU, its driver and a native module built with CUDA 13.0, all made up."""
    made_up = SimpleNamespace(driver=13000, count=1, probe="no error", capability=(9, 0))
    native = SimpleNamespace(
        cuda_architectures="80-real,90a-real",
        cuda_runtime_version=lambda: 13000,
        cuda_driver_version=lambda: made_up.driver,
        cuda_device_count=lambda: made_up.count,
        cuda_probe=lambda: made_up.probe,
    )

    def properties(number):
        major, minor = made_up.capability
        return SimpleNamespace(name="GPU X", total_memory=80 << 30, major=major, minor=minor)

    monkeypatch.setattr(backend, "_C", native)
    monkeypatch.setattr(backend, "cuda", object())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: made_up.count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    backend._driver_problem.cache_clear()
    yield made_up
    backend._driver_problem.cache_clear()


def report() -> str:
    return doctor._table(doctor.cuda())


def test_all_well(machine):
    assert "GPU X, 80 GiB, compute capability 9.0\n" in report()
    assert report().endswith("runs") and "built with CUDA 13.0 for 80-real,90a-real\n" in report()


def test_an_old_driver(machine):
    machine.driver = 12040
    assert "too old: the driver supports CUDA up to 12.4, the kernels were built with CUDA 13.0; update" in report()


def test_no_driver(machine):
    machine.driver = 0
    assert report().endswith("none found; the CUDA kernels need one")


def test_a_hidden_device(machine):
    machine.count = 0
    assert "sees no device (CUDA_VISIBLE_DEVICES?)" in report()


def test_an_old_gpu(machine):
    machine.capability = (7, 5)
    machine.probe = "no kernel image is available for execution on the device"
    assert "compute capability 7.5: too old, the kernels need 8.0" in report()
    assert report().endswith("fails: no kernel image is available for execution on the device")


def test_a_module_without_cuda(machine, monkeypatch):
    monkeypatch.setattr(backend, "cuda", None)
    assert report().endswith("not built (no nvcc, or FASTRL_CUDA=off)")
