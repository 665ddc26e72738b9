"""A reward run that ends for want of improvement: what it saves, and that it survives interruptions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loops import interrupt, reported, tiny_run
from safetensors.torch import load_file

from fastrl.run.masters import trained
from fastrl.train import reward

ACCURACIES = {0: 0.5, 1: 0.6, 2: 0.8, 3: 0.7, 4: 0.8, 5: 0.9, 6: 0.1}  # the best of the first five comes at step 2


@pytest.fixture
def config(tmp_path, tiny_policy, tiny_scalar, monkeypatch):
    """Evaluates after every step, to what ACCURACIES says; `weights` are those that were evaluated."""
    weights = {}

    def evaluate(run, scorer, *rest):
        weights[run.step] = {name: tensor.detach().clone() for name, tensor in trained(scorer)}
        metrics = {"eval_loss": 1.0, "eval_accuracy": ACCURACIES[run.step]}
        run.report(metrics, "eval")
        return metrics

    monkeypatch.setattr(reward, "report_held_out", evaluate)
    _, cfg = tiny_run("reward, full", tmp_path, tiny_policy, tiny_scalar)
    cfg = replace(cfg, eval_every=1, max_steps=6, patience=2, save_every=2)
    return cfg, weights


def backbone(folder: str) -> dict[str, torch.Tensor]:
    """Without the head, which is normalised when it is saved."""
    tensors = load_file(Path(folder) / "model.safetensors")
    return {f"model.{name}": tensor for name, tensor in tensors.items() if name != "score.weight"}


def assert_saved(folder: str, weights: dict[str, torch.Tensor]) -> None:
    saved = backbone(folder)
    assert len(saved) == len(weights) - 1 and all(torch.equal(t, weights[name]) for name, t in saved.items())


@pytest.mark.parametrize(
    "patience, steps, best", [(0, 6, 6), (1, 3, 2), (2, 4, 2), (3, 6, 5)], ids=["off", "one", "two", "three"]
)
def test_the_best_weights_are_saved(config, capsys, patience, steps, best):
    """Equal accuracies are no improvement; without patience the last weights are saved, however bad."""
    cfg, weights = config
    metrics = reward.main(replace(cfg, patience=patience))
    assert metrics["steps"] == steps and metrics["eval_accuracy"] == ACCURACIES[best]
    assert_saved(cfg.output, weights[best])
    assert ("best_step" in metrics) == (patience > 0)
    found = [path.name for path in (Path(cfg.output) / "checkpoints").glob("best*")]
    assert found == ([f"best-{best:06d}.pt"] if patience else [])
    if patience:
        assert f"best after step {best}" in capsys.readouterr().out


def test_adapters_and_their_head_come_back(config):
    cfg, weights = config
    reward.main(replace(cfg, tuner="lora"))
    saved = load_file(Path(cfg.output) / "adapter_model.safetensors")
    layers = {name: tensor for name, tensor in weights[2].items() if "lora_" in name}
    named = {name.replace(".default", "").removeprefix("model."): tensor for name, tensor in layers.items()}
    assert len(named) > 4 and all(torch.equal(saved[name], tensor) for name, tensor in named.items())


@pytest.mark.parametrize("save_every", [1, 3])
def test_a_resumed_run_stops_at_the_same_step_with_the_same_weights(config, monkeypatch, tmp_path, save_every):
    cfg, _ = config
    cfg = replace(cfg, save_every=save_every)
    whole = replace(cfg, output=str(tmp_path / "whole"))
    reward.main(whole)
    for step in (2, 3, 4):
        interrupt(monkeypatch, reward.main, replace(cfg, resume=True), step)
    metrics = reward.main(replace(cfg, resume=True))
    assert (metrics["steps"], metrics["best_step"]) == (4, 2)
    want, got = backbone(whole.output), backbone(cfg.output)
    assert all(torch.equal(tensor, got[name]) for name, tensor in want.items())
    assert reported(cfg.output) == reported(whole.output)
    reward.main(replace(cfg, resume=True))  # a run that ended
    assert all(torch.equal(tensor, backbone(cfg.output)[name]) for name, tensor in want.items())
    assert reported(cfg.output) == reported(whole.output)


def test_a_run_without_evaluations_cannot_stop_early(config):
    cfg, _ = config
    for changes in ({"eval_every": 0}, {"holdout": 0.0}):
        with pytest.raises(ValueError, match="patience: 2: expected evaluations, with eval_every above 0 and held-out"):
            reward.main(replace(cfg, **changes))
    assert not Path(cfg.output).exists()
