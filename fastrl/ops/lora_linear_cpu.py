"""lora_linear on the CPU: the base product first, the adapter's product accumulates onto it: the faster order there."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastrl.constants import dropout_threshold
from fastrl.ops.native import _C, DTYPE_CODES, native_op, threads_for


def forward(rows, seed, dropout, scalings, backend, weights, lora_as, lora_bs, biases):
    """The outputs (M, O_i), and the down-projections of all siblings as one (r_1 + r_2 + ..., M)."""
    down = _stacked(lora_as) @ _dropped(rows, seed, dropout).t()
    outputs = []
    for part, weight, lora_b, bias, scaling in zip(
        down.split([len(a) for a in lora_as]), weights, lora_bs, biases, scalings, strict=True
    ):
        y = F.linear(rows, weight, bias)
        outputs.append(y.addmm_(part.t(), lora_b.t(), alpha=scaling))
    return outputs, down


def backward(
    rows, dys, down, seed, dropout, scalings, backend, weights, lora_as, lora_bs, needs_dx, needs_a, needs_b
):  # fmt: skip
    """(dx, gradients of lora_as, gradients of lora_bs)"""
    ranks = [len(a) for a in lora_as]
    ddowns = [(dy @ b).mul_(s) for dy, b, s in zip(dys, lora_bs, scalings, strict=True)]
    ddown = ddowns[0] if len(ddowns) == 1 else torch.cat(ddowns, 1)  # (M, r_1 + r_2 + ...)
    dlora_bs = [
        (part @ dy).mul_(s).t() if needed else None
        for part, dy, s, needed in zip(down.split(ranks), dys, scalings, needs_b, strict=True)
    ]
    dlora_as = (ddown.t() @ _dropped(rows, seed, dropout)).split(ranks) if needs_a else [None] * len(ranks)
    dx = _input_gradient(dys, weights, ddown, _stacked(lora_as), seed, dropout) if needs_dx else None
    return dx, dlora_as, dlora_bs


def _input_gradient(dys, weights, ddown, lora_a, seed, dropout):
    """sum_i dy_i W_i + D(ddown A), where D is the mask."""
    if seed is not None:
        dx = ddown @ lora_a
        _dropout("cpu", dx, seed, dropout)
        for dy, weight in zip(dys, weights, strict=True):
            dx.addmm_(dy, weight)
        return dx
    dx = dys[0] @ weights[0]
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)
    return dx.addmm_(ddown, lora_a)


def _stacked(matrices):
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _dropped(rows, seed, dropout):
    if seed is None:
        return rows
    copy = rows.clone(memory_format=torch.contiguous_format)
    _dropout("cpu", copy, seed, dropout)
    return copy


def _dropout_cpu(matrix, seed, dropout):
    _C.lora_dropout(
        matrix, DTYPE_CODES[matrix.dtype], *matrix.shape, seed, dropout_threshold(dropout), threads_for(matrix.numel())
    )


_dropout = native_op("lora_dropout", "Tensor(a!) matrix, Tensor seed, float dropout", {"cpu": _dropout_cpu})
