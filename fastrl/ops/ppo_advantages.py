"""From log-probs, values and scores of a rollout to whitened advantages: KL penalty, reward, GAE, whitening."""

from __future__ import annotations

from math import inf
from typing import Any, NamedTuple

import torch

from fastrl.checks import (
    check,
    check_data,
    check_flag,
    check_float,
    check_mask,
    check_non_negative,
    check_positive,
    check_unit,
)
from fastrl.masked import compute_dtype
from fastrl.ops.backend import choose_for
from fastrl.ops.native import _C, as_data, cuda_workspace, launch_cuda, native_op, threads_for, triton_kernel
from fastrl.reference import ppo_advantages as reference

OP = "ppo_advantages"
KL_ESTIMATORS = ("k1", "k2", "k3")


class AdvantageStats(NamedTuple):
    """Float32 0-d tensors on the inputs' device, over this process's kept tokens or rows; 0 where there are none.

    A row counts if it keeps a token. `kl_*` are of the estimator asked for, before `kl_clip`; `score_mean` is before
    `score_clip`; variances are population variances; advantages are taken before whitening.
    """

    tokens: torch.Tensor  # kept tokens
    sequences: torch.Tensor  # rows that keep a token
    kl_mean: torch.Tensor  # nats per token
    kl_sum_mean: torch.Tensor  # nats per sequence: the row's sum, averaged over rows
    reward_sum_mean: torch.Tensor  # score less KL penalty per sequence: the row's sum of rewards, averaged
    score_mean: torch.Tensor
    value_mean: torch.Tensor
    return_mean: torch.Tensor
    return_variance: torch.Tensor
    advantage_mean: torch.Tensor
    advantage_std: torch.Tensor
    explained_variance: torch.Tensor  # 1 - variance(returns - values) / variance(returns); 0 if that is 0 or rounding


class Advantages(NamedTuple):
    """What `ppo_advantages` returns: four (B, R) tensors, 0 on dropped slots, and statistics."""

    advantages: torch.Tensor  # whitened as asked
    returns: torch.Tensor  # unwhitened advantages + values
    rewards: torch.Tensor  # -kl_coef * kl, plus the score on the last kept token
    kl: torch.Tensor  # per-token estimate as it entered the reward, so after kl_clip
    stats: AdvantageStats


def ppo_advantages(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
    kl_clip: float | None = None,
    score_clip: float | None = None,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    center: bool = True,
    scale: bool = True,
    process_group: Any = None,
    backend: str | None = None,
) -> Advantages:
    """Per-token KL penalty, score on the last kept token, GAE, returns and masked whitening.

        k1 = logprobs - ref_logprobs,   k2 = k1^2 / 2,   k3 = exp(-k1) - 1 + k1
        rewards = -kl_coef * clamp(kl, +-kl_clip) (+ clamp(score, +-score_clip) on the last kept token of the row)
        advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
        advantages = (advantages - mean if center) / (sqrt(variance + 1e-8) if scale)

    Mean and population variance are over the kept tokens, of all ranks if `process_group` is given.

    Args:
        logprobs, ref_logprobs, values: (B, R) float32, bfloat16 or float16 (float64 runs on `reference`), any strides.
            logprobs[b, t] is of response token t under the policy that sampled it; values[b, t] is the value of the
            state before token t. Log-probs must be of the distribution that was sampled from (same temperature, no
            suppressed tokens), else the KL estimate is biased and may stay negative.
        scores: (B,) float, one per sequence; 0.0 is a score like any other. Ignored in rows that keep nothing.
        mask: (B, R) bool, True = keep. Dropped slots return 0 and may hold anything in every input.
        kl_coef: >= 0, weight of the KL penalty.
        kl_estimator: k1 (unbiased, can be negative), k2 (biased, never negative) or k3 (unbiased, never negative).
        kl_clip, score_clip: > 0, or None for no clipping.
        gamma, gae_lambda: in [0, 1]; see `gae`. The value after the last kept token is 0.
        center, scale: subtract the mean; divide by the standard deviation. Either works without the other.
        process_group: a torch.distributed group whose ranks share mean and variance (ranks with nothing kept are
            fine); every rank must call. Needs eager mode.
        backend: None chooses; else one of reference, cpu, triton, cuda.
    Returns:
        `Advantages`; tensors are float32 (float64 if an input is).
    Raises:
        ValueError: shape, dtype, device or value does not fit.
    Numerics: float32, means and variances in float64 from (n, mean, M2) partials combined in a fixed order: same bits
        on every run, whatever the thread count. k3's exponent is bounded by 20 (e^20 = 4.9e8), so it stays finite.
        No gradient: advantages are data.
    Source: Ziegler et al. 2019, arXiv:1909.08593, equation 2; Schulman 2020, "Approximating KL divergence".
    """
    _check(logprobs, ref_logprobs, values, scores, mask)
    _check_options(kl_coef, kl_estimator, kl_clip, score_clip, gamma, gae_lambda)
    check_flag(OP, "center", center)
    check_flag(OP, "scale", scale)
    dtype = compute_dtype(logprobs, ref_logprobs, values, scores)
    backend = choose_for(OP, logprobs.device, dtype, backend)
    logprobs, ref_logprobs, values, scores = (as_data(t, dtype) for t in (logprobs, ref_logprobs, values, scores))
    local = process_group is None
    if backend == "reference":
        advantages, returns, rewards, kl, moments, stats = reference.ppo_advantages(
            logprobs, ref_logprobs, values, scores, mask, kl_coef, kl_estimator, kl_clip, score_clip, gamma, gae_lambda
        )
    else:
        advantages, returns, rewards, kl = (torch.empty_like(logprobs) for _ in range(4))
        moments = logprobs.new_empty(3, dtype=torch.float64)
        stats = logprobs.new_empty(len(AdvantageStats._fields), dtype=torch.float32)
        _advantages(
            backend, logprobs, ref_logprobs, values, scores, mask.contiguous(), float(kl_coef),
            KL_ESTIMATORS.index(kl_estimator) + 1, inf if kl_clip is None else float(kl_clip),
            inf if score_clip is None else float(score_clip), float(gamma), float(gae_lambda),
            center and local, scale and local, advantages, returns, rewards, kl, moments, stats,
        )  # fmt: skip
    if not local:
        moments = all_ranks(moments, process_group)
    if (center or scale) and (backend == "reference" or not local):
        advantages = reference.whiten(advantages, mask, moments, center, scale)
    return Advantages(advantages, returns, rewards, kl, AdvantageStats(*stats.unbind()))


