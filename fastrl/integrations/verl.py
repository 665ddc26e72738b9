"""verl: GAE, log-probs of logits and the clipped policy loss, with verl's names, arguments and results.

`patch()` puts them into verl in this process; each also works alone, and none needs verl to be installed.
docs/guides/verl.md says how every worker of a run gets them.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor

from fastrl.integrations.clipped import clipped_policy_loss
from fastrl.integrations.hosts import check_installed, check_signature, swap, warn_untested
from fastrl.ops import gae, token_logprobs

OLDEST, NEWEST = "0.7.0", "0.9.1"  # tested
LOSS_MODE = "fastrl"  # actor_rollout_ref.actor.policy_loss.loss_mode
LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")

_originals: dict[Callable[..., Any], Callable[..., Any]] = {}  # ours -> verl's own, while the patch is on


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """verl.utils.torch_functional.logprobs_from_logits: (..., V) logits, (...) labels -> (...) log-probs.

    Equals ``logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]``.

    Differs: the result is float32 for logits in half precision, where verl rounds it to theirs; `inplace_backward`
    changes nothing: the gradient is a tensor of its own, where flash-attn's kernel overwrites the logits.
    """
    return cast(Tensor, token_logprobs(logits, labels))


@torch.no_grad()
def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """verl.trainer.ppo.core_algos.compute_gae_advantage_return: whitened advantages and returns, each (B, R).

    GAE is verl's and `fastrl.ops.gae`'s alike: dropped tokens in the middle of a row are passed over. Whitening is
    verl's masked_whiten: (A - mean) / sqrt(variance + 1e-8) over the kept tokens, with the unbiased variance (divided
    by n - 1; `fastrl.ops.ppo_advantages` divides by n).

    Differs: dropped slots are 0 and may be NaN in the inputs. In verl they hold what was carried over them from the
    right, whitened too, and the returns that go with it; its losses and metrics read none of that.

    Raises:
        ValueError: fewer than two tokens are kept, as verl.
    """
    mask = response_mask.bool()
    advantages, returns = gae(token_level_rewards, values, mask, gamma=float(gamma), gae_lambda=float(lam))
    count = mask.sum()
    if count < 2:
        raise ValueError(
            "compute_gae_advantage_return: response_mask: expected at least 2 kept tokens, whose variance whitening "
            f"divides by, got {int(count)}"
        )
    centered = torch.where(mask, advantages - advantages.sum() / count, 0)
    variance = (centered**2).sum() / (count - 1)
    return centered * torch.rsqrt(variance + 1e-8), returns


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl.trainer.ppo.core_algos.compute_policy_loss_vanilla: the dual-clipped loss, and its three metrics.

    All of verl's loss_agg_modes, two different bounds (clip_ratio_low, clip_ratio_high), global_batch_info and
    rollout_is_weights give verl's loss and gradients.

    Differs: a batch without a token gives 0, where verl divides 0 by 0 (no global counts given); dropped slots may hold
    NaN; a token whose rollout_is_weights is 0 counts as not clipped in actor/pg_clipfrac.

    Args:
        config: verl's ActorConfig, or anything with clip_ratio, clip_ratio_low, clip_ratio_high and `get`.
        rollout_is_weights: (B, R), at least 0.
    Raises:
        ValueError: no config, an unknown loss_agg_mode, a global count that is missing, or see `ppo_loss`.
    """
    if config is None:
        raise ValueError("compute_policy_loss_vanilla: config: expected verl's ActorConfig, got None")
    mask = response_mask.bool()
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    dual_clip = config.get("clip_ratio_c", 3.0)
    row_weights, denominator = _average(loss_agg_mode, mask, **(config.get("global_batch_info", None) or {}))
    weighted = advantages
    for weight in (row_weights, rollout_is_weights):
        weighted = weighted if weight is None else weighted * weight
    loss, clip_frac, kl = clipped_policy_loss(
        log_prob, old_log_prob, weighted, mask, clip_low=low, clip_high=high, dual_clip=dual_clip,
        denominator=denominator,
    )  # fmt: skip
    with torch.no_grad():
        bounded_below = mask & (advantages < 0) & ((log_prob - old_log_prob).exp() > dual_clip)
        metrics = torch.stack([clip_frac, kl, bounded_below.sum() / mask.sum().clamp(min=1)]).tolist()
    return loss, dict(zip(("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"), metrics, strict=True))


