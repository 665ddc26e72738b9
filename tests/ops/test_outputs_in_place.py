"""Outputs belong to the caller: they may be changed in place, and share no memory with others or what is saved."""

from __future__ import annotations

import pickle

import pytest
import torch
from conformance.calls import all_calls, flatten, label

from fastrl.ops import gae, ppo_advantages

CALLS = all_calls(backends=("reference", "cpu"))
DIFFERENTIABLE = [call for call in CALLS if call.leaves]


@pytest.mark.parametrize("call", DIFFERENTIABLE, ids=label)
def test_backward_after_outputs_were_zeroed(call):
    """As trainers zero dropped log-probs: gradients are those of outputs that were masked out of place."""
    tensors = {name: tensor for name, tensor in call.tensors.items() if not name.startswith("upstream")}

    def gradients(change):
        leaves = {name: tensors[name].clone().requires_grad_() for name in call.leaves}
        outputs = [y for y in flatten(call.run(**{**tensors, **leaves}, backend=call.backend)) if y.requires_grad]
        torch.autograd.backward(sum(change(y).sum() for y in outputs))
        return [leaf.grad for leaf in leaves.values()]

    def in_place(y):
        y[..., 0].zero_() if y.ndim else y.mul_(1.0)
        return y.clamp_(min=-2.0)

    def out_of_place(y):
        if y.ndim:
            y = torch.where(torch.arange(y.shape[-1]) == 0, 0, y)
        return y.clamp(min=-2.0)

    for found, want in zip(gradients(in_place), gradients(out_of_place), strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("call", CALLS, ids=label)
def test_outputs_share_no_memory(call):
    """No output of (B, R) or more is a view, so that none keeps its siblings alive or is pickled with them."""
    leaves = {name: call.tensors[name].clone().requires_grad_() for name in call.leaves}
    tensors = {name: t for name, t in call.tensors.items() if not name.startswith("upstream")} | leaves
    outputs = [y for y in flatten(call.run(**tensors, backend=call.backend)) if y.ndim]
    for y in outputs:
        assert y.untyped_storage().nbytes() == y.numel() * y.element_size()
        assert not y._is_view()
    assert len({y.untyped_storage().data_ptr() for y in outputs}) == len(outputs)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_pickles_hold_one_tensor(backend):
    x, mask = torch.zeros(64, 64), torch.ones(64, 64, dtype=torch.bool)
    size = len(pickle.dumps(x))
    advantages = ppo_advantages(x, x, x, x[0], mask, backend=backend)
    for tensor in (*gae(x, x, backend=backend), *advantages[:4]):
        assert len(pickle.dumps(tensor)) == pytest.approx(size, abs=64)
    for stat in advantages.stats:  # views of a dozen numbers, which may be changed alone
        stat.add_(1.0)
        assert len(pickle.dumps(stat)) < 1024


def test_outputs_made_without_gradients_are_no_views():
    """torch forbids to change a view that no_grad made once gradients are on again."""
    for call in DIFFERENTIABLE:
        tensors = {name: tensor for name, tensor in call.tensors.items() if not name.startswith("upstream")}
        with torch.no_grad():
            found = flatten(call.run(**tensors, backend=call.backend))
            outputs = [y for y in found if y.ndim and y.is_floating_point()]
        factor = torch.tensor(2.0, requires_grad=True)
        for y in outputs:
            y.mul_(factor).sum().backward()
        assert factor.grad is not None or not outputs, label(call)
