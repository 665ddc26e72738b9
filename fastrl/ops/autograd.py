"""What the backward passes of all ops share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

MESSAGE = (
    "{}: a second derivative: native backends are differentiable once; pass backend='reference', which is plain torch "
    "(a model that fastrl.patch fused: call undo() on its handle)"
)


def differentiable_once(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a backward pass that kernels compute: a second derivative through it raises.

    Where a graph of the gradients is asked for (create_graph=True), theirs raises when it is differentiated. torch's
    once_differentiable leaves gradients without a graph where the upstream has none, and joins them to no input: a
    Hessian-vector product or gradient penalty is then 0 without a word. The inputs are what the forward pass saved and
    `ctx.inputs`, where it sets that.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *upstreams: torch.Tensor | None) -> Any:
            if torch.compiler.is_compiling():  # the compiler refuses second derivatives itself
                return backward(ctx, *upstreams)
            if not torch.is_grad_enabled():
                return backward(ctx, *map(_in_memory, upstreams))
            # Before the backward pass, which may write to what was saved.
            inputs = [t for t in (*upstreams, *ctx.saved_tensors, *getattr(ctx, "inputs", ())) if t is not None]
            with torch.no_grad():
                gradients = backward(ctx, *map(_in_memory, upstreams))
            return _DifferentiatedTwice.apply(op, gradients, *inputs)

        return run

    return decorate


class _DifferentiatedTwice(torch.autograd.Function):
    """The gradients as they are, depending on `inputs` by a function that has no derivative."""

    @staticmethod
    def forward(ctx, op, gradients, *inputs):
        ctx.op = op
        return gradients

    @staticmethod
    def backward(ctx, *upstreams):
        raise RuntimeError(MESSAGE.format(ctx.op))


def _in_memory(upstream: torch.Tensor | None) -> torch.Tensor | None:
    """The upstream as strided numbers; autograd also passes sparse ones, negated views, and zeros without memory."""
    if upstream is None:
        return None
    if upstream.layout is not torch.strided:
        upstream = upstream.to_dense()
    if upstream.is_neg() or upstream._is_zerotensor():
        upstream = upstream.clone()
    return upstream
