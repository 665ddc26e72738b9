"""Models on disk as ordinary Hugging Face folders: safetensors, config, tokenizer, adapter if
there is one.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import torch
import transformers

from fastrl.checks import NonFiniteError
from fastrl.folders import is_adapter
from fastrl.model_files import replacing
from fastrl.models.bottleneck import bottleneck_names, write_bottlenecks
from fastrl.models.heads import base_model
from fastrl.models.loading import quiet_transformers
from fastrl.models.score_heads import SCORE_FIELDS, SCORE_FILE
from fastrl.models.stopping import write_generation_config


def save_model(
    model: transformers.PreTrainedModel | peft.PeftModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: str | Path,
) -> Path:
    """Write model and tokenizer into `folder`, which transformers (or PEFT, for its adapters) loads without fastrl.

    The folder then holds this model alone, whole (`model_files.replacing`).

    Of a model with an adapter only that is written; a reward adapter's normalisation, which a full model has in its
    config.json, goes to fastrl_score.json (beside a config.json, transformers would take the folder for a full model).

    Raises:
        NonFiniteError: a trainable weight is NaN or infinite.
    """
    bad = [n for n, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if bad:
        raise NonFiniteError(f"save_model: {bad[0]} (of {len(bad)} weights) is not finite: {folder} left as it was")
    with replacing(folder) as staging, quiet_transformers():
        _write(model, tokenizer, staging)
    return Path(folder)


def save_merged_base(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    output: str | Path,
) -> None:
    """Give a model that was merged from an adapter folder a folder of its own, `output/base`;
    else do nothing.

    Call it before `tune`: the new adapter then names `output/base` as its base, so that
    plain PEFT loads it.
    """
    if not is_adapter(model.config._name_or_path):
        return
    folder = save_model(model, tokenizer, Path(output) / "base").resolve()
    model.config._name_or_path = model.name_or_path = str(folder)


def _write(
    model: transformers.PreTrainedModel | peft.PeftModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    staging: Path,
) -> None:
    if isinstance(model, peft.PeftModel):
        _name_base(model)
        model.save_pretrained(str(staging), save_embedding_layers=False)
        (staging / "README.md").unlink(missing_ok=True)  # a model card without content
    elif bottleneck_names(model):
        write_bottlenecks(model, staging)
    else:
        model.save_pretrained(staging)
    config = base_model(model).config
    score = {name: getattr(config, name) for name in SCORE_FIELDS if hasattr(config, name)}
    if score and is_adapter(staging):
        (staging / SCORE_FILE).write_text(json.dumps(score, indent=2) + "\n")
    tokenizer.save_pretrained(staging)
    if base_model(model).can_generate():
        write_generation_config(base_model(model), tokenizer, staging)


def _name_base(model: peft.PeftModel) -> None:
    """A base that is a folder is named by its whole path: the adapter then loads from any working directory."""
    for config in model.peft_config.values():
        base = config.base_model_name_or_path or base_model(model).name_or_path
        if base and Path(base).is_dir():
            config.base_model_name_or_path = str(Path(base).resolve())
