"""A patched PEFT model under torch.compile: one graph, eager's numbers."""

import pytest
import torch
from peft_models import losses, tiny_llama, with_lora
from torch._dynamo.utils import counters

import fastrl
from fastrl.models import fused_linear

pytestmark = [pytest.mark.hosts, pytest.mark.slow]


@pytest.mark.parametrize("path", ["the op", "a small batch"])
def test_a_patched_model_trains_in_one_graph(path, monkeypatch):
    """T32: no graph breaks, forward or backward; losses of three AdamW steps as in eager mode, to 1e-5."""
    if path == "the op":
        monkeypatch.setattr(fused_linear, "_line_is_faster", lambda *_: False)
    torch.compiler.reset()
    counters.clear()
    eager = losses(patched(), 3)
    compiled = torch.compile(patched(), fullgraph=True, backend="aot_eager")
    assert losses(compiled, 3) == pytest.approx(eager, rel=1e-5)
    assert eager[-1] < eager[0]
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def patched():
    model = with_lora(tiny_llama(layers=1))
    fastrl.patch(model)
    return model
