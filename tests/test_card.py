"""Model cards say what a run's files know, and leave blank what nobody wrote down."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from fastrl.run.card import model_card

VERSIONS = {"fastrl": "0.1.0", "torch": "2.x", "triton": "not installed"}


def write_run(folder: Path, loop: str, **settings: object) -> Path:
    """A finished run with two evaluations."""
    folder.mkdir(parents=True)
    reads = {settings["model"]: "some time"} if str(settings["model"]).startswith("runs/") else {}
    record = {"loop": loop, "state": "finished", "settings": settings, "versions": VERSIONS, "reads": reads}
    (folder / "run.json").write_text(json.dumps({**record, "device": "a machine"}))
    evaluations = [{"step": s, "kind": "eval", "eval_accuracy": a, "curve": [1]} for s, a in ((0, 0.5), (9, 0.75))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in evaluations))
    return folder


def header(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---")[1])


def test_a_card_says_base_data_loop_settings_metrics_and_versions(tmp_path):
    data = ["Anthropic/hh-rlhf:train", "mine/pairs.jsonl"]
    settings = {"model": "org/base", "data": data, "learning_rate": 1e-4, "tuner": "lora", "score_clip": None}
    card = model_card(write_run(tmp_path / "reward", "reward", **settings), task="text-classification")
    assert header(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["fastrl", "reward"],
        "base_model": "org/base",
        "datasets": ["Anthropic/hh-rlhf"],
    }
    for text in (
        "# license: to be filled in",
        "a reward model on preferences (finished)",
        "- Data: `Anthropic/hh-rlhf:train`, `mine/pairs.jsonl`",
        "| eval_accuracy | 50.0% | 75.0% |",
        "learning_rate: 0.0001",
        "fastrl 0.1.0, torch 2.x on a machine.",
    ):
        assert text in card, text
    assert "score_clip" not in card and "triton" not in card and "curve" not in card


def test_the_base_is_found_through_the_runs_that_came_before(tmp_path, monkeypatch):
    """From any working directory, as the folders lie beside each other; one that is lost is no hub id."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "x/sft", "sft", model="org/base", data="d")
    ppo = write_run(tmp_path / "x/ppo", "ppo", model="runs/sft", reward_model="runs/reward", data="d")
    card = model_card(ppo / "checkpoints/step-000010")
    assert header(card)["base_model"] == "org/base" and "- Base model: `org/base → runs/sft`" in card
    assert "- Reward model: `runs/reward`" in card and card.count("# step-000010") == 1
    (tmp_path / "x/sft/metrics.jsonl").unlink()
    assert "base_model" not in header(model_card(ppo))


def test_a_model_without_a_run_gets_a_card_that_says_so(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    card = model_card(tmp_path)
    assert "how it was trained is unknown" in card and header(card)["base_model"] == "org/base"
    assert "library_name" in header(model_card("org/model"))
