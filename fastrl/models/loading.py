"""Models and tokenizers of folders and hub ids, checked; an adapter folder is merged into its base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from fastrl.devices import usable_device
from fastrl.folders import (
    adapter_base,
    check_files,
    check_has_tokenizer,
    check_has_weights,
    is_adapter,
    read_config,
    reading,
)
from fastrl.models.bottleneck import FORMAT as BOTTLENECK
from fastrl.models.bottleneck import load_bottlenecks
from fastrl.models.heads import base_model
from fastrl.models.merging import check_mergeable, kept_kind, merge_adapter
from fastrl.models.score_heads import (
    CLASSIFIER,
    check_criteria,
    check_score_head,
    claims_score_head,
    read_score_fields,
    saved_score,
    set_pad_token,
    with_scalar_head,
)
from fastrl.models.tuners import TunerSettings, coming_tokens
from fastrl.models.virtual import virtual_tokens
from fastrl.models.virtual_tuning import load_virtual_tokens
from fastrl.models.weights import check_config, check_loaded, check_policy_adapter

KINDS = {
    transformers.AutoModelForCausalLM: (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, "a causal language model"),
    transformers.AutoModelForSequenceClassification: (
        transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        CLASSIFIER,
    ),
}
TRAIN_ONE = "train one with `fastrl reward`"


def load_tokenizer(path: str | Path) -> transformers.PreTrainedTokenizerBase:
    """Tokenizer of a folder or hub id; of its base where an adapter folder has none.

    Where it has no pad token of its own, eos stands in for it.

    Raises:
        FileNotFoundError: path looks like a folder and does not exist.
        ValueError: the tokenizer has neither pad nor eos.
    """
    path = _existing(path)
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        return load_tokenizer(adapter_base(path))
    if Path(path).is_dir():
        check_has_tokenizer(Path(path))
    with reading(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {path}: expected a pad token or an eos token, got neither;"
                " set pad_token or eos_token in the folder's tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    path: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> transformers.PreTrainedModel:
    """Causal LM of a folder or hub id, in eval mode; an adapter folder is loaded and merged into its base.

    `model.config._name_or_path` stays `path`, so that `saving.save_merged_base` can tell a merged model. An adapter
    that cannot be merged (`merging.UNMERGEABLE`) is kept on its base: `tuners.kept_tuner` goes on with it.
    """
    path, device = _existing(path), usable_device(device)
    if not is_adapter(path):
        return _from_pretrained(transformers.AutoModelForCausalLM, path, dtype).to(device).eval()
    check_policy_adapter(path)
    base = load_policy(adapter_base(path), dtype=dtype, device=device)
    return _with_adapter(base, path)


def load_scalar_model(
    path: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> transformers.PreTrainedModel:
    """Reward model of a folder or hub id, with its own head, which is fp32, and its score bias, in eval mode.

    The head has one output, or one for each criterion that `fastrl_score_names` names (`heads.ScoreHead`).

    An adapter folder is loaded and merged into its base, which may be a causal LM if the adapter brings the head.

    Raises:
        ValueError: there is no head, or it has more outputs than names.
    """
    path, device = _existing(path), usable_device(device)
    if is_adapter(path):
        model = _scalar_adapter(path, dtype, device)
    elif claims_score_head(path):
        model = _from_pretrained(transformers.AutoModelForSequenceClassification, path, dtype).to(device)
    else:
        raise ValueError(f"{path}: expected a reward model, got a language model without a score head; {TRAIN_ONE}")
    check_score_head(model, path)
    model.score.float()
    return model.eval()


def start_scalar_model(
    path: str | Path,
    criteria: Sequence[str] = (),
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
) -> transformers.PreTrainedModel:
    """What reward training on these criteria starts from: a reward model as it is, or a causal LM's backbone with a
    fresh head, which has one score, or one for each of several criteria.

    The head is N(0, 1 / sqrt(H + 1)), drawn from torch's global generator.

    Raises:
        ValueError: the reward model scores several criteria, and there are others; a language model's adapter that
            cannot be merged.
    """
    path = _existing(path)
    if claims_score_head(path):
        model = load_scalar_model(path, dtype=dtype, device=device)
        check_criteria(model, criteria, path)
        return model
    check_mergeable(path)
    return with_scalar_head(load_policy(path, dtype=dtype, device=device), criteria).eval()


def context_length(model: nn.Module, settings: TunerSettings | None = None) -> int | None:
    """Longest sequence the model was built for, less its virtual tokens and, with a loop's settings, those that `tune`
    will add; None if its config does not say.
    """
    context = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
    return None if context is None else context - _virtual_tokens(model, settings)


def check_context(model: nn.Module, length: int, setting: str, settings: TunerSettings | None = None) -> None:
    """Raise ValueError if `setting` asks for sequences longer than the model's context; see `context_length`."""
    context, virtual = context_length(model, settings), _virtual_tokens(model, settings)
    if context is not None and length > context:
        less = f" less {virtual} virtual tokens" if virtual else ""
        raise ValueError(
            f"{setting}: expected at most {context} tokens, the model's context{less}, got {length};"
            f" lower {setting}, or take a model with a longer context"
        )


