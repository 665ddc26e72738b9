"""What a run may write over, what a save leaves when it is killed, and what broken model folders say."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from loops import LOOPS, tiny_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastrl.models import LoRASettings, add_lora, load_policy, load_scalar_model, load_tokenizer
from fastrl.models.saving import save_model
from fastrl.run.output import check_output, claim_output
from fastrl.train import ppo, reward, sft

UP = "model.layers.0.mlp.up_proj.weight"


class Killed(BaseException):
    """In place of a signal: no `except Exception` sees it."""


def adapter_on(folder: Path) -> peft.PeftModel:
    torch.manual_seed(3)
    model = add_lora(load_policy(folder), LoRASettings(2, 4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(10, 20)[None]).logits


@pytest.fixture
def kinds(tiny_policy):
    """A full model and an adapter with other logits."""
    full = load_policy(tiny_policy)
    with torch.no_grad():
        full.get_parameter(UP).mul_(3.0)
    return {"full": full, "adapter": adapter_on(tiny_policy)}


@pytest.mark.parametrize(("before", "after"), [("full", "adapter"), ("adapter", "full")])
def test_the_other_kind_of_model_leaves_no_file_behind(before, after, kinds, tiny_tokenizer, tmp_path):
    for kind in (before, after):
        save_model(kinds[kind], tiny_tokenizer, tmp_path / "model")
    save_model(kinds[after], tiny_tokenizer, tmp_path / "fresh")
    names = [sorted(p.name for p in (tmp_path / folder).iterdir()) for folder in ("model", "fresh")]
    assert names[0] == names[1]
    torch.testing.assert_close(logits(load_policy(tmp_path / "model")), logits(kinds[after]), atol=1e-5, rtol=1e-5)


def kill_at(monkeypatch, step: int) -> list[str]:
    """The step-th operation that changes a folder does not happen: the process is killed. Returns what happened."""
    done: list[str] = []

    def watch(name, real):
        def operation(*arguments, **options):
            if len(done) == step:
                raise Killed
            done.append(name)
            return real(*arguments, **options)

        return operation

    for owner, name in [(os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "rename"), (Path, "rmdir")]:
        monkeypatch.setattr(owner, name, watch(name, getattr(owner, name)))
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "sharded"),
    [("full", "adapter", True), ("adapter", "full", False), ("full", "full", False)],
    ids=["full, adapter", "adapter, full", "full, full"],
)
def test_a_save_killed_at_any_step_leaves_no_mix(
    before, after, sharded, kinds, tiny_policy, tiny_tokenizer, tmp_path, monkeypatch
):  # fmt: skip
    """fastrl and plain transformers load the old model, the new one, or nothing."""
    old, new = kinds[before], kinds[after]
    if before == after:
        old = load_policy(tiny_policy)
    allowed = [logits(old), logits(new)]
    outcomes = set()
    for step in range(200):
        folder = tmp_path / f"model{step}"
        save_model(old, tiny_tokenizer, folder)
        if sharded:
            shutil.rmtree(folder)
            old.save_pretrained(folder, max_shard_size="30KB")
        with monkeypatch.context() as patched:
            done = kill_at(patched, step)
            try:
                save_model(new, tiny_tokenizer, folder)
            except Killed:
                pass
        for load in (load_policy, AutoModelForCausalLM.from_pretrained):
            try:
                got = logits(load(folder))
            except (OSError, ValueError):
                outcomes.add("nothing")
                continue
            close = [torch.allclose(got, want, atol=1e-4, rtol=1e-4) for want in allowed]
            assert any(close), f"killed at step {step}: a mix"
            outcomes.add(("old", "new")[close.index(True)])
        shutil.rmtree(folder)
        if len(done) < step:
            break
    assert outcomes == {"old", "nothing", "new"} and "fsync" in done


def test_a_first_save_appears_whole(kinds, tiny_tokenizer, tmp_path, monkeypatch):
    for step in range(50):
        with monkeypatch.context() as patched:
            done = kill_at(patched, step)
            try:
                save_model(kinds["full"], tiny_tokenizer, tmp_path / "model")
            except Killed:
                assert (tmp_path / "model").exists() == ("rename" in done)
        if (tmp_path / "model").exists():
            break
    assert torch.equal(logits(load_policy(tmp_path / "model")), logits(kinds["full"]))


def test_other_files_of_a_folder_stay(kinds, tiny_tokenizer, tmp_path):
    save_model(kinds["full"], tiny_tokenizer, tmp_path / "model")
    (tmp_path / "model/notes.txt").write_text("mine")
    (tmp_path / "model/base").mkdir()
    save_model(kinds["adapter"], tiny_tokenizer, tmp_path / "model")
    assert (tmp_path / "model/notes.txt").read_text() == "mine" and (tmp_path / "model/base").is_dir()


# --- the output of a run


@pytest.fixture
def start(tmp_path, tiny_policy, tiny_scalar):
    """(main, configuration of two steps) of one of the loops."""

    def build(name: str):
        (tmp_path / name).mkdir()
        main, cfg = tiny_run(name, tmp_path / name, tiny_policy, tiny_scalar)
        if main is ppo.main:
            return main, replace(cfg, iterations=1)
        return main, replace(cfg, max_steps=2, eval_every=0, save_every=0)

    return build


@pytest.mark.slow
@pytest.mark.parametrize("first", ["sft", "sft, full"])
def test_a_run_in_the_folder_of_another_kind(first, start, capsys):
    """LoRA after full fine-tuning and the reverse: the folder loads as the second run left it, the first is aside."""
    second = {"sft": "sft, full", "sft, full": "sft"}[first]
    main, cfg = start(first)
    main(cfg)
    other = replace(start(second)[1], output=cfg.output)
    before = {p.name for p in Path(cfg.output).iterdir()}
    kept = logits(load_policy(cfg.output))
    main(other)
    assert f"is now in {Path(cfg.output).resolve()}.previous" in capsys.readouterr().out
    aside = Path(f"{cfg.output}.previous")
    assert {p.name for p in aside.iterdir()} == before | {".put_aside"}
    assert torch.equal(logits(load_policy(aside)), kept)
    fresh = replace(other, output=f"{cfg.output} again")
    main(fresh)
    assert {p.name for p in Path(cfg.output).iterdir()} == {p.name for p in Path(fresh.output).iterdir()}
    assert torch.equal(logits(load_policy(cfg.output)), logits(load_policy(fresh.output)))


@pytest.mark.slow
def test_what_is_put_aside_keeps_its_own_base(start, tmp_path):
    """Adapters on a merged base: the second run writes its base where the first one's was."""
    main, cfg = start("sft")
    main(cfg)
    second = replace(cfg, model=cfg.output, output=str(tmp_path / "second"), save_every=1)
    main(second)
    kept = logits(load_policy(second.output))
    third = replace(cfg, output=str(tmp_path / "third"), seed=1, learning_rate=0.1)
    main(third)
    main(replace(second, model=third.output))
    assert torch.equal(logits(load_policy(f"{second.output}.previous")), kept)
    step = next(Path(f"{second.output}.previous/checkpoints").iterdir())
    assert json.loads((step / "adapter_config.json").read_text())["base_model_name_or_path"].endswith("previous/base")
    assert not torch.equal(logits(load_policy(second.output)), kept)


