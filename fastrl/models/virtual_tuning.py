"""Virtual tokens as they are made, loaded, trained and tried, through PEFT; `virtual.py` puts them before the text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from fastrl.folders import adapter_weights, reading
from fastrl.models.heads import SCORE, base_model, decoder, lm_head
from fastrl.models.hidden import final_hidden
from fastrl.models.virtual import virtual_tokens

GOES_ON = {"PROMPT_TUNING": "prompt", "P_TUNING": "prompt", "PREFIX_TUNING": "prefix"}  # tuner of saved tokens
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of logits, as a share of their standard deviation


def add_virtual_tokens(model: Any, kind: str, count: int) -> peft.PeftModel:
    """PEFT's model around a frozen one, with virtual tokens that are trained; so is the score head of a reward model.

    They are drawn from torch's global generator: tokens of the vocabulary for "prompt", the keys and values of such
    tokens for "prefix", PEFT's network of random embeddings for "p-tuning".
    """
    options: dict[str, Any] = {
        "task_type": "SEQ_CLS" if hasattr(model, SCORE) else "CAUSAL_LM",
        "num_virtual_tokens": count,
    }
    if kind == "prefix":
        prefix = _keys_and_values(model, torch.randint(model.get_input_embeddings().weight.shape[0], (count,)))
        adapted: Any = peft.get_peft_model(model, peft.PrefixTuningConfig(**options))
        adapted.prompt_encoder["default"].load_prompt_embeddings(prefix)
        return adapted
    if kind == "prompt":
        return peft.get_peft_model(model, peft.PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **options))
    return peft.get_peft_model(model, peft.PromptEncoderConfig(**options))


def load_virtual_tokens(base: Any, path: str) -> peft.PeftModel:
    """PEFT's model of a folder, its virtual tokens as they were saved, in eval mode; nothing of it is trained yet.

    Raises:
        FileNotFoundError: there is no safetensors file.
        ValueError: the virtual tokens are of another base.
    """
    adapter_weights(path)
    with reading(path), torch.no_grad():
        config: Any = peft.PeftConfig.from_pretrained(path)
        config.base_model_name_or_path = base.name_or_path  # where it was found
        model = peft.PeftModel.from_pretrained(base, path, config=config).eval()
        text = torch.zeros(1, 2, dtype=torch.long, device=base.device)
        final_hidden(model, text, torch.ones_like(text))
    return model


def train_virtual_tokens(model: nn.Module) -> None:
    """Train the virtual tokens that a model was loaded with, and the score head of a reward model."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("prompt_encoder.") or f"{SCORE}.modules_to_save." in name)


@contextmanager
def without_virtual_tokens(model: peft.PeftModel) -> Iterator[None]:
    """Within, the model is the one below its virtual tokens, with the score head that it had.

    PEFT's own `disable_adapter` exchanges methods, which a reward model lacks, and leaves the trained head in place.
    """
    heads = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    model._adapters_disabled = True
    for head in heads:
        head.enable_adapters(False)
    try:
        yield
    finally:
        model._adapters_disabled = False
        for head in heads:
            head.enable_adapters(True)


@torch.no_grad()
def _keys_and_values(model: Any, tokens: Tensor) -> Tensor:
    """(n, layers * 2 * heads * head size) keys and values of n tokens, as PEFT's prefix encoder holds them."""
    cache = decoder(model)(input_ids=tokens[None].to(model.device), use_cache=True).past_key_values
    pairs = [x[0] for layer in cache.layers for x in (layer.keys, layer.values)]  # each (heads, n, head size)
    return torch.stack(pairs).permute(2, 0, 1, 3).flatten(1).float()


@torch.no_grad()
def try_virtual_tokens(model: Any, kind: str, count: int) -> None:
    """Raise ValueError unless virtual tokens do in fastrl's passes what they do in PEFT's, on a few tokens of text.

    Args:
        model: as it was loaded; tokens that it has are tried, else new ones, which are taken off again.
    """
    name, head = type(base_model(model)).__name__, getattr(base_model(model), SCORE, None)
    ids = torch.linspace(1, model.get_input_embeddings().weight.shape[0] - 2, 8, device=model.device).long()[None]
    try:
        with torch.random.fork_rng(devices=[]):
            trial: Any = model if virtual_tokens(model) else add_virtual_tokens(model, kind, count)
        hidden = final_hidden(trial, ids, torch.ones_like(ids))[0, -1:]
        want = None if head is not None else trial(input_ids=ids).logits[0, -1:].float()
    except Exception as error:  # whatever PEFT and transformers raise for a model that has no place for them
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(
            f"tuner: expected another than {kind} for {name}, got {type(error).__name__}: {reason}"
        ) from error
    finally:
        if head is not None:
            base_model(model).score = head  # PEFT has wrapped it
    if want is None:  # of a reward model; its backbone is what was tried
        return
    difference = (lm_head(trial).logits(hidden) - want).abs().max()
    allowed = TOLERANCE.get(model.dtype, 0.1) * want.std()
    if not difference <= allowed:
        raise ValueError(
            f"tuner: {kind}: expected PEFT's logits of {name} behind virtual tokens, within {allowed:.2g}, got a"
            f" difference of {difference:.2g}; take another tuner"
        )