def _virtual_tokens(model: nn.Module, settings: TunerSettings | None) -> int:
    return virtual_tokens(model) + (coming_tokens(model, settings) if settings else 0)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load report and bars; what they would say is checked or expected by the caller."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """torch.dtype of "float32" or "bfloat16"; a torch.dtype is returned as it is."""
    if isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ValueError(f"dtype: expected one of {', '.join(known)}, got {dtype!r}")
    return known[dtype]


def _existing(path: str | Path) -> str:
    """path as text; a path that is written as one must be a folder (else it is taken for a hub id)."""
    looks_local = isinstance(path, Path) or str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise FileNotFoundError(f"model folder {path}: not found; give a folder in Hugging Face format or a hub id")
    path = str(Path(path).expanduser()) if looks_local else str(path)
    if Path(path).is_dir():
        check_files(Path(path))
    return path


def _from_pretrained(auto_class: Any, path: str, dtype: str | torch.dtype) -> Any:
    if Path(path).is_dir():
        check_has_weights(Path(path))
    with quiet_transformers():
        config = read_config(path)
        check_config(path, config, *KINDS[auto_class])
        with reading(path):
            model, info = auto_class.from_pretrained(
                path,
                config=config,
                dtype=torch_dtype(dtype),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_loaded names them
            )
    if getattr(model, "peft_config", None):
        raise ValueError(f"{path}: expected a model, got an adapter on the hub; download it and give its folder")
    check_loaded(path, model, info)
    return model


def _scalar_adapter(path: str, dtype: str | torch.dtype, device: torch.device) -> Any:
    """Base and adapter merged; the head is the adapter's own where it brings one, else the base's."""
    fields, score, base_path = read_score_fields(path), saved_score(path), _existing(adapter_base(path))
    if claims_score_head(base_path):
        base = load_scalar_model(base_path, dtype=dtype, device=device)
    elif score is None:
        raise ValueError(
            f"{path}: expected a reward model, got an adapter without a score head: adapter_model.safetensors has no"
            f" `score.weight`, and its base {base_path} is a language model; {TRAIN_ONE}"
        )
    else:
        policy = load_policy(base_path, dtype=dtype, device=device)
        base = with_scalar_head(policy, fields.get("fastrl_score_names", ()))
    model: Any = _with_adapter(base, path)
    restore_head(model, path)
    return model


def restore_head(model: Any, path: str) -> None:
    """Give a classifier the head that an adapter folder brings, and what it says of its criteria and pad token."""
    score = saved_score(path)
    if score is not None:
        model.score.weight.data = score.to(model.score.weight)
    if (Path(path) / "tokenizer_config.json").is_file():
        set_pad_token(model, load_tokenizer(path))
    for name, value in read_score_fields(path).items():
        setattr(model.config, name, value)


def _with_adapter(base: transformers.PreTrainedModel, path: str) -> Any:
    """The base with an adapter merged into it or, if that cannot be, kept on it."""
    with quiet_transformers():
        kind = kept_kind(path)
        if kind == BOTTLENECK:
            return load_bottlenecks(base, path)
        if kind:
            return load_virtual_tokens(base, path)
        return merge_adapter(base, path)
