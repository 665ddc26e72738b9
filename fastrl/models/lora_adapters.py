"""LoRA adapters as a loop's settings ask for them, through PEFT, on fastrl's fused layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import peft
import transformers
from torch import nn

from fastrl.models.heads import SCORE
from fastrl.models.lora import patch


class LoRASettings(NamedTuple):
    """Adapter shape; `target_modules`: "all-linear", or layer names (a tuple, or comma-separated)."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"


def lora_settings(settings: Any) -> LoRASettings:
    """The adapters that a loop's settings (`run.settings.TunerSettings`) ask for."""
    alpha, dropout = settings.lora_alpha or 2 * settings.lora_rank, getattr(settings, "lora_dropout", 0.0)
    return LoRASettings(settings.lora_rank, alpha, dropout, settings.lora_targets)


def add_lora(model: transformers.PreTrainedModel, settings: LoRASettings) -> peft.PeftModel:
    """PEFT LoRA on a frozen model, on fastrl's fused layers; the score head of a reward model is trained whole.

    Adapters are drawn from torch's global generator: seed it first.

    Raises:
        ValueError: rank is not positive, or target_modules match no layer.
    """
    if settings.rank <= 0:
        raise ValueError(f"add_lora: rank: expected a positive integer, got {settings.rank}")
    scores = hasattr(model, SCORE)
    targets = _targets(settings)
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=[SCORE] if scores else None,
    )
    adapted = peft.get_peft_model(model, config)
    patch(adapted)
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
