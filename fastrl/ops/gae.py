"""Generalised advantage estimation over rows of tokens with masks."""

from __future__ import annotations

import torch

from fastrl.checks import check, check_data, check_float, check_mask, check_unit, has_values
from fastrl.masked import compute_dtype
from fastrl.ops.backend import choose_for
from fastrl.ops.native import _C, as_data, launch_cuda, native_op, threads_for, triton_kernel
from fastrl.reference import gae as reference

OP = "gae"


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    gamma: float = 1.0,
    gae_lambda: float | torch.Tensor = 0.95,
    dones: torch.Tensor | None = None,
    bootstrap_value: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns of every token, right to left.

        delta_t     = rewards_t + gamma * values_{t+1} - values_t
        advantage_t = delta_t + gamma * gae_lambda * advantage_{t+1}
        returns     = advantages + values

    Same value as the loop ``for t in reversed(range(R))`` over these lines, run on each row with its dropped tokens
    taken out: a dropped slot passes the value and the advantage on its right through to its left.

    Args:
        rewards, values: (B, R) float32, bfloat16 or float16 (float64 runs on `reference`), any strides.
            values[b, t] is the value of the state before token t is emitted.
        mask: (B, R) bool, True = keep; None keeps all. Dropped slots return 0 and may hold anything.
        gamma: discount in [0, 1].
        gae_lambda: in [0, 1], one number or (B,), one per row.
        dones: (B, R) bool; an episode ends after token t: nothing to its right reaches it. Ignored on dropped slots.
        bootstrap_value: (B,) value of the state after the last kept token; 0 if None (the sequence has ended).
        backend: None chooses; else one of reference, cpu, triton, cuda.
    Returns:
        (advantages, returns), each (B, R) float32 (float64 if an input is). Whitening is not applied.
    Raises:
        ValueError: shape, dtype, device or value does not fit.
    Numerics: float32; rows are independent, so a row's bits do not depend on the batch. No gradient: advantages are
        data.
    Source: Schulman et al. 2016, arXiv:1506.02438, equations 11, 12 and 16.
    """
    _check(rewards, values, mask, gamma, gae_lambda, dones, bootstrap_value)
    dtype = compute_dtype(rewards, values, bootstrap_value)
    backend = choose_for(OP, rewards.device, dtype, backend)
    rewards, values = (as_data(t, dtype) for t in (rewards, values))
    bootstrap = None if bootstrap_value is None else as_data(bootstrap_value, dtype)
    lambdas = as_data(gae_lambda, dtype) if isinstance(gae_lambda, torch.Tensor) else None
    if backend == "reference":
        keep = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
        decay = gae_lambda if lambdas is None else lambdas
        return reference.gae(rewards, values, keep, gamma, decay, dones, bootstrap)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    _gae(
        backend, rewards, values, None if mask is None else mask.contiguous(),
        None if dones is None else dones.contiguous(), lambdas, bootstrap,
        float(gamma), 0.0 if lambdas is not None else float(gae_lambda), advantages, returns,
    )  # fmt: skip
    return advantages, returns


def _check(rewards, values, mask, gamma, gae_lambda, dones, bootstrap_value):
    check_float(OP, "rewards", rewards)
    check(rewards.ndim == 2, OP, "rewards", "shape (B, R)", tuple(rewards.shape))
    shape = rewards.shape
    check_data(OP, "values", values, shape, rewards)
    check_mask(OP, mask, shape, rewards)
    check_unit(OP, "gamma", gamma)
    if isinstance(gae_lambda, torch.Tensor):
        check_data(OP, "gae_lambda", gae_lambda, shape[:1], rewards)
        if gae_lambda.device.type == "cpu" and has_values(gae_lambda):  # elsewhere it would be a sync
            outside = gae_lambda[~((gae_lambda >= 0) & (gae_lambda <= 1))]
            check(outside.numel() == 0, OP, "gae_lambda", "numbers in [0, 1]", outside[:3].tolist())
    else:
        check_unit(OP, "gae_lambda", gae_lambda)
    check_mask(OP, dones, shape, rewards, "dones", "the episode ends after this token (a mask's True keeps)")
    if bootstrap_value is not None:
        check_data(OP, "bootstrap_value", bootstrap_value, shape[:1], rewards)


def _gae_cpu(rewards, *rest):
    _C.gae(*rewards.shape, rewards, *rest, threads_for(rewards.numel()))


def _gae_cuda(rewards, *rest):
    launch_cuda("gae", rewards, *rewards.shape, rewards, *rest)


_gae = native_op(
    "gae",
    "Tensor rewards, Tensor values, Tensor? mask, Tensor? dones, Tensor? lambdas, Tensor? bootstrap_value, "
    "float gamma, float gae_lambda, Tensor(a!) advantages, Tensor(b!) returns",
    {"cpu": _gae_cpu, "cuda": _gae_cuda, "triton": triton_kernel("gae", "gae")},
)
