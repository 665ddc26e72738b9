"""Triton row kernels of the GPU head (fastrl/ops/linear_head_gpu.py), on chunks of float32 logits."""

from __future__ import annotations

import torch

from fastrl.kernels.token_logprobs import gradient, statistics


def linear_head_rows(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    softcap: float,
    logprobs: torch.Tensor,
    row_stats: torch.Tensor | None,
    entropy: torch.Tensor | None,
    top1: torch.Tensor | None,
    out: torch.Tensor | None,
    entropy_out: torch.Tensor | None,
) -> None:
    """Log-probs, statistics, entropies and top1 of rows of logits; and where `out` (which may be `logits`) is given,
    the gradient of each row's log-prob with respect to its logits, and in `entropy_out` that of its entropy.
    """
    if out is not None and row_stats is None:
        row_stats = torch.empty(len(token_ids), 2, dtype=torch.float32, device=logits.device)
    statistics(logits, token_ids, mask, temperature, softcap, logprobs, row_stats, entropy, top1)
    if out is not None:
        assert row_stats is not None
        assert entropy_out is None or entropy_out.stride() == out.stride()
        gradient(
            logits, token_ids, mask, row_stats, logprobs, None if entropy_out is None else entropy, None, None, 0,
            temperature, softcap, out, entropy_out,
        )  # fmt: skip


def linear_head_gradient(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    mask: torch.Tensor | None,
    begin: int,
    row_stats: torch.Tensor,
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    dlogprobs: torch.Tensor,
    dentropy: torch.Tensor | None,
    temperature: float,
    softcap: float,
    out: torch.Tensor,
) -> None:
    """The gradient of columns of logits that begin at column `begin` of the vocabulary, from each row's upstream."""
    entropy = None if dentropy is None else entropy
    gradient(
        logits, token_ids, mask, row_stats, logprobs, entropy, dlogprobs, dentropy, begin, temperature, softcap, out
    )
