"""A linear layer with a LoRA adapter."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor

from fastrl.conformance.compare import (
    close_to_scale,
    compiled,
    double,
    expect,
    gradients,
    layouts,
    same_bits,
    second_backward_of,
    short,
)


def gradients_of_every_input(lora_linear):
    """T1, pitfall 31: the output and the gradients of input and adapter are those of float64."""
    inputs, upstream = _layer(), torch.randn(10, 16)
    truth, wanted = gradients(_naive, double(inputs), upstream, scaling=0.5)
    got, found = gradients(lora_linear, inputs, upstream, scaling=0.5)
    given = "x (10, 12), weight (16, 12), r = 4 float32"
    close_to_scale(got, truth, given, rtol=1e-5)
    for name in ("x", "lora_a", "lora_b"):
        close_to_scale(found[name], wanted[name], f"{given}: gradient of {name}", rtol=1e-5)


def second_backward(lora_linear):
    """T13: the input is not written to, and a second backward gives the first's gradient or raises."""
    inputs = _layer()
    leaf = inputs["x"].clone().requires_grad_()
    loss = lora_linear(*(inputs | {"x": leaf}).values(), scaling=0.5).square().sum()
    second_backward_of(loss, leaf, inputs["x"], "x (10, 12), weight (16, 12), r = 4")


def any_layout(lora_linear):
    """T21: strided, transposed and unaligned inputs give what contiguous ones give."""
    inputs = _layer()
    truth = _naive(**double(inputs), scaling=0.5)
    for layout, same in layouts(inputs["x"].view(2, 5, 12)):
        got = lora_linear(*(inputs | {"x": same}).values(), scaling=0.5)
        close_to_scale(got, truth.view(2, 5, 16), f"x (2, 5, 12) as {layout}", rtol=1e-5)


def dtypes(lora_linear):
    """T22: float32 adapters on a half-precision base, in its dtype, give its dtype, near float64."""
    single, half = torch.float32, torch.bfloat16
    for base, adapter in ((single, single), (half, half), (half, single)):
        _check_dtypes(lora_linear, base, base, adapter, autocast=False)


def dtypes_under_autocast(lora_linear):
    """T22: under autocast to bfloat16 any mix of dtypes gives bfloat16, as nn.Linear does."""
    for x in (torch.float32, torch.bfloat16):
        for base in (torch.float32, torch.bfloat16):
            for adapter in (torch.float32, torch.bfloat16):
                _check_dtypes(lora_linear, x, base, adapter, autocast=True)


def dropout_reaches_the_input_gradient(lora_linear):
    """T23: with dropout the gradient of the input is that of the function that ran: the same mask and scale."""
    inputs = _layer()
    inputs["weight"] = torch.zeros_like(inputs["weight"])
    for dropout in (0.1, 0.5):
        x, step, upstream = inputs["x"], torch.randn(10, 12), torch.randn(10, 16)

        def at(x: Tensor, dropout=dropout) -> Tensor:
            torch.manual_seed(3)
            return lora_linear(*(inputs | {"x": x}).values(), scaling=0.5, dropout=dropout)

        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((at(leaf) * upstream).sum(), leaf)
        moved = ((at(x + step) - at(x)).double() * upstream).sum()  # linear in x, so that this is exact
        predicted = (gradient.double() * step).sum()
        given = f"x (10, 12), dropout {dropout}: change along a step, by its gradient"
        close_to_scale(predicted.reshape(1), moved.reshape(1), given, rtol=1e-3)


def dropout_keeps_the_mean(lora_linear):
    """T23: dropout drops what it says and scales what it keeps by 1 / (1 - p); another call draws another mask."""
    x, weight, lora_a, lora_b = torch.ones(1, 4000), torch.zeros(1, 4000), torch.ones(1, 4000) / 4000, torch.ones(1, 1)
    draws = torch.cat([lora_linear(x, weight, lora_a, lora_b, 1.0, dropout=0.25)[0] for _ in range(40)]).double()
    given = "the mean of 4000 ones, dropout 0.25, 40 calls"
    expect(abs(float(draws.mean()) - 1) < 0.01, f"{given}: mean", "1 within 0.01", float(draws.mean()))
    spread = float(draws.std()) / (0.25 / 0.75 / 4000) ** 0.5
    expect(0.5 < spread < 1.5, f"{given}: standard deviation over that of independent draws", "1 within 0.5", spread)


