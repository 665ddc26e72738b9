"""The clipped policy and value loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl.conformance.compare import close, close_to_scale, double, expect, finite, gradients, second_backward_of

OPTIONS: dict[str, Any] = {"clip_coef": 0.2, "vf_clip_coef": 0.2, "vf_coef": 0.1}
TRAINED = ("logprobs", "values")
POLICY = OPTIONS | {"vf_coef": 0.0}


def closed_form(ppo_loss):
    """pitfall 37, pitfall 31: the loss and its gradients; the value loss has its factor 1/2 once."""
    inputs, mask = _batch()
    truth, wanted = gradients(_naive, double(inputs), None, of=TRAINED, mask=mask, **OPTIONS)
    got, found = gradients(ppo_loss, inputs, None, of=TRAINED, mask=mask, **OPTIONS)
    close(got, truth, "3 responses of 7, 4 and 1 tokens, clip 0.2, vf_coef 0.1")
    for name in ("logprobs", "values"):
        close_to_scale(found[name], wanted[name], f"3 responses of 7, 4 and 1 tokens: gradient of {name}", rtol=1e-5)


def policy_loss_in_closed_form(ppo_loss):
    """pitfall 31, pitfall 39: the policy loss alone: a mean over kept tokens, ratios clipped on the worse side."""
    inputs, mask = _batch()
    truth, wanted = gradients(_naive, double(inputs), None, of=("logprobs",), mask=mask, **POLICY)
    got, found = gradients(ppo_loss, inputs, None, of=("logprobs",), mask=mask, **POLICY)
    close(got, truth, "3 responses of 7, 4 and 1 tokens, clip 0.2, vf_coef 0")
    close_to_scale(found["logprobs"], wanted["logprobs"], "3 responses of 7, 4 and 1 tokens: gradient", rtol=1e-5)


def before_any_update(ppo_loss):
    """pitfall 1: where old and new log-probs agree the loss is -mean(A) and its gradient -A / n."""
    inputs, mask = _batch()
    inputs["logprobs"] = inputs["old_logprobs"].clone()
    got, found = gradients(ppo_loss, inputs, None, of=("logprobs",), mask=mask, **POLICY)
    kept, count = torch.where(mask, inputs["advantages"].double(), 0), int(mask.sum())
    close(got, -kept.sum() / count, "logprobs == old_logprobs, 12 kept tokens", atol=1e-6)
    close(found["logprobs"], -kept / count, "logprobs == old_logprobs, 12 kept tokens: gradient", atol=1e-6)


def padding(ppo_loss):
    """T20, pitfall 9, pitfall 38: padding may hold NaN; the loss does not see it, its gradient is exactly 0."""
    inputs, mask = _batch()
    truth, wanted = gradients(_naive, double(inputs), None, of=("logprobs",), mask=mask, **POLICY)
    poisoned = {name: x.masked_fill(~mask, torch.nan) for name, x in inputs.items()}
    got, found = gradients(ppo_loss, poisoned, None, of=("logprobs",), mask=mask, **POLICY)
    close(got, truth, "responses of 7, 4 and 1 tokens, NaN behind")
    behind = found["logprobs"][~mask]
    expect((behind == 0).all(), "NaN behind: gradient of padding", 0, behind[0].item())
    close_to_scale(found["logprobs"], wanted["logprobs"], "NaN behind: gradient of logprobs", rtol=1e-5)


def padding_of_values(ppo_loss):
    """T20, pitfall 9: padding of the values may hold NaN; its gradient is exactly 0, that of the others is finite."""
    inputs, mask = _batch()
    poisoned = {name: x.masked_fill(~mask, torch.nan) for name, x in inputs.items()}
    got, found = gradients(ppo_loss, poisoned, None, of=TRAINED, mask=mask, **OPTIONS)
    finite(got, "responses of 7, 4 and 1 tokens, NaN behind")
    finite(found["values"], "NaN behind: gradient of values")
    behind = found["values"][~mask]
    expect((behind == 0).all(), "NaN behind: gradient of values of padding", 0, behind[0].item())


def extra_padding(ppo_loss):
    """pitfall 39: means are over kept tokens: more padding changes nothing."""
    inputs, mask = _batch()
    wider = {name: torch.nn.functional.pad(x, (0, 5), value=3.0) for name, x in inputs.items()}
    alone = ppo_loss(**inputs, mask=mask, **POLICY).double()
    got = ppo_loss(**wider, mask=torch.nn.functional.pad(mask, (0, 5)), **POLICY)
    close(got, alone, "responses of 7, 4 and 1 tokens with 5 more columns of padding", atol=1e-6)


def nothing_kept(ppo_loss):
    """pitfall 10: a batch that keeps nothing has a finite loss and zero gradients."""
    inputs, mask = _batch()
    got, found = gradients(ppo_loss, inputs, None, of=("logprobs",), mask=torch.zeros_like(mask), **POLICY)
    finite(got, "a mask that drops everything: loss")
    close(found["logprobs"], torch.zeros(3, 7), "a mask that drops everything: gradient", atol=0)


def banned_token(ppo_loss):
    """T18: a sampled token that the new policy bans (log-prob -inf) leaves loss and gradient finite."""
    for dropped in (True, False):
        inputs, mask = _batch()
        inputs["logprobs"][0, 2], mask[0, 2] = -torch.inf, not dropped
        got, found = gradients(ppo_loss, inputs, None, of=("logprobs",), mask=mask, **POLICY)
        given = f"logprobs[0, 2] = -inf, {'dropped' if dropped else 'kept'}"
        finite(got, given)
        finite(found["logprobs"], f"{given}: gradient")


def extreme_log_ratios(ppo_loss):
    """T19: log-ratios of +-200 give a finite gradient, and the exact loss where the clipped branch counts."""
    for sign in (1.0, -1.0):
        inputs, mask = _batch()
        inputs["logprobs"] = inputs["old_logprobs"] + torch.tensor([200.0, 20.0, 0.0, -20.0, -200.0, 0.0, 0.0])
        inputs["advantages"] = torch.full_like(inputs["advantages"], sign)
        mask[:, 2:] = False
        if sign < 0:
            mask = torch.zeros_like(mask)
            mask[:, 3:5] = True
        got, found = gradients(ppo_loss, inputs, None, of=("logprobs",), mask=mask, **POLICY)
        given = f"log-ratios {'200 20' if sign > 0 else '-20 -200'}, advantages {sign:g}"
        close(got, torch.tensor(-1.2 if sign > 0 else 0.8).double(), given)
        finite(found["logprobs"], f"{given}: gradient")


def extreme_log_ratios_in_padding(ppo_loss):
    """T19: a log-ratio of 200 in padding does not become inf * 0."""
    inputs, mask = _batch()
    inputs["logprobs"] = torch.where(mask, inputs["logprobs"], inputs["old_logprobs"] + 200)
    truth = _naive(**double(inputs), mask=mask, **POLICY)
    got, found = gradients(ppo_loss, inputs, None, of=("logprobs",), mask=mask, **POLICY)
    close(got, truth, "a log-ratio of 200 in padding")
    finite(found["logprobs"], "a log-ratio of 200 in padding: gradient")


def second_backward(ppo_loss):
    """T13: inputs are not written to, and a second backward gives the first's gradient or raises."""
    inputs, mask = _batch()
    leaf = inputs["logprobs"].clone().requires_grad_()
    loss = ppo_loss(**(inputs | {"logprobs": leaf}), mask=mask, **POLICY) * 3
    second_backward_of(loss, leaf, inputs["logprobs"], "logprobs (3, 7), loss * 3")


