"""The fused LoRA layer: PEFT's lora.Linear, computed by `fastrl.ops.lora_linear`."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from fastrl.checks import is_plain
from fastrl.ops.backend import transforming
from fastrl.ops.cpu_products import is_widened
from fastrl.ops.lora_linear import lora_linear, plain, prefers_plain, too_few_to_widen

# PEFT's LoRA layers on quantised weights, some of which are installed with their library alone.
QUANTISED = (
    "Linear8bitLt", "Linear4bit", "GPTQLoraLinear", "AwqLoraLinear", "AqlmLoraLinear", "EetqLoraLinear",
    "HqqLoraLinear", "IncLoraLinear", "TorchaoLoraLinear",
)  # fmt: skip

# Rows below which, on a CPU, PEFT's line costs less than the op's call and products: without and with gradients; and
# whether it multiplies bfloat16 faster than float32: else float32 adapters are best left so (benches/NOTES.md).
LINE_ROWS, LINE_TRAINING_ROWS = 96, 128
FAST_BFLOAT16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


class FusedLinear(Linear):
    """PEFT's lora.Linear with a fused forward; anything but one plain adapter on a plain input runs PEFT's own.

    To other code it is lora.Linear: by its name, and pickled, so that a pickle needs no fastrl (and is not fused).
    Parts are looked up in nn.Module's dictionaries: a decoded token passes hundreds of these layers, and each attribute
    that nn.Module.__getattr__ has to find costs 0.3 us.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = "" if args or kwargs else self.fusable_adapter()[0]
        if not (name and self._takes(x)):
            return super().forward(x, *args, **kwargs)
        parts: Any = self._modules
        base, dropout = parts["base_layer"]._parameters, parts["lora_dropout"]._modules[name]
        weight, bias, scaling = base["weight"], base["bias"], self.scaling[name]
        lora_a = parts["lora_A"]._modules[name]._parameters["weight"]
        lora_b = parts["lora_B"]._modules[name]._parameters["weight"]
        share = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        if _line_is_faster(x, lora_a, len(weight)):
            return _line(x, weight, bias, lora_a, lora_b, scaling, share)
        if not share and prefers_plain(x, len(weight)) and not torch.is_autocast_enabled("cuda"):
            return plain(x, weight, lora_a, lora_b, scaling, bias)
        return lora_linear(x, weight, lora_a, lora_b, scaling, bias=bias, dropout=share)

    def fusable_adapter(self) -> tuple[str, str]:
        """(the one active adapter, "") if `lora_linear` computes what PEFT would; else ("", the reason)."""
        if self.disable_adapters:
            return "", "adapters are disabled"
        if self.merged:
            return "", "adapters are merged"
        if not self.cast_input_dtype_enabled:
            return "", "PEFT's casts of inputs are off"
        parts: Any = self._modules
        adapters = parts["lora_A"]._modules
        names = [name for name in self.active_adapters if name in adapters]
        if len(names) != 1:
            return "", "several adapters are active" if names else "no adapter is active"
        name = names[0]
        if name in self.lora_variant:
            return "", type(self.lora_variant[name]).__name__
        lora_b, dropout = parts["lora_B"]._modules[name], parts["lora_dropout"]._modules[name]
        if not (_is_plain(parts["base_layer"]) and _is_plain(adapters[name]) and _is_plain(lora_b)):
            return "", "hooks or wrapped weights in its parts"
        if lora_b._parameters["bias"] is not None:
            return "", "lora_bias"
        if isinstance(self.scaling[name], torch.Tensor):
            return "", "its scaling is a tensor, for PEFT's hot swap"
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return "", f"its dropout is a {type(dropout).__name__}"
        return name, ""

    def _takes(self, x: torch.Tensor) -> bool:
        """Whether `lora_linear` takes such an input; under another dtype than the base's PEFT raises its own error."""
        weight = self._modules["base_layer"]._parameters["weight"]  # type: ignore[union-attr]
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):  # type: ignore[union-attr]
            return False
        return is_plain(x) and not transforming()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Protocol 2 and later take the object's own class alone.
        function, (_, *arguments), *state = super().__reduce_ex__(1)  # type: ignore[misc,str-unpack]
        return function, (Linear, *arguments), *state

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedLinear:
        copied = memo[id(self)] = FusedLinear.__new__(FusedLinear)
        copied.__setstate__(deepcopy(self.__dict__, memo))
        return copied


FusedLinear.__name__, FusedLinear.__qualname__, FusedLinear.__module__ = "Linear", "Linear", Linear.__module__


def why_not(layer: LoraLayer) -> str:
    """Why a LoRA layer cannot be a `FusedLinear`, whatever its adapters do; empty if it can."""
    if isinstance(layer, FusedLinear):
        return "fused already"
    kind = type(layer).__name__
    if kind in QUANTISED:
        return f"its base is quantised (lora.{kind})"
    if type(layer) is not Linear:
        return f"lora.{kind} is no plain lora.Linear"
    if type(layer.base_layer) is not nn.Linear:
        return f"its base layer is a {type(layer.base_layer).__name__}"
    return ""


def _line_is_faster(x: torch.Tensor, lora_a: torch.Tensor, outputs: int) -> bool:
    """Whether PEFT's line is the faster one. Measured on CPUs alone; who asks for a backend means the op."""
    if x.device.type != "cpu" or os.environ.get("FASTRL_BACKEND"):
        return False
    if is_widened(x.dtype):
        return too_few_to_widen(x, outputs)
    few = x.numel() < (LINE_TRAINING_ROWS if torch.is_grad_enabled() else LINE_ROWS) * x.shape[-1]
    widens = lora_a.dtype != x.dtype and not (x.dtype == torch.bfloat16 and FAST_BFLOAT16)
    return few or widens


def _line(x, weight, bias, lora_a, lora_b, scaling, dropout):
    """What PEFT's forward computes of these, to the bit, without the calls of its modules."""
    y = F.linear(x, weight, bias)
    z = x if x.dtype == lora_a.dtype else x.to(lora_a.dtype)
    if dropout:
        z = F.dropout(z, dropout)
    out = y + F.linear(F.linear(z, lora_a), lora_b) * scaling
    return out if out.dtype == y.dtype else out.to(y.dtype)


def _is_plain(linear: nn.Module) -> bool:
    """Whether calling the module is F.linear on its own parameters: no hooks, no tensor subclass."""
    return (
        type(linear) is nn.Linear
        and type(linear._parameters.get("weight")) in (nn.Parameter, torch.Tensor)  # functional_call puts tensors there
        and "forward" not in linear.__dict__
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and not (linear._backward_hooks or linear._backward_pre_hooks)
    )
