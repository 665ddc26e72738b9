"""The fused LoRA layer: PEFT's layers of an existing model, computed by `fastrl.ops.lora_linear`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from fastrl.checks import is_plain
from fastrl.models.head_patch import HeadPatch
from fastrl.ops.backend import transforming
from fastrl.ops.lora_linear import lora_linear


class FusedLinear(Linear):
    """PEFT's lora.Linear with a fused forward; anything but one plain adapter on a plain input runs PEFT's own.

    To other code it is lora.Linear: by its name, and pickled, so that a pickle needs no fastrl (and is not fused).
    Parts are looked up in nn.Module's dictionaries: a decoded token passes hundreds of these layers, and each attribute
    that nn.Module.__getattr__ has to find costs 0.3 us.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = None if args or kwargs else self._fusable_adapter(x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        parts: Any = self._modules
        base, dropout = parts["base_layer"]._parameters, parts["lora_dropout"]._modules[name]
        return lora_linear(
            x,
            base["weight"],
            parts["lora_A"]._modules[name]._parameters["weight"],
            parts["lora_B"]._modules[name]._parameters["weight"],
            self.scaling[name],
            bias=base["bias"],
            dropout=dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0,
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Protocol 2 and later take the object's own class alone.
        function, (_, *arguments), *state = super().__reduce_ex__(1)  # type: ignore[misc,str-unpack]
        return function, (Linear, *arguments), *state

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedLinear:
        copied = memo[id(self)] = FusedLinear.__new__(FusedLinear)
        copied.__setstate__(deepcopy(self.__dict__, memo))
        return copied

    def _fusable_adapter(self, x: torch.Tensor) -> str | None:
        """The one active adapter if `lora_linear` computes what PEFT would, else None."""
        if self.disable_adapters or self.merged or not self.cast_input_dtype_enabled:
            return None
        parts: Any = self._modules
        adapters = parts["lora_A"]._modules
        names = [name for name in self.active_adapters if name in adapters]
        if len(names) != 1 or names[0] in self.lora_variant:
            return None
        name = names[0]
        base, lora_b = parts["base_layer"], parts["lora_B"]._modules[name]
        if not (_is_plain(base) and _is_plain(adapters[name]) and _is_plain(lora_b)):
            return None
        if lora_b._parameters["bias"] is not None:
            return None
        if type(parts["lora_dropout"]._modules[name]) not in (nn.Dropout, nn.Identity):
            return None
        if x.dtype != base._parameters["weight"].dtype and not torch.is_autocast_enabled(x.device.type):
            return None  # an error from PEFT
        if not is_plain(x) or transforming():
            return None
        return name


FusedLinear.__name__, FusedLinear.__qualname__, FusedLinear.__module__ = "Linear", "Linear", Linear.__module__


class Patch:
    """What `patch` did: `layers` (names of the fused layers), `skipped` (name -> reason), `head`, `undo()`.

    Also a context manager that undoes on exit.
    """

    head: HeadPatch | None = None  # of `fastrl.patch(model, head=True)`

    def __init__(self, modules: dict[str, FusedLinear], skipped: dict[str, str]) -> None:
        self._modules = modules
        self.layers = list(modules)
        self.skipped = skipped

    def undo(self) -> None:
        """Gives every layer PEFT's forward back, and the model its own head; a second call does nothing."""
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


def patch(model: nn.Module) -> Patch:
    """Computes the LoRA linear layers of a PEFT model with `fastrl.ops.lora_linear`, in place.

    Parameters, state dict, hooks, names, `disable_adapter()`, merging, saving and loading stay PEFT's own; a copy is
    fused like its model, a pickle holds PEFT's layers. A layer whose state
    asks for more than one plain adapter on a plain `nn.Linear` (several active adapters, a mixed batch, DoRA and other
    variants, `lora_bias`, hooks on its parts) runs PEFT's forward for as long as it does. Layers of other types are
    left alone. Two differences from PEFT: float32 adapters on a half-precision base are used in the base's dtype
    (their gradients are float32), and dropout masks come from another generator.

        model = peft.get_peft_model(model, config)
        fastrl.patch(model)

    Args:
        model: any module that holds `peft.tuners.lora` layers, wrapped or not; may be patched again after
            adapters were added.
    Returns:
        A `Patch`: its `layers`, `skipped` with the reasons, and `undo()`.
    """
    fused: dict[str, FusedLinear] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or isinstance(module, FusedLinear):
            continue
        reason = _why_not(module)
        if reason:
            skipped[name] = reason
            continue
        module.__class__ = FusedLinear
        fused[name] = module  # type: ignore[assignment]
    return Patch(fused, skipped)


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


def _why_not(module: LoraLayer) -> str:
    if type(module) is not Linear:
        return f"lora.{type(module).__name__} is no plain lora.Linear"
    if type(module.base_layer) is not nn.Linear:
        return f"its base layer is a {type(module.base_layer).__name__}"
    return ""


def _is_plain(linear: nn.Module) -> bool:
    """Whether calling the module is F.linear on its own parameters: no hooks, no tensor subclass."""
    return (
        type(linear) is nn.Linear
        and type(linear._parameters.get("weight")) in (nn.Parameter, torch.Tensor)  # functional_call puts tensors there
        and "forward" not in linear.__dict__
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and not (linear._backward_hooks or linear._backward_pre_hooks)
    )
