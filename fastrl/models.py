"""Models as the loops use them: loading, adapters, hidden states, heads, scores, log-probabilities.

Everything is an ordinary transformers or PEFT module; the functions here only reach the parts that
the fused ops need (the hidden states below a head and the head's weights), whatever wrapper is
around them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import peft
import torch
import transformers
from torch import Tensor, nn

from fastrl.folders import (
    ADAPTER_CONFIG,
    check_files,
    check_has_tokenizer,
    check_has_weights,
    find_base,
    read_config,
    read_json,
    reading,
)
from fastrl.heads import base_model, decoder, lm_head
from fastrl.merging import merge_adapter
from fastrl.scalars import CLASSIFIER, check_score_head, claims_score_head, saved_score, set_pad_token, with_scalar_head
from fastrl.weights import check_config, check_loaded, check_policy_adapter

KINDS = {
    transformers.AutoModelForCausalLM: (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, "a causal language model"),
    transformers.AutoModelForSequenceClassification: (
        transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        CLASSIFIER,
    ),
}
TRAIN_ONE = "train one with `fastrl reward`"
SCORE_FILE = "fastrl_score.json"
SCORE_FIELDS = ("fastrl_score_bias", "fastrl_score_mean", "fastrl_score_std")


class LoRASettings(NamedTuple):
    """Adapter shape; `target_modules`: "all-linear", or layer names (a tuple, or comma-separated)."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"


def default_device() -> str:
    """cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(device: str | torch.device) -> torch.device:
    """The named device.

    Raises:
        ValueError: there is no such kind of device, or torch sees no GPU.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu or cuda, got {device!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected cpu, got {found}: torch sees no GPU here; `fastrl doctor` says why")
    return found


def load_tokenizer(path: str | Path) -> transformers.PreTrainedTokenizerBase:
    """Tokenizer of a folder or hub id; where it has no pad token of its own, eos stands in for it.

    Raises:
        FileNotFoundError: path looks like a folder and does not exist.
        ValueError: the tokenizer has neither pad nor eos.
    """
    path = _existing(path)
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = _existing(adapter_base(path))
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
    """Causal LM of a folder or hub id, in eval mode; an adapter folder is loaded and merged into
    its base.

    `model.config._name_or_path` stays `path`, so that `checkpoint.save_merged_base` can tell
    a merged model.
    """
    path, device = _existing(path), usable_device(device)
    if not is_adapter(path):
        return _from_pretrained(transformers.AutoModelForCausalLM, path, dtype).to(device).eval()
    check_policy_adapter(path)
    base = load_policy(adapter_base(path), dtype=dtype, device=device)
    return _merged(base, path)


def load_scalar_model(
    path: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> transformers.PreTrainedModel:
    """Reward model of a folder or hub id, with its own head, which is fp32, and its score bias, in eval mode.

    An adapter folder is loaded and merged into its base, which may be a causal LM if the adapter brings the head.

    Raises:
        ValueError: there is no head, or it has more outputs than one.
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
    path: str | Path, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> transformers.PreTrainedModel:
    """What reward training starts from: a reward model as it is, or a causal LM's backbone with a fresh head.

    The head is N(0, 1 / sqrt(H + 1)), drawn from torch's global generator.
    """
    path = _existing(path)
    if claims_score_head(path):
        return load_scalar_model(path, dtype=dtype, device=device)
    return with_scalar_head(load_policy(path, dtype=dtype, device=device)).eval()


def is_adapter(path: str | Path) -> bool:
    """Whether path is a folder that holds a PEFT adapter."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def adapter_base(path: str | Path) -> str:
    """Folder or hub id of the model that an adapter folder was trained on."""
    base = _adapter_config(path).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{Path(path) / ADAPTER_CONFIG}: expected base_model_name_or_path to name the"
            " adapter's base model,"
            f" got {base!r}; write the base model's folder or hub id there"
        )
    return find_base(base, path)


def context_length(model: nn.Module) -> int | None:
    """Longest sequence the model was built for; None if its config does not say."""
    return getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)


def check_context(model: nn.Module, length: int, setting: str) -> None:
    """Raise ValueError if `setting` asks for sequences longer than the model's context."""
    context = context_length(model)
    if context is not None and length > context:
        raise ValueError(
            f"{setting}: expected at most {context} tokens, the model's context, got {length};"
            f" lower {setting}, or take a model with a longer context"
        )


def add_lora(model: transformers.PreTrainedModel, settings: LoRASettings) -> peft.PeftModel:
    """PEFT LoRA on a frozen model, on fastrl's fused layers; the scalar head of a reward model is
    trained whole.

    Adapters are drawn from torch's global generator: seed it first.

    Raises:
        ValueError: rank is not positive, or target_modules match no layer.
    """
    if settings.rank <= 0:
        raise ValueError(f"add_lora: rank: expected a positive integer, got {settings.rank}")
    import fastrl

    scalar = hasattr(model, "score")
    targets = _targets(settings)
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=["score"] if scalar else None,
    )
    adapted = peft.get_peft_model(model, config)
    fastrl.patch(adapted)
    return adapted


