"""Checkpoints of a run: where they are, and which are kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from fastrl.model_files import replacing


def checkpoints(output: str | Path) -> list[Path]:
    """Folders of the checkpoints under `output`, oldest first."""
    return sorted((Path(output) / "checkpoints").glob("step-*"))


def save_checkpoint(write: Callable[[Path], object], output: str | Path, step: int, *, keep: int = 2) -> Path:
    """`output/checkpoints/step-NNNNNN` with what `write` writes into a folder: whole or not at all. Then all but the
    newest `keep` are dropped.
    """
    folder = Path(output) / "checkpoints" / f"step-{step:06d}"
    if folder.exists():  # one that was not whole
        shutil.rmtree(folder)
    with replacing(folder) as staging:
        write(staging)
    for old in checkpoints(output)[:-keep]:
        shutil.rmtree(old)
    return folder


def last_checkpoint(output: str | Path) -> Path | None:
    """Newest checkpoint under `output`; None if there is none."""
    found = checkpoints(output)
    return found[-1] if found else None
