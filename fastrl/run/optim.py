"""Optimiser, learning-rate schedule and the one step that all loops take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from fastrl.checks import NonFiniteError
from fastrl.run.masters import add_masters, round_masters, trained

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


class Learner(NamedTuple):
    """A model with what trains it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]


def make_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> AdamW:
    """AdamW over the trainable parameters, in float32 whatever their dtype (`masters.py`); matrices decay, biases and
    norms do not.
    """
    add_masters(model)
    trainable = [tensor for _, tensor in trained(model)]
    if not trainable:
        raise ValueError("make_optimizer: model: expected trainable parameters, got none")
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, eps=eps)


def make_schedule(optimizer: torch.optim.Optimizer, *, kind: str, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Linear warm-up over `warmup_steps`, then `kind` ("constant", "linear" or "cosine") to 0
    at `total_steps`.

    The first step already moves: it uses lr / warmup_steps. `optimizer.param_groups[0]["lr"]` is
    the lr in use.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"make_schedule: kind: expected one of {', '.join(SCHEDULES)}, got {kind!r}")
    decay = SCHEDULES[kind]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return decay(min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return LambdaLR(optimizer, factor)


def count_steps(examples: int, batch_size: int, *, epochs: int, max_steps: int = 0) -> int:
    """Optimizer steps of a run: `max_steps` if positive, else what `epochs` passes need."""
    if examples == 0:
        raise ValueError("training data: expected at least one example, got none after loading")
    total = max_steps if max_steps > 0 else epochs * math.ceil(examples / max(1, batch_size))
    if total < 1:
        raise ValueError(f"steps: expected epochs or max_steps above 0, got {epochs} and {max_steps}")
    return total


def check_finite(loss: float, step: int, last_good: object = None) -> None:
    """Raise NonFiniteError if the loss of `step` (counted from 1) is NaN or infinite."""
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"loss is {loss} at step {step}: training stopped before the update;"
            f" last good checkpoint: {last_good or 'none (set save_every to keep some)'};"
            " lower the learning rate, or look for broken data"
        )


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR | None,
    *,
    max_grad_norm: float,
    step: int = 0,
) -> float:
    """Clip the accumulated gradients to `max_grad_norm` (<= 0: do not clip), update, clear them;
    returns their norm.

    Raises:
        NonFiniteError: the norm is NaN or infinite; the weights are left as they were.
    """
    trainable = [tensor for _, tensor in trained(model)]
    limit = max_grad_norm if max_grad_norm > 0 else math.inf
    grad_norm = float(nn.utils.clip_grad_norm_(trainable, limit))
    if not math.isfinite(grad_norm):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(f"gradient norm is {grad_norm} at step {step}: training stopped before the update")
    optimizer.step()
    round_masters(model)
    if schedule is not None:
        schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm
