"""Generalised advantage estimation over rows of tokens with masks."""

from __future__ import annotations

import torch

from fastrl.checks import check, check_data, check_mask, check_unit
from fastrl.ops.backend import choose_for
from fastrl.reference import gae as reference
from fastrl.reference.masked import compute_dtype

OP = "gae"


@torch.no_grad()
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
    taken out: a dropped slot hands the value and the advantage on its right through to its left.

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
    backend = choose_for(OP, rewards.device.type, dtype, backend)
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    lambdas = torch.as_tensor(gae_lambda, dtype=dtype, device=rewards.device)
    bootstrap = None if bootstrap_value is None else bootstrap_value.to(dtype)
    return reference.gae(rewards.to(dtype), values.to(dtype), mask, gamma, lambdas, dones, bootstrap)


def _check(rewards, values, mask, gamma, gae_lambda, dones, bootstrap_value):
    check(rewards.ndim == 2, OP, "rewards", "shape (B, R)", tuple(rewards.shape))
    shape = rewards.shape
    check_data(OP, "rewards", rewards, shape, rewards)
    check_data(OP, "values", values, shape, rewards)
    check_mask(OP, mask, shape, rewards)
    check_unit(OP, "gamma", gamma)
    if isinstance(gae_lambda, torch.Tensor):
        check_data(OP, "gae_lambda", gae_lambda, shape[:1], rewards)
        if gae_lambda.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would be a sync
            outside = gae_lambda[~((gae_lambda >= 0) & (gae_lambda <= 1))]
            check(outside.numel() == 0, OP, "gae_lambda", "numbers in [0, 1]", outside[:3].tolist())
    else:
        check_unit(OP, "gae_lambda", gae_lambda)
    check_mask(OP, dones, shape, rewards, name="dones")
    if bootstrap_value is not None:
        check_data(OP, "bootstrap_value", bootstrap_value, shape[:1], rewards)
