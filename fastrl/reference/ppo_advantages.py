"""ppo_advantages in plain torch: KL penalty, reward, GAE, whitening, statistics; one readable line each."""

from __future__ import annotations

import torch

from fastrl.constants import MAX_LOG_RATIO, WHITEN_EPS
from fastrl.masked import explained_variance, masked_mean, masked_variance
from fastrl.reference.gae import gae


def kl_estimate(k1: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from k1 = logprobs - ref_logprobs, tokens drawn from the policy."""
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return 0.5 * k1**2
    # e^-k1 - 1 + k1 is never negative; expm1 keeps its digits for small k1.
    return (torch.expm1((-k1).clamp(max=MAX_LOG_RATIO)) + k1).clamp(min=0)


def shaped_rewards(
    kl: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, kl_coef: float, score_clip: float | None
) -> torch.Tensor:
    """-kl_coef * kl per kept token, plus the score on the last kept token."""
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    penalty = -kl_coef * kl
    return torch.where(mask, torch.where(last, penalty + scores[:, None], penalty), 0)


def moments(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(n, mean, M2) of the kept elements in float64; M2 is the sum of squared deviations."""
    x = torch.where(mask, x, 0).double()
    mean = masked_mean(x, mask)
    return torch.stack([mask.sum().double(), mean, torch.where(mask, (x - mean) ** 2, 0).sum()])


def whiten(advantages: torch.Tensor, mask: torch.Tensor, stats: torch.Tensor, center: bool, scale: bool):
    """(A - mean if center) / (sqrt(population variance + 1e-8) if scale), with `stats` as `moments` gives them."""
    n, mean, m2 = stats.unbind()
    if center:
        advantages = advantages - mean.to(advantages.dtype)
    if scale:
        advantages = advantages * torch.rsqrt(m2 / n.clamp(min=1) + WHITEN_EPS).to(advantages.dtype)
    return torch.where(mask, advantages, 0)


def ppo_advantages(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    mask: torch.Tensor,
    kl_coef: float,
    kl_estimator: str,
    kl_clip: float | None,
    score_clip: float | None,
    gamma: float,
    gae_lambda: float,
):
    """(unwhitened advantages, returns, rewards, kl, moments (3,), stats): see `fastrl.ops.ppo_advantages`.

    Inputs have one dtype; `stats` is a float32 vector in the order of AdvantageStats.
    """
    unclipped = torch.where(mask, kl_estimate(logprobs - ref_logprobs, kl_estimator), 0)
    kl = unclipped if kl_clip is None else unclipped.clamp(-kl_clip, kl_clip)
    rewards = shaped_rewards(kl, scores, mask, kl_coef, score_clip)
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda, None, None)

    rows = mask.any(-1)
    return_mean = masked_mean(returns, mask)
    return_variance, advantage_variance = masked_variance(returns, mask), masked_variance(advantages, mask)
    stats = [
        mask.sum(),
        rows.sum(),
        masked_mean(unclipped, mask),
        masked_mean(unclipped.sum(-1), rows),
        masked_mean(rewards.sum(-1), rows),
        masked_mean(scores, rows),
        masked_mean(values, mask),
        return_mean,
        return_variance,
        masked_mean(advantages, mask),
        advantage_variance.sqrt(),
        explained_variance(advantage_variance, return_variance, return_mean),  # returns - values = advantages
    ]
    return advantages, returns, rewards, kl, moments(advantages, mask), torch.stack([s.float() for s in stats])
