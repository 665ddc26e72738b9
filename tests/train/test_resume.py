"""Runs that are interrupted and go on: pitfall 41."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loops import LOOPS, everything, interrupt, reported, tiny_run
from safetensors.torch import load_file

from fastrl.run.resume import newest_state
from fastrl.train import ppo
from fastrl.train.ppo_state import kl_coef


@pytest.fixture(params=LOOPS)
def loop(request, tmp_path, tiny_policy, tiny_scalar):
    """(main, configuration): six steps, a checkpoint after every second, dropout where there are adapters."""
    main, cfg = tiny_run(request.param, tmp_path, tiny_policy, tiny_scalar)
    if main is ppo.main:
        return main, replace(cfg, iterations=6, eval_every=2)
    return main, replace(cfg, max_steps=6, eval_every=2, save_every=2, lora_dropout=0.2)


def weights(folder: str) -> dict[str, torch.Tensor]:
    files = sorted(path for path in Path(folder).rglob("*.safetensors") if "checkpoints" not in path.parts)
    return {f"{path.relative_to(folder)} {name}": value for path in files for name, value in load_file(path).items()}


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
    assert reported(cfg.output) == reported(whole.output)
    assert resumed["output"] == cfg.output
    main(replace(cfg, resume=True))  # a run that ended goes on from its last checkpoint
    assert all(torch.equal(value, weights(cfg.output)[name]) for name, value in want.items())
    for name in ["samples.jsonl"]:
        if (Path(whole.output) / name).exists():
            assert (Path(cfg.output) / name).read_text() == (Path(whole.output) / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["ppo"], indirect=True)
def test_a_resumed_run_of_ppo_with_everything_equals_an_uninterrupted_one(loop, monkeypatch, tmp_path):
    """Pitfall 41: coefficient, moments of scores, order of PTX examples, best score and weights, bit for bit."""
    main, cfg = loop
    cfg = everything(replace(cfg, iterations=4, epochs=1))
    whole = replace(cfg, output=str(tmp_path / "whole"))
    main(whole)
    interrupt(monkeypatch, main, cfg, 4)
    kept = torch.load(newest_state(Path(cfg.output)), weights_only=True)["own"]
    assert kept["kl_scale"] != 1 and kept["scores"][0] == 2 * cfg.batch_size
    main(replace(cfg, resume=True))
    assert reported(cfg.output) == reported(whole.output)
    got, want = weights(cfg.output), weights(whole.output)
    assert any(name.startswith("best/") for name in want) and got.keys() == want.keys()
    assert all(torch.equal(value, got[name]) for name, value in want.items())
    assert all(r["ptx_loss"] > 0 and r["kl_coef"] > 0 for r in reported(cfg.output) if r["kind"] == "train")


def test_other_settings_are_an_error(loop, monkeypatch):
    main, cfg = loop
    interrupt(monkeypatch, main, cfg, 4)
    with pytest.raises(ValueError, match=r"resume: settings: .*step-000002.* learning_rate was 0.001, is 0.5"):
        main(replace(cfg, resume=True, learning_rate=0.5))


@pytest.mark.parametrize("loop", ["sft"], indirect=True)
def test_other_settings_are_taken_where_the_user_says_so(loop, monkeypatch, capsys):
    """The new rate holds from the next step on, at the schedule's place; moments and data go on."""
    main, cfg = loop
    whole = replace(cfg, output=f"{cfg.output}-whole", learning_rate=cfg.learning_rate / 2)
    main(whole)
    interrupt(monkeypatch, main, cfg, 4)
    capsys.readouterr()
    main(replace(cfg, resume=True, resume_changed=True, learning_rate=cfg.learning_rate / 2))
    out = capsys.readouterr().out
    assert out.count("settings that have changed") == 1 and "learning_rate was 0.001, is 0.0005" in out
    rates, wanted = ([r["lr"] for r in reported(x.output) if r["kind"] == "train"] for x in (cfg, whole))
    assert rates[2:] == wanted[2:] and rates[:2] == [2 * rate for rate in wanted[:2]]


@pytest.mark.parametrize("loop", ["ppo"], indirect=True)
def test_a_changed_weight_of_the_kl_penalty_holds_from_the_next_step_on(loop, monkeypatch):
    main, cfg = loop
    interrupt(monkeypatch, main, cfg, 4)
    seen, original = set(), ppo.compute_advantages

    def watched(scored, mask, cfg, state):
        seen.add(kl_coef(cfg, state))
        return original(scored, mask, cfg, state)

    monkeypatch.setattr(ppo, "compute_advantages", watched)
    main(replace(cfg, resume=True, resume_changed=True, kl_coef=0.5))
    assert seen == {0.5}


@pytest.mark.parametrize("loop", ["sft"], indirect=True)
def test_other_trained_weights_are_refused_even_then(loop, monkeypatch):
    main, cfg = loop
    interrupt(monkeypatch, main, cfg, 4)
    for options in ({"lora_rank": 2}, {"tuner": "full"}):
        with pytest.raises(ValueError, match=r"step-000002: expected the trained weights that it holds, got others: "):
            main(replace(cfg, resume=True, resume_changed=True, **options))


@pytest.mark.parametrize("loop", ["sft"], indirect=True)
def test_what_is_there_at_the_start(loop, monkeypatch, capsys):
    """Nothing to go on from: a run from the beginning. A new run puts an earlier one aside, whole."""
    main, cfg = loop
    interrupt(monkeypatch, main, replace(cfg, resume=True), 4)
    assert "no checkpoint under" in capsys.readouterr().out
    interrupt(monkeypatch, main, cfg, 2)
    folder, aside = Path(cfg.output), Path(f"{cfg.output}.previous")
    assert f"the earlier run in {folder} is now in {aside}" in capsys.readouterr().out
    assert [path.name for path in (aside / "checkpoints").iterdir()] == ["step-000002"]
    assert not (folder / "checkpoints").exists()
    interrupt(monkeypatch, main, cfg, 2)  # nothing was worth keeping
    assert (aside / "checkpoints/step-000002").exists()


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
    assert [r["step"] for r in reported(cfg.output) if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
