"""The files of a model's folder: their names, and how a new model takes the place of an old one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from fastrl.folders import ADAPTER_CONFIG

CONFIGS = {"config.json", ADAPTER_CONFIG}  # a folder without either loads nowhere
MODEL_FILES = (
    *sorted(CONFIGS),
    "generation_config.json",
    "fastrl_*.json",
    "training_state.pt",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin*",
    "adapter_model.bin",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
)


def is_model_file(name: str) -> bool:
    """Whether a file of that name in a model's folder belongs to the model, its tokenizer or a run's state."""
    return any(fnmatch(name, pattern) for pattern in MODEL_FILES)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """An empty folder to write a model into, which then becomes the model in `folder`.

    Files of the model that was there go, whatever its kind; other files stay. What was written aside is forced to disk
    and moved into place as a set. A killed process leaves the old model, the new one, or for a moment no config.json or
    adapter_config.json, without which nothing loads: never a mix.
    """
    place = Path(folder).resolve()
    is_new = not place.exists()
    staging = place.parent / f".{place.name}.partial" if is_new else place / ".partial"  # on the same file system
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    except Exception:  # a full disk gets its space back
        shutil.rmtree(staging, ignore_errors=True)
        raise
    for written in (*staging.rglob("*"), staging):
        _sync(written)
    if is_new:
        staging.rename(place)
        _sync(place.parent)
    else:
        _replace_model(staging, place)


def _replace_model(staging: Path, folder: Path) -> None:
    """Exchange the model in `folder` for the one in `staging`. The files without which nothing loads go first and come
    last.
    """
    old = {file.name for file in folder.iterdir() if is_model_file(file.name)}
    new = {file.name for file in staging.iterdir()}
    for name in old & CONFIGS:
        (folder / name).unlink()
    _sync(folder)
    for name in old - new - CONFIGS:
        (folder / name).unlink()
    for names in (new - CONFIGS, new & CONFIGS):
        for name in sorted(names):
            os.replace(staging / name, folder / name)
        _sync(folder)
    staging.rmdir()


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
