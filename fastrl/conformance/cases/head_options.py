"""What a head has beside its weight, the shapes it takes, and what it must not take for a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.conformance.compare import (
    close,
    close_to_scale,
    compiled,
    double,
    expect,
    gradients,
    head_inputs,
    naive_head,
    naive_logprobs,
)


def compiles(linear_logprobs):
    """T32: torch.compile(fullgraph=True) traces it, and the result is the same."""
    compiled(linear_logprobs, tuple(head_inputs(4, 24, 37).values()), "hidden (4, 24), weight (37, 24) float32")


def sharded_head(linear_logprobs):
    """T33: a head whose weight is elsewhere (ZeRO-3: an empty tensor) is an error, never a log-prob."""
    for shape in ((0,), (0, 8)):
        hidden, ids = torch.randn(3, 8), torch.zeros(3, dtype=torch.long)
        try:
            got = linear_logprobs(hidden, torch.empty(shape), ids)
        except (IndexError, RuntimeError, ValueError, TypeError):
            continue
        expect(not torch.isfinite(got).any(), f"weight of shape {shape}", "an error", float(got[0]))


def bias_of_the_head(linear_logprobs):
    """T34: the head's bias counts, or is refused."""
    inputs, bias = head_inputs(5, 24, 37), torch.randn(37)
    truth = naive_head(*double(inputs).values(), bias=bias.double())
    close(linear_logprobs(*inputs.values(), bias=bias), truth, "weight (37, 24), bias (37,)", atol=2e-5)


def softcap_of_the_head(linear_logprobs):
    """T34: a softcap on the logits counts, or is refused; its derivative too."""
    inputs = head_inputs(5, 24, 37)
    inputs["hidden"] *= 4
    truth, wanted = gradients(naive_head, double(inputs), torch.ones(5), softcap=3.0)
    got, found = gradients(linear_logprobs, inputs, torch.ones(5), softcap=3.0)
    close(got, truth, "hidden (5, 24), softcap 3", atol=2e-5)
    close_to_scale(found["hidden"], wanted["hidden"], "hidden (5, 24), softcap 3: gradient of hidden", rtol=2e-5)


def adapter_on_the_head(linear_logprobs):
    """T34, pitfall 30: LoRA on the head changes the log-probs and is trained, or is refused."""
    inputs = head_inputs(5, 24, 37)
    lora_a, lora_b = torch.randn(4, 24), torch.randn(37, 4, requires_grad=True)
    merged = inputs["weight"].double() + 0.5 * lora_b.detach().double() @ lora_a.double()
    got = linear_logprobs(*inputs.values(), lora=(lora_a, lora_b, 0.5))
    truth = naive_head(inputs["hidden"].double(), merged, inputs["token_ids"])
    close(got, truth, "weight (37, 24), lora r = 4", atol=1e-4)
    (gradient,) = torch.autograd.grad(got.sum(), lora_b)
    expect(bool((gradient != 0).any()), "weight (37, 24), lora r = 4: gradient of lora_b", "some", "zeros")


def tied_weights(linear_logprobs):
    """T34: a weight that is the embedding too gets both gradients."""
    ids = torch.tensor([3, 1, 4, 1, 5])

    def loss(function, weight: Tensor) -> Tensor:
        leaf = weight.clone().requires_grad_()
        function(leaf[ids], leaf, ids.flip(0)).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    weight = torch.randn(7, 8)
    truth = loss(naive_head, weight.double())
    close_to_scale(loss(linear_logprobs, weight), truth, "hidden = weight[ids], weight (7, 8): gradient", rtol=1e-5)


def one_temperature_on_both_paths(linear_logprobs, token_logprobs):
    """pitfall 26: at temperature 0.7 the head gives the log-probs that its logits give."""
    inputs = head_inputs(5, 24, 37)
    logits = inputs["hidden"] @ inputs["weight"].T
    truth = token_logprobs(logits, inputs["token_ids"], temperature=0.7).double()
    close(linear_logprobs(*inputs.values(), temperature=0.7), truth, "hidden (5, 24), temperature 0.7", atol=2e-5)
    exact = naive_logprobs(logits.double() / 0.7, inputs["token_ids"])
    close(truth, exact, "logits (5, 37), temperature 0.7", atol=2e-5)


def padded_and_packed_states(linear_logprobs):
    """pitfall 29: (B, T, H) and (M, H) states give the same log-probs."""
    inputs = head_inputs(6, 24, 37)
    truth = naive_head(*double(inputs).values())
    close(linear_logprobs(*inputs.values()), truth, "hidden (6, 24)", atol=2e-5)
    got = linear_logprobs(inputs["hidden"].view(2, 3, 24), inputs["weight"], inputs["token_ids"].view(2, 3))
    close(got, truth.view(2, 3), "hidden (2, 3, 24)", atol=2e-5)


def no_rows(linear_logprobs):
    """T24: no rows give no log-probs."""
    got = linear_logprobs(torch.randn(0, 24), torch.randn(37, 24), torch.zeros(0, dtype=torch.long))
    expect(got.shape == (0,), "hidden (0, 24)", "shape (0,)", tuple(got.shape))
