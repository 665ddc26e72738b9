"""Going on with a run that was interrupted: what its steps change, beside the weights of its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from fastrl.run.checkpoint import checkpoints
from fastrl.run.masters import round_masters, trained

STATE_FILE = "training_state.pt"
FREE = ("resume", "output", "device")  # settings that may differ


def step_seed(seed: int, step: int) -> int:
    """What the random numbers of a step are drawn from: they depend on no earlier step."""
    return seed * 1_000_003 + step


class Run(NamedTuple):
    """A run at some step. All that its later steps do follows from this, its seed and their numbers."""

    settings: Any  # the loop's configuration, with `resume` and `output`
    models: Sequence[nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    schedules: Sequence[LRScheduler]

    def save(self, folder: Path, step: int) -> None:
        """Write the state after `step` steps into the folder of a checkpoint, at once or not at all."""
        state = {
            "step": step,
            "settings": _fixed(self.settings),
            "models": [{name: tensor.detach() for name, tensor in trained(model)} for model in self.models],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
        }
        torch.save(state, folder / f"{STATE_FILE}.partial")
        os.replace(folder / f"{STATE_FILE}.partial", folder / STATE_FILE)

    def start(self) -> int:
        """The steps that were made already: with `resume` those of the newest whole checkpoint, which is restored; else
        0.

        Raises:
            ValueError: the checkpoint is of a run with other settings.
        """
        output = Path(self.settings.output)
        if not self.settings.resume:
            return 0
        newest = newest_state(output)
        if newest is None:
            print(f"resume: no checkpoint under {output / 'checkpoints'} yet: starting from the beginning")
            return 0
        check_settings(self.settings, newest)
        state = torch.load(newest, map_location="cpu", weights_only=True)
        for model, values in zip(self.models, state["models"], strict=True):
            with torch.no_grad():
                for name, tensor in trained(model):
                    tensor.copy_(values[name])
                round_masters(model)
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        for schedule, values in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(values)
        print(f"resume: going on after step {state['step']} from {newest.parent}")
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