def _average(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor | None, float | Tensor]:
    """verl's agg_loss as (weights of rows (B, 1) or None, what the weighted sum over kept tokens is divided by)."""
    if mode not in LOSS_AGG_MODES:
        raise ValueError(f"agg_loss: loss_agg_mode: expected one of {', '.join(LOSS_AGG_MODES)}, got {mode!r}")
    if mode == "token-sum":
        return None, 1 / dp_size
    needed = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    count = batch_num_tokens if mode == "token-mean" else global_batch_size
    if count is None and dp_size > 1:
        raise ValueError(f"agg_loss: {needed}: expected the count over all ranks with dp_size {dp_size}, got None")
    if mode == "token-mean":
        return None, (mask.sum().clamp(min=1) if count is None else count) / dp_size
    tokens = mask.sum(-1, keepdim=True)
    rows = ((tokens > 0).sum().clamp(min=1) if count is None else count) / dp_size
    if mode == "seq-mean-token-sum":
        return None, rows
    if mode == "seq-mean-token-sum-norm":
        return None, rows * (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return 1 / tokens.clamp(min=1), rows


def patch() -> None:
    """Puts these functions into the verl of this process; a second call does nothing.

    - GAE: `compute_gae_advantage_return`, and "gae" in the registry of estimators. verl's trainer gives values, gamma
      and lam to that one alone, so an estimator of another name could not be GAE.
    - log-probs: `logprobs_from_logits`, in every module of verl that has imported it.
    - the policy loss: registered as "fastrl" beside verl's own; choose it by
      `actor_rollout_ref.actor.policy_loss.loss_mode=fastrl`.

    Warns of a version that was not tested.

    Raises:
        ImportError: verl is not installed.
        RuntimeError: a function of this version takes other arguments; nothing was changed.
    """
    if _originals:
        return
    check_installed("verl", OLDEST, NEWEST)
    from verl.trainer.ppo import core_algos
    from verl.utils import torch_functional

    originals: dict[Callable[..., Any], Callable[..., Any]] = {
        compute_gae_advantage_return: core_algos.compute_gae_advantage_return,
        logprobs_from_logits: torch_functional.logprobs_from_logits,
    }
    for ours, theirs in (*originals.items(), (compute_policy_loss_vanilla, core_algos.compute_policy_loss_vanilla)):
        check_signature(f"verl's {ours.__name__}", theirs, *signature(ours).parameters)
    counts = list(signature(_average).parameters)[2:]
    check_signature("verl's agg_loss", core_algos.agg_loss, "loss_mat", "loss_mask", "loss_agg_mode", *counts)
    warn_untested("verl", OLDEST, NEWEST)

    core_algos.register_policy_loss(LOSS_MODE)(compute_policy_loss_vanilla)
    core_algos.ADV_ESTIMATOR_REGISTRY["gae"] = compute_gae_advantage_return
    for ours, theirs in originals.items():
        swap("verl", theirs, ours)
    _originals.update(originals)


def unpatch() -> None:
    """Gives verl its own functions back; does nothing where `patch` was not called."""
    if not _originals:
        return
    from verl.trainer.ppo import core_algos

    del core_algos.POLICY_LOSS_REGISTRY[LOSS_MODE]
    core_algos.ADV_ESTIMATOR_REGISTRY["gae"] = _originals[compute_gae_advantage_return]
    for ours, theirs in _originals.items():
        swap("verl", ours, theirs)
    _originals.clear()
