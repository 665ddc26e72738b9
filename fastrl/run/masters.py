"""Float32 copies of weights that are trained in a narrower dtype.

A step of 1e-5 is less than half the spacing of bfloat16 numbers near 0.1: added to a bfloat16 weight it is rounded
away. Such a weight is therefore a rounded image of a float32 one, its master: forward and backward passes run on the
weight, as they would on the saved model; gradients are summed, and steps are taken, in float32 on the master. Bytes per
weight with Adam: 2 + 4 (gradient) + 4 (master) + 8, against 4 + 4 + 8 for float32 weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

NARROW = (torch.bfloat16, torch.float16)


def add_masters(model: nn.Module) -> None:
    """Give each trainable weight that is narrower than float32 a master; a second call changes nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in NARROW and not hasattr(parameter, "master"):
            master = nn.Parameter(parameter.detach().float())
            parameter.master = master  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(_hand_over)


def master_of(parameter: Tensor) -> Tensor:
    """The tensor that steps change: the parameter's master, or itself if it has none."""
    return getattr(parameter, "master", parameter)


def trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor that steps change) of each trainable parameter, in the model's order."""
    return ((name, master_of(p)) for name, p in model.named_parameters() if p.requires_grad)


@torch.no_grad()
def restore(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give what is trained the values of `trained` at an earlier time."""
    for name, tensor in trained(model):
        tensor.copy_(weights[name])
    round_masters(model)


@torch.no_grad()
def round_masters(model: nn.Module) -> None:
    """Write the masters into the weights, rounded to nearest; call it after the masters have changed."""
    for parameter in model.parameters():
        if hasattr(parameter, "master"):
            parameter.copy_(parameter.master)


def _hand_over(parameter: Tensor) -> None:
    """Add the gradient of a micro-batch to the master's and forget it."""
    master, gradient = master_of(parameter), parameter.grad
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad += gradient
    parameter.grad = None
