"""Experiment trackers (TensorBoard, W&B, trackio, MLflow), through accelerate's interface to them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastrl.run.config import nearest

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}  # to install


def check_trackers(names: str) -> list[str]:
    """The trackers in a list that commas separate.

    Raises:
        ValueError: one is unknown, or not installed.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in TRACKERS:
            raise ValueError(f"tracker: unknown tracker '{name}'{nearest(name, list(TRACKERS), what='ones')}")
        if find_spec(TRACKERS[name]) is None:
            raise ValueError(f"tracker: {name} is not installed: pip install {TRACKERS[name]}, or leave it out")
    return found


class Trackers:
    """Tells trackers what metrics.jsonl gets; use it on rank 0 alone. One that raises is told of once and left out, and
    the run goes on.

    The project is the name of the run's folder's parent, the run that of the folder; TensorBoard's files lie in
    `tensorboard/` below it.
    """

    def __init__(self, names: str, output: Path, settings: Mapping[str, Any]) -> None:
        self._trackers = {name: start(name, output) for name in check_trackers(names)}
        shown = {
            name: value if isinstance(value, (int, float, str)) else str(value) for name, value in settings.items()
        }
        self._tell("store_init_configuration", shown)

    def log(self, step: int, kind: str, metrics: Mapping[str, Any]) -> None:
        """The record's numbers as kind/name; trackers take neither lists nor NaN."""
        numbers = {
            f"{kind}/{name}": value
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        }
        self._tell("log", numbers, step=step)

    def finish(self) -> None:
        self._tell("finish")

    def _tell(self, method: str, *arguments: Any, **options: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, method)(*arguments, **options)
            except Exception as error:  # noqa: BLE001 a run of days does not end because a tracker's server does
                del self._trackers[name]
                warnings.warn(
                    f"tracker: {name} is left out from here on: {type(error).__name__}: {error}", stacklevel=2
                )


def start(name: str, output: Path) -> Any:
    """accelerate's tracker of that name, started.

    Raises:
        ValueError: it does not start, as where nobody is logged in.
    """
    from accelerate import PartialState, tracking

    PartialState(cpu=True)  # what accelerate's log asks for; where several ranks talk, theirs stays
    project, run = output.resolve().parent.name or "fastrl", output.resolve().name
    make = {
        "tensorboard": lambda: tracking.TensorBoardTracker("tensorboard", output),
        "wandb": lambda: tracking.WandBTracker(project, name=run),
        "trackio": lambda: tracking.TrackioTracker(project, name=run),
        "mlflow": lambda: tracking.MLflowTracker(project, run_name=run),
    }
    try:
        tracker = make[name]()
        tracker.start()
    except Exception as error:  # of whatever kind the tracker's package raises
        raise ValueError(f"tracker: {name} does not start: {type(error).__name__}: {error}") from error
    return tracker
