"""Masked means and variances that never multiply by the mask: a dropped slot may hold NaN."""

from __future__ import annotations

import torch


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over all kept elements; 0 if none is kept."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def masked_variance(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Population variance over all kept elements; 0 if none is kept."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def explained_variance(residual_variance: torch.Tensor, variance: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """1 - residual_variance / variance; 0 where there is no variance to explain, but for the rounding of the mean."""
    nothing = variance <= (1e-6 * mean) ** 2
    return torch.where(nothing, 0, 1 - residual_variance / torch.where(nothing, 1, variance))
