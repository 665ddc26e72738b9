"""Bottleneck adapters: a small network after the attention and after the MLP of every layer, after Houlsby et al. 2019.

They are modules of the model itself, which stays an ordinary one otherwise. Being nonlinear they cannot be merged, and
PEFT has none: their folder looks like one of PEFT's adapters, but `load_policy` and `load_scalar_model` alone read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastrl.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_weights, read_json, reading
from fastrl.models.heads import SCORE, decoder

FORMAT = "FASTRL_BOTTLENECK"  # stands in the place of PEFT's peft_type
PREFIX = "base_model.model."  # of names in the file, as in PEFT's
PLACES = {"both": ("attention", "mlp"), "mlp": ("mlp",)}  # Houlsby et al. 2019; Pfeiffer et al. 2021
NAMES = {"attention": ("attention", "attn"), "mlp": ("mlp", "feedforward", "ffn", "moe")}  # parts of names of classes


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))), (..., H) -> (..., H). `up` starts at 0: a new one changes nothing."""

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(hidden, size), nn.Linear(size, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))

    def after(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        """Forward hook of the part of a layer that holds the adapter."""
        return (self(output[0]), *output[1:]) if isinstance(output, tuple) else self(output)


def add_bottlenecks(model: Any, size: int, places: str) -> None:
    """Give every layer its adapters, in place; drawn from torch's global generator.

    Args:
        size: width of the bottleneck.
        places: "both", after attention and MLP, or "mlp".
    """
    hidden = model.config.get_text_config().hidden_size
    for parts in layer_parts(model):
        for place in PLACES[places]:
            adapter = Bottleneck(hidden, size).to(model.device, model.dtype)
            parts[place].add_module("bottleneck", adapter)
            parts[place].register_forward_hook(adapter.after)
    model.fastrl_bottleneck = {"adapter_size": size, "adapter_places": places}


def layer_parts(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Attention and MLP of every layer.

    Raises:
        ValueError: the model's layers have no such parts.
    """
    found = []
    for module in decoder(model).modules():
        kinds = [(type(child).__name__.lower(), child) for child in module.children()]
        parts = {
            place: next((child for kind, child in kinds if any(name in kind for name in names)), None)
            for place, names in NAMES.items()
        }
        if None not in parts.values():
            found.append(parts)
    if not found:
        raise ValueError(
            f"tuner: expected another than adapter for {type(model).__name__}, whose layers have no attention and MLP"
            " as modules of their own; take lora or full"
        )
    return found  # type: ignore[return-value]


def bottleneck_names(model: nn.Module) -> list[str]:
    """Names of the adapters' parameters; [] if the model has none."""
    return [name for name, _ in model.named_parameters() if ".bottleneck." in name]


def write_bottlenecks(model: Any, folder: Path) -> None:
    """Write the adapters, the score head of a reward model, and the name of the base."""
    base, scores = model.name_or_path, hasattr(model, SCORE)
    config = {
        "peft_type": FORMAT,
        "task_type": "SEQ_CLS" if scores else "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).is_dir() else base,
        **model.fastrl_bottleneck,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    saved = {name for name, _ in model.named_parameters() if name.startswith(f"{SCORE}.")} | {*bottleneck_names(model)}
    weights = {PREFIX + name: x.detach().contiguous() for name, x in model.named_parameters() if name in saved}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_bottlenecks(base: Any, path: str) -> Any:
    """The base with the adapters of a folder, in place, in eval mode.

    Raises:
        FileNotFoundError: there is no safetensors file.
        ValueError: they are of another base.
    """
    config, weights = read_json(Path(path) / ADAPTER_CONFIG), load_file(adapter_weights(path))
    with reading(path):
        add_bottlenecks(base, config["adapter_size"], config["adapter_places"])
    _fill(base, {name.removeprefix(PREFIX): x for name, x in weights.items()}, path)
    return base.eval()


@torch.no_grad()
def _fill(model: Any, weights: Mapping[str, Tensor], path: str) -> None:
    parameters = dict(model.named_parameters())
    for name in (*bottleneck_names(model), *weights):
        here, there = (tuple(x[name].shape) if name in x else None for x in (parameters, weights))
        if here != there:
            raise ValueError(
                f"{path}: the adapter is of another base: {name} is {there} in its file, {here} in the model"
            )
        parameters[name].copy_(weights[name])
