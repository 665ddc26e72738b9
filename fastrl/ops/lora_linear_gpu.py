"""lora_linear on a GPU: the adapter's product first, the base product accumulates onto it.

cuBLAS reads what it adds to while it multiplies, so of the adapter only the thin products show. Those with dropout are
kernels that make the mask on the way, and the two products of dy come from one reading of it. `cuda` leaves to cuBLAS
what its kernels do not fit: float32, columns no multiple of 4 (with a dropped copy of x), odd ranks.
"""

from __future__ import annotations

import torch

from fastrl.constants import dropout_threshold
from fastrl.ops.native import DTYPE_CODES, cuda_workspace, launch_cuda, native_op, triton_kernel


def forward(rows, seed, dropout, scalings, backend, weights, lora_as, lora_bs, biases):
    """The outputs (M, O_i), and the down-projections of all siblings as one (M, r_1 + r_2 + ...)."""
    lora_a = _stacked(lora_as)
    if seed is None:
        down = rows @ lora_a.t()
    else:
        down = rows.new_empty(len(rows), len(lora_a))
        _down(backend, _with_rows(rows), lora_a, seed, dropout, down)
    outputs = []
    for part, weight, lora_b, bias, scaling in zip(
        _parts(down, [len(a) for a in lora_as], 1), weights, lora_bs, biases, scalings, strict=True
    ):
        y = rows.new_empty(len(rows), len(weight))
        start, keep_start = (y, 0) if bias is None else (bias, 1)
        torch.addmm(start, part, lora_b.t(), beta=keep_start, alpha=scaling, out=y)
        outputs.append(y.addmm_(rows, weight.t()))
    return outputs, down


def backward(
    rows, dys, down, seed, dropout, scalings, backend, weights, lora_as, lora_bs, needs_dx, needs_a, needs_b
):  # fmt: skip
    """(dx, gradients of lora_as, gradients of lora_bs)"""
    ranks = [len(a) for a in lora_as]
    ddown = torch.empty_like(down) if needs_dx or needs_a else None
    ddowns = [None] * len(ranks) if ddown is None else _parts(ddown, ranks, 1)
    dlora_bs = [b.new_empty(b.shape) if needed else None for b, needed in zip(lora_bs, needs_b, strict=True)]
    for i, part in enumerate(_parts(down, ranks, 1)):
        if ddowns[i] is not None or dlora_bs[i] is not None:
            lora_b = lora_bs[i].contiguous()
            _up_backward(backend, dys[i].contiguous(), part, lora_b, scalings[i], ddowns[i], dlora_bs[i])
    dlora_as = [None] * len(ranks)
    if needs_a:
        dlora_a = rows.new_empty(sum(ranks), rows.shape[1])
        _down_backward(backend, ddown, _with_rows(rows), seed, dropout, dlora_a)
        dlora_as = _parts(dlora_a, ranks, 0)
    dx = None
    if needs_dx:
        dx = _adapter_input_gradient(backend, ddown, _stacked(lora_as), seed, dropout)
        for dy, weight in zip(dys, weights, strict=True):
            dx.addmm_(dy, weight)
    return dx, dlora_as, dlora_bs


def _adapter_input_gradient(backend, ddown, lora_a, seed, dropout):
    """D(ddown A)"""
    if seed is None:
        return ddown @ lora_a
    dx = ddown.new_empty(len(ddown), lora_a.shape[1])
    _input_gradient(backend, ddown, lora_a, seed, dropout, dx)
    return dx


def _stacked(matrices):
    return matrices[0].contiguous() if len(matrices) == 1 else torch.cat(matrices)


def _parts(matrix, sizes, dim):
    return [matrix] if len(sizes) == 1 else matrix.split(sizes, dim)  # a split into one part costs 2.5 us


def _with_rows(matrix):
    """A matrix whose rows are contiguous and not so far apart that offsets in a tile exceed 32 bits."""
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) < 1 << 22 else matrix.contiguous()


def _fits(*matrices, elements=4):
    """Whether the CUDA kernels take such matrices: 16 bits, rows that begin and end with whole groups of elements."""
    return all(
        m.dtype != torch.float32
        and m.shape[1] % elements == 0
        and m.stride(0) % elements == 0
        and m.data_ptr() % (2 * elements) == 0
        for m in matrices
    )


