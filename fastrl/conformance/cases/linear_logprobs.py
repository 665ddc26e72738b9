"""Log-probs from hidden states and the weight of the head."""

from __future__ import annotations

import gc
import weakref

import torch

from fastrl.conformance.compare import (
    close,
    close_to_scale,
    double,
    expect,
    finite,
    gradients,
    head_inputs,
    layouts,
    naive_head,
    same_bits,
    second_backward_of,
    short,
    weight_gradient_over_rows,
)


def per_token_gradients(linear_logprobs):
    """T1, T17, pitfall 31, pitfall 48: each token is scored at its own position, in a batch that fills no chunk, and
    its own upstream reaches hidden states and weight."""
    for rows in (1, 5, 1031):
        inputs = head_inputs(rows, 24, 37)
        upstream = torch.randn(rows)
        truth, wanted = gradients(naive_head, double(inputs), upstream)
        got, found = gradients(linear_logprobs, inputs, upstream)
        given = f"hidden ({rows}, 24), weight (37, 24) float32"
        close(got, truth, given, atol=2e-5)
        for name in ("hidden", "weight"):
            close_to_scale(found[name], wanted[name], f"{given}, random upstream: gradient of {name}", rtol=1e-5)


def weight_gradient_over_many_rows(linear_logprobs):
    """T2: the gradient of a bfloat16 weight is summed in float32, whatever the number of rows."""
    weight_gradient_over_rows(linear_logprobs, naive_head, torch.ones(6000))


def odd_vocabularies(linear_logprobs):
    """T4, pitfall 23: any vocabulary size; a log-prob is never above 0."""
    for vocab in (1, 2, 127, 129, 1000, 32001):
        inputs = head_inputs(6, 8, vocab)
        inputs["hidden"][:3] *= 40  # sure of one token
        inputs["token_ids"] = (inputs["hidden"] @ inputs["weight"].T).argmax(-1)
        got, given = linear_logprobs(*inputs.values()), f"hidden (6, 8), weight ({vocab}, 8) float32"
        close(got, naive_head(*double(inputs).values()), given, rtol=1e-5, atol=1e-4)
        expect((got <= 0).all(), given, "log-probs <= 0", float(got.max()))


def gradient_near_probability_one(linear_logprobs):
    """T3: 1 - p keeps its digits in the gradient where p is 0.99, 0.999 or 0.9999."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.tensor([[1.0], [0.0]], dtype=dtype)
        hidden = torch.tensor([[4.59375], [6.90625], [9.1875]], dtype=dtype)
        inputs = {"hidden": hidden, "weight": weight, "token_ids": torch.zeros(3, dtype=torch.long)}
        _, truth = gradients(naive_head, double(inputs), torch.ones(3))
        _, got = gradients(linear_logprobs, inputs, torch.ones(3))
        close(got["hidden"], truth["hidden"], f"logits [z, 0] {short(dtype)}: gradient of hidden", rtol=0.012, atol=0)


def very_negative_rows(linear_logprobs):
    """T5: logits that are all far below 0."""
    hidden = torch.full((2, 1), -1e4)
    inputs = {"hidden": hidden, "weight": torch.ones(300, 1), "token_ids": torch.tensor([0, 299])}
    close(linear_logprobs(*inputs.values()), torch.full((2,), -5.703782), "300 float32 logits of -10000", atol=2e-3)


def common_offset(linear_logprobs):
    """T7: adding the same number to all logits changes nothing."""
    for offset in (-1e4, 1e4):
        hidden = torch.tensor([[offset, 1.0], [offset, -1.0]])
        weight = torch.cat([torch.ones(300, 1), torch.randint(-16, 16, (300, 1)) / 8], 1)
        inputs = {"hidden": hidden, "weight": weight, "token_ids": torch.tensor([0, 299])}
        truth = naive_head(*double(inputs).values())
        close(linear_logprobs(*inputs.values()), truth, f"300 float32 logits near {offset:g}", atol=2e-5)


def banned_tokens(linear_logprobs):
    """T6: a bias of -inf bans a whole block of tokens, wherever it is, and no gradient is NaN."""
    for start in (0, 500, 1096):
        inputs, bias = head_inputs(3, 8, 2096), torch.zeros(2096)
        bias[start : start + 1000] = -torch.inf
        inputs["token_ids"] = torch.tensor([2095 if start < 1000 else 0, 499, start + 5])
        given = f"weight (2096, 8) float32, bias -inf in [{start}, {start + 1000}), ids {inputs['token_ids'].tolist()}"
        truth = naive_head(*double(inputs).values(), bias=bias.double())
        got, found = gradients(linear_logprobs, inputs, torch.tensor([1.0, 1.0, 0.0]), bias=bias)
        close(got, truth, given, atol=2e-5)
        finite(found["hidden"], f"{given}: gradient of hidden")


def token_out_of_range(linear_logprobs):
    """T9: a token id outside the vocabulary is an error or no finite number, never a log-prob."""
    for token in (-1, 37, 10**6):
        inputs = head_inputs(4, 8, 37)
        inputs["token_ids"][1] = token
        try:
            got = linear_logprobs(*inputs.values())
        except (IndexError, RuntimeError, ValueError):
            continue
        expect(not torch.isfinite(got[1]), f"token id {token}, vocabulary 37", "an error, NaN or inf", float(got[1]))


def any_layout(linear_logprobs):
    """T10, T21: strided, transposed and unaligned tensors give what contiguous ones give."""
    inputs = head_inputs(6, 24, 37)
    truth = naive_head(*double(inputs).values())
    for name in inputs:
        for layout, same in layouts(inputs[name]):
            close(linear_logprobs(*(inputs | {name: same}).values()), truth, f"{name} as {layout}", atol=2e-5)


def second_backward(linear_logprobs):
    """T13: hidden states are not written to, and a second backward gives the first's gradient or raises."""
    inputs = head_inputs(5, 24, 37)
    leaf = inputs["hidden"].clone().requires_grad_()
    loss = linear_logprobs(leaf, inputs["weight"], inputs["token_ids"]).sum()
    second_backward_of(loss, leaf, inputs["hidden"], "hidden (5, 24), weight (37, 24) float32")


