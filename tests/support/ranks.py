"""Runs of the loops as one of several processes: `torchrun --nproc_per_node 2 ranks.py JOBS.json FOLDER`.

Every process runs every job and leaves what it saw in FOLDER/NAME.RANK.json; tests run jobs in their own process too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from loops import MAINS

from fastrl.run import distributed
from fastrl.run import run as runs
from fastrl.run.masters import trained
from fastrl.train import sft

ROOT = Path(sft.__file__).parents[2]


def job(loop: str, settings: Any, *, stop: int = 0, change: str = "") -> dict[str, Any]:
    """A run, as JSON: interrupted when it reports step `stop`; with something changed (see CHANGES)."""
    return {"loop": loop, "settings": dataclasses.asdict(settings), "stop": stop, "change": change}


def run_job(todo: dict[str, Any]) -> dict[str, Any]:
    """Run a job; gradient norms and hashes of the weights after each update, and the error that ended it."""
    main, config = MAINS[todo["loop"]]
    seen: dict[str, Any] = {"norms": [], "hashes": [], "error": None}
    step_of, report_of = runs.optimizer_step, runs.Run.report

    def watched_step(model: Any, *arguments: Any, **options: Any) -> float:
        norm = step_of(model, *arguments, **options)
        content = b"".join(t.detach().numpy().tobytes() for _, t in trained(model))
        seen["norms"].append(norm)
        seen["hashes"].append(hashlib.sha256(content).hexdigest()[:16])
        return norm

    def watched_report(run: runs.Run, metrics: Any, kind: str = "train", **options: Any) -> None:
        if run.step == todo["stop"] and kind == "train":
            raise KeyboardInterrupt
        report_of(run, metrics, kind, **options)

    with (
        mock.patch.object(runs, "optimizer_step", watched_step),
        mock.patch.object(runs.Run, "report", watched_report),
        CHANGES[todo["change"]](),
    ):
        try:
            main(config(**todo["settings"]))
        except (RuntimeError, ValueError, OSError, KeyboardInterrupt) as error:
            seen["error"], seen["told"] = f"{type(error).__name__}: {error}", distributed.is_told(error)
    return seen


def _no_targets() -> Any:
    """Every second record keeps no token: there are steps in which one of two ranks has nothing to learn from."""
    original = sft.load_split

    def load(*arguments: Any, **options: Any) -> Any:
        items, held_out = original(*arguments, **options)
        return [x._replace(loss_mask=[False] * len(x.loss_mask)) if i % 2 else x for i, x in enumerate(items)], held_out

    return mock.patch.object(sft, "load_split", load)


def _at_call(number: int, act: Callable[[Any], Any]) -> Any:
    """The loss of a micro-batch on the last rank is replaced by what `act` makes of it."""
    original, calls = sft.sft_loss, []

    def loss_of(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        loss = original(*arguments, **options)
        last = distributed.rank() == distributed.world_size() - 1
        return act(loss) if last and len(calls) == number else loss

    return mock.patch.object(sft, "sft_loss", loss_of)


def _raise(loss: Any) -> Any:
    raise ValueError("row 3 is broken")


def _die(loss: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


CHANGES: dict[str, Callable[[], Any]] = {
    "": lambda: mock.patch.dict({}),
    "no targets": _no_targets,
    "nan": lambda: _at_call(4, lambda loss: loss * math.nan),
    "raise": lambda: _at_call(4, _raise),
    "die": lambda: _at_call(4, _die),
}


def environment(**more: str) -> dict[str, str]:
    """For a process that runs jobs, one thread each."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests/support")))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def launch(jobs: dict[str, dict[str, Any]], folder: Path) -> None:
    """Two processes run each job; `launched` reads what they saw."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, __file__, str(folder / "jobs.json"), str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def launched(folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The jobs of a launch, and what each of two processes saw of each."""
    jobs = json.loads((folder / "jobs.json").read_text())
    return jobs, {name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)] for name in jobs}


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    folder = Path(arguments[1])
    for name, todo in json.loads(Path(arguments[0]).read_text()).items():
        seen = run_job(todo)
        (folder / f"{name}.{distributed.rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1:])