def all_ranks(moments: torch.Tensor, process_group: Any) -> torch.Tensor:
    """(n, mean, M2) over all ranks, combined in rank order so that every rank gets the same bits; n may be 0."""
    parts = [torch.empty_like(moments) for _ in range(torch.distributed.get_world_size(process_group))]
    torch.distributed.all_gather(parts, moments, group=process_group)
    n, mean, m2 = parts[0].unbind()
    for part in parts[1:]:  # Chan, Golub, LeVeque 1983
        total = n + part[0]
        share = part[0] / total.clamp(min=1)
        difference = part[1] - mean
        m2 = m2 + part[2] + difference**2 * n * share
        mean = mean + difference * share
        n = total
    return torch.stack([n, mean, m2])


def _check(logprobs, ref_logprobs, values, scores, mask):
    check_float(OP, "logprobs", logprobs)
    check(logprobs.ndim == 2, OP, "logprobs", "shape (B, R)", tuple(logprobs.shape))
    shape = logprobs.shape
    check_data(OP, "ref_logprobs", ref_logprobs, shape, logprobs)
    check_data(OP, "values", values, shape, logprobs)
    check_data(OP, "scores", scores, shape[:1], logprobs)
    check_mask(OP, mask, shape, logprobs)


def _check_options(kl_coef, kl_estimator, kl_clip, score_clip, gamma, gae_lambda):
    check_non_negative(OP, "kl_coef", kl_coef)
    known = isinstance(kl_estimator, str) and kl_estimator in KL_ESTIMATORS
    check(known, OP, "kl_estimator", "k1, k2 or k3", repr(kl_estimator))
    for name, clip in (("kl_clip", kl_clip), ("score_clip", score_clip)):
        if clip is not None:
            check_positive(OP, name, clip)
    check_unit(OP, "gamma", gamma)
    check_unit(OP, "gae_lambda", gae_lambda)


def _advantages_cpu(logprobs, *rest):
    _C.ppo_advantages(*logprobs.shape, logprobs, *rest, threads_for(logprobs.numel()))


def _advantages_cuda(logprobs, *rest):
    workspace = cuda_workspace(OP, len(logprobs), like=logprobs, dtype=torch.float64)
    launch_cuda(OP, logprobs, *logprobs.shape, logprobs, *rest, workspace)


_advantages = native_op(
    "ppo_advantages",
    "Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor scores, Tensor mask, float kl_coef, "
    "int kl_estimator, float kl_clip, float score_clip, float gamma, float gae_lambda, bool center, bool scale, "
    "Tensor(a!) advantages, Tensor(b!) returns, Tensor(c!) rewards, Tensor(d!) kl, Tensor(e!) moments, "
    "Tensor(f!) stats",
    {"cpu": _advantages_cpu, "cuda": _advantages_cuda, "triton": triton_kernel("ppo_advantages", "ppo_advantages")},
)
