"""The mean cross-entropy from hidden states and the weight of the head."""

from __future__ import annotations

import torch

from fastrl.conformance.compare import (
    close,
    close_to_scale,
    double,
    expect,
    gradients,
    head_inputs,
    naive_loss,
    second_backward_of,
    weight_gradient_over_rows,
)


def gradients_of_the_mean(linear_cross_entropy):
    """T1, pitfall 31: the loss and its gradients are those of float64, for an upstream other than 1 too."""
    inputs = head_inputs(65, 24, 37)
    for scale in (1.0, -2.5):
        truth, wanted = gradients(naive_loss, double(inputs), torch.tensor(scale))
        got, found = gradients(linear_cross_entropy, inputs, torch.tensor(scale))
        given = f"hidden (65, 24), weight (37, 24) float32, upstream {scale:g}"
        close(got, truth, given)
        for name in ("hidden", "weight"):
            close_to_scale(found[name], wanted[name], f"{given}: gradient of {name}", rtol=1e-5)


def weight_gradient_of_the_mean(linear_cross_entropy):
    """T2: the gradient of a bfloat16 weight is summed in float32, whatever the number of rows."""
    weight_gradient_over_rows(linear_cross_entropy, naive_loss, torch.tensor(1.0))


def ignored_labels(linear_cross_entropy):
    """T8: label -100 does not count and has exactly zero gradient; the first and last tokens are labels like others."""
    inputs = head_inputs(9, 24, 37)
    inputs["token_ids"] = torch.tensor([-100, 0, 36, -100, 5, 0, 36, -100, 12])
    truth, wanted = gradients(naive_loss, double(inputs), torch.tensor(1.0))
    got, found = gradients(linear_cross_entropy, inputs, torch.tensor(1.0))
    given = f"labels {inputs['token_ids'].tolist()}, vocabulary 37"
    close(got, truth, given)
    close(found["hidden"], wanted["hidden"], f"{given}: gradient of hidden")
    dropped = found["hidden"][inputs["token_ids"] == -100]
    expect((dropped == 0).all(), f"{given}: gradient of ignored rows", 0, float(dropped.abs().max()))


def nothing_but_ignored_labels(linear_cross_entropy):
    """T8, pitfall 10: a batch whose labels are all -100 has loss 0 and zero gradients, not NaN."""
    inputs = head_inputs(4, 8, 11)
    inputs["token_ids"] = torch.full((4,), -100)
    got, found = gradients(linear_cross_entropy, inputs, torch.tensor(1.0))
    expect(bool(got == 0), "4 labels of -100: loss", 0, float(got))
    close(found["hidden"], torch.zeros(4, 8), "4 labels of -100: gradient of hidden", atol=0)


def second_backward_of_the_mean(linear_cross_entropy):
    """T13: hidden states are not written to, and a second backward gives the first's gradient or raises."""
    inputs = head_inputs(5, 24, 37)
    leaf = inputs["hidden"].clone().requires_grad_()
    loss = linear_cross_entropy(leaf, inputs["weight"], inputs["token_ids"]) * 3
    second_backward_of(loss, leaf, inputs["hidden"], "hidden (5, 24), weight (37, 24) float32, loss * 3")


def one_definition_of_the_loss(linear_cross_entropy, linear_logprobs):
    """T38, pitfall 32: the loss is the mean of the log-probs that the same project gives."""
    inputs = head_inputs(33, 24, 37)
    mean = -linear_logprobs(*inputs.values()).double().mean()
    close(linear_cross_entropy(*inputs.values()), mean, "hidden (33, 24), weight (37, 24) float32")


def micro_batches_add_up(linear_cross_entropy):
    """pitfall 16: ragged micro-batches, each divided by the whole batch's count, add up to the batch's gradient."""
    inputs = head_inputs(12, 24, 37)
    labels = torch.where(torch.tensor([1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1]).bool(), inputs["token_ids"], -100)
    truth, wanted = gradients(naive_loss, double(inputs | {"token_ids": labels}), torch.tensor(1.0))
    total = torch.zeros_like(inputs["weight"])
    for rows in (slice(0, 6), slice(6, 11), slice(11, 12)):
        part = {"hidden": inputs["hidden"][rows], "weight": inputs["weight"], "token_ids": labels[rows]}
        total += gradients(linear_cross_entropy, part, torch.tensor(1.0), denominator=6)[1]["weight"]
    close_to_scale(total, wanted["weight"], "5, 0 and 1 labels in three micro-batches: gradient of weight", rtol=1e-5)
