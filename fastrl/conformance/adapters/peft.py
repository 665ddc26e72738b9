"""PEFT's LoRA layer on an nn.Linear, given the tensors of a case in place of its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastrl.conformance.adapter import PARTS, Adapter
from fastrl.conformance.adapters import installed

LAYERS: dict[tuple[Any, ...], nn.Module] = {}  # made once for each kind, so that torch.compile sees the forward alone


def adapters() -> list[Adapter]:
    absent = {part: "adapters alone" for part in PARTS if part != "lora_linear"}
    return [Adapter("PEFT", installed("peft", "0.21.2"), lora_linear=lora_linear, absent=absent)]


def lora_linear(x, weight, lora_a, lora_b, scaling, *, bias=None, dropout=0.0) -> Tensor:
    key = (weight.shape, weight.dtype, lora_a.shape, lora_a.dtype, scaling, bias is None, dropout)
    if key not in LAYERS:
        LAYERS[key] = _layer(weight, lora_a, scaling, bias is not None, dropout)
    tensors = {"base_layer.weight": weight, "lora_A.default.weight": lora_a, "lora_B.default.weight": lora_b}
    if bias is not None:
        tensors["base_layer.bias"] = bias
    return functional_call(LAYERS[key], tensors, x)


def _layer(weight: Tensor, lora_a: Tensor, scaling: float, bias: bool, dropout: float) -> nn.Module:
    from peft.tuners.lora import Linear, LoraConfig

    rank, columns = lora_a.shape
    config = LoraConfig(r=rank, lora_dropout=dropout)
    with torch.random.fork_rng():  # dropout draws what it would draw without the initialisation
        base = nn.Linear(columns, len(weight), bias=bias, dtype=weight.dtype)
        layer = Linear(base, "default", config=config, r=rank, lora_alpha=scaling * rank)  # type: ignore[arg-type]
    for part in (layer.lora_A, layer.lora_B):
        part.to(lora_a.dtype)
    return layer.train()
