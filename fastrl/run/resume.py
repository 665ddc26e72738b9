"""Going on with a run that was interrupted: what its steps change, beside the weights of its checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastrl.run.checkpoint import checkpoints
from fastrl.run.masters import restore, trained
from fastrl.run.optim import Learner

STATE_FILE = "training_state.pt"
FREE = ("resume", "resume_changed", "output", "device", "tracker")  # settings that may differ


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """What the random numbers of a step are drawn from: they depend on no earlier step, and differ between ranks."""
    return seed * 1_000_003 + step + rank * 2_654_435_761  # torch's generator on CPU sees the last 32 bits


def save_state(folder: Path, step: int, settings: Any, learners: Sequence[Learner], own: Any = None) -> None:
    """Write what later steps depend on, beside the folder's model, after `step` steps.

    `own` is an object in whose attributes, numbers and tensors, a loop keeps what else its steps change.
    """
    state = {
        "step": step,
        "settings": plain(settings),
        "models": [{name: tensor.detach() for name, tensor in trained(x.model)} for x in learners],
        "optimizers": [x.optimizer.state_dict() for x in learners],
        "schedules": [x.schedule.state_dict() for x in learners],
        "own": {} if own is None else dict(vars(own)),
    }
    torch.save(state, folder / STATE_FILE)


def load_state(state_file: Path, settings: Any, learners: Sequence[Learner], own: Any = None) -> int:
    """Bring the learners, and the loop's own state, to that of a checkpoint; the steps that were made.

    Rates, decay and epsilon are those of the settings, which are the checkpoint's unless `resume_changed` is set.

    Raises:
        ValueError: the checkpoint is of a run with other settings, or trained other weights.
    """
    changes = check_settings(settings, state_file)
    if changes:
        print(f"resume: settings that have changed since {state_file.parent}: {', '.join(changes)}")
    state = torch.load(state_file, map_location="cpu", weights_only=True)
    for learner, weights in zip(learners, state["models"], strict=True):
        _check_weights(learner, weights, state_file)
    parts = zip(learners, state["models"], state["optimizers"], state["schedules"], strict=True)
    for learner, weights, optimizer, schedule in parts:
        restore(learner.model, weights)
        groups = learner.optimizer.state_dict()["param_groups"]
        learner.optimizer.load_state_dict({**optimizer, "param_groups": groups})
        _place(learner, schedule["last_epoch"])
    if own is not None:
        vars(own).update(state.get("own", {}))
    return state["step"]


def _check_weights(learner: Learner, weights: dict[str, torch.Tensor], state_file: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in trained(learner.model)}
    before = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differing = sorted(name for name in shapes.keys() | before.keys() if shapes.get(name) != before.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"resume: {state_file.parent}: expected the trained weights that it holds, got others: {name} was"
            f" {before.get(name, 'not trained')}, is {shapes.get(name, 'not trained')} ({len(differing)} in all); give"
            " its tuner's settings, or start anew without resume"
        )


def _place(learner: Learner, steps: int) -> None:
    """Take a schedule to where it is after so many steps."""
    schedule = learner.schedule
    schedule.last_epoch = steps
    for group, rate, factor in zip(learner.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = rate * factor(steps)


def newest_state(output: Path) -> Path | None:
    """State file of the newest whole checkpoint; None if there is none."""
    whole = [folder / STATE_FILE for folder in checkpoints(output) if (folder / STATE_FILE).exists()]
    return whole[-1] if whole else None


def check_settings(settings: Any, state_file: Path) -> list[str]:
    """How the settings differ from those of a checkpoint's run; its tensors are not read.

    Raises:
        ValueError: they do, and `resume_changed` is not set.
    """
    before = torch.load(state_file, map_location="cpu", weights_only=True, mmap=True)["settings"]
    changes = changed(before, settings)
    if changes and not settings.resume_changed:
        raise ValueError(
            f"resume: settings: expected those of the run that wrote {state_file.parent}, got others:"
            f" {', '.join(changes)}; give the same ones, start anew without resume, or go on with the new ones with"
            " --resume_changed true"
        )
    return changes


def changed(before: Mapping[str, Any], settings: Any) -> list[str]:
    """What the settings differ in from those of an earlier run, but for those that may: ["seed was 0, is 1", ...].

    An option that the earlier run did not know has its default, with which it changes nothing.
    """
    now, defaults = plain(settings), {item.name: item.default for item in dataclasses.fields(settings)}
    names = sorted(name for name in before.keys() | now.keys() if name not in FREE)
    pairs = {name: (before.get(name, defaults.get(name)), now.get(name)) for name in names}
    return [f"{name} was {was!r}, is {is_now!r}" for name, (was, is_now) in pairs.items() if was != is_now]


def plain(settings: Any) -> dict[str, Any]:
    """The settings as JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))
