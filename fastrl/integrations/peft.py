"""PEFT: LoRA layers computed by `fastrl.ops.lora_linear`, of a model that exists (`patch`) or is made (`register`)."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import dispatch_default
from torch import nn

from fastrl.models.fused_linear import FusedLinear, why_not
from fastrl.models.lora import Patch, check_peft, merged, patch

__all__ = ["FusedLinear", "Patch", "merged", "patch", "register"]


def register(config: LoraConfig) -> LoraConfig:
    """Has `peft.get_peft_model` make fused layers from the start, through PEFT's hook for custom modules.

        model = peft.get_peft_model(model, fastrl.integrations.peft.register(peft.LoraConfig(...)))

    The same layers as `fastrl.patch(model)` afterwards gives, and every other type as PEFT makes it: quantised ones,
    subclasses of `nn.Linear`, embeddings. PEFT does not save the registration, and a model that is loaded from the
    adapter has PEFT's layers; there is no undo, for which `patch` is the way. A pickled config names this module.

    Returns:
        The config itself.
    Raises:
        RuntimeError: this PEFT has no `LoraConfig._register_custom_module`, which is an experimental hook.
    """
    hook = getattr(config, "_register_custom_module", None)
    if hook is None:
        raise RuntimeError(
            "fastrl.integrations.peft.register: config: expected a peft.LoraConfig with _register_custom_module, "
            f"got a {type(config).__name__} without it; call fastrl.patch(model) after get_peft_model instead"
        )
    hook({nn.Linear: _fused})
    return config


def _fused(target: nn.Module, adapter_name: str, *, config: LoraConfig, **options: Any) -> nn.Module | None:
    """PEFT's default layer for a plain nn.Linear, fused; None leaves the target to PEFT's other dispatchers."""
    if type(target) is not nn.Linear or type(target.weight) is not nn.Parameter:  # a quantised one may look like it
        return None
    layer: Any = dispatch_default(target, adapter_name, config, **options)
    if not why_not(layer):
        check_peft(layer)
        layer.__class__ = FusedLinear
    return layer
