"""The host waits for the GPU where that is documented and nowhere else; test_device.py asks a real one."""

from __future__ import annotations

import pytest
import torch
from conformance.calls import Call, all_calls, evaluate, label, moved
from gpu.waits import Waits, allowed
from gpus import HAS_GPU
from simulated_cuda import simulated_cuda, use_kernels

from fastrl.ops import ranking_loss

pytestmark = pytest.mark.skipif(HAS_GPU, reason="of the simulated device")


@pytest.fixture
def waits(monkeypatch):
    """Counts inside of the simulated device, whose kernels are those compiled for the host."""
    counter = Waits()
    counter.of_methods(monkeypatch)
    with simulated_cuda(monkeypatch), counter:
        yield counter


CALLS = all_calls(batch=4, tokens=9, backends=("cuda",))
CALLS += [call for call in all_calls(backends=("reference",)) if call.name == "ranking_loss"]  # what a GPU runs


@pytest.mark.parametrize("call", CALLS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_hot_path_never_waits(call: Call, dtype, host_cuda_kernels, waits, monkeypatch):
    """No .item(), no copy from or to the host, forward and backward, beyond what waits.py allows."""
    use_kernels(monkeypatch, host_cuda_kernels)
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in call.tensors.items()}
    tensors = moved(tensors, "cuda")
    waits.count = 0
    found = evaluate(call, tensors)
    assert waits.count <= allowed(call)
    assert all(value.is_cuda for value in found.values())


def test_a_rank_that_is_nan(host_cuda_kernels, waits, monkeypatch):
    """It makes the loss NaN, since a look at it would wait; with FASTRL_DEBUG=1 it is an error."""
    use_kernels(monkeypatch, host_cuda_kernels)
    monkeypatch.delenv("FASTRL_DEBUG", raising=False)
    scores, groups, ranks = (
        x.to("cuda") for x in (torch.randn(3), torch.zeros(3).long(), torch.tensor([0, 1, torch.nan]))
    )
    waits.count = 0
    loss, _ = ranking_loss(scores, groups, ranks)
    assert waits.count == 0 and loss.isnan().item()
    monkeypatch.setenv("FASTRL_DEBUG", "1")
    with pytest.raises(ValueError, match="ranking_loss: ranks: expected numbers, got nan"):
        ranking_loss(scores, groups, ranks)


WAYS = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).any()),
    "equal": lambda x: torch.equal(x, x + 0),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "a mask as index": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "from the host": lambda x: torch.ones(3).to("cuda"),
    "copy_": lambda x: x.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_wait_is_counted(way, waits):
    x = torch.arange(3.0, device="cuda")
    waits.count = 0
    (x * 2).to(torch.float16).clone()[1:].sum()
    assert waits.count == 0
    WAYS[way](x)
    assert waits.count == 1
