"""The clipped policy loss as verl and OpenRLHF weight and average it, on `fastrl.ops.ppo_loss`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.ops import PPOStats, ppo_loss


class Clipped(NamedTuple):
    """What `clipped_policy_loss` returns; the statistics are means over the kept tokens, detached."""

    loss: Tensor
    clip_frac: Tensor  # share of tokens whose term took the clipped branch
    kl: Tensor  # mean of old_logprobs - logprobs, each bounded to +-20


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    denominator: float | Tensor | None,
) -> Clipped:
    """Sum over the kept tokens of max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)) / denominator.

    r = exp(logprobs - old_logprobs), and `dual_clip` c bounds the term at -c A where A < 0. The term grows in
    proportion to A, so a weight of a token or row that is not negative can be multiplied into `advantages`.

    `ppo_loss` has one bound. A token whose A is negative never meets the upper one, and any other never the lower one,
    so two bounds are two calls, each on its own tokens.
    """
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    if clip_low == clip_high:
        loss, stats = _one_bound(logprobs, old_logprobs, advantages, mask, clip_low, dual_clip, denominator)
        return Clipped(loss, stats.clip_frac, stats.kl)
    falls = advantages < 0  # NaN is on the other side, and makes the loss NaN
    low, below = _one_bound(logprobs, old_logprobs, advantages, mask & falls, clip_low, dual_clip, denominator)
    high, above = _one_bound(logprobs, old_logprobs, advantages, mask & ~falls, clip_high, None, denominator)
    share = below.tokens / (below.tokens + above.tokens).clamp(min=1)
    return Clipped(
        low + high,
        share * below.clip_frac + (1 - share) * above.clip_frac,
        share * below.kl + (1 - share) * above.kl,
    )


def _one_bound(logprobs, old_logprobs, advantages, mask, clip, dual_clip, denominator) -> tuple[Tensor, PPOStats]:
    """The policy's part of `ppo_loss`."""
    unused = torch.zeros_like(advantages)  # values and returns
    return ppo_loss(
        logprobs, unused, old_logprobs, unused, advantages, unused, mask, clip_coef=clip, vf_clip_coef=None,
        vf_coef=0.0, dual_clip=dual_clip, denominator=denominator,
    )  # fmt: skip