@pytest.mark.parametrize("name", LOOPS)
def test_an_output_that_is_read_is_refused(name, start, tmp_path, tiny_policy, tiny_scalar, monkeypatch):
    main, cfg = start(name)
    model = shutil.copytree(tiny_policy, tmp_path / "home/model")
    scalar = shutil.copytree(tiny_scalar, tmp_path / "home/scalar")
    save_model(adapter_on(model), load_tokenizer(model), tmp_path / "home/adapter")
    (tmp_path / "link").symlink_to(model)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    cases = [(model, model), (model, model / "run"), (model, tmp_path / "home"), (model, "link"), (model, "~/model")]
    cases += [("home/model", model), ("~/model", model / "run"), (tmp_path / "home/adapter", model)]
    if main is ppo.main:
        cases += [(model, scalar), (model, scalar / "critic")]
        cfg = replace(cfg, reward_model=str(scalar))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "home").rglob("*")}
    for source, output in cases:
        with pytest.raises(ValueError, match="output: .* expected folders apart"):
            main(replace(cfg, model=str(source), output=str(output)))
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "home").rglob("*")}


@pytest.mark.slow
def test_a_checkpoint_is_not_trained_into_its_own_run(start):
    main, cfg = start("sft")
    main(replace(cfg, save_every=1))
    step = next(Path(cfg.output, "checkpoints").iterdir())
    with pytest.raises(ValueError, match="expected folders apart"):
        main(replace(cfg, model=str(step)))
    main(cfg)
    with pytest.raises(
        ValueError, match=r"run\.previous, to which an earlier run would be moved, .*expected folders apart"
    ):
        main(replace(cfg, model=f"{cfg.output}.previous"))