def check_lora(model: nn.Module, settings: LoRASettings) -> None:
    """Raise ValueError if a target names no layer of the model; `add_lora` would find out once files are written."""
    targets, names = _targets(settings), [name for name, _ in model.named_modules()]
    for target in () if isinstance(targets, str) else targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            layers = {
                name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
            }
            raise ValueError(
                f"lora_targets: expected all-linear or names of layers of {type(model).__name__}"
                f" ({', '.join(sorted(layers))}), got {target!r}"
            )


def _targets(settings: LoRASettings) -> str | tuple[str, ...]:
    targets = settings.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        return tuple(name.strip() for name in targets.split(","))
    return targets


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, T) position of each kept token among its row's kept tokens; 0 on padding, either side."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


@cache
def arguments(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the arguments that a function takes."""
    return frozenset(inspect.signature(function).parameters)


def final_hidden(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T, H) hidden states below the head, from the backbone alone; logits are never formed.

    Padding costs nothing, wherever it is: kept tokens are moved to the left, where a causal model needs no mask, and
    their hidden states are moved back. What a position that is not kept returns is unspecified.
    """
    backbone: Any = decoder(model)
    lengths = attention_mask.sum(-1)
    width = max(int(lengths.max()), 1)
    columns = torch.arange(width, device=input_ids.device)
    kept_first = attention_mask.logical_not().long().argsort(dim=-1, stable=True)[:, :width]
    compact = torch.where(columns < lengths[:, None], input_ids.gather(1, kept_first), 0)  # (B, W)
    inputs = {"input_ids": compact}
    if "position_ids" in arguments(type(backbone).forward):
        inputs["position_ids"] = columns.expand_as(compact)
    hidden = backbone(**inputs, use_cache=False).last_hidden_state
    places = position_ids(attention_mask)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, places)


def token_scores(scalar_model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T) fp32 output of the scalar head on every position, less the stored score bias."""
    return _scores(scalar_model, final_hidden(scalar_model, input_ids, attention_mask))


def last_token_scores(scalar_model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B,) fp32 score on each row's last kept token, on any padding side, with or without eos.

    As transformers' classifiers do, a token that is the config's pad token is passed over, so that a foreign reward
    model which was trained with pad == eos gives its own scores; ours have a pad token that ends no response.
    """
    hidden = final_hidden(scalar_model, input_ids, attention_mask)  # (B, T, H)
    config = base_model(scalar_model).config.get_text_config()
    kept, pad = attention_mask.bool(), getattr(config, "pad_token_id", None)
    if pad is not None:
        kept = kept & (input_ids != pad)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (columns * kept).argmax(-1)  # (B,)
    return _scores(scalar_model, hidden[torch.arange(len(last), device=last.device), last])


def response_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of the response, which is the last R columns of `input_ids` (B, P + R).

    `logprobs[b, t]` is of response token t, from the hidden state of the token before it; only
    positions kept by `response_mask` (B, R) reach the head.

    Returns:
        (B, R) fp32 nats, 0 where masked; with `return_entropy` also the entropies (B, R).
    """
    from fastrl.ops import linear_logprobs

    length = response_mask.shape[1]
    if length >= input_ids.shape[1]:
        raise ValueError(
            "response_logprobs: response_mask: expected fewer columns than input_ids (at"
            " least one prompt token),"
            f" got {tuple(response_mask.shape)} and {tuple(input_ids.shape)}"
        )
    start = input_ids.shape[1] - length
    hidden = final_hidden(model, input_ids, attention_mask)[:, start - 1 : -1]  # (B, R, H)
    head = lm_head(model)
    return linear_logprobs(
        hidden,
        head.weight,
        input_ids[:, start:],
        mask=response_mask,
        temperature=temperature,
        return_entropy=return_entropy,
        **head.options(),
    )


def _scores(scalar_model: nn.Module, hidden: Tensor) -> Tensor:
    base = base_model(scalar_model)
    head = cast(nn.Module, base.score)
    dtype = next(head.parameters()).dtype
    scores = head(hidden.to(dtype)).squeeze(-1).float()
    return scores - getattr(base.config, "fastrl_score_bias", 0.0)


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
    score, base_path = saved_score(path), _existing(adapter_base(path))
    if claims_score_head(base_path):
        base = load_scalar_model(base_path, dtype=dtype, device=device)
    elif score is None:
        raise ValueError(
            f"{path}: expected a reward model, got an adapter without a score head: adapter_model.safetensors has no"
            f" `score.weight`, and its base {base_path} is a language model; {TRAIN_ONE}"
        )
    else:
        base = with_scalar_head(load_policy(base_path, dtype=dtype, device=device))
    model: Any = _merged(base, path)
    if score is not None:
        model.score.weight.data = score.to(model.score.weight)
    if (Path(path) / "tokenizer_config.json").is_file():
        set_pad_token(model, load_tokenizer(path))
    score_file = Path(path) / SCORE_FILE
    for name, value in (read_json(score_file) if score_file.is_file() else {}).items():
        setattr(model.config, name, value)
    return model


def _merged(base: transformers.PreTrainedModel, path: str) -> transformers.PreTrainedModel:
    with quiet_transformers():
        return merge_adapter(base, path)


def _adapter_config(path: str | Path) -> dict[str, Any]:
    return read_json(Path(path) / ADAPTER_CONFIG)
