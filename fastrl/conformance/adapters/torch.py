"""Plain torch, written with care: shows that no case asks for more than torch can give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.conformance.adapter import Adapter


def adapters() -> list[Adapter]:
    return [
        Adapter(
            "torch",
            torch.__version__,
            token_logprobs=token_logprobs,
            entropy=entropy,
            linear_logprobs=linear_logprobs,
            linear_cross_entropy=linear_cross_entropy,
            lora_linear=lora_linear,
            gae=gae,
            kl=kl,
            kl_reward=kl_reward,
            kl_controller=kl_controller,
            whiten=whiten,
            ppo_loss=ppo_loss,
            ranking_loss=ranking_loss,
            sft_labels=sft_labels,
            pooled_scores=pooled_scores,
            sequence_logprobs=sequence_logprobs,
            resume=resume,
        )
    ]


def token_logprobs(logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0, softcap: float | None = None):
    x = logits.float()
    if softcap is not None:
        x = torch.where(x == -math.inf, x, softcap * torch.tanh(x / softcap))
    return (x / temperature).log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]


def entropy(logits: Tensor) -> Tensor:
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(torch.float32).min)).sum(-1)


def linear_logprobs(hidden, weight, token_ids, *, bias=None, lora=None, temperature=1.0, softcap=None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if lora is not None:
        lora_a, lora_b, scaling = lora
        logits = logits + scaling * F.linear(F.linear(hidden, lora_a), lora_b)
    return token_logprobs(logits, token_ids, temperature=temperature, softcap=softcap)


def linear_cross_entropy(hidden, weight, labels, *, denominator=None) -> Tensor:
    total = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
    return total / ((labels != -100).sum().clamp(min=1) if denominator is None else denominator)


def lora_linear(x, weight, lora_a, lora_b, scaling, *, bias=None, dropout=0.0) -> Tensor:
    base = F.linear(x, weight, bias)
    update = F.linear(F.linear(F.dropout(x, dropout).to(lora_a.dtype), lora_a), lora_b)
    return base + (update * scaling).to(base.dtype)


def gae(rewards, values, mask, gamma, gae_lambda) -> tuple[Tensor, Tensor]:
    advantages = torch.zeros_like(rewards)
    carry = following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        keep, value = mask[:, t], values[:, t]
        carry = torch.where(keep, rewards[:, t] + gamma * following - value + gamma * gae_lambda * carry, carry)
        following = torch.where(keep, value, following)
        advantages[:, t] = torch.where(keep, carry, 0)
    return advantages, torch.where(mask, advantages + values, 0)


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    d = logprobs - ref_logprobs
    bounded = d.clamp(min=-20)
    return {"k1": d, "k2": d**2 / 2, "k3": (torch.expm1(-bounded) + bounded).clamp(min=0)}[estimator]


def kl_reward(logprobs, ref_logprobs, scores, mask, kl_coef) -> Tensor:
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0) + torch.where(last, scores[:, None], 0)


def kl_controller(coef: float, kl: float, target: float, horizon: int, samples: int) -> float:
    return coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * samples / horizon)


def whiten(x: Tensor, mask: Tensor, *, center: bool = True) -> Tensor:
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, x, 0).sum() / count
    variance = torch.where(mask, (x - mean) ** 2, 0).sum() / count
    return torch.where(mask, (x - mean if center else x) * torch.rsqrt(variance + 1e-8), 0)


def ppo_loss(
    logprobs, values, old_logprobs, old_values, advantages, returns, mask, *, clip_coef, vf_clip_coef, vf_coef,
    denominator=None,
) -> Tensor:  # fmt: skip
    tensors = (logprobs, values, old_logprobs, old_values, advantages, returns)
    new, values, old, old_values, advantages, returns = (torch.where(mask, x, 0) for x in tensors)
    ratio = (new - old).clamp(-20, 20).exp()
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef))
    error = (values - returns) ** 2
    if vf_clip_coef is not None:
        near = values.clamp(old_values - vf_clip_coef, old_values + vf_clip_coef)
        error = torch.maximum(error, (near - returns) ** 2)
    terms = torch.where(mask, policy + vf_coef * error / 2, 0).sum()
    return terms / (mask.sum().clamp(min=1) if denominator is None else denominator)


def ranking_loss(chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None) -> Tensor:
    return -F.logsigmoid(chosen - rejected - (0 if margin is None else margin)).mean()


def sft_labels(tokenizer: Any, records: Sequence[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    examples = []
    for record in records:
        prompt, completion = (tokenizer(record[key])["input_ids"] for key in ("prompt", "completion"))
        target = [*completion, tokenizer.eos_token_id]
        examples.append(([*prompt, *target], [-100] * len(prompt) + target))
    return examples


def pooled_scores(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    columns = torch.arange(input_ids.shape[1])
    last = (columns * attention_mask).argmax(-1)
    hidden = model.model(**_inputs(input_ids, attention_mask)).last_hidden_state
    return model.score(hidden[torch.arange(len(last)), last])[:, 0]


def sequence_logprobs(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return token_logprobs(model(**_inputs(input_ids, attention_mask)).logits[:, :-1], input_ids[:, 1:])


def _inputs(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}


def resume(folder: Path, stop: int) -> list[Tensor]:
    """Weights, optimizer, generator and the order of the data are in the checkpoint."""
    path = folder / "state.pt"
    if stop:
        _steps(path, stop)
    return _steps(path, 6)


def _steps(path: Path, end: int) -> list[Tensor]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data, order, done = torch.randn(24, 8), torch.randperm(24), 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generator"])
        done = state["done"]
    for step in range(done, end):
        optimizer.zero_grad()
        model(data[order[4 * step : 4 * step + 4]]).square().mean().backward()
        optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": torch.get_rng_state()}
    torch.save({**state, "done": end}, path)
    return [p.detach() for p in model.parameters()]
