"""`run.json`: what a run is, beside what it measures. Its settings, what it reads, versions, machine, how it ended."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastrl.devices import device_name
from fastrl.run.distributed import world_size
from fastrl.run.resume import plain
from fastrl.versions import versions

RUN = "run.json"


def write_begun(settings: Any, loop: str, *, steps: int, done: int, device: str) -> None:
    """Write that a run of so many steps begins, or goes on after the `done` ones that an earlier process made."""
    before = read_record(settings.output) if done else {}
    record = {
        "loop": loop,
        "state": "running",
        "begun": before.get("begun") or _now(),
        "steps": steps,
        "seconds": before.get("seconds", 0.0),
        "settings": plain(settings),
        "reads": {model: begun for _, model in models_read(settings) if (begun := begun_at(model))},
        "device": device_name(device),
        "processes": world_size(),
        "versions": versions(),
    }
    _write(Path(settings.output), record)


def write_ended(output: Path, *, seconds: float, error: BaseException | None) -> None:
    """Write that the run finished, or why it stopped; `seconds` are those of this process."""
    record = read_record(output)
    record["state"] = "finished" if error is None else "stopped"
    record["why"] = "" if error is None else str(error) or type(error).__name__
    record["ended"] = _now()
    record["seconds"] = record.get("seconds", 0.0) + seconds
    _write(output, record)


def read_record(folder: str | Path) -> dict[str, Any]:
    """What `run.json` in the folder holds; {} if there is none that can be read."""
    try:
        record = json.loads((Path(folder) / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def begun_at(folder: str | Path) -> str:
    """When the run in a folder was begun, which tells it from any other in the same place; "" if no run is known."""
    return read_record(Path(folder).expanduser()).get("begun", "")


def models_read(settings: Any) -> Iterator[tuple[str, str]]:
    """(option, folder or hub id) of each model that a run reads."""
    for name in ("model", "reward_model"):
        if model := getattr(settings, name, ""):
            yield name, model
    rewards = getattr(settings, "rewards", "")
    for term in rewards.split(",") if isinstance(rewards, str) else rewards:  # WEIGHT*MODEL#CRITERION
        model = term.rpartition("*")[2].partition("#")[0].strip()
        if model and ":" not in model:  # else a function of a Python module
            yield "rewards", model


def _write(output: Path, record: dict[str, Any]) -> None:
    temporary = output / f".{RUN}"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, output / RUN)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")
