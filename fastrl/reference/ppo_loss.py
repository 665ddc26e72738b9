"""ppo_loss in plain torch: differentiable, in float64 when an input is."""

from __future__ import annotations

import torch

from fastrl.constants import MAX_LOG_RATIO
from fastrl.masked import explained_variance, masked_mean, masked_variance
from fastrl.reference.ppo_advantages import kl_estimate


def ppo_loss(
    logprobs: torch.Tensor,
    values: torch.Tensor,
    entropy: torch.Tensor | None,
    old_logprobs: torch.Tensor,
    old_values: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    denominator: torch.Tensor | None,
    clip_coef: float,
    vf_clip_coef: float | None,
    vf_coef: float,
    ent_coef: float,
    dual_clip: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, float32 vector in the order of PPOStats): see `fastrl.ops.ppo_loss`. Inputs have one dtype."""
    keep = [
        torch.where(mask, t, 0)  # before any arithmetic, so that no NaN reaches a gradient
        for t in (logprobs, values, old_logprobs, old_values, advantages, returns)
    ]
    logprobs, values, old_logprobs, old_values, advantages, returns = keep
    entropy = torch.zeros_like(values) if entropy is None else torch.where(mask, entropy, 0)

    log_ratio = logprobs - old_logprobs
    bounded = log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_ratio = torch.where(log_ratio.abs() > MAX_LOG_RATIO, bounded, log_ratio)  # NaN keeps its gradient
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_clipped = clipped > unclipped  # a tie takes the unclipped branch: ratio 1 gives the whole gradient -A
    policy = torch.where(policy_clipped, clipped, unclipped)
    if dual_clip is not None:
        bound = -dual_clip * advantages
        policy = torch.where((advantages < 0) & (policy > bound), bound, policy)

    error = (values - returns) ** 2
    value_clipped = torch.zeros_like(mask)
    if vf_clip_coef is not None:
        near = values.clamp(old_values - vf_clip_coef, old_values + vf_clip_coef)
        clipped_error = (near - returns) ** 2
        value_clipped = clipped_error > error
        error = torch.where(value_clipped, clipped_error, error)
    value = 0.5 * error

    terms = policy + vf_coef * value - ent_coef * entropy
    tokens = mask.sum()
    loss = torch.where(mask, terms, 0).sum() / (tokens.clamp(min=1) if denominator is None else denominator)
    with torch.no_grad():
        stats = [
            tokens,
            masked_mean(policy, mask),
            masked_mean(value, mask),
            masked_mean(entropy, mask),
            masked_mean(kl_estimate(-log_ratio, "k3"), mask),
            masked_mean(policy_clipped.to(values.dtype), mask),
            masked_mean(value_clipped.to(values.dtype), mask),
            masked_mean(ratio, mask),
            torch.cat([torch.where(mask, ratio, 0).flatten(), ratio.new_zeros(1)]).max(),
            explained_variance(
                masked_variance(returns - values, mask), masked_variance(returns, mask), masked_mean(returns, mask)
            ),
            masked_mean(-log_ratio, mask),
        ]
        return loss, torch.stack([s.float() for s in stats])
