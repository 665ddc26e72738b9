"""Score heads as they are made, saved and found: the layer `score` makes a reward model or a critic of a backbone.

Such models are ordinary sequence classifiers of transformers with one label a criterion, most often one alone, as TRL's
reward models are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from fastrl.data.templates import end_token_id
from fastrl.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_config, read_json
from fastrl.models.heads import score_head
from fastrl.models.weights import check_config, weight_names

CLASSIFIER = "a model with a sequence classification class, which reward models and critics are"
SCORE_FILE = "fastrl_score.json"  # beside an adapter: what a full model has in its config.json
SCORE_FIELDS = ("fastrl_score_bias", "fastrl_score_mean", "fastrl_score_std", "fastrl_score_names")


def claims_score_head(path: str) -> bool:
    """Whether a model or adapter folder, or hub id, is a reward model's: by its config, or by its weights.

    An adapter is one if its task says so or if it saved a head; a full model if its config names a sequence classifier
    or, where the config names nothing, if there is a head among its weights.
    """
    adapter = Path(path) / ADAPTER_CONFIG
    if adapter.is_file():
        return read_json(adapter).get("task_type") == "SEQ_CLS" or saved_score(path) is not None
    names = read_config(path).architectures
    if names:
        return any(name.endswith("ForSequenceClassification") for name in names)
    return "score.weight" in weight_names(path)


def saved_score(adapter: str | Path) -> Tensor | None:
    """(C, H) weight of the head that an adapter folder brings; None if it brings none.

    Raises:
        ValueError: the head has more outputs than names.
    """
    file = Path(adapter) / ADAPTER_WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; save the adapter as safetensors")
    with safe_open(file, "pt") as tensors:
        name = next((key for key in tensors.keys() if key.endswith(".score.weight")), None)
        weight = tensors.get_tensor(name) if name else None
    if weight is not None:
        _check_outputs(len(weight), read_score_fields(adapter).get("fastrl_score_names"), f"{file}: {name}")
    return weight


def read_score_fields(adapter: str | Path) -> dict[str, Any]:
    """What an adapter folder says of its criteria, as a full model's config does; {} if nothing."""
    file = Path(adapter) / SCORE_FILE
    return read_json(file) if file.is_file() else {}


def check_score_head(model: Any, path: str) -> None:
    """Raise ValueError unless the model has a linear head `score` with one output, or one a name of its criteria."""
    head = getattr(model, "score", None)
    head = getattr(head, "original_module", head)  # as PEFT keeps it beside virtual tokens
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{path}: expected a {type(model).__name__} with a linear head `score`, got none; choose a causal"
            " (decoder-only) model"
        )
    names = getattr(model.config, "fastrl_score_names", None)
    _check_outputs(head.out_features, names, f"{path}: config.json: num_labels")


def check_criteria(model: Any, criteria: Sequence[str], path: str | Path) -> None:
    """Raise ValueError if a model scores several criteria, and not all of these; a model of one score takes any."""
    names = score_head(model).names
    unknown = sorted(set(criteria) - set(names))
    if len(names) > 1 and unknown:
        raise ValueError(
            f"{path}: criterion: expected some of those that the model scores, {', '.join(names)}, got"
            f" {', '.join(unknown)}; rename them in the data, or start from a model without a score head"
        )


def with_scalar_head(
    policy: transformers.PreTrainedModel, criteria: Sequence[str] = ()
) -> transformers.PreTrainedModel:
    """The classifier of the policy's family around the policy's own backbone, with a fresh head `score`.

    It has one output, or one for each of several named criteria.
    """
    path = policy.config._name_or_path
    config = copy.deepcopy(policy.config)
    config.num_labels = outputs = max(len(criteria), 1)
    if len(criteria) > 1:
        config.fastrl_score_names = list(criteria)
        config.id2label = dict(enumerate(criteria))
        config.label2id = {name: i for i, name in enumerate(criteria)}
    check_config(path, config, transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, CLASSIFIER)
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    backbone = getattr(policy, policy.base_model_prefix, None)
    if type(getattr(model, model.base_model_prefix, None)) is not type(backbone):
        raise ValueError(
            f"{path}: {type(model).__name__}: expected the backbone of {type(policy).__name__}, got another;"
            " no reward model can be made of this family"
        )
    setattr(model, model.base_model_prefix, backbone)
    check_score_head(model, path)
    model.score = fresh_scalar_head(model.score.in_features, outputs).to(policy.device)
    model.config._name_or_path = model.name_or_path = path
    return model


def fresh_scalar_head(hidden_size: int, outputs: int = 1) -> nn.Linear:
    """Linear(hidden_size, outputs) without bias, fp32, N(0, 1 / sqrt(hidden_size + 1)) after Ziegler et al. 2019."""
    head = nn.Linear(hidden_size, outputs, bias=False, dtype=torch.float32)
    nn.init.normal_(head.weight, std=(hidden_size + 1) ** -0.5)
    return head


def pad_apart(tokenizer: Any, template: str = "auto") -> None:
    """Give the tokenizer a pad token that ends no response, if it shares eos or the end of turn.

    transformers' classifiers score the last token that is not a pad token: with a shared one they would skip the end.
    Taken is unk or bos, else another special token, else the last of the vocabulary.
    """
    ends = {tokenizer.eos_token_id, end_token_id(tokenizer, template)}
    if tokenizer.pad_token_id not in ends:
        return
    vocab = tokenizer.get_vocab()
    others = [tokenizer.unk_token_id, tokenizer.bos_token_id, *sorted(tokenizer.added_tokens_decoder)]
    others += sorted(vocab.values(), reverse=True)
    pad = next(i for i in others if i is not None and i not in ends)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)


def set_pad_token(model: Any, tokenizer: Any) -> None:
    """Write the tokenizer's pad token into the config, where transformers' classifiers look for it."""
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def _check_outputs(outputs: int, names: Any, where: str) -> None:
    """Raise ValueError unless there is one output, or one for each of several different names."""
    if names is not None:
        if not isinstance(names, list) or len(names) != outputs or len(set(map(str, names))) != outputs:
            raise ValueError(f"{where}: {outputs} outputs, expected one for each of fastrl_score_names, got {names!r}")
    elif outputs != 1:
        raise ValueError(
            f"{where}: {outputs} outputs, expected 1: a reward model gives one score, or one for each criterion that"
            " fastrl_score_names names; a classifier over several labels is none: train one with `fastrl reward`, or"
            " save it with num_labels=1"
        )
