"""Runs that are interrupted and go on: pitfall 41."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastrl.metrics import MetricsLog
from fastrl.train import ppo, reward, sft

TIMES = ("tokens_per_s", "peak_mem_gib")


@pytest.fixture
def data(tmp_path):
    """24 records with whatever a loop looks for."""
    path = tmp_path / "data.jsonl"
    records = [
        {"prompt": f"{i} say:", "completion": "x" * (1 + i % 4), "chosen": "a" * (1 + i % 3), "rejected": "b" * 5}
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(params=["sft", "sft, full", "reward", "ppo", "ppo, full"])
def loop(request, data, tmp_path, tiny_policy, tiny_scalar):
    """(main, configuration): six steps, a checkpoint after every second, dropout where there are adapters."""
    name, _, full = request.param.partition(", ")
    common = {"model": str(tiny_policy), "data": str(data), "output": str(tmp_path / "run"), "eval_every": 2}
    common |= {"lora_rank": 0 if full else 4, "batch_size": 5, "micro_batch_size": 2, "learning_rate": 1e-3}
    if name == "ppo":
        options = {"reward_model": str(tiny_scalar), "iterations": 6, "minibatch_size": 3, "max_new_tokens": 5}
        return ppo.main, ppo.PPOConfig(**common, **options, epochs=2)
    records = [json.loads(line) for line in data.read_text().splitlines()]
    unwanted = {"sft": ("chosen", "rejected"), "reward": ("completion",)}[name]
    lines = [json.dumps({k: v for k, v in record.items() if k not in unwanted}) for record in records]
    data.write_text("\n".join(lines) + "\n")
    options = {
        "max_steps": 6,
        "save_every": 2,
        "holdout": 0.2,
        "max_length": 64,
        "warmup_steps": 2,
        "lora_dropout": 0.2,
    }
    module, config = {"sft": (sft, sft.SFTConfig), "reward": (reward, reward.RewardConfig)}[name]
    return module.main, config(**common, **options)


def interrupt(monkeypatch, main, cfg, step):
    """Runs until the training record of `step` would be written."""
    write = MetricsLog.write

    def stop(self, at, kind="train", **metrics):
        if at == step and kind == "train":
            raise KeyboardInterrupt
        write(self, at, kind, **metrics)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(MetricsLog, "write", stop)
        main(cfg)


def weights(folder: str) -> dict[str, torch.Tensor]:
    files = sorted(path for path in Path(folder).rglob("*.safetensors") if "checkpoints" not in path.parts)
    return {f"{path.relative_to(folder)} {name}": value for path in files for name, value in load_file(path).items()}


def records(folder: str) -> list[dict]:
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if k not in TIMES and not k.startswith("time_")} for r in lines]


def test_a_resumed_run_equals_an_uninterrupted_one(loop, monkeypatch, tmp_path):
    """Pitfall 41: the same weights, metrics and samples bit for bit, after two interruptions."""
    main, cfg = loop
    whole = replace(cfg, output=str(tmp_path / "whole"))
    main(whole)
    interrupt(monkeypatch, main, cfg, 4)
    interrupt(monkeypatch, main, replace(cfg, resume=True), 6)
    resumed = main(replace(cfg, resume=True))
    got, want = weights(cfg.output), weights(whole.output)
    assert want.keys() == got.keys() and all(torch.equal(value, got[name]) for name, value in want.items())
    assert records(cfg.output) == records(whole.output)
    assert resumed["output"] == cfg.output
    main(replace(cfg, resume=True))  # a run that ended goes on from its last checkpoint
    assert all(torch.equal(value, weights(cfg.output)[name]) for name, value in want.items())
    for name in ["samples.jsonl"]:
        if (Path(whole.output) / name).exists():
            assert (Path(cfg.output) / name).read_text() == (Path(whole.output) / name).read_text()


def test_other_settings_are_an_error(loop, monkeypatch):
    main, cfg = loop
    interrupt(monkeypatch, main, cfg, 4)
    with pytest.raises(ValueError, match=r"resume: settings: .*step-000002.* learning_rate was 0.001, is 0.5"):
        main(replace(cfg, resume=True, learning_rate=0.5))


@pytest.mark.parametrize("loop", ["sft"], indirect=True)
def test_what_is_there_at_the_start(loop, monkeypatch, capsys):
    """Nothing to go on from: a run from the beginning. A new run puts the checkpoints of an earlier one aside."""
    main, cfg = loop
    interrupt(monkeypatch, main, replace(cfg, resume=True), 4)
    assert "no checkpoint under" in capsys.readouterr().out
    interrupt(monkeypatch, main, cfg, 2)
    folder = Path(cfg.output)
    assert "checkpoints of an earlier run are now in" in capsys.readouterr().out
    assert [path.name for path in (folder / "checkpoints.previous").iterdir()] == ["step-000002"]
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("loop", ["sft"], indirect=True)
def test_a_checkpoint_that_was_being_written_is_passed_over(loop, monkeypatch, capsys):
    main, cfg = loop
    interrupt(monkeypatch, main, cfg, 6)
    newest = Path(cfg.output) / "checkpoints/step-000004"
    (newest / "training_state.pt").rename(newest / "training_state.pt.partial")
    with (Path(cfg.output) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "ki')
    main(replace(cfg, resume=True))
    assert "going on after step 2" in capsys.readouterr().out
    assert [r["step"] for r in records(cfg.output) if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
