"""Gradients that a forward pass has formed, times the upstream: as by a plain product, in place where that is safe."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.ops import linear_cross_entropy, ppo_loss

V, H = 300, 16


def head_loss(weight):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, H, generator=generator).to(weight.dtype)
    return linear_cross_entropy(hidden, weight, torch.arange(7), backend="cpu")


def head(dtype=torch.float32):
    return torch.randn(V, H, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.0, -0.3, 65536.0, float("nan")])
def test_any_upstream(dtype, factor):
    weight = head(dtype)
    (unscaled,) = torch.autograd.grad(head_loss(weight), weight)
    (found,) = torch.autograd.grad(head_loss(weight), weight, torch.tensor(factor))
    torch.testing.assert_close(found, (unscaled.float() * factor).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_a_graph_that_is_kept_gives_the_same_again():
    weight = head()
    loss = head_loss(weight)
    (first,) = torch.autograd.grad(loss, weight, torch.tensor(2.0), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, weight, torch.tensor(2.0), retain_graph=True)
    first.zero_()
    (third,) = torch.autograd.grad(loss, weight)
    assert kept.equal(second) and kept.equal(2 * third)


def test_a_graph_of_gradients_that_is_not_kept():
    weight = head()
    (expected,) = torch.autograd.grad(head_loss(weight), weight, torch.tensor(3.0))
    upstream = torch.tensor(3.0)
    (found,) = torch.autograd.grad(head_loss(weight), weight, upstream, create_graph=True, retain_graph=False)
    assert found.equal(expected)
    with pytest.raises(RuntimeError, match="second derivative"):
        found.sum().backward()


def test_backward_of_the_loss_makes_nothing_as_large_as_the_weight():
    weight = head()
    loss = head_loss(weight)
    with Made() as made:
        loss.backward()
    assert weight.grad is not None and max(made.sizes, default=0) < V * H
    again = head_loss(weight)
    with Made() as made:
        again.backward(retain_graph=True)
    assert max(made.sizes) == V * H  # so it is seen


class Made(TorchDispatchMode):
    """Sizes of the tensors that operators return and did not get."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.data_ptr() not in {
            a.data_ptr() for a in args if isinstance(a, torch.Tensor)
        }:
            self.sizes.append(out.numel())
        return out


def test_micro_batches_add_up():
    """The second backward pass adds to a gradient that the first handed over."""
    weight = head()
    (head_loss(weight) / 2).backward()
    (head_loss(weight) / 2).backward()
    (whole,) = torch.autograd.grad(head_loss(weight), weight)
    torch.testing.assert_close(weight.grad, whole)


def test_several_upstreams_at_once():
    """is_grads_batched: the backward pass runs once, under vmap."""
    row = torch.linspace(-1, 1, 12).view(2, 6)
    leaf = row.clone().requires_grad_()
    loss, _ = ppo_loss(leaf, row, row - 0.1, row, row, row, torch.ones(2, 6, dtype=torch.bool), backend="cpu")
    (found,) = torch.autograd.grad(loss, leaf, torch.tensor([1.0, 2.0, 0.5]), retain_graph=True, is_grads_batched=True)
    (one,) = torch.autograd.grad(loss, leaf)
    assert found.equal(torch.stack([one, 2 * one, 0.5 * one]))


def test_gradients_of_two_inputs():
    row = torch.linspace(-1, 1, 12).view(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    found = []
    for factor in (1.0, 0.25):
        leaves = row.clone().requires_grad_(), (row + 1).requires_grad_()
        loss, _ = ppo_loss(*leaves, row - 0.1, row, row.flip(0), row.flip(1), mask, backend="cpu")
        found.append(torch.autograd.grad(factor * loss, leaves))
    assert all(b.equal(0.25 * a) for a, b in zip(*found, strict=True))
