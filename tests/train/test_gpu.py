"""The loops on a GPU, or on a simulated one that runs the CUDA kernels on the host: same settings, same course."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpus import HAS_GPU
from simulated_cuda import DEVICE, OnDevice, simulated_cuda

from fastrl import checkpoint, resume
from fastrl.ops import backend
from fastrl.train import ppo, reward, sft


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    records = [{"prompt": f"{i} say:", "chosen": "a" * (1 + i % 4), "rejected": "b" * 5} for i in range(24)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(params=["sft", "sft, full", "reward", "ppo", "ppo, full"])
def loop(request, data, tmp_path, tiny_policy, tiny_scalar):
    """(main, configuration) of a few steps."""
    name, _, full = request.param.partition(", ")
    common = {"model": str(tiny_policy), "data": str(data), "output": str(tmp_path / "run"), "device": "cuda"}
    common |= {"lora_rank": 0 if full else 4, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3}
    if name == "ppo":
        options = {"reward_model": str(tiny_scalar), "iterations": 2, "minibatch_size": 4, "max_new_tokens": 5}
        return ppo.main, ppo.PPOConfig(**common, **options, epochs=2, merge_adapter=not full)
    options = {"max_steps": 3, "holdout": 0.2, "max_length": 64, "save_every": 0}
    if name == "sft":
        lines = [json.loads(line) for line in data.read_text().splitlines()]
        tasks = [json.dumps({"prompt": line["prompt"], "completion": line["chosen"]}) for line in lines]
        data.write_text("\n".join(tasks) + "\n")
        return sft.main, sft.SFTConfig(**common, **options, sample_tokens=4, gradient_checkpointing=bool(full))
    return reward.main, reward.RewardConfig(**common, **options)


@pytest.fixture
def gpu(request, monkeypatch):
    """A GPU whose kernels are fastrl's CUDA kernels."""
    if HAS_GPU:
        if backend.cuda is None:
            pytest.skip("fastrl was built without CUDA")
        return nullcontext
    monkeypatch.setattr(backend, "cuda", request.getfixturevalue("host_cuda_kernels"))
    monkeypatch.setattr(backend, "driver_problem", lambda: "")
    monkeypatch.setattr(backend, "compute_capability", lambda index: (9, 0))
    monkeypatch.setattr(backend, "raw_stream", lambda index: 0)
    for module, name in ((checkpoint, "_write"), (resume.Run, "save")):  # files want real tensors
        monkeypatch.setattr(module, name, lambda *args: None)
    return lambda: simulated_cuda(monkeypatch)


def course(folder: str) -> list[dict[str, float]]:
    """What a run reported, without times and memory, and without what is near 0 by its nature."""
    unwanted = (
        "tokens_per_s",
        "peak_mem_gib",
        "lr",
        "kl_k1",
        "approx_kl",
        "first_approx_kl",
        "policy_loss",
        "explained_variance",
    )
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if isinstance(v, float) and k not in unwanted and not k.startswith("time_")}
        for line in lines
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
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
    for want, got in zip(*(reported[:lines] for reported in courses), strict=True):
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
