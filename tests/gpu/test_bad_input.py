"""Requests that a GPU backend cannot meet say why, and what can be done. Nothing here needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conformance.calls import Call, all_calls, evaluate, label
from gpus import HAS_GPU

from fastrl.kernels.launch import launch
from fastrl.ops import backend, native

REFERENCE = all_calls(backends=("reference",))
GPU = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch):
    """A machine with a GPU as far as dispatch can see: native kernels and a driver for them."""
    module = SimpleNamespace(cuda_driver_version=lambda: 13000, cuda_runtime_version=lambda: 13000)
    module.cuda_architectures = "80-real,86-real,89-real,90a-real,100"
    monkeypatch.setattr(backend, "cuda", object())
    monkeypatch.setattr(backend, "_C", module)
    monkeypatch.setattr(backend, "compute_capability", lambda index: (9, 0))
    caches = backend._driver_problem, backend._build_problem
    for cached in caches:
        cached.cache_clear()
    yield module
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("call", REFERENCE, ids=label)
def test_cpu_tensors_on_a_gpu_backend(call: Call, name, monkeypatch):
    monkeypatch.setattr(backend, "cuda", object())
    with pytest.raises(ValueError, match=rf"backend='{name}' is not possible: .*; possible here: reference") as caught:
        evaluate(call._replace(backend=name))
    op = call.name.split(",")[0]
    if name in backend.NATIVE_BACKENDS[op]:
        assert "tensors are on cpu" in str(caught.value)


@pytest.mark.parametrize("call", REFERENCE, ids=label)
def test_tensors_on_different_devices(call: Call):
    """Each argument in turn lies elsewhere; the message names one of the two devices as expected."""
    first, *others = (name for name in call.tensors if not name.startswith("upstream"))
    for name in others:
        tensors = {**call.tensors, name: call.tensors[name].to("meta")}
        with pytest.raises(ValueError, match="expected a tensor on cpu, got meta"):
            evaluate(call._replace(leaves=()), tensors)


def test_an_old_gpu_is_named(hopper, monkeypatch):
    monkeypatch.setattr(backend, "compute_capability", lambda index: (7, 5))
    reason = "the GPU has compute capability 7.5; the kernels need 8.0"
    assert backend.why_not("cuda", "lora_linear", GPU, torch.float32) == reason
    assert backend.choose_for("lora_linear", GPU, torch.float32) == "reference"
    with pytest.raises(ValueError, match=rf"{reason}; possible here: reference$"):
        backend.choose_for("lora_linear", GPU, torch.float32, "cuda")


def test_another_vendors_gpu_is_named(hopper, monkeypatch):
    """torch calls the devices of ROCm `cuda` too."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for name in ("cuda", "triton"):
        assert "built for ROCm 6.4" in backend.why_not(name, "lora_linear", GPU, torch.float32)
    assert backend.choose_for("lora_linear", GPU, torch.float32) == "reference"


def test_a_module_without_cuda_is_named(hopper, monkeypatch):
    monkeypatch.setattr(backend, "cuda", None)
    assert "built without CUDA" in backend.why_not("cuda", "lora_linear", GPU, torch.float32)


def test_an_old_driver_is_named(hopper):
    assert backend.why_not("cuda", "lora_linear", GPU, torch.float32) == ""
    hopper.cuda_driver_version = lambda: 12080
    backend._driver_problem.cache_clear()
    reason = backend.why_not("cuda", "lora_linear", GPU, torch.float32)
    assert reason.startswith("the driver supports CUDA up to 12.8, the kernels were built with CUDA 13.0;")
    assert "update the driver" in reason


@pytest.mark.parametrize(
    ("built", "runs", "does_not"),
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(9, 0), (12, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90a-real", [(9, 0)], [(8, 0), (10, 0)]),
        ("80", [(8, 0), (9, 0), (12, 1)], []),
        ("90-virtual", [(9, 0), (10, 0)], [(8, 9)]),
        ("100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("80-real,86-real,89-real,90a-real,100", [(8, 0), (8, 7), (9, 0), (10, 0), (12, 0)], []),
        ("native", [(8, 0), (9, 0)], []),
    ],
)
def test_a_gpu_that_was_not_built_for_is_named(hopper, built, runs, does_not):
    hopper.cuda_architectures = built
    assert not any(backend.build_problem(capability) for capability in runs)
    for major, minor in does_not:
        problem = backend.build_problem((major, minor))
        assert f"built for CUDA architectures {built} alone, the GPU has compute capability {major}.{minor}" in problem


def test_a_build_for_another_gpu_leaves_the_others_to_triton(hopper):
    hopper.cuda_architectures = "80-real"
    assert "FASTRL_CUDA_ARCHITECTURES=90-real" in backend.why_not("cuda", "gae", GPU, torch.float32)
    assert backend.choose_for("gae", GPU, torch.float32) == ("triton" if backend.HAS_TRITON else "reference")


def test_float64_goes_to_the_reference(hopper):
    assert backend.choose_for("lora_linear", GPU, torch.float64) == "reference"


def launch_cuda(monkeypatch, tensor, kernel):
    monkeypatch.setattr(native, "raw_stream", lambda index: 100 + index)
    monkeypatch.setattr(native, "cuda", SimpleNamespace(kernel=kernel))
    native.launch_cuda("kernel", tensor, 5)


def launch_triton(monkeypatch, tensor, kernel):
    launch({(3,): kernel}, (3,), tensor, 5, 100 + tensor.device.index)  # Triton takes the current device's stream


@pytest.mark.skipif(HAS_GPU, reason="the device guard is mocked")
@pytest.mark.parametrize("launcher", [launch_cuda, launch_triton])
@pytest.mark.parametrize("index", [0, 1])
def test_launches_on_the_device_and_stream_of_the_tensor(monkeypatch, index, launcher):
    """T29: the tensor's device, whichever is current; torch's current stream there."""
    current = [0]

    class Guard:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    seen = []
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    tensor = SimpleNamespace(device=torch.device("cuda", index))
    launcher(monkeypatch, tensor, lambda *args: seen.append((current[-1], args)))
    assert seen == [(index, (5, 100 + index))] and current == [0]
