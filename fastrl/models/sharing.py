"""One set of base weights for two models: a reward model's adapter on the weights of a policy that is loaded already.

Each model has modules of its own, so that no adapter of one is ever active in the other; the frozen parameters of both
are the same objects.
"""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import safe_open
from torch import nn

from fastrl.folders import ADAPTER_CONFIG, adapter_base, is_adapter, read_config, read_json
from fastrl.models.loading import quiet_transformers, restore_head
from fastrl.models.lora import patch
from fastrl.models.merging import attach_adapter
from fastrl.models.score_heads import read_score_fields, saved_score, with_scalar_head
from fastrl.models.weights import weight_names

HOW = "take --critic separate"
PLAIN = (".lora_A.", ".lora_B.", ".score.")  # parts of the names of what an adapter may hold
# Fields of configs that change no hidden state, beside those that begin with fastrl_.
WITHOUT_EFFECT = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "return_dict"),
    *("id2label", "label2id", "num_labels", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("tie_word_embeddings", "output_hidden_states", "output_attentions"),
}


def load_scalar_adapter(path: str, policy: transformers.PreTrainedModel) -> peft.PeftModel:
    """Reward model of a LoRA adapter's folder on a policy's own weights, not merged, in eval mode.

    Adapter and head are trained, all else is the policy's and frozen, which the policy's must then be, too. Whoever
    changes the policy's weights, as `merged` does for a while, changes them for both.

    Raises:
        ValueError: the folder is no plain LoRA adapter with a score head, or is of a base with other weights.
    """
    _check_plain(path)
    _check_base(path, policy)
    names = read_score_fields(path).get("fastrl_score_names", ())
    model = with_scalar_head(_sharing_weights(policy), names)
    restore_head(model, path)
    with quiet_transformers():
        adapted = attach_adapter(model, path, trained=True)
    if any(getattr(module, "lora_variant", None) for module in adapted.modules()):
        _refuse(path, "an adapter of plain LoRA on linear layers", "another variant of LoRA")
    adapted.active_peft_config.base_model_name_or_path = None  # saved as an adapter of what the policy is one of
    patch(adapted)
    return adapted


def share_name(model: nn.Module, policy: transformers.PreTrainedModel) -> None:
    """Name the policy's folder as the base of a model that `load_scalar_adapter` gave; call it when it has moved."""
    inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    inner.config._name_or_path = inner.name_or_path = policy.name_or_path


def first_difference(model: transformers.PreTrainedModel, folder: str | Path) -> str:
    """Name of a weight of the model's backbone that the folder's safetensors do not hold with the same values, in the
    model's dtype; "" if there is none. One weight is read at a time.
    """
    prefix = f"{model.base_model_prefix}."
    weights = {name: weight for name, weight in model.state_dict().items() if name.startswith(prefix)}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in sorted(weights.keys() & stored.keys()):
                weight = weights.pop(name)
                if not torch.equal(stored.get_tensor(name).to(weight), weight):
                    return name
    return min(weights, default="")


def _sharing_weights(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A copy of the modules, with the parameters and buffers of the model itself."""
    own = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, own)


def _check_plain(path: str) -> None:
    """Raise ValueError unless the folder holds a LoRA adapter that leaves its base as it is, and a score head."""
    if not is_adapter(path):
        _refuse(path, "a reward model that is a LoRA adapter", "a full model with weights of its own")
    config = read_json(Path(path) / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        _refuse(path, "a reward model that is a LoRA adapter", f"an adapter of {config.get('peft_type')}")
    if saved_score(path) is None:
        _refuse(path, "an adapter with a score head", "none: adapter_model.safetensors has no `score.weight`")
    other = next((name for name in sorted(weight_names(path)) if not any(part in name for part in PLAIN)), None)
    if other:
        _refuse(path, "an adapter of plain LoRA on linear layers", f"{other}, which changes more of its base")
    start = config.get("init_lora_weights", True)
    if start not in (True, False, "gaussian") or config.get("layer_replication"):
        _refuse(path, "an adapter that leaves its base as it is", f"init_lora_weights {start!r} or layer_replication")


def _check_base(path: str, policy: transformers.PreTrainedModel) -> None:
    """Raise ValueError unless the adapter's base has the weights of the policy's backbone, and computes the same."""
    base, own = adapter_base(path), str(policy.name_or_path)
    if base == own or (Path(base).is_dir() and Path(base).resolve() == Path(own).resolve()):
        return
    if is_adapter(base) or not Path(base).is_dir():
        _refuse(path, f"an adapter on the policy {own}", f"one on {base}, whose weights cannot be compared")
    settings, theirs = _settings(policy.config), _settings(read_config(base))
    changed = sorted(name for name in settings.keys() | theirs.keys() if settings.get(name) != theirs.get(name))
    if changed:
        _refuse(path, f"an adapter on the policy {own}", f"one on {base}, whose config has another {changed[0]}")
    name = first_difference(policy, base)
    if name:
        _refuse(path, f"an adapter on the weights of the policy {own}", f"one on {base}, which differs in {name}")


def _settings(config: Any) -> dict[str, Any]:
    fields = config.get_text_config().to_dict()
    return {name: fields[name] for name in fields if name not in WITHOUT_EFFECT and not name.startswith("fastrl_")}


def _refuse(path: str, expected: str, got: str) -> None:
    raise ValueError(f"critic: shared: {path}: expected {expected}, got {got}; {HOW}")
