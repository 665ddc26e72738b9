"""Whether a folder holds the model that its config and its tokenizer speak of: checked at load, by names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open

from fastrl.folders import read_json
from fastrl.models.heads import base_model

SHOWN = 4  # names of weights in one message
LAYER = re.compile(r"\.(\d+)\.")
PLACEHOLDERS = ("image", "audio", "video")  # tokens of a processor, which text never holds


def check_config(path: str, config: Any, mapping: Any, kind: str) -> None:
    """Raise ValueError if transformers has no model of this kind for the config, or the config contradicts itself.

    `mapping` is one of transformers' tables from config classes to model classes; `kind` is what it holds, in words.
    """
    if type(config) not in mapping:
        raise ValueError(
            f"{path}: expected {kind}, got model_type {config.model_type!r}, for which transformers"
            f" {transformers.__version__} has none; choose a model of another family"
        )
    text = config.get_text_config()
    pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if pad is not None and rows is not None and pad >= rows:
        raise ValueError(
            f"{path}/config.json: pad_token_id: expected less than vocab_size, {rows}, got {pad}; set it to the id"
            " of the tokenizer's pad token, or to null"
        )


def check_loaded(path: str, model: Any, info: dict[str, Any]) -> None:
    """Raise ValueError for weights that are missing, unexpected or of another shape than the config says.

    `info` is the loading info of `from_pretrained`.
    """
    where = f"{path}: {type(model).__name__}"
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise ValueError(f"{where}: {_shape_mismatch(model, name, tuple(found), tuple(expected))}")
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if value_head := [name for name in unexpected if "v_head." in name]:
        raise ValueError(
            f"{where}: unexpected weights {_some(value_head)}: a value head as TRL's PPO saves it, which is neither a"
            " policy's nor a reward model's; save the policy inside it (model.pretrained_model.save_pretrained)"
        )
    if layers := _layer_mismatch(model.config.get_text_config(), missing, unexpected):
        raise ValueError(f"{path}/config.json: {layers}")
    if missing:
        raise ValueError(f"{where}: missing weights {_some(missing)}; expected the folder of a {type(model).__name__}")
    if unexpected:
        raise ValueError(
            f"{where}: unexpected weights {_some(unexpected)}: they would be left out, and the model would be another"
            " than the one saved; give the folder of the kind of model asked for"
        )


def check_policy_adapter(path: str | Path) -> None:
    """Raise ValueError if an adapter folder holds a head that no language model has."""
    names = weight_names(path)
    for head, owner in ((".score.", "a reward model"), ("v_head.", "TRL's PPO, a value head")):
        if found := [name for name in names if head in name]:
            raise ValueError(f"{path}: expected an adapter of a language model, got {_some(found)}: of {owner}")


def check_sizes(model: Any, tokenizer: Any, path: str | Path) -> None:
    """Raise ValueError if the tokenizer has ids for which the model `path` has no row, in its embedding or its head."""
    placeholders = {getattr(tokenizer, f"{kind}_token_id", None) for kind in PLACEHOLDERS}
    token, last = max(
        ((token, i) for token, i in tokenizer.get_vocab().items() if i not in placeholders), key=lambda pair: pair[1]
    )
    base = base_model(model)
    parts = {"embedding": base.get_input_embeddings(), "output head": base.get_output_embeddings()}
    for part, module in parts.items():
        rows = module.weight.shape[0] if getattr(module, "weight", None) is not None else last + 1
        if last >= rows:
            raise ValueError(
                f"{path}: tokenizer: expected at most {rows} tokens, the rows of the model's {part}, got {last + 1}"
                f" (the last is {token!r}): tokens were added without resizing the model; call"
                f" model.resize_token_embeddings({last + 1}) and save it, or take the tokenizer that belongs to it"
            )


def weight_names(path: str | Path) -> list[str]:
    """Names of the weights in a folder's safetensors files, from headers and index alone; [] if there are none."""
    folder = Path(path)
    names: list[str] = []
    for index in folder.glob("*.safetensors.index.json"):
        names += read_json(index)["weight_map"]
    if not names:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                names += tensors.keys()
    return names


def _shape_mismatch(model: Any, name: str, found: Sequence[int], expected: Sequence[int]) -> str:
    config = model.config.get_text_config()
    got = f"{name} is {found} in the file, {expected} by config.json"
    if len(found) == len(expected) == 2:
        if name.startswith("score.") and found[0] != expected[0]:
            return (
                f"config.json: num_labels: expected {found[0]} outputs, as the weights have, got {expected[0]}; {got}"
            )
        for field in ("vocab_size", "hidden_size", "intermediate_size"):
            size = getattr(config, field, None)
            for here, there in zip(found, expected, strict=True):
                if there == size and here != there:
                    return f"config.json: {field}: expected {here}, as the weights have, got {size}; {got}"
    return f"{got}; config and weights are not of one model"


def _layer_mismatch(config: Any, missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    count = getattr(config, "num_hidden_layers", None)
    wrong = [LAYER.search(name) for name in missing or unexpected]
    if not wrong or count is None or not all(wrong) or (missing and unexpected):
        return None
    indices = [int(match[1]) for match in wrong if match]
    found = min(indices) if missing else max(indices) + 1
    if (found < count) != bool(missing):
        return None  # parts of layers
    return f"num_hidden_layers: expected {found}, as the weights have, got {count}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
