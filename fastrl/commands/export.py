"""`fastrl export MODEL OUT`: an ordinary Hugging Face folder, with an adapter merged into its base.

Works for policies and reward models. The folder holds safetensors, config and tokenizer, and loads
with transformers alone; its README.md is a model card of what the run's files know.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastrl.folders import read_config
from fastrl.models import adapter_base, is_adapter, load_policy, load_scalar_model, load_tokenizer
from fastrl.models.merging import check_mergeable
from fastrl.models.saving import save_model
from fastrl.models.score_heads import claims_score_head
from fastrl.models.weights import check_sizes
from fastrl.run.card import model_card
from fastrl.run.output import model_folders

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str]) -> None:
    """Parse the arguments and export."""
    parser = argparse.ArgumentParser(
        prog="fastrl export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="model or adapter folder, or hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: that of the base)")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in a folder that is not empty")
    options = parser.parse_args(list(argv))
    folder = export(options.model, options.out, dtype=options.dtype, overwrite=options.overwrite)
    print(f"wrote {folder}")


def export(model: str, out: str | Path, *, dtype: str | None = None, overwrite: bool = False) -> Path:
    """Write `model`, merged if it is an adapter, to the folder `out`.

    The merge happens in float32; `dtype` (default: as stored in the base) is applied afterwards.

    Raises:
        ValueError: `out` is not empty and `overwrite` is False, or `out` holds `model` itself; the adapter cannot be
            merged.
    """
    model, folder = os.path.expanduser(model), Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"export: out: expected a folder, got the file {folder}")
    if folder.is_dir() and folder.resolve() in model_folders(model):
        raise ValueError(f"export: out: {folder} holds the model that is being read; name another folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"export: out: {folder} is not empty; name another folder or give --overwrite")

    check_mergeable(model)
    tokenizer = load_tokenizer(model)
    is_scalar = claims_score_head(model)
    load = load_scalar_model if is_scalar else load_policy
    merged: Any = load(model, dtype="float32")
    check_sizes(merged, tokenizer, model)
    merged = merged.to(DTYPES[dtype] if dtype else stored_dtype(model))
    save_model(merged, tokenizer, folder)
    write_card(model, folder, task="text-classification" if is_scalar else "text-generation")
    return folder


def write_card(model: str, folder: Path, *, task: str) -> None:
    """The model card, README.md; one that is there already is the user's and stays."""
    path = folder / "README.md"
    if path.exists():
        print(f"{path} is left as it is")
        return
    path.write_text(model_card(model, task=task), encoding="utf-8")


def stored_dtype(path: str) -> torch.dtype:
    """dtype of the stored weights, of the base for an adapter; float32 if the config does not say."""
    if is_adapter(path):
        return stored_dtype(adapter_base(path))
    return read_config(path).dtype or torch.float32