def _dropout_cuda(matrix, seed, dropout):
    threshold = dropout_threshold(dropout)
    launch_cuda("lora_dropout", matrix, matrix, DTYPE_CODES[matrix.dtype], *matrix.shape, seed, threshold)


def _dropped_cuda(x, seed, dropout):
    if seed is None:
        return x
    copy = x.clone(memory_format=torch.contiguous_format)
    _dropout_cuda(copy, seed, dropout)
    return copy


def _down_cuda(x, lora_a, seed, dropout, down):
    if not _fits(x, lora_a):
        torch.mm(_dropped_cuda(x, seed, dropout), lora_a.t(), out=down)
        return
    launch_cuda(
        "lora_down", x, x, x.stride(0), lora_a, DTYPE_CODES[x.dtype], *x.shape, len(lora_a), seed,
        dropout_threshold(dropout), down,
    )  # fmt: skip


def _up_backward_cuda(dy, down, lora_b, scaling, ddown, dlora_b):
    both = ddown is not None and dlora_b is not None
    if both and _fits(dy) and _fits(down, lora_b, elements=2):
        rank = down.shape[1]
        workspace = cuda_workspace("lora_up_backward", *dy.shape, rank, like=dy, dtype=torch.float32)
        launch_cuda(
            "lora_up_backward", dy, dy, down, down.stride(0), lora_b, DTYPE_CODES[dy.dtype], *dy.shape, rank, scaling,
            workspace, ddown, ddown.stride(0), dlora_b,
        )  # fmt: skip
        return
    if ddown is not None:
        torch.addmm(ddown, dy, lora_b, beta=0, alpha=scaling, out=ddown)
    if dlora_b is not None:
        torch.addmm(dlora_b, dy.t(), down, beta=0, alpha=scaling, out=dlora_b)


def _down_backward_cuda(ddown, x, seed, dropout, dlora_a):
    if not _fits(x):
        torch.mm(ddown.t(), _dropped_cuda(x, seed, dropout), out=dlora_a)
        return
    rank = ddown.shape[1]
    workspace = cuda_workspace("lora_da", *x.shape, rank, like=x, dtype=torch.float32)
    launch_cuda(
        "lora_da", x, x, x.stride(0), ddown, DTYPE_CODES[x.dtype], *x.shape, rank, seed, dropout_threshold(dropout),
        workspace, dlora_a,
    )  # fmt: skip


def _input_gradient_cuda(ddown, lora_a, seed, dropout, dx):
    if not _fits(lora_a, dx):
        torch.mm(ddown, lora_a, out=dx)
        _dropout_cuda(dx, seed, dropout)
        return
    launch_cuda(
        "lora_dx", dx, ddown, lora_a, DTYPE_CODES[dx.dtype], *dx.shape, len(lora_a), seed, dropout_threshold(dropout),
        dx,
    )  # fmt: skip


# down = D(x) lora_a^T
_down = native_op(
    "lora_down",
    "Tensor x, Tensor lora_a, Tensor seed, float dropout, Tensor(a!) down",
    {"cuda": _down_cuda, "triton": triton_kernel("lora_linear", "down_projection")},
)

# ddown = scaling dy lora_b, dlora_b = scaling dy^T down
_up_backward = native_op(
    "lora_up_backward",
    "Tensor dy, Tensor down, Tensor lora_b, float scaling, Tensor(a!)? ddown, Tensor(b!)? dlora_b",
    {"cuda": _up_backward_cuda, "triton": triton_kernel("lora_linear", "up_backward")},
)

# dlora_a = ddown^T D(x)
_down_backward = native_op(
    "lora_down_backward",
    "Tensor ddown, Tensor x, Tensor? seed, float dropout, Tensor(a!) dlora_a",
    {"cuda": _down_backward_cuda, "triton": triton_kernel("lora_linear", "down_backward")},
)

# dx = D(ddown lora_a)
_input_gradient = native_op(
    "lora_input_gradient",
    "Tensor ddown, Tensor lora_a, Tensor seed, float dropout, Tensor(a!) dx",
    {"cuda": _input_gradient_cuda, "triton": triton_kernel("lora_linear", "input_gradient")},
)
