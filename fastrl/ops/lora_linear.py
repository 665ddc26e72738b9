"""Linear layers with a LoRA adapter, alone or as siblings that share their input."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastrl.checks import check, check_device, check_float, check_number, check_plain, check_shape, check_unit
from fastrl.ops import lora_linear_cpu, lora_linear_gpu
from fastrl.ops.autograd import differentiable_once
from fastrl.ops.backend import choose, transforming
from fastrl.ops.cpu_products import is_widened
from fastrl.ops.native import autocast_dtype
from fastrl.reference import lora_linear as reference


class LoRAWeights(NamedTuple):
    """One layer of `lora_linear_group`."""

    weight: torch.Tensor  # (O, K)
    lora_a: torch.Tensor  # (r, K)
    lora_b: torch.Tensor  # (O, r)
    scaling: float
    bias: torch.Tensor | None = None  # (O,)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """A linear layer with a low-rank adapter beside it.

        y = x W^T + bias + scaling * (D(x) A^T) B^T

    Same value as PEFT's ``base(x) + lora_B(lora_A(dropout(x))) * scaling``, or
    ``F.linear(x, weight, bias) + F.linear(F.linear(F.dropout(x, dropout), lora_a), lora_b) * scaling``. The
    adapter's product accumulates onto the base product (GEMM with beta = 1), in the forward pass and in the gradient
    of x. Saved for backward: x and D(x) A^T (M x r); no copy of x, no adapter output.

    Args:
        x: (..., K) float32, bfloat16 or float16 (float64 runs on `reference`). Any strides.
        weight: (O, K), usually frozen; dtype of x. Its gradient is formed only if it requires one.
        lora_a: (r, K), r >= 1, any float dtype: used in the dtype of x (or float32: see numerics), gradient in its own.
        lora_b: (O, r), likewise.
        scaling: a finite number, PEFT's lora_alpha / r.
        bias: (O,), dtype of x.
        dropout: in [0, 1): the probability that D zeroes an element of x (the rest is divided by 1 - dropout). The mask
            is never stored: Philox4x32-10 regenerates it from one seed, drawn on each call from the device's generator
            (so torch.manual_seed and torch.utils.checkpoint reproduce it). Pass 0 in evaluation.
        backend: None chooses (plain torch where the work is small); else one of reference, cpu, triton, cuda.
    Returns:
        (..., O) in the dtype of x.
    Raises:
        ValueError: shape, dtype, device or value does not fit.
    Numerics: products accumulate in fp32; D(x) A^T, the first product and the result are rounded to the dtype of x. On
        a CPU without products of 16 bits everything is float32, and results alone are rounded.
        Under torch.autocast every argument is cast as F.linear would cast it. Differentiable once.
    Source: Hu et al. 2021, arXiv:2106.09685; Salmon et al. 2011 (Philox).
    """
    layer = LoRAWeights(weight, lora_a, lora_b, scaling, bias)
    return _run("lora_linear", x, [layer], dropout, backend)[0]


def lora_linear_group(
    x: torch.Tensor, layers: Sequence[LoRAWeights], *, dropout: float = 0.0, backend: str | None = None
) -> list[torch.Tensor]:
    """Sibling LoRA layers (query/key/value, gate/up) on the same input.

        y_i = x W_i^T + bias_i + scaling_i * (D(x) A_i^T) B_i^T

    Same value as ``[lora_linear(x, *layer) for layer in layers]``. One product x [A_1; A_2; ...]^T serves all adapters,
    and all siblings add into one gradient of x.

    Args:
        x: (..., K), as in `lora_linear`.
        layers: at least one LoRAWeights; ranks, output sizes and scalings may differ.
        dropout: as in `lora_linear`. All siblings share one draw of the mask (PEFT draws one for each: another, equally
            valid sample).
        backend: None chooses; else one of reference, cpu, triton, cuda.
    Returns:
        One (..., O_i) tensor for each layer, in the dtype of x.
    Raises, numerics: see `lora_linear`.
    """
    layers = [LoRAWeights(*layer) for layer in layers]
    check(len(layers) > 0, "lora_linear_group", "layers", "at least one LoRAWeights", "none")
    return list(_run("lora_linear_group", x, layers, dropout, backend))


def _run(op, x, layers, dropout, backend):
    check_float(op, "x", x)
    check(x.ndim >= 1 and x.shape[-1] > 0, op, "x", "shape (..., K) with K >= 1", tuple(x.shape))
    check_unit(op, "dropout", dropout)
    check(dropout < 1, op, "dropout", "a number in [0, 1)", dropout)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
        layers = [_cast_base(layer, dtype) for layer in layers]
    for layer in layers:
        _check_layer(op, x, layer)
    if backend is None and dropout == 0 and prefers_plain(x, sum(len(layer.weight) for layer in layers)):
        return [plain(x, *layer) for layer in layers]
    backend = choose(op, x, backend, eager=_eager_is_faster(x, layers, dropout))
    seed = torch.randint(2**62, (1,), device=x.device) if dropout > 0 else None
    if backend == "reference":
        return reference.lora_linear_group(x, layers, dropout, seed)
    tensors: list[torch.Tensor | None] = []
    widened = backend == "cpu" and is_widened(x.dtype)  # adapters then keep what precision they have
    for weight, lora_a, lora_b, _, bias in layers:
        if not widened:
            lora_a, lora_b = _in_dtype_of(x, lora_a), _in_dtype_of(x, lora_b)
        tensors += (weight, lora_a, lora_b, bias)
    scalings = [layer.scaling / (1.0 - dropout) for layer in layers]  # the mask then only selects
    if not torch.is_grad_enabled():
        return _forward(x, seed, dropout, scalings, backend, tensors)[0]
    return _LoRALinearGroup.apply(x, seed, dropout, scalings, backend, *tensors)


# Rows below which, on a CPU, calls cost more than the fused products save: without and with gradients
# (benches/NOTES.md).
EAGER_ROWS, EAGER_TRAINING_ROWS = 48, 128
# Where 16-bit matrices are multiplied in float32: rows without gradients, multiply-adds of a product with them.
WIDENED_ROWS, WIDENED_WORK = 16, 1 << 20


def too_few_to_widen(x: torch.Tensor, outputs: int) -> bool:
    """Whether torch's own 16-bit loops take less time than the conversion of the weights."""
    if torch.is_grad_enabled():
        return x.numel() * outputs < WIDENED_WORK
    return x.numel() < WIDENED_ROWS * x.shape[-1]


