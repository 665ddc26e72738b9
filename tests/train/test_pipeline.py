"""`fastrl run`: stages that take each other's outputs, are skipped, go on, or are trained again; and the recipes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import datasets
import pytest
import yaml
from ranks import environment
from safetensors.torch import load_file

from fastrl import cli
from fastrl.commands import pipeline, stages
from fastrl.commands.pipeline import RESUME, SKIP, TRAIN, plan
from fastrl.commands.stages import read_stages, recipes
from fastrl.run.metrics import MetricsLog

RECIPE_NAMES = list(recipes())


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_policy):
    """A pipeline's file of two SFT steps, two reward steps and one iteration of PPO, with its data beside it."""
    folder = tmp_path_factory.mktemp("pipeline")
    pairs = [{"prompt": f"{i} <b>:", "chosen": "a" * (1 + i % 3), "rejected": "b" * 5} for i in range(16)]
    for record, criterion in zip(pairs, ["helpful", "harmless"] * 8, strict=True):
        record["criterion"] = criterion
    answers = [{"prompt": f"{i} <b>:", "completion": "x" * (1 + i % 4)} for i in range(16)]
    for name, records in (("pairs", pairs), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    content = {
        "output": str(folder / "out"),
        "model": str(tiny_policy),
        "device": "cpu",
        "lora_rank": 2,
        "micro_batch_size": 4,
        "max_length": 64,
        "sft": {"data": str(folder / "answers.jsonl"), "batch_size": 6, "max_steps": 2, "holdout": 0.2},
        "reward": {"data": str(folder / "pairs.jsonl"), "batch_size": 6, "max_steps": 2, "holdout": 0.3},
        "ppo": {
            "data": str(folder / "answers.jsonl"),
            "batch_size": 4,
            "iterations": 1,
            "reward_weights": "helpful=1,harmless=0.5",
            "max_new_tokens": 4,
            "epochs": 1,
        },
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def trained(source):
    """That pipeline's output, whole."""
    pipeline.main([str(source)])
    return source.with_name("out")


def copied(trained, folder):
    """What was trained, at another place."""
    if not folder.exists():
        shutil.copytree(trained, folder)
        for record in folder.glob("*/run.json"):
            record.write_text(record.read_text().replace(str(trained), str(folder)))
    return str(folder)


@pytest.fixture
def again(trained, source, tmp_path):
    """Reads the pipeline, with overrides, over a copy of what it trained."""
    return lambda **overrides: read_stages(source, {"output": copied(trained, tmp_path / "out"), **overrides})[1]


def actions(*arguments, **options):
    return [action for action, _ in plan(*arguments, **options)]


def test_stages_take_each_others_outputs(trained, tiny_policy):
    records = {name: json.loads((trained / name / "run.json").read_text()) for name in ("sft", "reward", "ppo")}
    assert {record["state"] for record in records.values()} == {"finished"}
    models = {name: record["settings"]["model"] for name, record in records.items()}
    assert models == {"sft": str(tiny_policy), "reward": f"{trained}/sft", "ppo": f"{trained}/sft"}
    assert records["ppo"]["settings"]["reward_model"] == f"{trained}/reward"
    assert records["ppo"]["reads"] == {f"{trained}/{name}": records[name]["begun"] for name in ("sft", "reward")}
    assert records["reward"]["settings"]["seed"] == 0 and records["sft"]["settings"]["lora_rank"] == 2


def test_the_report_tells_of_all_stages(trained):
    page = (trained / "report.html").read_text()
    for text in (
        "sft: curves",
        "reward: by criterion",
        "ppo: samples before and after",
        "helpful",
        "harmless",
        "± its",
    ):
        assert text in page
    assert "0 &lt;b&gt;:" in page and " <b>:" not in page and "<script" not in page
    for name in ("sft", "reward", "ppo"):
        assert (trained / name / "report.html").exists()


def test_finished_stages_are_skipped(again, tmp_path):
    assert actions(again()) == [SKIP, SKIP, SKIP]
    assert actions(again(resume="true", device="auto")) == [SKIP, SKIP, SKIP]
    file = tmp_path / "out/reward/run.json"
    record = json.loads(file.read_text())
    assert record["settings"].pop("center_coef") == 0.0  # an option that came later: its default changes nothing
    file.write_text(json.dumps(record))
    assert actions(again()) == [SKIP, SKIP, SKIP]
    with pytest.raises(ValueError, match="center_coef was 0.0, is 0.5"):
        plan(again(**{"reward.center_coef": 0.5}))


def test_changed_settings_are_shown_and_refused_unless_told(again):
    changes = {"reward.learning_rate": 0.5, "ppo.iterations": 3}
    with pytest.raises(
        ValueError, match=r"reward \(.*/out/reward\): learning_rate was 0.0001, is 0.5; ppo .* iterations"
    ):
        plan(again(**changes))
    assert actions(again(**changes), redo=True) == [SKIP, TRAIN, TRAIN]
    assert actions(again(**changes, resume_changed=True)) == [SKIP, SKIP, SKIP]


def test_what_came_of_a_stage_that_is_trained_again_is_trained_again(again, tmp_path):
    assert actions(again(**{"sft.seed": 1}), redo=True) == [TRAIN, TRAIN, TRAIN]
    assert actions(again(**{"reward.seed": 1}), redo=True) == [SKIP, TRAIN, TRAIN]
    stages = again()
    shutil.rmtree(tmp_path / "out/reward")
    with pytest.raises(ValueError, match=r"ppo \(.*\): reward_model .*/out/reward is trained anew"):
        plan(stages)
    assert actions(stages, redo=True) == [SKIP, TRAIN, TRAIN]


def test_a_model_that_was_trained_anew_by_hand_is_noticed(again, tmp_path):
    stages = again()
    file = tmp_path / "out/sft/run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"begun": "later"}))
    with pytest.raises(ValueError, match=r"reward \(.*\): model .*/out/sft was trained anew since; ppo "):
        plan(stages)


def test_a_pipeline_goes_on_inside_the_stage_that_was_interrupted(source, trained, tmp_path, monkeypatch, capsys):
    """It ends on the weights of an uninterrupted one; the second time it does nothing."""
    arguments = [str(source), "--output", str(tmp_path / "out"), "--reward.save_every=1"]
    write = MetricsLog.write

    def stop(self, step, kind="train", **metrics):
        if step == 2 and self._title == "reward":
            raise KeyboardInterrupt
        write(self, step, kind, **metrics)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(MetricsLog, "write", stop)
        pipeline.main(arguments)
    capsys.readouterr()
    pipeline.main([*arguments, "--reward.save_every", "1"])
    out = capsys.readouterr().out
    assert (
        "1/3  sft: skip (finished)" in out and "2/3  reward: resume (interrupted)" in out and "3/3  ppo: train" in out
    )
    for file in ("reward/adapter_model.safetensors", "ppo/adapter_model.safetensors"):
        got, want = load_file(tmp_path / "out" / file), load_file(trained / file)
        assert got.keys() == want.keys() and all(got[name].equal(want[name]) for name in want)
    assert RESUME == "resume"


@pytest.mark.ranks
@pytest.mark.slow
def test_two_processes_agree_on_what_is_due(source, trained, tmp_path):
    """Rank 0 looks at the folders and tells the other, which then trains with it."""
    folder = copied(trained, tmp_path / "out")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "fastrl.cli", "run", source, "--output", folder, "--ppo.seed", "1", "--redo"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(": skip (finished)") == 2
    assert done.stdout.count("3/3  ppo: train (again: seed was 0, is 1)") == 1
    assert json.loads((tmp_path / "out/ppo/run.json").read_text())["processes"] == 2
    assert (tmp_path / "out/ppo.previous/run.json").exists() and done.stdout.count("report: ") == 1


def test_all_settings_are_checked_before_the_first_stage_trains(source, tmp_path, capsys):
    where = ["--output", str(tmp_path / "out")]
    for arguments, message in [
        (["--ppo.iteration", "3"], "tiny.yaml: ppo: unknown key 'iteration'; did you mean 'iterations'?"),
        (["--ppo.iterations", "many"], "tiny.yaml: ppo: key 'iterations': expected int, got many"),
        (["--ppo.clip_coef", "-1"], "tiny.yaml: ppo: clip_coef: expected a number above 0, got -1.0"),
        (["--ppo.kl_in", "loss"], "tiny.yaml: ppo: kl_estimator: expected k2 or k3 with kl_in loss, got k1"),
        (["--ppo.rewards", "none/of/these#x"], "run: ppo: rewards: not found: none/of/these (looked in "),
        (["--ppo.tracker", "tensorbord"], "tracker: unknown tracker 'tensorbord'; did you mean 'tensorboard'?"),
        (["--ppo.data", "none.jsonl"], "run: ppo: data: not found: none.jsonl (looked in "),
        (["--sed", "3"], "run: unknown option --sed; did you mean '--seed'?"),
        (["--pp.seed", "3"], "run: --pp.seed: unknown stage 'pp'; did you mean 'ppo'?"),
        (["--seed"], "run: --seed: expected a value after it"),
        (["seed"], "run: expected --KEY VALUE or --STAGE.KEY VALUE, got 'seed'"),
    ]:
        assert cli.main(["run", str(source), *where, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\n", "expected at least one of the stages sft, reward, ppo, got none"),
        ("sft: 3\n", "sft: expected 'key: value' lines, got 3"),
        ("sfd:\n  data: x\nreward:\n  data: x\n", "unknown key 'sfd'; did you mean 'sft'?"),
        ("sft:\n  data: x\n", "sft: "),  # no model
        ("output: o\nmodel: m\nsft: {data: x, output: a}\nreward: {data: x, output: a}\n", "a folder of its own"),
        ("- sft\n", "expected 'key: value' lines, got list"),
    ],
)
def test_a_file_that_is_no_pipeline(text, message, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_stages(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_a_name_that_is_no_pipeline():
    with pytest.raises(ValueError, match="no file or recipe 'smolm2-hh'; did you mean 'smollm2-hh'"):
        stages.find_pipeline("smolm2-hh")
    with pytest.raises(ValueError, match="file not found: missing.yaml"):
        stages.find_pipeline("missing.yaml")


def test_a_stage_alone_names_its_own_models(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("model: base\noutput: out\nppo:\n  reward_model: judge\n  data: x\n")
    _, (stage,) = read_stages(path)
    assert (stage.settings.model, stage.settings.reward_model) == ("base", "judge")
    path.write_text("sft: {model: base, data: x}\nppo: {reward_model: judge, data: x, model: other}\n")
    _, (_, stage) = read_stages(path)
    assert (stage.settings.model, stage.settings.reward_model) == ("other", "judge")
    assert stage.settings.output == "runs/p/ppo"


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_recipes_are_read_checked_and_shown_without_network(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("a dry run reads no data"))
    assert cli.main(["run", name, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "3 stages" in out and out.count(": train (not begun)") == 3 and "nothing was trained" in out
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_listed_with_what_they_are(capsys):
    assert {"demo", "smollm2-hh", "tldr-pythia-1b"} <= set(RECIPE_NAMES)
    assert cli.main(["run", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == RECIPE_NAMES and all(len(line.split()) > 5 for line in lines)
