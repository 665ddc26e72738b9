"""What is built once in a run of the tests, whatever the number of workers."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def once(tmp_path_factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], object]) -> Path:
    """The folder `name` as `fill(folder)` leaves it; workers that come later wait for it, then share it."""
    run = tmp_path_factory.getbasetemp()
    if run.name.startswith("popen-"):  # a worker's own
        run = run.parent
    folder, unfinished = run / name, run / f"{name}.unfinished"
    with (run / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            fill(unfinished)
            unfinished.rename(folder)
    return folder
