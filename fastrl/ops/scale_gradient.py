"""A gradient that the forward pass has formed, times the upstream that the backward pass brings."""

from __future__ import annotations

import torch
from torch._C._functorch import is_legacy_batchedtensor

from fastrl.ops.backend import transforming
from fastrl.ops.native import DTYPE_CODES, launch_cuda, native_op, triton_kernel


def scale_gradient(backend: str, gradient: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """gradient * upstream, a 0-d float32 tensor, in the gradient's own memory if no other backward pass can need it.

    Where the upstream is 1, as of a loss that backward() is called on, nothing is read or written. The product is
    formed in float32 and rounded once. The host does not wait.
    """
    if torch.compiler.is_compiling() or transforming() or is_legacy_batchedtensor(upstream):  # is_grads_batched=True
        return (gradient * upstream).to(gradient.dtype)
    if _graph_is_kept():
        gradient = gradient.clone()
    _scale(backend, gradient, upstream)
    return gradient


# Whether the backward pass that runs was asked to leave its graph for another one (retain_graph=True).
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _scale_cpu(gradient, upstream):
    factor = upstream.item()
    if factor != 1.0:
        gradient.mul_(factor)


def _scale_cuda(gradient, upstream):
    launch_cuda("scale_gradient", gradient, gradient, DTYPE_CODES[gradient.dtype], gradient.numel(), upstream)


_scale = native_op(
    "scale_gradient",
    "Tensor(a!) gradient, Tensor upstream",
    {"cpu": _scale_cpu, "cuda": _scale_cuda, "triton": triton_kernel("scale_gradient", "scale_gradient")},
)
