"""KL of the policy to the reference: how its coefficient adapts, and the KL as a term of the loss.

In the reward (`kl_in: reward`, Ziegler et al. 2019) the KL is data: `ppo_advantages` takes it off each token's reward,
and the policy gradient carries it. In the loss (`kl_in: loss`, as GRPO has it) it is differentiated itself:
`kl_penalty`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.constants import MAX_LOG_RATIO

LOSS_ESTIMATORS = ("k2", "k3")
MAX_ERROR = 0.2


def adapted(coef: float, kl: float, *, target: float, horizon: int, samples: int) -> float:
    """The coefficient, or a factor of it, after `samples` responses had a mean KL of `kl` under `coef`.

        error = clip(kl / target - 1, -0.2, 0.2),   coef * (1 + error * samples / horizon)

    Args:
        kl: nats per response, the one that is reported (`kl_k1` and its like), before any clipping.
        target: > 0, nats per response.
        horizon: samples in which the coefficient can grow by a fifth; at least `samples`, so that it stays positive.
    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2, with K_beta = samples / horizon as in its code.
    """
    error = min(max(kl / target - 1, -MAX_ERROR), MAX_ERROR)
    return coef * (1 + error * samples / horizon)


def kl_penalty(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, estimator: str, denominator: float | Tensor
) -> Tensor:
    """Sum of a per-token estimate of KL(policy || reference) over the kept tokens / denominator, differentiable.

        d = logprobs - ref_logprobs,   k2 = d^2 / 2,   k3 = exp(-d) - 1 + d

    Over tokens of the policy, the gradient of k2 is that of KL(policy || reference) in expectation, the one of k3 is
    that of KL(reference || policy): both vanish where the two agree, and both pull towards the reference. k1 = d has
    the gradient of log p, whose expectation is 0: it would be noise and no penalty, so it is refused.

    Args:
        logprobs, ref_logprobs: (B, R); no gradient flows into the latter.
        mask: (B, R) bool, True = keep. Dropped slots may hold anything.
        denominator: positive; of micro-batches the kept tokens of the whole batch.
    Raises:
        ValueError: another estimator.
    Numerics: d is bounded below by -20 (gradient 0 beyond), as the ratio in `ppo_loss` is.
    """
    if estimator not in LOSS_ESTIMATORS:
        raise ValueError(
            f"kl_penalty: estimator: expected k2 or k3, got {estimator!r}"
            + (": its gradient is 0 in expectation" if estimator == "k1" else "")
        )
    difference = torch.where(mask, logprobs - ref_logprobs.detach(), 0).clamp(min=-MAX_LOG_RATIO)
    if estimator == "k2":
        penalty = 0.5 * difference**2
    else:
        penalty = torch.expm1(-difference) + difference
    return penalty.sum() / denominator
