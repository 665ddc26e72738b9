"""Tiny PEFT models, and the same ones patched: results and gradients side by side."""

import copy

import peft
import torch
import transformers
from torch import nn

import fastrl
from fastrl.models import fused_linear

IDS = torch.tensor([[5, 9, 2, 7, 1], [3, 3, 8, 0, 6]])


def tiny_llama(dtype=torch.float32, layers=2):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype)


def with_lora(model=None, *, adapter_dtype=True, names=("default",), **options):
    """A PEFT model whose adapters change the output."""
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    config = peft.LoraConfig(**options)
    model = peft.get_peft_model(
        model or tiny_llama(), config, adapter_name=names[0], autocast_adapter_dtype=adapter_dtype
    )
    for name in names[1:]:
        model.add_adapter(name, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def pair(**options):
    """(PEFT's own model, the same one patched, what patch returned)."""
    model = with_lora(**options)
    patched = copy.deepcopy(model)
    return model, patched, fastrl.patch(patched)


def results(model, ids=IDS, **inputs):
    logits = model(ids, **inputs).logits
    model.zero_grad()
    logits.float().log_softmax(-1)[..., 3].sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def losses(model, steps):
    """Those of AdamW steps on IDS."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def assert_same(model, patched, **inputs):
    (want, want_grads), (got, grads) = results(model, **inputs), results(patched, **inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert grads.keys() == want_grads.keys() and len(grads) > 0
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-3, atol=1e-5, msg=name)


def fused_calls(monkeypatch):
    """A list that gets the options of every call of the fused op that a patched layer makes, at any size."""
    seen, lora_linear = [], fused_linear.lora_linear

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return lora_linear(*args, **kwargs)

    monkeypatch.setattr(fused_linear, "lora_linear", spy)
    monkeypatch.setattr(fused_linear, "_line_is_faster", lambda *_: False)
    return seen
