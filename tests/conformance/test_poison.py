"""Nothing that was never written and nothing that the mask drops reaches a result."""

from __future__ import annotations

import pytest
import torch
from conformance.calls import Call, all_calls, assert_same, evaluate, label
from torch.utils import deterministic

CALLS = all_calls()
MASKED = [call for call in CALLS if "mask" in call.tensors]


@pytest.fixture
def unwritten_memory_is_nan():
    """torch fills what empty() returns: NaN in floats, the largest value in integers."""
    assert deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_unwritten_memory_is_nan(unwritten_memory_is_nan):
    like = torch.zeros(7)
    for tensor in (torch.empty(7), like.new_empty(7), torch.empty_like(like)):
        assert tensor.isnan().all()


@pytest.mark.parametrize("call", CALLS, ids=label)
def test_every_output_is_written(call: Call, unwritten_memory_is_nan):
    """T20, pitfall 9: buffers start as NaN, so a slot that a kernel skips would show; the mask drops a whole row."""
    found = evaluate(call)
    torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert_same(call, found, evaluate(call), 1e-6, "poisoned buffers")


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("call", MASKED, ids=label)
def test_dropped_slots_may_hold_anything(call: Call, poison: float):
    """T8, T20, pitfalls 9, 10, 38: in every input and upstream; same bits as with zeros there, and 0 where dropped."""
    mask = call.tensors["mask"]
    results = []
    for value, token in ((0.0, 0), (poison, -100), (poison, 2**40)):
        tensors = {name: tensor.clone() for name, tensor in call.tensors.items()}
        for name, tensor in tensors.items():
            if name in call.per_token or name.startswith("upstream"):
                tensor[~mask] = value
            elif name in call.per_row:
                tensor[~mask.any(1)] = value
        if "ids" in tensors:
            tensors["ids"][~mask] = token
        if "dones" in tensors:
            tensors["dones"][~mask] = bool(token)
        results.append(evaluate(call, tensors))
    for name, clean in results[0].items():
        assert torch.isfinite(clean).all()
        for dirty in results[1:]:
            assert torch.equal(dirty[name], clean), f"{label(call)}: {name}"
        if clean.shape[:2] == mask.shape:
            assert (clean[~mask] == 0).all(), f"{label(call)}: {name} is not 0 where dropped"


@pytest.mark.parametrize("call", MASKED, ids=label)
def test_nothing_kept(call: Call):
    """T8, T25, pitfalls 10, 13: no kept token at all: zeros, no 0 / 0, whatever the dropped slots hold."""
    tensors = {name: tensor.clone() for name, tensor in call.tensors.items()}
    tensors["mask"] = torch.zeros_like(tensors["mask"])
    for name in (*call.per_token, *call.per_row):
        tensors[name].fill_(torch.nan)
    for name, value in evaluate(call, tensors).items():
        assert (value == 0).all(), f"{label(call)}: {name}"
