"""Trackers get what metrics.jsonl gets, and never end a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
from accelerate import tracking

from fastrl.run import trackers
from fastrl.run.trackers import TRACKERS, Trackers, check_trackers


class Told(tracking.GeneralTracker):
    """accelerate's interface; notes what it is told."""

    name = "told"
    requires_logging_directory = False
    fails = ""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()
        self.told = [("made", arguments, options)]
        made.append(self)

    @property
    def tracker(self):
        return self

    def start(self):
        if self.fails == "start":
            raise RuntimeError("nobody is logged in")

    def store_init_configuration(self, values):
        self.told.append(("settings", values))

    def log(self, values, step=None, **options):
        if self.fails == "log":
            raise ConnectionError("no server")
        self.told.append(("log", step, values))

    def finish(self):
        self.told.append(("finished",))


made: list[Told] = []


@pytest.fixture
def installed(monkeypatch):
    """All trackers are installed and note what they are told; yields the class."""
    made.clear()
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    for name in ("TensorBoardTracker", "WandBTracker", "TrackioTracker", "MLflowTracker"):
        monkeypatch.setattr(tracking, name, Told)
    monkeypatch.setattr(Told, "fails", "")
    return Told


def test_every_tracker_is_told_settings_numbers_and_the_end(installed, tmp_path):
    found = Trackers(",".join(TRACKERS), tmp_path / "runs/sft", {"seed": 1, "data": ["a", "b"], "score_clip": None})
    found.log(3, "eval", {"loss": 0.5, "steps": 2, "nan": math.nan, "curve": [1, 2], "text": "x", "flag": True})
    found.finish()
    assert len(made) == 4
    for one in made:
        assert one.told[1:] == [
            ("settings", {"seed": 1, "data": "['a', 'b']", "score_clip": "None"}),
            ("log", 3, {"eval/loss": 0.5, "eval/steps": 2}),
            ("finished",),
        ]
    assert made[0].told[0] == ("made", ("tensorboard", tmp_path / "runs/sft"), {})
    assert made[1].told[0] == ("made", ("runs",), {"name": "sft"})


def test_a_tracker_that_fails_is_told_of_once_and_left_out(installed, tmp_path, monkeypatch):
    monkeypatch.setattr(Told, "fails", "log")
    found = Trackers("wandb", tmp_path, {})
    with pytest.warns(UserWarning, match="tracker: wandb is left out from here on: ConnectionError: no server"):
        found.log(1, "train", {"loss": 1.0})
    found.log(2, "train", {"loss": 1.0})
    found.finish()
    assert made[0].told[2:] == []


def test_a_tracker_that_does_not_start_is_an_error(installed, tmp_path, monkeypatch):
    monkeypatch.setattr(Told, "fails", "start")
    with pytest.raises(ValueError, match="tracker: mlflow does not start: RuntimeError: nobody is logged in"):
        Trackers("mlflow", tmp_path, {})


def test_unknown_and_missing_trackers_are_refused(monkeypatch):
    assert check_trackers("") == [] and check_trackers(" , ") == []
    with pytest.raises(ValueError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        check_trackers("tensorbord")
    with pytest.raises(ValueError, match="unknown tracker 'x'; known ones: tensorboard, wandb, trackio, mlflow"):
        check_trackers("x")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tracker: wandb is not installed: pip install wandb, or leave it out"):
        check_trackers("wandb")


def test_accelerates_own_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = Trackers("tensorboard", tmp_path, {"seed": 1, "text": "x"})
    for step in (1, 2):
        found.log(step, "train", {"loss": 1 / step})
    found.finish()
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
