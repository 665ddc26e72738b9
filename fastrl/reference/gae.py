"""gae in plain torch: the reverse loop, any device, in float64 when an input is."""

from __future__ import annotations

import torch


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float,
    gae_lambda: float | torch.Tensor,
    dones: torch.Tensor | None,
    bootstrap_value: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastrl.ops.gae`; inputs have one dtype, gae_lambda is a number or (B,)."""
    advantages = torch.zeros_like(rewards)
    carry = rewards.new_zeros(rewards.shape[0])
    next_value = carry if bootstrap_value is None else bootstrap_value
    for t in reversed(range(rewards.shape[1])):
        keep, value = mask[:, t], values[:, t]
        if dones is not None:
            ends = dones[:, t] & keep
            next_value, carry = torch.where(ends, 0, next_value), torch.where(ends, 0, carry)
        advantage = rewards[:, t] + gamma * next_value - value + gamma * gae_lambda * carry
        # A dropped slot hands on what came from its right, as if it were not there.
        carry = torch.where(keep, advantage, carry)
        next_value = torch.where(keep, value, next_value)
        advantages[:, t] = torch.where(keep, advantage, 0)
    return advantages, torch.where(mask, advantages + values, 0)
