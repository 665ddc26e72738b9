"""Going on with a run that was interrupted: what its steps change, beside the weights of its checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastrl.run.checkpoint import checkpoints
from fastrl.run.masters import restore, trained
from fastrl.run.optim import Learner

STATE_FILE = "training_state.pt"
FREE = ("resume", "output", "device")  # settings that may differ


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """What the random numbers of a step are drawn from: they depend on no earlier step, and differ between ranks."""
    return seed * 1_000_003 + step + rank * 2_654_435_761  # torch's generator on CPU sees the last 32 bits


def save_state(folder: Path, step: int, settings: Any, learners: Sequence[Learner], own: Any = None) -> None:
    """Write what later steps depend on, beside the folder's model, after `step` steps.

    `own` is an object in whose attributes, numbers and tensors, a loop keeps what else its steps change.
    """
    state = {
        "step": step,
        "settings": _fixed(settings),
        "models": [{name: tensor.detach() for name, tensor in trained(x.model)} for x in learners],
        "optimizers": [x.optimizer.state_dict() for x in learners],
        "schedules": [x.schedule.state_dict() for x in learners],
        "own": {} if own is None else dict(vars(own)),
    }
    torch.save(state, folder / STATE_FILE)


def load_state(state_file: Path, settings: Any, learners: Sequence[Learner], own: Any = None) -> int:
    """Bring the learners, and the loop's own state, to that of a checkpoint; the steps that were made.

    Raises:
        ValueError: the checkpoint is of a run with other settings.
    """
    check_settings(settings, state_file)
    state = torch.load(state_file, map_location="cpu", weights_only=True)
    parts = zip(learners, state["models"], state["optimizers"], state["schedules"], strict=True)
    for learner, weights, optimizer, schedule in parts:
        restore(learner.model, weights)
        learner.optimizer.load_state_dict(optimizer)
        learner.schedule.load_state_dict(schedule)
    if own is not None:
        vars(own).update(state["own"])
    return state["step"]


def newest_state(output: Path) -> Path | None:
    """State file of the newest whole checkpoint; None if there is none."""
    whole = [folder / STATE_FILE for folder in checkpoints(output) if (folder / STATE_FILE).exists()]
    return whole[-1] if whole else None


def check_settings(settings: Any, state_file: Path) -> None:
    """Raise ValueError if a checkpoint is of a run with other settings than these; its tensors are not read."""
    before = torch.load(state_file, map_location="cpu", weights_only=True, mmap=True)["settings"]
    now = _fixed(settings)
    differing = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if differing:
        changes = ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in differing)
        raise ValueError(
            f"resume: settings: expected those of the run that wrote {state_file.parent}, got others: {changes}; give"
            " the same ones, or start anew without resume"
        )


def _fixed(settings: Any) -> dict[str, Any]:
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in FREE}
    return json.loads(json.dumps(values, default=str))
