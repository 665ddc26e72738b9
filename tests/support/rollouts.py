"""Small batches of what trainers hand to a policy's loss and to GAE, with rows of every kind."""

from __future__ import annotations

import torch

MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],  # a hole, as of a tool's answer
        [0, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
)
WITHOUT_HOLES = torch.tensor([0, 1, 4, 5])  # rows of MASK


def policy_batch(seed=0):
    """(logprobs, old_logprobs, advantages): ratios on both sides of every bound, one advantage of 0."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(MASK.shape, generator=g) * 3
    logprobs = old + torch.randn(MASK.shape, generator=g)
    advantages = torch.randn(MASK.shape, generator=g)
    advantages[0, 3] = 0
    return logprobs.requires_grad_(), old, advantages


def critic_batch(seed=1):
    """(rewards, values)"""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(MASK.shape, generator=g), torch.randn(MASK.shape, generator=g)


def poisoned(x, mask=MASK):
    """`x` with NaN where nothing is kept."""
    return torch.where(mask.bool(), x.detach(), torch.nan)


def gradient(loss, logprobs):
    return torch.autograd.grad(loss, logprobs)[0]