def micro_batches_add_up(ppo_loss):
    """pitfall 11, pitfall 16: ragged micro-batches, each divided by the whole batch's count, add up to its gradient."""
    inputs, mask = _batch()
    wanted = gradients(_naive, double(inputs), None, of=TRAINED, mask=mask, **OPTIONS)[1]
    options = OPTIONS | {"denominator": int(mask.sum())}
    found = []
    for row in range(3):
        part = {name: x[row : row + 1] for name, x in inputs.items()}
        found.append(gradients(ppo_loss, part, None, of=TRAINED, mask=mask[row : row + 1], **options)[1])
    for name in TRAINED:
        total = torch.cat([gradient[name] for gradient in found])
        close_to_scale(total, wanted[name], f"micro-batches of 7, 4 and 1 tokens: gradient of {name}", rtol=1e-5)


def _batch() -> tuple[dict[str, Tensor], Tensor]:
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    logprobs, values = -torch.rand(3, 7) * 3, torch.randn(3, 7)
    inputs = {
        "logprobs": logprobs,
        "values": values,
        "old_logprobs": logprobs + torch.randn(3, 7) * 0.4,
        "old_values": values + torch.randn(3, 7) * 0.4,
        "advantages": torch.randn(3, 7),
        "returns": torch.randn(3, 7),
    }
    return inputs, mask


def _naive(
    logprobs, values, old_logprobs, old_values, advantages, returns, mask, *, clip_coef, vf_clip_coef, vf_coef
) -> Tensor:
    ratio = (logprobs - old_logprobs).exp()
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef))
    near = torch.maximum(torch.minimum(values, old_values + vf_clip_coef), old_values - vf_clip_coef)
    value = 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)
    return torch.where(mask, policy + vf_coef * value, 0).sum() / mask.sum()
