"""lora_linear on the CPU: the base product first, the adapter's product accumulates onto it: the faster order there.

Where the CPU has no products of 16 bits, a block of the weight at a time is widened to float32 and multiplied so.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fastrl.constants import dropout_threshold
from fastrl.ops.cpu_products import is_widened, spans
from fastrl.ops.native import _C, DTYPE_CODES, native_op, threads_for

WIDENED_ELEMENTS = 1 << 20  # of a weight at a time: 4 MiB, which stay in the cache


def forward(rows, seed, dropout, scalings, backend, weights, lora_as, lora_bs, biases):
    """The outputs (M, O_i), and the down-projections of all siblings as one (r_1 + r_2 + ..., M)."""
    if is_widened(rows.dtype):
        with torch.autocast("cpu", enabled=False):  # it would round what is widened
            return _forward_widened(rows, seed, dropout, scalings, weights, lora_as, lora_bs, biases)
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
    if is_widened(rows.dtype):
        with torch.autocast("cpu", enabled=False):
            return _backward_widened(
                rows, dys, down, seed, dropout, scalings, weights, lora_as, lora_bs, needs_dx, needs_a, needs_b
            )
    ranks = [len(a) for a in lora_as]
    ddowns = [(dy @ b).mul_(s) for dy, b, s in zip(dys, lora_bs, scalings, strict=True)]
    ddown = _stacked(ddowns, 1)  # (M, r_1 + r_2 + ...)
    dlora_bs = [
        (part @ dy).mul_(s).t() if needed else None
        for part, dy, s, needed in zip(down.split(ranks), dys, scalings, needs_b, strict=True)
    ]
    dlora_as = (ddown.t() @ _dropped(rows, seed, dropout)).split(ranks) if needs_a else [None] * len(ranks)
    dx = _input_gradient(dys, weights, ddown, _stacked(lora_as), seed, dropout) if needs_dx else None
    return dx, dlora_as, dlora_bs


def _forward_widened(rows, seed, dropout, scalings, weights, lora_as, lora_bs, biases):
    """`forward` with all sums in float32, rounded once; the down-projections stay in float32."""
    x = rows.float()
    down = _stacked(lora_as).float() @ _dropped(x, seed, dropout).t()
    outputs = []
    for part, weight, lora_b, bias, scaling in zip(
        down.split([len(a) for a in lora_as]), weights, lora_bs, biases, scalings, strict=True
    ):
        y = rows.new_empty(len(rows), len(weight))
        for begin, end in _blocks(weight):
            block = F.linear(x, weight[begin:end].float(), None if bias is None else bias[begin:end].float())
            y[:, begin:end] = block.addmm_(part.t(), lora_b[begin:end].float().t(), alpha=scaling)
        outputs.append(y)
    return outputs, down


def _backward_widened(
    rows, dys, down, seed, dropout, scalings, weights, lora_as, lora_bs, needs_dx, needs_a, needs_b
):  # fmt: skip
    """`backward` with all sums in float32, rounded once."""
    ranks = [len(a) for a in lora_as]
    dx = rows.new_zeros(rows.shape, dtype=torch.float32) if needs_dx else None
    ddowns, dlora_bs = [], []
    for part, dy, weight, lora_b, scaling, needed in zip(
        down.split(ranks), dys, weights, lora_bs, scalings, needs_b, strict=True
    ):
        ddown = dy.new_zeros(len(dy), len(part), dtype=torch.float32)
        dlora_b = torch.empty_like(lora_b) if needed else None
        for begin, end in _blocks(weight):
            block = dy[:, begin:end].float()
            ddown.addmm_(block, lora_b[begin:end].float(), alpha=scaling)
            if dlora_b is not None:
                dlora_b[begin:end] = (part @ block).mul_(scaling).t()
            if dx is not None:
                dx.addmm_(block, weight[begin:end].float())
        ddowns.append(ddown)
        dlora_bs.append(dlora_b)
    ddown = _stacked(ddowns, 1)
    dlora_as = [None] * len(ranks)
    if needs_a:
        gradients = (ddown.t() @ _dropped(rows.float(), seed, dropout)).split(ranks)
        dlora_as = [gradient.to(a.dtype) for gradient, a in zip(gradients, lora_as, strict=True)]
    if dx is not None:
        adapter = ddown @ _stacked(lora_as).float()
        if seed is not None:
            _dropout("cpu", adapter, seed, dropout)
        dx = dx.add_(adapter).to(rows.dtype)
    return dx, dlora_as, dlora_bs


def _blocks(weight: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Spans of a weight's outputs that are widened at a time; the compiler sees one."""
    outputs, features = weight.shape
    return spans(outputs, outputs if torch.compiler.is_compiling() else max(1, WIDENED_ELEMENTS // features))


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


def _stacked(matrices, dim=0):
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim)


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