def _eager_is_faster(x, layers, dropout):
    if x.device.type != "cpu" or dropout > 0:
        return False
    if is_widened(x.dtype):
        few = too_few_to_widen(x, sum(len(layer.weight) for layer in layers))
    else:
        few = x.numel() < (EAGER_TRAINING_ROWS if torch.is_grad_enabled() else EAGER_ROWS) * x.shape[-1]
    # Of adapters in another dtype eager widens x.
    return few and all(layer.lora_a.dtype == layer.lora_b.dtype == x.dtype for layer in layers)


# Multiply-adds of the base products below which, on a GPU, the host's calls take longer than the device: forward and
# backward, an H100 needs some 120 us for so many. To be set by rows of a device.
PLAIN_WORK = 1 << 34


def prefers_plain(x: torch.Tensor, outputs: int) -> bool:
    """Whether, on a GPU, `plain` is called in less time than the op and its kernels would need."""
    if x.device.type != "cuda" or x.numel() * outputs >= PLAIN_WORK:
        return False
    return not (os.environ.get("FASTRL_BACKEND") or transforming())


def plain(x, weight, lora_a, lora_b, scaling, bias=None):
    """lora_linear without dropout as three calls of the library: the adapter's second product adds to the base's."""
    rows = x.reshape(-1, x.shape[-1])
    down = F.linear(rows, _in_dtype_of(x, lora_a))
    y = F.linear(rows, weight, bias).addmm_(down, _in_dtype_of(x, lora_b).t(), alpha=scaling)
    return y if x.ndim == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))


def _in_dtype_of(x, tensor):
    return tensor if tensor.dtype == x.dtype else tensor.to(x.dtype)  # a call that does nothing costs 0.4 us


def _cast_base(layer, dtype):
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return layer._replace(weight=layer.weight.to(dtype), bias=bias)


def _check_layer(op, x, layer):
    weight, lora_a, lora_b, scaling, bias = layer
    features = x.shape[-1]
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
        check_float(op, name, tensor)
        check_device(op, name, tensor, x)
    check_plain(op, "weight", weight)
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != features:
        check(False, op, "weight", f"shape (O, {features}) with O >= 1", tuple(weight.shape))
    if lora_a.ndim != 2 or lora_a.shape[0] == 0 or lora_a.shape[1] != features:
        check(False, op, "lora_a", f"shape (r, {features}) with r >= 1", tuple(lora_a.shape))
    check_shape(op, "lora_b", lora_b, (weight.shape[0], lora_a.shape[0]))
    if bias is not None:
        check_plain(op, "bias", bias)
        check_shape(op, "bias", bias, (weight.shape[0],))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            check(False, op, name, f"the dtype of x, {x.dtype}", tensor.dtype)
        check_device(op, name, tensor, x)
    check_number(op, "scaling", scaling)


def _order(backend):
    """In which order the products are formed, each accumulating onto the one before it."""
    return lora_linear_cpu if backend == "cpu" else lora_linear_gpu


def _forward(x, seed, dropout, scalings, backend, tensors):
    rows = x.reshape(-1, x.shape[-1])
    outputs, down = _order(backend).forward(rows, seed, dropout, scalings, backend, *(tensors[i::4] for i in range(4)))
    if x.ndim != 2:  # as F.linear shapes its own: to autograd no view, so that it may be changed in place
        outputs = [torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])) for y in outputs]
    return tuple(outputs), down


class _LoRALinearGroup(torch.autograd.Function):
    """`tensors`: weight, lora_a, lora_b, bias of each sibling, all in the dtype of x."""

    @staticmethod
    def forward(ctx, x, seed, dropout, scalings, backend, *tensors):
        outputs, down = _forward(x, seed, dropout, scalings, backend, tensors)
        ctx.save_for_backward(x, seed, down, *tensors)
        ctx.options = (dropout, scalings, backend)
        return outputs

    @staticmethod
    @differentiable_once("lora_linear")
    def backward(ctx, *dys):
        x, seed, down, *tensors = ctx.saved_tensors
        dropout, scalings, backend = ctx.options
        needs_dx, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        rows = x.reshape(-1, x.shape[-1])
        dy_rows = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        gradients: list[torch.Tensor | None] = [None] * len(tensors)
        for i, dy in enumerate(dy_rows):
            if needs[4 * i]:
                gradients[4 * i] = dy.t() @ rows
            if needs[4 * i + 3]:
                gradients[4 * i + 3] = dy.sum(0)
        dx, gradients[1::4], gradients[2::4] = _order(backend).backward(
            rows, dy_rows, down, seed, dropout, scalings, backend, *(tensors[i::4] for i in range(3)),
            needs_dx, any(needs[1::4]), needs[2::4],
        )  # fmt: skip
        return dx if dx is None else dx.view(x.shape), None, None, None, None, *gradients