@pytest.mark.slow
def test_a_model_that_no_run_wrote_is_not_written_over(start, tiny_policy, tmp_path):
    main, cfg = start("sft")
    own = shutil.copytree(tiny_policy, tmp_path / "own")
    for resume in (False, True):
        with pytest.raises(
            ValueError, match=r"one without metrics\.jsonl that holds chat_template\.jinja, config\.json"
        ):
            main(replace(cfg, output=str(own), resume=resume))
    with pytest.raises(ValueError, match="output: expected a folder, got the file"):
        main(replace(cfg, output=str(own / "config.json")))
    (tmp_path / "new").mkdir()
    (tmp_path / "new/log.txt").write_text("of the shell")
    for _ in range(2):
        main(replace(cfg, output=str(tmp_path / "new")))
        assert (tmp_path / "new/log.txt").read_text() == "of the shell"


@pytest.mark.slow
def test_a_folder_of_the_users_is_not_deleted(start):
    """What stands where an earlier run would be put aside, and was not put there by a run."""
    main, cfg = start("sft")
    main(cfg)
    shutil.copytree(cfg.output, f"{cfg.output}.previous")
    with pytest.raises(ValueError, match="which exists; move it away"):
        main(cfg)
    shutil.rmtree(cfg.output)
    main(cfg)  # nothing to put aside


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_run_that_is_refused_leaves_the_earlier_one(name, start, tmp_path):
    main, cfg = start(name)
    main(cfg)
    before = {p: p.stat().st_mtime_ns for p in Path(cfg.output).rglob("*")}
    (tmp_path / "broken.jsonl").write_text('{"prompt": \n')
    refused = [{"data": str(tmp_path / "broken.jsonl")}, {"data": "/nowhere.jsonl"}, {"batch_size": 0}]
    if cfg.tuner == "lora":
        refused.append({"lora_targets": "q_proj,q_prj"})
    refused += [{"stop_tokens": "abc"}] if main is ppo.main else []
    refused += [{"sample_tokens": 256}] if main is sft.main else []
    for changes in refused:
        with pytest.raises((ValueError, OSError)):
            main(replace(cfg, **changes))
    assert before == {p: p.stat().st_mtime_ns for p in Path(cfg.output).rglob("*")}


@pytest.mark.slow
def test_a_resume_with_other_settings_writes_nothing(start, tmp_path):
    main, cfg = start("sft")
    first = replace(cfg, save_every=1)
    main(first)
    second = replace(first, model=cfg.output, output=str(tmp_path / "second"))
    main(second)
    before = {p: p.read_bytes() for p in Path(second.output).rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="resume: settings: .*model was"):
        main(replace(second, model=first.model, resume=True))
    assert before == {p: p.read_bytes() for p in Path(second.output).rglob("*") if p.is_file()}


@pytest.mark.slow
def test_claiming_is_killed_between_two_steps(start, tmp_path, monkeypatch):
    """The earlier run is where it was or aside; its adapter never stands on another base."""
    main, cfg = start("sft")
    main(cfg)
    second = replace(cfg, model=cfg.output, output=str(tmp_path / "second"))
    main(second)
    kept = logits(load_policy(second.output))
    for step in range(20):
        with monkeypatch.context() as patched:
            kill_at(patched, step)
            try:
                check_output(second)
                claim_output(second)
                break
            except Killed:
                pass
    assert step > 0 and torch.equal(logits(load_policy(f"{second.output}.previous")), kept)


@pytest.mark.slow
def test_a_reward_model_after_another_kind(start):
    main, cfg = start("reward")
    main(cfg)
    main(replace(cfg, lora_rank=0))
    stored = load_file(Path(cfg.output) / "model.safetensors")
    assert torch.equal(load_scalar_model(cfg.output).state_dict()[UP], stored[UP])
    assert main is reward.main and not (Path(cfg.output) / "fastrl_score.json").exists()
