"""An adapter folded into its base: checked before, while and after, because a wrong merge computes without a word."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from fastrl.folders import ADAPTER_CONFIG, adapter_base, adapter_weights, is_adapter, read_json, reading
from fastrl.models.bottleneck import FORMAT as BOTTLENECK
from fastrl.models.virtual_tuning import GOES_ON as VIRTUAL

UNMERGEABLE = {kind: "its virtual tokens are no weights of the base" for kind in VIRTUAL}  # by peft_type
UNMERGEABLE[BOTTLENECK] = "its layers are not linear"
PREFIX = "base_model.model."  # of names in an adapter's file
TOLERANCE = {torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of outputs, as a share of the largest
PROBED = 8  # tokens

Shapes = dict[str, tuple[int, ...]]


def merge_adapter(base: transformers.PreTrainedModel, path: str) -> transformers.PreTrainedModel:
    """The base, changed in place, with the adapter of a folder merged into its weights; in eval mode.

    Embeddings get the rows that the adapter added; an output head that is tied to them becomes a weight of its own
    where the adapter changes one of the two.

    Raises:
        FileNotFoundError: the adapter has no safetensors file.
        ValueError: the adapter cannot be merged, is of another base, or the merged model's outputs on a few tokens
            differ from the adapter's by more than rounding.
    """
    model: Any = attach_adapter(base, path)
    _untie(base)
    want = _outputs(model)
    merged: Any = _fold(model, path)
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    _compare(_outputs(merged), want, merged.dtype, path)
    merged.config._name_or_path = merged.name_or_path = path
    return merged.eval()


def attach_adapter(base: transformers.PreTrainedModel, path: str, *, trained: bool = False) -> peft.PeftModel:
    """The base, changed in place, with the adapter of a folder on it as PEFT has it, in eval mode.

    Raises:
        FileNotFoundError: the adapter has no safetensors file.
        ValueError: the adapter cannot be merged, or is of another base.
    """
    file = adapter_weights(path)
    with reading(path):
        config = peft.PeftConfig.from_pretrained(path)
    _check_kind(config, base, path)
    shapes = _shapes(file)
    _check_layers(base, shapes, path)
    _add_tokens(base, shapes, bool(getattr(config, "ensure_weight_tying", False)), path)
    with _strict(path):
        return peft.PeftModel.from_pretrained(base, path, is_trainable=trained).eval()


def check_mergeable(path: str) -> None:
    """Raise ValueError if path is the folder of an adapter that is kept on its base, as it cannot be merged."""
    kind = kept_kind(path)
    if kind:
        raise ValueError(
            f"{path}: a {kind} adapter cannot be merged into a model: {UNMERGEABLE[kind]}; give its base,"
            f" {adapter_base(path)}, or an adapter of LoRA"
        )


def kept_kind(path: str) -> str:
    """peft_type of a folder's adapter if it is kept on its base, as it cannot be merged; else "".

    Raises:
        ValueError: the base of such an adapter is an adapter, too.
    """
    kind = str(read_json(Path(path) / ADAPTER_CONFIG).get("peft_type")) if is_adapter(path) else ""
    if kind not in UNMERGEABLE:
        return ""
    if is_adapter(adapter_base(path)):
        raise ValueError(
            f"{path}: a {kind} adapter needs a whole model as its base, got the adapter {adapter_base(path)};"
            " write that one with `fastrl export`, and its folder into adapter_config.json as the base"
        )
    return kind


def _fold(model: Any, path: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie")  # PEFT on what _untie has settled
            return model.merge_and_unload()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:  # PEFT's ways to say so
        raise ValueError(f"{path}: PEFT cannot merge this adapter: {_short(error)}; use it through PEFT") from error


def _check_kind(config: Any, base: nn.Module, path: str) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
        raise ValueError(
            f"{path}: expected an adapter that can be merged, got {kind}: its virtual tokens are no weights of the"
            " base; use the adapter through PEFT, or train one with LoRA"
        )
    if config.task_type == "SEQ_CLS" and not hasattr(base, "score"):
        raise ValueError(
            f"{path}: expected an adapter of a language model, got one of a reward model (task_type SEQ_CLS)"
        )


def _shapes(file: Path) -> Shapes:
    """Shape of each tensor in the file, by its name in the base."""
    with safe_open(file, framework="pt") as tensors:
        return {name.removeprefix(PREFIX): tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}


def _check_layers(base: nn.Module, shapes: Shapes, path: str) -> None:
    """Each layer that the file adapts must be one of the base: PEFT passes over the others."""
    modules = dict(base.named_modules())
    unknown = sorted({name.partition(".lora_")[0] for name in shapes if ".lora_" in name} - modules.keys())
    if unknown:
        raise ValueError(
            f"{path}: the adapter is of another base: it adapts {unknown[0]} (of {len(unknown)} such layers), which"
            f" {type(base).__name__} of {base.name_or_path} does not have; name its own base in adapter_config.json"
        )


def _add_tokens(base: Any, shapes: Shapes, tied_by_adapter: bool, path: str) -> None:
    """Give embedding and output head the rows that the adapter's have."""
    ends = {id(end) for end in (base.get_input_embeddings(), base.get_output_embeddings()) if end is not None}
    names = [name for name, module in base.named_modules() if id(module) in ends]
    whole = {name: shapes[file][0] for name in names for file in _whole_weight(name) if file in shapes}
    thin = [shapes[f"{name}.lora_embedding_A"][1] for name in names if f"{name}.lora_embedding_A" in shapes]
    thin += [shapes[f"{name}.lora_B.weight"][0] for name in names if f"{name}.lora_B.weight" in shapes]
    rows, has = max([*whole.values(), *thin], default=0), base.get_input_embeddings().weight.shape[0]
    if rows in (0, has):
        return
    lacking = [name for name in names if name not in whole]
    if lacking and not (tied_by_adapter and whole):
        raise ValueError(
            f"{path}: the adapter is of a model with {rows} tokens, its base {base.name_or_path} has {has}, and the"
            f" adapter does not bring the rows of {' and '.join(lacking)}; save it with save_embedding_layers=True,"
            " or name the resized model as its base"
        )
    base.resize_token_embeddings(rows, mean_resizing=False)


