"""Models on disk as ordinary Hugging Face folders: safetensors, config, tokenizer, adapter if
there is one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import peft
import torch
import transformers

from fastrl.models import SCORE_FIELDS, SCORE_FILE, base_model, is_adapter, quiet_transformers
from fastrl.optim import NonFiniteError
from fastrl.rollout import write_generation_config


def save_model(
    model: transformers.PreTrainedModel | peft.PeftModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: str | Path,
) -> Path:
    """Write model and tokenizer into `folder`, which transformers (or PEFT, for an adapter) loads
    without fastrl.

    A killed save leaves what was there: files are written aside and moved into place. Of a PEFT
    model only the adapter is written; a reward adapter's normalisation, which a full model has in
    its config.json, goes to fastrl_score.json (beside a config.json, transformers would take the
    folder for a full model).

    Raises:
        NonFiniteError: a trainable weight is NaN or infinite.
    """
    bad = [n for n, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if bad:
        raise NonFiniteError(f"save_model: {bad[0]} (of {len(bad)} weights) is not finite: {folder} left as it was")
    folder = Path(folder)
    staging = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    with quiet_transformers():
        _write(model, tokenizer, staging)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(staging.iterdir()):
        os.replace(file, folder / file.name)
    staging.rmdir()
    return folder


def _write(
    model: transformers.PreTrainedModel | peft.PeftModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    staging: Path,
) -> None:
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(str(staging), save_embedding_layers=False)
        config = base_model(model).config
        score = {name: getattr(config, name) for name in SCORE_FIELDS if hasattr(config, name)}
        if score:
            (staging / SCORE_FILE).write_text(json.dumps(score, indent=2) + "\n")
    else:
        model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    if base_model(model).can_generate():
        write_generation_config(base_model(model), tokenizer, staging)


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


def save_merged_base(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    output: str | Path,
) -> None:
    """Give a model that was merged from an adapter folder a folder of its own, `output/base`;
    else do nothing.

    Call it before `add_lora`: the new adapter then names `output/base` as its base, so that
    plain PEFT loads it.
    """
    if not is_adapter(model.config._name_or_path):
        return
    folder = save_model(model, tokenizer, Path(output) / "base").resolve()
    model.config._name_or_path = model.name_or_path = str(folder)
