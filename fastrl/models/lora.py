"""`fastrl.patch` for LoRA: PEFT's layers of an existing model become fused ones, and how they come back."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import peft
import torch
from packaging.version import Version
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from fastrl.models.fused_linear import FusedLinear, why_not

if TYPE_CHECKING:
    from fastrl.models.head_patch import HeadPatch

TESTED = ("0.20", "0.22")  # PEFT, from and up to but not including
# What FusedLinear reads of PEFT's layer.
PARTS = (
    "base_layer", "lora_A", "lora_B", "lora_dropout", "lora_variant", "scaling", "active_adapters", "disable_adapters",
    "merged", "cast_input_dtype_enabled",
)  # fmt: skip


class Patch:
    """What `patch` did: `layers` (names of the fused layers), `skipped` (name -> reason), `head`, `summary()` and
    `undo()`.

    Also a context manager that undoes on exit.
    """

    head: HeadPatch | None = None  # of `fastrl.patch(model, head=True)`

    def __init__(self, modules: dict[str, FusedLinear], skipped: dict[str, str]) -> None:
        self._modules = modules
        self.layers = list(modules)
        self.skipped = skipped

    def summary(self) -> str:
        """What runs fused now, and what does not and why, in lines of text.

        The state of the adapters is read at this call: a layer whose adapters are merged, disabled, several or of a
        variant such as DoRA runs PEFT's forward for as long as that lasts.
        """
        reasons = {name: module.fusable_adapter()[1] for name, module in self._modules.items()}
        fused = [name for name, reason in reasons.items() if not reason]
        lines = [f"fastrl.patch: {len(self.layers) + len(self.skipped)} LoRA layers, {len(fused)} fused by this patch"]
        if self.layers and not self._modules:
            lines[0] += " (undone)"
        if self.head is not None:
            lines.append("  the head: loss and log-probs without logits")
        lines += _counted(self.skipped, "left alone")
        lines += _counted({name: reason for name, reason in reasons.items() if reason}, "run PEFT's forward for now")
        lines += _counted({name: text for name in fused if (text := _casts(self._modules[name]))}, "note")
        if fused:
            lines.append("  calls with adapter_names (a mixed batch) or other arguments run PEFT's forward")
        return "\n".join(lines)

    def undo(self) -> None:
        """Gives every layer PEFT's forward back, and the model its own head; a second call does nothing.

        Raises:
            ValueError: a layer's class or the model's forward was changed by something else since; nothing is undone.
        """
        for name, module in self._modules.items():
            if isinstance(module, FusedLinear) and type(module) is not FusedLinear:
                raise ValueError(
                    f"fastrl.patch: undo: {name}: expected the layer as it was patched, got a {type(module).__name__}"
                    " on top of it; undo what was done to the model since, last first"
                )
        if self.head is not None:
            self.head.undo()
        for module in self._modules.values():
            if type(module) is FusedLinear:
                module.__class__ = Linear  # type: ignore[assignment]
        self._modules = {}

    def __len__(self) -> int:
        return len(self.layers)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in Counter(self.skipped.values()).items())
        head = " and the head" if self.head is not None else ""
        return f"<fastrl.patch: {len(self)} layers{head} fused" + (f"; kept: {reasons}>" if reasons else ">")


def patch(model: nn.Module, *, expect_layers: bool = True) -> Patch:
    """Computes the LoRA linear layers of a PEFT model with `fastrl.ops.lora_linear`, in place.

    Parameters, state dict, hooks, names, `disable_adapter()`, merging, saving and loading stay PEFT's own; a copy is
    fused like its model, a pickle holds PEFT's layers. A layer whose state asks for more than one plain adapter on a
    plain `nn.Linear` (several active adapters, a mixed batch, DoRA and other variants, `lora_bias`, hooks on its parts)
    runs PEFT's forward for as long as it does. Layers of other types, quantised ones among them, are left alone.

    Where PEFT's line is the faster one (few rows on a CPU; float32 adapters where it emulates the base's dtype), layers
    compute that line and have PEFT's bits. Else two things differ: float32 adapters on a half-precision base are used
    in the base's dtype, so that their gradients, float32 as well, are rounded to it on the way (relative error 3e-3 in
    bfloat16; outputs err as PEFT's do), and dropout masks come from another generator. A CPU that does not multiply 16
    bits computes all of it in float32 and rounds the results alone.

        model = peft.get_peft_model(model, config)
        fastrl.patch(model)

    Args:
        model: any module that holds `peft.tuners.lora` layers, wrapped or not, on any device; may be patched again
            after adapters were added.
        expect_layers: whether to warn where the model has no such layers, and so nothing is done.
    Returns:
        A `Patch`: its `layers`, `skipped` with the reasons, `summary()` and `undo()`.
    Raises:
        RuntimeError: the installed PEFT has another lora.Linear than this code knows; nothing is changed.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if expect_layers and not layers:
        warnings.warn(
            f"fastrl.patch: model: expected LoRA layers of PEFT, found none in a {type(model).__name__}; "
            "call patch after peft.get_peft_model",
            stacklevel=3,
        )
    skipped = {name: reason for name, layer in layers.items() if (reason := why_not(layer))}
    fused = {name: layer for name, layer in layers.items() if name not in skipped}
    for layer in fused.values():
        check_peft(layer)
    for layer in fused.values():
        layer.__class__ = FusedLinear
    return Patch(fused, skipped)  # type: ignore[arg-type]