def _whole_weight(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.base_layer.weight"


@contextmanager
def _strict(path: str) -> Iterator[None]:
    """Errors where PEFT warns of weights that are missing, and in its own words where sizes differ."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            yield
        except UserWarning as warning:
            raise ValueError(
                f"{path}: the adapter is of another base, or its file is not whole: {_short(warning)}"
            ) from warning
        except RuntimeError as error:  # size mismatch
            if "size mismatch" not in str(error):
                raise
            mismatch = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line)
            raise ValueError(f"{path}: the adapter is of another base: {mismatch}") from error


def _untie(base: Any) -> None:
    """Give the output head a weight of its own if it shares the embedding's and the adapter changes one of them."""
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    if None in ends:
        return
    inner = [end.get_base_layer() if hasattr(end, "get_base_layer") else end for end in ends]
    inner = [getattr(end, "original_module", end) for end in inner]
    adapted = [end is not layer for end, layer in zip(ends, inner, strict=True)]
    if not any(adapted) or inner[0].weight is not inner[1].weight:
        return
    inner[1].weight = nn.Parameter(inner[1].weight.detach().clone(), requires_grad=False)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False


@torch.no_grad()
def _outputs(model: Any) -> Tensor:
    """Logits or scores of one short sequence, in float32."""
    inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    rows, dtype = inner.get_input_embeddings().weight.shape[0], inner.dtype
    ids = torch.linspace(1, rows - 2, PROBED, device=inner.device).long()[None]
    narrow = dtype in (torch.bfloat16, torch.float16)  # a float32 score head may stand on it
    with torch.autocast(inner.device.type, dtype=dtype if narrow else torch.bfloat16, enabled=narrow):
        return model(input_ids=ids).logits.float()


def _compare(got: Tensor, want: Tensor, dtype: torch.dtype, path: str) -> None:
    scale = max(1.0, float(want.abs().max()))
    difference, limit = float((got - want).abs().max()), TOLERANCE.get(dtype, 5e-4) * scale
    if not difference <= limit:
        raise ValueError(
            f"{path}: merging the adapter changes the model: outputs on {PROBED} tokens differ from the unmerged ones"
            f" by {difference:.3g}, expected at most {limit:.3g}; use the adapter through PEFT"
        )


def _short(error: object, length: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= length else text[:length] + "..."
