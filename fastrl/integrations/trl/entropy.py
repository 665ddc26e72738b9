"""The entropy of a head's distribution with a gradient that costs nothing until a loss asks for it."""

from __future__ import annotations

from typing import Any

import torch

from fastrl.ops import LoRAHead, linear_logprobs
from fastrl.ops.autograd import differentiable_once


def with_gradient(entropy, hidden, weight, targets, options):
    """`entropy`, which linear_logprobs gave detached, as a function of what it came from.

    Nearly all of TRL's losses report it and no more; the backward pass of one that does train it computes it again.
    """
    lora = options["lora"] or (None, None, 1.0)
    inputs = (hidden, weight, options["bias"], lora[0], lora[1])
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in inputs):
        return entropy
    return _Entropy.apply(entropy, *inputs, targets, {**options, "scaling": lora[2]})


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, entropy, hidden, weight, bias, lora_a, lora_b, targets, options):
        ctx.save_for_backward(hidden, weight, bias, lora_a, lora_b, targets)
        ctx.options = {name: value for name, value in options.items() if name not in ("bias", "lora", "scaling")}
        ctx.scaling = options["scaling"]
        ctx.set_materialize_grads(False)
        return entropy.clone()

    @staticmethod
    @differentiable_once("entropy")
    def backward(ctx, upstream):
        if upstream is None:
            return (None,) * 8
        *inputs, targets = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:6]
        leaves: list[Any] = [
            None if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)
        ]
        hidden, weight, bias, lora_a, lora_b = leaves
        lora = None if lora_a is None else LoRAHead(lora_a, lora_b, ctx.scaling)
        with torch.enable_grad():
            entropy = linear_logprobs(hidden, weight, targets, bias=bias, lora=lora, return_entropy=True, **ctx.options)
            wanted = [leaf for leaf, n in zip(leaves, needed, strict=True) if n]
            gradients = iter(torch.autograd.grad(entropy[1], wanted, upstream))
        return None, *(next(gradients) if n else None for n in needed), None, None
