"""The loops on a GPU, or on a simulated one that runs the CUDA kernels on the host: same settings, same course."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from gpus import HAS_GPU
from loops import reported, tiny_run
from simulated_cuda import DEVICE, OnDevice, simulated_cuda, use_kernels

from fastrl.models import saves_adapter, saving
from fastrl.ops import backend
from fastrl.run import run
from fastrl.train import ppo, sft

# Near 0 by their nature, or (the explained variance) a quotient of such.
UNSTABLE = ("lr", "kl_k1", "approx_kl", "first_approx_kl", "policy_loss", "explained_variance")


# What is trained beside the base model meets no other kernels; full training does in its head.
COURSES = [
    *((name, "float32") for name in ("sft", "sft, full", "reward", "ppo")),
    ("sft", "bfloat16"),
    ("reward", "bfloat16"),
]


@pytest.fixture
def loop(name, tmp_path, tiny_policy, tiny_scalar):
    """(main, configuration) of a few steps on a GPU."""
    main, cfg = tiny_run(name, tmp_path, tiny_policy, tiny_scalar)
    cfg, adapters = replace(cfg, device="cuda"), saves_adapter(cfg)
    if main is ppo.main:
        return main, replace(cfg, iterations=2, merge_adapter=adapters)
    cfg = replace(cfg, max_steps=3, save_every=0)
    return main, replace(cfg, sample_tokens=4, gradient_checkpointing=not adapters) if main is sft.main else cfg


@pytest.fixture
def gpu(request, monkeypatch):
    """A GPU whose kernels are fastrl's CUDA kernels."""
    if HAS_GPU:
        if backend.cuda is None:
            pytest.skip("fastrl was built without CUDA")
        return nullcontext
    use_kernels(monkeypatch, request.getfixturevalue("host_cuda_kernels"))
    for module, name in ((saving, "_write"), (run, "save_state")):  # files want real tensors
        monkeypatch.setattr(module, name, lambda *args: None)
    return lambda: simulated_cuda(monkeypatch)


def course(folder: str) -> list[dict[str, float]]:
    """The figures of every report that two backends must agree on."""
    return [{k: v for k, v in line.items() if isinstance(v, float)} for line in reported(folder, UNSTABLE)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), COURSES)
def test_the_course_of_a_run_is_that_of_the_references(loop, gpu, dtype, monkeypatch):
    """Every tensor is on the device; losses, scores and norms are those of plain torch there."""
    main, cfg = loop
    courses = []
    for name in ("reference", "cuda"):
        monkeypatch.setenv("FASTRL_BACKEND", name)
        output = f"{cfg.output}-{name}"
        with gpu():
            main(replace(cfg, dtype=dtype, output=output))
        courses.append(course(output))
    assert len(courses[0]) == len(courses[1]) > 3
    # In bfloat16 rounding soon decides which token is sampled: until the first update alone.
    tolerance, lines = {"float32": (1e-3, None), "bfloat16": (0.1, 2)}[dtype]
    for want, got in zip(*(figures[:lines] for figures in courses), strict=True):
        assert got == pytest.approx(want, rel=tolerance, abs=tolerance)


@pytest.mark.skipif(HAS_GPU, reason="of the simulated device")
def test_the_simulated_device_notices_what_was_left_behind(monkeypatch):
    with simulated_cuda(monkeypatch):
        x = torch.ones(2, 3, requires_grad=True)
        on_device = x.to("cuda")
        assert isinstance(on_device, OnDevice) and on_device.device == DEVICE and on_device.is_cuda
        assert torch.arange(3, device="cuda").device == DEVICE and (on_device + 1).mT.device == DEVICE
        (on_device * 2).sum().backward()
        assert torch.equal(x.grad.cpu(), torch.full((2, 3), 2.0)) and on_device.sum().item() == 6
        assert not on_device.cpu().is_cuda and on_device[torch.tensor([1])].is_cuda
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            on_device + torch.ones(3)
        model = torch.nn.Linear(3, 2).to("cuda")
        assert model(on_device).is_cuda and model.weight.is_cuda
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            model(torch.ones(2, 3))
