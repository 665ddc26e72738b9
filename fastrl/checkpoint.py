"""Models on disk as ordinary Hugging Face folders: safetensors, config, tokenizer, adapter if
there is one.
"""

from __future__ import annotations

import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import peft
import torch
import transformers

from fastrl.folders import ADAPTER_CONFIG
from fastrl.models import SCORE_FIELDS, SCORE_FILE, base_model, is_adapter, quiet_transformers
from fastrl.optim import NonFiniteError
from fastrl.rollout import write_generation_config

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


def save_model(
    model: transformers.PreTrainedModel | peft.PeftModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: str | Path,
) -> Path:
    """Write model and tokenizer into `folder`, which transformers (or PEFT, for an adapter) loads
    without fastrl.

    The folder then holds this model alone: files of the model that was there go, whatever its kind; other files stay.
    Files are written aside, forced to disk and moved into place as a set. A killed save leaves the old model, the new
    one, or for a moment no config.json or adapter_config.json, without which nothing loads: never a mix.

    Of a PEFT model only the adapter is written; a reward adapter's normalisation, which a full model has in its
    config.json, goes to fastrl_score.json (beside a config.json, transformers would take the folder for a full model).

    Raises:
        NonFiniteError: a trainable weight is NaN or infinite.
    """
    bad = [n for n, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if bad:
        raise NonFiniteError(f"save_model: {bad[0]} (of {len(bad)} weights) is not finite: {folder} left as it was")
    place = Path(folder).resolve()
    is_new = not place.exists()
    staging = place.parent / f".{place.name}.partial" if is_new else place / ".partial"  # on the same file system
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    with quiet_transformers():
        _write(model, tokenizer, staging)
    for written in (*staging.rglob("*"), staging):
        _sync(written)
    if is_new:
        staging.rename(place)
        _sync(place.parent)
    else:
        _replace_model(staging, place)
    return Path(folder)


def is_model_file(name: str) -> bool:
    """Whether a file of that name in a model's folder belongs to the model, its tokenizer or a run's state."""
    return any(fnmatch(name, pattern) for pattern in MODEL_FILES)


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


def _write(
    model: transformers.PreTrainedModel | peft.PeftModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    staging: Path,
) -> None:
    if isinstance(model, peft.PeftModel):
        _name_base(model)
        model.save_pretrained(str(staging), save_embedding_layers=False)
        (staging / "README.md").unlink(missing_ok=True)  # a model card without content
        config = base_model(model).config
        score = {name: getattr(config, name) for name in SCORE_FIELDS if hasattr(config, name)}
        if score:
            (staging / SCORE_FILE).write_text(json.dumps(score, indent=2) + "\n")
    else:
        model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    if base_model(model).can_generate():
        write_generation_config(base_model(model), tokenizer, staging)


def _name_base(model: peft.PeftModel) -> None:
    """A base that is a folder is named by its whole path: the adapter then loads from any working directory."""
    for config in model.peft_config.values():
        base = config.base_model_name_or_path or base_model(model).name_or_path
        if base and Path(base).is_dir():
            config.base_model_name_or_path = str(Path(base).resolve())


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
