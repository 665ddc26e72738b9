"""What the ops on logits take and return alike: scale, cap and temperature, and the results that are asked for."""

from __future__ import annotations

import torch

from fastrl.checks import check_positive


def check_logit_options(op: str, temperature: float, logit_scale: float, softcap: float | None) -> None:
    check_positive(op, "temperature", temperature)
    check_positive(op, "logit_scale", logit_scale)
    if softcap is not None:
        check_positive(op, "softcap", softcap)


def without_scale(temperature: float, logit_scale: float, softcap: float | None) -> tuple[float, float]:
    """(temperature, softcap) that give the same distribution of logits without a scale; softcap 0 means none.

    c tanh(s x / c) / T = c' tanh(x / c') / T' with c' = c / s and T' = T / s.
    """
    return temperature / logit_scale, (softcap or 0.0) / logit_scale


def present(*results: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Those that are not None."""
    return tuple(result for result in results if result is not None)