def two_runs_are_equal(linear_logprobs):
    """pitfall 44: the same call gives the same bits, gradients too."""
    inputs = head_inputs(200, 24, 999)
    first, second = (gradients(linear_logprobs, inputs, torch.ones(200)) for _ in range(2))
    same_bits(first[0], second[0], "hidden (200, 24), weight (999, 24) float32 twice")
    for name in ("hidden", "weight"):
        same_bits(first[1][name], second[1][name], f"hidden (200, 24), weight (999, 24) twice: gradient of {name}")


def half_precision_head(linear_logprobs):
    """T16, pitfall 35: log-probs of bfloat16 states and weights are summed in float32 and returned in float32."""
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in head_inputs(32, 64, 500).items()}
    got, given = linear_logprobs(*inputs.values()), "hidden (32, 64), weight (500, 64) bfloat16"
    largest = (inputs["hidden"].double() @ inputs["weight"].double().T).abs().max()
    expect(got.dtype == torch.float32, given, "float32 log-probs", got.dtype)
    # what rounding every logit to bfloat16 once can cost
    close(got, naive_head(*double(inputs).values()), given, atol=float(largest) * 2**-8)


def gradients_have_their_inputs_dtype(linear_logprobs):
    """T30: gradients of bfloat16 inputs are bfloat16, within a few roundings of float64."""
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in head_inputs(32, 64, 50).items()}
    _, truth = gradients(naive_head, double(inputs), torch.ones(32))
    _, got = gradients(linear_logprobs, inputs, torch.ones(32))
    for name in ("hidden", "weight"):
        given = f"hidden (32, 64), weight (50, 64) bfloat16: gradient of {name}"
        expect(got[name].dtype == torch.bfloat16, given, "bfloat16", got[name].dtype)
        close_to_scale(got[name], truth[name], given, rtol=0.02)


def nothing_is_kept_alive(linear_logprobs):
    """T36, pitfall 28: after backward the hidden states are freed."""
    inputs = head_inputs(5, 24, 37)
    leaf = inputs.pop("hidden").requires_grad_()
    alive = weakref.ref(leaf)
    linear_logprobs(leaf, *inputs.values()).sum().backward()
    del leaf
    gc.collect()
    expect(alive() is None, "hidden (5, 24) after backward, deleted by the caller", "freed", "still alive")


def improbable_tokens_keep_their_gradient(linear_logprobs):
    """T37: the weight's row of a token of probability 1e-14 gets its gradient as exactly as one of 1e-1."""
    weight = -torch.arange(130).div(4).expand(3, 130).T.contiguous()
    inputs = {"hidden": torch.eye(3), "weight": weight, "token_ids": torch.tensor([0, 1, 2])}
    _, truth = gradients(naive_head, double(inputs), torch.ones(3))
    _, got = gradients(linear_logprobs, inputs, torch.ones(3))
    close(got["weight"], truth["weight"], "logits 0 to -32 float32: gradient of weight", rtol=5e-5, atol=0)


def only_what_is_trained_gets_a_gradient(linear_logprobs):
    """pitfall 24: a frozen weight beside trained states, and trained weights beside frozen states."""
    inputs = head_inputs(5, 24, 37)
    for trained in ("hidden", "weight"):
        leaf = inputs[trained].clone().requires_grad_()
        got = linear_logprobs(*(inputs | {trained: leaf}).values())
        expect(got.requires_grad, f"only {trained} trained", "requires_grad", False)
        got.sum().backward()
        truth = gradients(naive_head, double(inputs), torch.ones(5))[1][trained]
        assert leaf.grad is not None
        close_to_scale(leaf.grad, truth, f"only {trained} trained: its gradient", rtol=1e-5)
