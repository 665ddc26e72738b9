"""A run's folder, signals and full disks, on the loops themselves."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loops import reported, tiny_run
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastrl import cli
from fastrl.run import lock, trackers
from fastrl.run import run as runs
from fastrl.run.metrics import MetricsLog, PhaseTimer
from fastrl.run.output import writing
from fastrl.run.record import read_record
from fastrl.run.resume import newest_state
from fastrl.train import ppo

PPO_PHASES = {"train", "sample", "score", "logprobs", "advantages", "update", "evaluate", "save"}


@pytest.fixture(params=["sft", "ppo"])
def loop(request, tmp_path, tiny_policy, tiny_scalar):
    """(main, configuration) of six steps, without checkpoints of its own."""
    main, cfg = tiny_run(request.param, tmp_path, tiny_policy, tiny_scalar)
    if main is ppo.main:
        return main, replace(cfg, iterations=6, eval_every=0)
    return main, replace(cfg, max_steps=6, eval_every=0, save_every=0, lora_dropout=0.2)


@pytest.fixture
def sft_loop(tmp_path, tiny_policy, tiny_scalar):
    main, cfg = tiny_run("sft", tmp_path, tiny_policy, tiny_scalar)
    return main, replace(cfg, max_steps=6, eval_every=0, save_every=2)


def at(step: int, act):
    """A sink that acts when a training step is reported."""
    return lambda record: act() if record.kind == "train" and record.step == step else None


def send(*numbers: int):
    def act():
        for number in numbers:
            signal.raise_signal(number)

    return act


def weights(folder: str) -> dict[str, torch.Tensor]:
    files = sorted(path for path in Path(folder).rglob("*.safetensors") if "checkpoints" not in path.parts)
    return {f"{path.relative_to(folder)} {name}": value for path in files for name, value in load_file(path).items()}


# --- signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(loop, tmp_path, number, status, capfd):
    """It stops after its step, with a checkpoint, and resumes to the bits of an uninterrupted run."""
    main, cfg = loop
    whole = replace(cfg, output=str(tmp_path / "whole"))
    main(whole)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped after step 3 of 6, .*--resume true$") as stop:
        main(cfg, at(3, send(number)))
    assert stop.value.status == status and (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert "saving after this step, then ending; Ctrl-C ends at once" in capfd.readouterr().err
    assert [p.name for p in Path(cfg.output, "checkpoints").iterdir()] == ["step-000003"]
    assert not Path(cfg.output, lock.LOCK).exists()
    main(replace(cfg, resume=True))
    assert all(torch.equal(value, weights(cfg.output)[name]) for name, value in weights(whole.output).items())
    assert reported(cfg.output) == reported(whole.output)


def test_the_command_exits_with_the_signals_status(sft_loop, capsys, monkeypatch):
    main, cfg = sft_loop
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        monkeypatch.setattr(cli, "run", lambda *_, number=number: main(cfg, at(1, send(number))))
        assert cli.main(["sft"]) == status
        assert capsys.readouterr().err.endswith(
            "fastrl: stopped after step 1 of 6, which is saved: go on with --resume true\n"
        )


def test_a_second_ctrl_c_ends_at_once(sft_loop):
    """No checkpoint is written any more; the last one is whole, and the folder is free."""
    main, cfg = sft_loop
    with pytest.raises(KeyboardInterrupt) as stop:
        main(cfg, at(4, send(signal.SIGINT, signal.SIGINT)))
    assert not isinstance(stop.value, runs.Interrupted)
    assert newest_state(Path(cfg.output)).parent.name == "step-000002"
    assert not Path(cfg.output, lock.LOCK).exists()
    assert main(replace(cfg, resume=True))["steps"] == 6


def test_a_ctrl_c_while_a_checkpoint_is_written_leaves_no_half_one(sft_loop, monkeypatch):
    main, cfg = sft_loop
    original = runs.save_state

    def interrupted(folder, step, *rest):
        if step == 4:
            raise KeyboardInterrupt
        original(folder, step, *rest)

    monkeypatch.setattr(runs, "save_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(cfg)
    assert [p.name for p in Path(cfg.output, "checkpoints").glob("step-*")] == ["step-000002"]


def test_a_run_in_another_thread_leaves_signals_alone(sft_loop):
    main, cfg = sft_loop
    seen = []
    thread = threading.Thread(target=lambda: main(cfg, at(1, lambda: seen.append(signal.getsignal(signal.SIGINT)))))
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert seen == [before]


# --- one run in a folder


def test_a_second_run_in_the_folder_is_refused(sft_loop, monkeypatch, capsys):
    main, cfg = sft_loop
    seen = []

    def second():
        with pytest.raises(ValueError, match=f"expected no other run in it, got that of process {os.getpid()} "):
            main(replace(cfg, seed=1))
        seen.append(sorted(p.name for p in Path(cfg.output).iterdir()))

    main(cfg, at(3, second))
    assert seen == [["checkpoints", "metrics.jsonl", "run.json", "run.lock", "samples.jsonl"]]
    assert [r["step"] for r in reported(cfg.output) if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    main(cfg, at(3, lambda: None))  # the earlier run is put aside, the lock goes with the new one
    assert not Path(cfg.output, lock.LOCK).exists() and not Path(f"{cfg.output}.previous", lock.LOCK).exists()


# --- what a run tells


def test_a_run_tells_its_tracker_what_its_log_gets(sft_loop, monkeypatch):
    main, cfg = sft_loop
    told = []

    class Tracker:
        def __getattr__(self, method):
            return lambda *arguments, **options: told.append((method, *arguments, *options.values()))

    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    monkeypatch.setattr(trackers, "start", lambda name, output: Tracker())
    main(replace(cfg, tracker="wandb"))
    steps = [step for method, *_, step in told[1:-1] if method == "log"]
    assert (told[0][0], told[0][1]["seed"], told[-1]) == ("store_init_configuration", 0, ("finish",))
    assert steps == [record["step"] for record in reported(cfg.output)]


def test_a_tracker_that_is_missing_is_refused_before_anything_is_written(sft_loop):
    main, cfg = sft_loop
    with pytest.raises(ValueError, match="unknown tracker 'wand'; did you mean 'wandb'"):
        main(replace(cfg, tracker="wand"))
    assert not Path(cfg.output).exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_the_phase_and_the_time_that_is_left(tmp_path, monkeypatch):
    """Steps of a second each, of which two are made: three are left, in the phase that runs."""
    terminal, clock = Terminal(), [0.0]
    monkeypatch.setattr(sys, "stderr", terminal)
    with MetricsLog(tmp_path, total=5, title="ppo") as log:
        log._bar._time = lambda: clock[0]
        log._bar.start_t = log._bar.last_print_t = 0.0
        timer = PhaseTimer("cpu", log.phase)
        for step in (1, 2):
            with timer.phase("sample"):
                clock[0] += 1.0
            log.write(step, loss=1.0)
        with timer.phase("update"):
            shown = terminal.getvalue().split("\r")[-1]
    assert "ppo:  40%" in shown and "2/5 [00:02<00:03" in shown and shown.rstrip().endswith(", update]")
    assert "sample]" in terminal.getvalue()


@pytest.mark.parametrize(("name", "phases"), [("sft", {"train", "evaluate", "save"}), ("ppo", PPO_PHASES)])
def test_loops_say_what_they_do_now(name, phases, tmp_path, tiny_policy, tiny_scalar, monkeypatch):
    main, cfg = tiny_run(name, tmp_path, tiny_policy, tiny_scalar)
    seen = set()
    monkeypatch.setattr(MetricsLog, "phase", lambda self, phase: seen.add(phase))
    main(replace(cfg, iterations=1) if name == "ppo" else replace(cfg, max_steps=2, save_every=1))
    assert seen == phases


def test_run_json_says_what_ran_and_how_it_ended(sft_loop):
    main, cfg = sft_loop
    with pytest.raises(KeyboardInterrupt):
        main(cfg, at(3, send(signal.SIGTERM)))
    stopped = read_record(cfg.output)
    assert (stopped["state"], stopped["steps"], stopped["settings"]["learning_rate"]) == ("stopped", 6, 1e-3)
    assert stopped["why"].startswith("stopped after step 3 of 6") and stopped["versions"]["torch"] == torch.__version__
    main(replace(cfg, resume=True))
    finished = read_record(cfg.output)
    assert (finished["state"], finished["begun"]) == ("finished", stopped["begun"])
    assert finished["seconds"] > stopped["seconds"] > 0


# --- full disks


def full_from(step: int, error: Exception, monkeypatch):
    original = runs.save_state

    def fail(folder, at, *rest):
        if at >= step:
            (folder / "training_state.pt").write_text("half of it")
            raise error
        original(folder, at, *rest)

    monkeypatch.setattr(runs, "save_state", fail)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
    ids=["python", "safetensors", "torch"],
)
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(error, sft_loop, monkeypatch, capsys):
    main, cfg = sft_loop
    full_from(4, error, monkeypatch)
    monkeypatch.setattr(cli, "run", lambda *_: main(cfg))
    assert cli.main(["sft"]) == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith(f"fastrl: error: output: {cfg.output}: cannot be written: ") and "MiB free" in text
    assert text.endswith(f"{cfg.output}/checkpoints/step-000002, is whole: go on with --resume true")
    assert [p.name for p in Path(cfg.output, "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert main(replace(cfg, resume=True))["steps"] == 6


@pytest.mark.parametrize("limit", [3_000, 40_000, 100_000])
def test_files_that_cannot_grow(sft_loop, limit):
    """The errors of torch, safetensors and tokenizers themselves, at a limit of the size of files."""
    main, cfg = sft_loop
    cfg = replace(cfg, lora_rank=0, save_every=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            OSError, match=rf"output: {cfg.output}: cannot be written: .*(too large|unexpected pos|fail)"
        ):
            main(cfg, at(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert newest_state(Path(cfg.output)) is None and not Path(cfg.output, lock.LOCK).exists()
    assert list(Path(cfg.output).glob("checkpoints/*")) == list(Path(cfg.output).glob("checkpoints/.*")) == []


def test_a_read_only_folder_is_one_line(sft_loop, monkeypatch):
    main, cfg = sft_loop

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(cfg.output))

    monkeypatch.setattr(lock.os, "open", refuse)
    with pytest.raises(OSError, match=rf"output: {cfg.output}: cannot be written: .*Read-only file system.* free\)$"):
        main(cfg)
    assert not Path(cfg.output).exists()


def test_other_errors_pass_through_writing(tmp_path):
    for error in (RuntimeError("a fault"), ValueError("a setting"), KeyError("x")):
        with pytest.raises(type(error)) as caught, writing(tmp_path):
            raise error
        assert caught.value is error
