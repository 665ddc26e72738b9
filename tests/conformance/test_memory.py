"""The loops' losses never form the logits of whole sequences."""

from __future__ import annotations

import pytest
import torch
from heads import small_blocks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from fastrl.data.batches import SFTBatch
from fastrl.models import response_logprobs
from fastrl.train.losses import sft_loss

VOCABULARY, BATCH, TOKENS, RESPONSE = 521, 6, 40, 10


class Largest(TorchDispatchMode):
    """The most elements that any result has whose last dimension is at least `columns`."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns, self.elements = columns, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] >= self.columns:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_eager_would_be_seen(model):
    with Largest(VOCABULARY) as largest:
        model(torch.zeros(BATCH, TOKENS, dtype=torch.long))
    assert largest.elements == BATCH * TOKENS * VOCABULARY


@pytest.mark.parametrize("loss", ["sft", "response"])
def test_losses_hold_one_block_of_logits(model, loss, monkeypatch):
    """T31, pitfall 42: forward and backward make nothing wider than one block of the vocabulary, of few rows."""
    small_blocks(monkeypatch, rows=8, columns=64)
    ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(ids, dtype=torch.bool)
    kept = torch.zeros_like(attention_mask)
    kept[:, -RESPONSE:] = True
    model.lm_head.weight.requires_grad_(False)
    with Largest(32 + 1) as largest:
        if loss == "sft":
            result = sft_loss(model, SFTBatch(ids, attention_mask, kept), denominator=int(kept.sum()))
        else:
            result = response_logprobs(model, ids, attention_mask, kept[:, -RESPONSE:], temperature=0.7).sum()
        result.backward()
    assert torch.isfinite(result) and result != 0
    assert 0 < largest.elements < RESPONSE * BATCH * VOCABULARY / 2
