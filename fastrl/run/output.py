"""The folder that a run writes: what it may not be, and where the earlier run in it goes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastrl.checks import NonFiniteError
from fastrl.folders import ADAPTER_CONFIG, adapter_base, is_adapter, read_json
from fastrl.model_files import is_model_file
from fastrl.run.checkpoint import checkpoints
from fastrl.run.lock import move_lock
from fastrl.run.record import RUN, models_read
from fastrl.run.resume import check_settings, newest_state

LOG = "metrics.jsonl"  # every run has one, from the moment it takes the folder
SAMPLES = "samples.jsonl"
REPORT = "report.html"
FILES = (LOG, SAMPLES, RUN, REPORT, "tensorboard")  # of a run, beside its model
PARTS = ("checkpoints", "base", "critic", "best")  # folders that runs write into their output
MARK = ".put_aside"
DISK_ERRORS = ("(os error ", "inline_container", "PytorchStreamWriter")  # of Rust's libraries, and of torch.save


def check_output(settings: Any) -> None:
    """Refuse an output folder in which the run would write over something; call it before anything is loaded.

    Raises:
        ValueError: `output` is a file; is, holds or lies in a model that the run reads, or its adapter's base; holds a
            model that no run wrote; or with `resume`, its newest checkpoint is of a run with other settings.
    """
    output = Path(settings.output).resolve()
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: expected a folder, got the file {settings.output}")
    places = {output: ""}
    if _is_put_aside(output, settings.resume):
        places[_aside(output)] = ", to which an earlier run would be moved,"
        if _aside(output).exists() and not (_aside(output) / MARK).exists():
            raise ValueError(
                f"output: the run in it would be put aside in {_aside(output)}, which exists; move it away"
            )
    for name, model in models_read(settings):
        for read in model_folders(model):
            for written, what in places.items():
                if written == read or written in read.parents or read in written.parents:
                    raise ValueError(
                        f"output: {written}{what} and {name} {read}: expected folders apart, got one that is or holds"
                        " the other; name another output"
                    )
    if output.is_dir() and not (output / LOG).is_file():
        foreign = [p.name for p in sorted(output.iterdir()) if is_model_file(p.name) or p.name in PARTS]
        if foreign:
            raise ValueError(
                f"output: {settings.output}: expected a new folder or that of an earlier run, got one without {LOG}"
                f" that holds {', '.join(foreign[:4])}: a run would write over it; name another output"
            )
    if settings.resume and (state := newest_state(output)):
        check_settings(settings, state)


def claim_output(settings: Any) -> None:
    """Make `output` this run's; call it when nothing can be refused any more.

    An earlier run that left a model or a checkpoint is put aside whole, in `output`.previous, where it takes the place
    of the one before; files that are no run's stay. A run that resumes keeps its folder.
    """
    output = Path(settings.output).resolve()
    if settings.resume and newest_state(output):
        return
    if _is_put_aside(output, settings.resume):
        _put_aside(output)
    for part in PARTS:  # of a run that ended before its first checkpoint
        shutil.rmtree(output / part, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / LOG).touch()


@contextmanager
def writing(output: str | Path) -> Iterator[None]:
    """What a full or read-only disk makes Python, safetensors and torch raise, as an OSError of one line."""
    try:
        yield
    except NonFiniteError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if not isinstance(error, OSError) and not any(mark in text for mark in DISK_ERRORS):
            raise
        newest = newest_state(Path(output))
        raise OSError(
            f"output: {output}: cannot be written: {text} ({shutil.disk_usage(_existing(output)).free >> 20} MiB free)"
            + (f"; the last checkpoint, {newest.parent}, is whole: go on with --resume true" if newest else "")
        ) from error


def _is_put_aside(output: Path, resume: bool) -> bool:
    """Whether a run that begins in this folder finds something there that is worth keeping."""
    if resume and newest_state(output):
        return False
    return any((output / name).exists() for name in ("config.json", ADAPTER_CONFIG)) or bool(checkpoints(output))


def _put_aside(output: Path) -> None:
    """Rename the folder. Its adapters on bases inside it name them at the new place first: if the run is killed in
    between they name nothing, and never the next run's base.
    """
    aside = _aside(output)
    shutil.rmtree(aside, ignore_errors=True)
    for file in output.rglob(ADAPTER_CONFIG):
        config = read_json(file)
        base = Path(config.get("base_model_name_or_path") or "")
        if base.is_absolute() and output in base.parents:
            config["base_model_name_or_path"] = str(aside / base.relative_to(output))
            temporary = file.with_name(f".{file.name}")
            temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, file)
    (output / MARK).touch()
    try:
        output.rename(aside)
    except OSError as error:
        raise ValueError(f"output: {output}: the earlier run in it cannot be moved to {aside}: {error}") from error
    output.mkdir(exist_ok=True)
    move_lock(aside, output)
    for entry in aside.iterdir():  # data, notes, the log of a shell
        if not (is_model_file(entry.name) or entry.name in (*FILES, MARK, *PARTS)):
            entry.rename(output / entry.name)
    print(f"the earlier run in {output} is now in {aside}")


def _existing(path: str | Path) -> Path:
    return next(place for place in (Path(path).resolve(), *Path(path).resolve().parents) if place.exists())


def _aside(output: Path) -> Path:
    return output.with_name(f"{output.name}.previous")


def model_folders(model: str) -> Iterator[Path]:
    """The folder of a model and those of its adapters' bases; nothing for a hub id."""
    seen: set[Path] = set()
    while model and (path := Path(model).expanduser()).is_dir() and (folder := path.resolve()) not in seen:
        yield folder
        seen.add(folder)
        model = adapter_base(path) if is_adapter(path) else ""