def check_peft(layer: LoraLayer) -> None:
    """Raises where PEFT's layer has not what `FusedLinear` reads and calls; warns once of an untested version."""
    missing = [name for name in PARTS if not hasattr(layer, name)]
    parameters = list(inspect.signature(Linear.forward).parameters)
    if missing or parameters != ["self", "x", "args", "kwargs"]:
        got = f"one without {', '.join(missing)}" if missing else f"forward({', '.join(parameters)})"
        raise RuntimeError(
            f"fastrl.patch: peft {peft.__version__}: expected its lora.Linear as in {TESTED[0]} to {TESTED[1]}, "
            f"got {got}; nothing was patched; pip install 'peft>={TESTED[0]},<{TESTED[1]}'"
        )
    _warn_of_untested(peft.__version__)


@functools.cache
def _warn_of_untested(version: str) -> None:
    if not Version(TESTED[0]) <= Version(version) < Version(TESTED[1]):
        warnings.warn(
            f"fastrl.patch: peft {version} is not tested (from {TESTED[0]} to below {TESTED[1]}), but looks alike",
            stacklevel=4,
        )


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Folds the active adapters of a PEFT model into its weights, for passes without gradients such as sampling.

        W' = W + scaling * B A, rounded to the dtype of W

    The same as PEFT's ``merge_adapter()``, but afterwards the weights have their own bits again, which
    ``unmerge_adapter()`` does not promise. A layer is then one product in place of three, which tells where few rows
    are multiplied. Outputs differ from the unmerged model's by the rounding of W', so take log-probs that are compared
    with training's (PPO's old ones) outside. A copy of the folded weights is kept meanwhile. Layers that are no plain
    `lora.Linear`, or whose weight another module shares, stay as they are.

        with torch.no_grad(), fastrl.integrations.peft.merged(model):
            model.generate(**inputs)

    Raises:
        ValueError: adapters are merged already.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers = [
        module
        for module in model.modules()
        if isinstance(module, Linear)
        and type(module.base_layer) is nn.Linear
        and not module.disable_adapters
        and owners[id(module.base_layer.weight)] == 1
    ]
    if any(layer.merged for layer in layers):
        raise ValueError("merged: model: expected adapters that are not merged; call unmerge_adapter() first")
    kept = [(p, p.detach().clone()) for layer in layers for p in layer.base_layer.parameters()]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            layer.merged_adapters.clear()
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def _counted(reasons: dict[str, str], what: str) -> list[str]:
    """A line for each reason: how many layers, what they do, the names of the first."""
    lines = []
    for reason, count in Counter(reasons.values()).items():
        names = [name for name in reasons if reasons[name] == reason]
        shown = names[0] + (f" and {count - 1} more" if count > 1 else "")
        lines.append(f"  {count} {what}: {reason} ({shown})")
    return lines


def _casts(layer: FusedLinear) -> str:
    """How a layer's numbers differ from PEFT's: its adapter has another dtype than its base."""
    adapter: Any = layer.lora_A[layer.fusable_adapter()[0]]
    base: Any = layer.get_base_layer()
    if adapter.weight.dtype == base.weight.dtype:
        return ""
    return f"{_short(adapter.weight.dtype)} adapters multiply in {_short(base.weight.dtype)} in the kernels"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
