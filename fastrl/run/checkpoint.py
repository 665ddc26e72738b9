"""Checkpoints of a run: where they are, and which are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import transformers

from fastrl.models.saving import save_model


def checkpoints(output: str | Path) -> list[Path]:
    """Folders of the checkpoints under `output`, oldest first."""
    return sorted((Path(output) / "checkpoints").glob("step-*"))


def save_checkpoint(
    model: transformers.PreTrainedModel | peft.PeftModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    output: str | Path,
    step: int,
    *,
    keep: int = 2,
) -> Path:
    """Write `output/checkpoints/step-NNNNNN` (weights after `step` updates) and drop all but
    the newest `keep`.

    Call it once a finite loss of these weights is known, so that the newest checkpoint is always a
    good one.
    """
    folder = Path(output) / "checkpoints" / f"step-{step:06d}"
    save_model(model, tokenizer, folder)
    for old in checkpoints(output)[:-keep]:
        shutil.rmtree(old)
    return folder


def last_checkpoint(output: str | Path) -> Path | None:
    """Newest checkpoint under `output`; None if there is none."""
    found = checkpoints(output)
    return found[-1] if found else None
