"""Weights in bfloat16 are trained through float32 masters: steps that bfloat16 would round away add up."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loops import reported, tiny_run
from safetensors.torch import load_file
from torch import nn

from fastrl.models import LoRASettings, add_lora, load_policy
from fastrl.run.masters import master_of, round_masters, trained
from fastrl.run.optim import make_optimizer, optimizer_step
from fastrl.train import ppo


def test_steps_below_the_spacing_of_bfloat16_add_up():
    """100 steps of 1e-5 on 0.1 are 1e-3, two spacings; a bfloat16 weight alone would never move."""
    layer = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.constant_(layer.weight, 0.1)
    start = layer.weight.detach().float().clone()
    optimizer = make_optimizer(layer, learning_rate=1e-5)
    for _ in range(100):
        layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer_step(layer, optimizer, None, max_grad_norm=0.0)
    torch.testing.assert_close(master_of(layer.weight), start - 1e-3, atol=1e-6, rtol=0)
    assert torch.equal(layer.weight, master_of(layer.weight).bfloat16())
    assert ((start - layer.weight.float()) - 1e-3).abs().max() < 3e-4


def test_micro_batches_are_summed_in_float32():
    """2^8 gradients of 1 and a large one: in bfloat16 the ones would be lost."""
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    make_optimizer(layer, learning_rate=1.0)
    for value in [1024.0, *[1.0] * 256]:
        layer(torch.tensor([[value]], dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is None
    assert master_of(layer.weight).grad.item() == 1024 + 256


def test_float32_weights_are_their_own_masters():
    layer = nn.Linear(2, 2)
    optimizer = make_optimizer(layer, learning_rate=1e-3)
    assert optimizer.param_groups[0]["params"][0] is layer.weight
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is not None
    before = layer.weight.detach().clone()
    round_masters(layer)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("target", ["all-linear", "lm_head"])
def test_adapters_are_float32_on_a_bfloat16_base(tiny_policy, target):
    model = add_lora(load_policy(tiny_policy, dtype="bfloat16"), LoRASettings(4, 8, 0.0, target))
    make_optimizer(model, learning_rate=1e-3)
    assert model.dtype == torch.bfloat16
    for name, tensor in trained(model):
        assert tensor.dtype == torch.float32 and tensor is model.get_parameter(name)


@pytest.fixture
def course(tmp_path, tiny_policy, tiny_scalar):
    """Runs a loop by full fine-tuning in both dtypes; the metrics' records and the weights before and after."""

    def run(name: str, **options):
        courses = {}
        for dtype in ("float32", "bfloat16"):
            folder = tmp_path / dtype
            folder.mkdir()
            main, cfg = tiny_run(name, folder, tiny_policy, tiny_scalar)
            cfg = replace(cfg, lora_rank=0, dtype=dtype, **options)
            main(cfg)
            courses[dtype] = reported(cfg.output), Path(cfg.output)
        return courses

    return run


def moved(source: Path, output: Path) -> float:
    """Share of the weights of the layers (not of embeddings of tokens that never come) that are not as they were."""
    before, after = load_file(source / "model.safetensors"), load_file(output / "model.safetensors")
    names = [name for name in after if ".layers." in name]
    changed = sum(int((after[name] != before[name].to(after[name].dtype)).sum()) for name in names)
    return changed / sum(after[name].numel() for name in names)


OPTIONS = {"max_steps": 40, "learning_rate": 2e-5, "schedule": "constant", "warmup_steps": 0, "eval_every": 0}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft, full", "reward"])
def test_a_bfloat16_run_follows_the_float32_one(name, course, tiny_policy):
    """40 steps at a small learning rate: the loss falls as far, and most weights move."""
    courses = course(name, **OPTIONS)
    falls = {}
    for dtype, (records, output) in courses.items():
        losses = [r["eval_loss"] for r in records if r["kind"] == "eval"]
        falls[dtype] = losses[0] - losses[-1]
        saved = load_file(output / "model.safetensors")
        assert {v.dtype for n, v in saved.items() if "score" not in n} == {getattr(torch, dtype)}
    assert falls["float32"] > 0
    assert falls["bfloat16"] == pytest.approx(falls["float32"], rel=0.25)
    assert moved(tiny_policy, courses["float32"][1]) > 0.99
    assert moved(tiny_policy, courses["bfloat16"][1]) > 0.2


@pytest.mark.slow
def test_ppo_moves_bfloat16_weights(course, tiny_policy):
    courses = course("ppo, full", iterations=8, learning_rate=2e-5, critic_learning_rate=2e-5, kl_coef=0.0)
    assert moved(tiny_policy, courses["bfloat16"][1]) > 0.1
    assert all(r["approx_kl"] > 0 for r in courses["bfloat16"][0] if r["kind"] == "train")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft, full", "ppo, full"])
def test_a_bfloat16_run_resumes_from_its_masters(name, tmp_path, tiny_policy, tiny_scalar):
    """Stopped and resumed, it ends on the bits of an uninterrupted run: masters are part of the state."""
    main, cfg = tiny_run(name, tmp_path, tiny_policy, tiny_scalar)
    cfg = replace(cfg, dtype="bfloat16", learning_rate=1e-4)
    steps = {"iterations": 4, "eval_every": 2} if main is ppo.main else {"max_steps": 5, "save_every": 2}
    whole = replace(cfg, output=str(tmp_path / "whole"), **steps)
    main(whole)
    last = sorted((tmp_path / "whole/checkpoints").iterdir())
    state = torch.load(last[-1] / "training_state.pt", weights_only=True)
    assert {t.dtype for model in state["models"] for t in model.values()} == {torch.float32}
    if main is ppo.main:
        shutil.rmtree(last[-1])
    (tmp_path / "whole").rename(tmp_path / "again")
    main(replace(whole, output=str(tmp_path / "again"), resume=True))
    main(whole)
    for file in ("model.safetensors", *(["critic/model.safetensors"] if main is ppo.main else [])):
        got, want = (load_file(tmp_path / run / file) for run in ("again", "whole"))
        assert all(torch.equal(got[name], want[name]) for name in want)
