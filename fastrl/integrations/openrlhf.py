"""OpenRLHF: log-probs of logits, GAE and the clipped policy loss, with OpenRLHF's arguments and results.

`patch()` puts them into OpenRLHF in this process; each also works alone, and none needs OpenRLHF to be installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fastrl.integrations.clipped import clipped_policy_loss
from fastrl.integrations.hosts import check_installed, check_signature, swap, warn_untested
from fastrl.ops import gae, token_logprobs

OLDEST, NEWEST = "0.11.2", "0.11.2"  # tested

_originals: dict[str, Callable[..., Any]] = {}  # OpenRLHF's own functions, while the patch is on


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """openrlhf.models.utils.log_probs_from_logits: (..., V) logits, (...) labels -> (...) log-probs.

    Equals ``(logits / temperature).log_softmax(-1).gather(-1, labels[..., None])[..., 0]``.

    Differs: the result is float32 for logits in half precision, where OpenRLHF rounds it to theirs; the logits are left
    as they are, where OpenRLHF divides them by a temperature other than 1 in place.
    """
    return cast(Tensor, token_logprobs(logits, labels, temperature=temperature))


def get_advantages_and_returns(
    values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """RemoteExperienceMaker.get_advantages_and_returns: (advantages, returns), each (B, R), not whitened.

    A dropped token has reward and value 0 and is a step like any other: over a hole in the middle of a row the
    advantage decays, and the token before it sees a next value of 0. `fastrl.ops.gae` with the mask passes over holes
    instead; both are equal where the kept tokens of a row have no holes between them, or gamma = lambd = 1.

    Differs: a dropped slot may be NaN.
    """
    if action_mask is not None:
        keep = action_mask.bool()
        values, rewards = torch.where(keep, values, 0), torch.where(keep, rewards, 0)
    return gae(rewards, values, gamma=gamma, gae_lambda=lambd)


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    *,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    dual_clip: float | None = None,
    token_level_loss: bool = True,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """openrlhf.models.PolicyLoss of the type "ppo" without a correction: (loss, clip_ratio, ppo_kl).

    The loss is a mean over tokens, or, without `token_level_loss`, over rows of the mean over a row's tokens; divided
    by the global count and times dp_size where one is given. Rows without a token do not count.

    Differs: a batch without a token gives 0 for all three, where OpenRLHF divides 0 by 0; a dropped slot may be NaN.
    """
    mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask.bool()
    tokens = mask.sum(-1, keepdim=True)
    if token_level_loss:
        weighted, own, count = advantages, tokens.sum(), batch_num_tokens
    else:
        weighted, own, count = advantages / tokens.clamp(min=1), (tokens > 0).sum(), global_batch_size
    loss, clip_ratio, _ = clipped_policy_loss(
        log_probs, old_log_probs, weighted, mask, clip_low=clip_eps_low, clip_high=clip_eps_high, dual_clip=dual_clip,
        denominator=own.clamp(min=1) if count is None else count / dp_size,
    )  # fmt: skip
    with torch.no_grad():  # not bounded to +-20, as OpenRLHF's
        kl = torch.where(mask, old_log_probs - log_probs, 0).sum() / tokens.sum().clamp(min=1)
    return loss, clip_ratio, kl


def patch() -> None:
    """Puts these functions into the OpenRLHF of this process; a second call does nothing.

    `log_probs_from_logits` in every module that has imported it, `RemoteExperienceMaker.get_advantages_and_returns`,
    and the forward of `PolicyLoss` for the policy loss type "ppo" without a correction of importance weights: "gspo"
    and corrections stay OpenRLHF's own. Whitening stays OpenRLHF's: over all kept tokens, with the population variance,
    as in `fastrl.ops.ppo_advantages`, but for a variance clamped to at least 1e-8 where ours adds 1e-8.

    Warns of a version that was not tested.

    Raises:
        ImportError: OpenRLHF is not installed.
        RuntimeError: a function of this version takes other arguments; nothing was changed.
    """
    if _originals:
        return
    check_installed("openrlhf", OLDEST, NEWEST)
    from openrlhf.models import loss, utils
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    shared = ("dp_size", "batch_num_tokens", "global_batch_size")
    forward = ("self", "log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs", *shared)
    maker = ("self", "values", "rewards", "action_mask", "gamma", "lambd")
    correction = tuple(f"is_correction_{name}" for name in ("level", "mode", "gating", "threshold"))
    settings = ("clip_eps_low", "clip_eps_high", "dual_clip", "token_level_loss", "policy_loss_type", *correction)
    check_signature("OpenRLHF's log_probs_from_logits", utils.log_probs_from_logits, "logits", "labels", "temperature")
    check_signature("OpenRLHF's PolicyLoss", loss.PolicyLoss, *settings)
    check_signature("OpenRLHF's PolicyLoss.forward", loss.PolicyLoss.forward, *forward)
    theirs = RemoteExperienceMaker.get_advantages_and_returns
    check_signature("OpenRLHF's get_advantages_and_returns", theirs, *maker)
    warn_untested("openrlhf", OLDEST, NEWEST)

    _originals.update(logprobs=utils.log_probs_from_logits, gae=theirs, loss=loss.PolicyLoss.forward)
    swap("openrlhf", utils.log_probs_from_logits, log_probs_from_logits)
    RemoteExperienceMaker.get_advantages_and_returns = _advantages_of_maker
    loss.PolicyLoss.forward = _forward_of_loss


def unpatch() -> None:
    """Gives OpenRLHF its own functions back; does nothing where `patch` was not called."""
    if not _originals:
        return
    from openrlhf.models.loss import PolicyLoss
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    swap("openrlhf", log_probs_from_logits, _originals["logprobs"])
    RemoteExperienceMaker.get_advantages_and_returns = _originals["gae"]
    PolicyLoss.forward = _originals["loss"]
    _originals.clear()


def _advantages_of_maker(self, values, rewards, action_mask, gamma, lambd):
    with torch.no_grad():
        return get_advantages_and_returns(values, rewards, action_mask, gamma, lambd)


def _forward_of_loss(
    self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None,
    dp_size=1, batch_num_tokens=None, global_batch_size=None,
):  # fmt: skip
    counts = {"dp_size": dp_size, "batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size}
    if self.policy_loss_type != "ppo" or self.is_correction_level != "off":
        theirs = _originals["loss"]
        return theirs(self, log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, **counts)
    results = policy_loss(
        log_probs, old_log_probs, advantages, action_mask, clip_eps_low=self.clip_eps_low,
        clip_eps_high=self.clip_eps_high, dual_clip=self.dual_clip, token_level_loss=self.token_level_loss, **counts,
    )  # fmt: skip
    return (*results, None, None)  # vllm_kl, is_filter_ratio
