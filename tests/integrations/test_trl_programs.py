"""Whole programs: TRL's own example scripts with two lines more, and the bench of its trainers."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

import trl
from trl_runs import write_model, write_records

from fastrl.benches import bench_trl, train_workload
from fastrl.benches.bench_trl import SETTINGS, SMALL
from fastrl.integrations.trl import functions, unpatch

LINES = "import fastrl.integrations.trl\nfastrl.integrations.trl.patch()\n"


@pytest.fixture(autouse=True)
def leave_trl_as_it_was():
    yield
    unpatch()


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trls_own_scripts_run_with_two_lines_more(kind, tmp_path, monkeypatch):
    """On a model in a folder and records in another; the adapter that they train is saved."""
    source = (Path(trl.__file__).parent / "scripts" / f"{kind}.py").read_text(encoding="utf-8")
    script = tmp_path / f"{kind}.py"
    script.write_text(source.replace("\nimport argparse\n", f"\nimport argparse\n{LINES}", 1), encoding="utf-8")
    calls = []
    for name in ("linear_logprobs", "token_logprobs"):  # TRL 1.12 has logits
        original = getattr(functions, name)
        monkeypatch.setattr(functions, name, lambda *a, o=original, **k: calls.append(1) or o(*a, **k))
    output = tmp_path / "output"
    model, data = write_model(tmp_path / "model"), write_records(kind, tmp_path / "data")
    arguments = f"--model_name_or_path {model} --dataset_name {data} --output_dir {output} --use_peft"
    options = "--max_steps 2 --per_device_train_batch_size 2 --use_cpu --bf16 False --report_to none"
    monkeypatch.setattr(sys, "argv", [str(script), *arguments.split(), *options.split()])
    runpy.run_path(str(script), run_name="__main__")
    assert calls and (output / "adapter_model.safetensors").exists()


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.parametrize("task", bench_trl.PEERS)
def test_the_bench_of_trainers_agrees_on_what_it_times(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func
    train_trainers = pytest.importorskip("fastrl.benches.train_trainers")
    small = {**SMALL, "prompt": 16, "response": 16, "micro_batch": 2, "iterations": 1, "threads": 1}
    train_workload.write(tmp_path, train_workload.Settings(**{**vars(SETTINGS), **small}))
    reports = []
    for _, _, argument in bench_trl.PEERS[task]:
        train_trainers.main(tmp_path, argument)
        reports.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    plain, *others = reports
    assert len(plain["seconds"]) == 1 and plain["check"]["grad_norm 0"] > 0
    assert plain["tokens"] > 0
    for report in others:
        assert report["check"] == pytest.approx(plain["check"], rel=1e-4, abs=1e-6)