def any_number_of_rows(lora_linear):
    """T24: (M, K), (B, T, K), one row and none."""
    inputs = _layer()
    truth = _naive(**double(inputs), scaling=0.5)
    for shape, rows in (((10,), slice(0, 10)), ((2, 5), slice(0, 10)), ((1,), slice(0, 1)), ((0,), slice(0, 0))):
        x = inputs["x"][rows].view(*shape, 12)
        got = lora_linear(*(inputs | {"x": x}).values(), scaling=0.5)
        expect(got.shape == (*shape, 16), f"x {(*shape, 12)}", f"shape {(*shape, 16)}", tuple(got.shape))
        close_to_scale(got, truth[rows].view(*shape, 16), f"x {(*shape, 12)}", rtol=1e-5)


def compiles(lora_linear):
    """T32: torch.compile(fullgraph=True) traces it, and the result is the same."""
    compiled(lora_linear, (*_layer().values(), 0.5), "x (10, 12), weight (16, 12), r = 4")


def bias_of_the_base(lora_linear):
    """T34: the base layer's bias counts, or is refused."""
    inputs, bias = _layer(), torch.randn(16)
    truth = _naive(**double(inputs), scaling=0.5) + bias.double()
    got = lora_linear(*inputs.values(), scaling=0.5, bias=bias)
    close_to_scale(got, truth, "weight (16, 12), bias (16,)", rtol=1e-5)


def nothing_is_kept_alive(lora_linear):
    """T36, pitfall 28: after backward the input is freed."""
    inputs = _layer()
    leaf = inputs.pop("x").requires_grad_()
    alive = weakref.ref(leaf)
    lora_linear(leaf, *inputs.values(), scaling=0.5).sum().backward()
    del leaf
    gc.collect()
    expect(alive() is None, "x (10, 12) after backward, deleted by the caller", "freed", "still alive")


def only_what_is_trained_gets_a_gradient(lora_linear):
    """pitfall 24: a frozen input (the first layer) still trains the adapter, through a view too."""
    inputs = _layer()
    inputs["lora_b"].requires_grad_()
    got = lora_linear(inputs["x"].view(2, 5, 12), inputs["weight"], inputs["lora_a"], inputs["lora_b"], scaling=0.5)
    expect(got.requires_grad, "x and weight frozen, lora_b trained", "requires_grad", False)
    (found,) = torch.autograd.grad(got.sum(), inputs["lora_b"])
    truth = gradients(_naive, double(inputs), None, scaling=0.5, total=True)[1]["lora_b"]
    close_to_scale(found, truth, "x frozen, lora_b (16, 4) trained: its gradient", rtol=1e-5)


def two_runs_are_equal(lora_linear):
    """pitfall 44: the same call gives the same bits, gradients too."""
    inputs, upstream = _layer(), torch.randn(10, 16)
    first, second = (gradients(lora_linear, inputs, upstream, scaling=0.5) for _ in range(2))
    same_bits(first[0], second[0], "x (10, 12) twice")
    for name in ("x", "lora_a", "lora_b"):
        same_bits(first[1][name], second[1][name], f"x (10, 12) twice: gradient of {name}")


def _layer() -> dict[str, Tensor]:
    shapes = {"x": (10, 12), "weight": (16, 12), "lora_a": (4, 12), "lora_b": (16, 4)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def _naive(x, weight, lora_a, lora_b, scaling, total=False):
    y = x @ weight.T + scaling * (x @ lora_a.T) @ lora_b.T
    return y.sum() if total else y


def _check_dtypes(lora_linear, x, base, adapter, *, autocast: bool) -> None:
    kinds = {"x": x, "weight": base, "lora_a": adapter, "lora_b": adapter}
    inputs = {name: tensor.to(kinds[name]) for name, tensor in _layer().items()}
    given = f"x {short(x)}, weight {short(base)}, adapter {short(adapter)}" + (", autocast" if autocast else "")
    truth = _naive(**double(inputs), scaling=0.5)
    leaf = inputs["lora_b"].requires_grad_()
    with torch.autocast(leaf.device.type, torch.bfloat16, enabled=autocast):
        got = lora_linear(*inputs.values(), scaling=0.5)
    wanted = torch.bfloat16 if autocast else base
    expect(got.dtype == wanted, given, short(wanted), short(got.dtype))
    close_to_scale(got, truth, given, rtol=0.03 if wanted == torch.bfloat16 else 1e-5)
    (gradient,) = torch.autograd.grad(got.float().sum(), leaf)
    expect(gradient.dtype == adapter, f"{given}: gradient of lora_b", short(adapter), short(gradient.dtype))
