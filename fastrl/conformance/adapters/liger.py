"""Liger's fused heads: the scaled cross-entropy, which has a path for every device, and on a GPU the Triton losses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastrl.conformance.adapter import PARTS, Adapter, NotOffered
from fastrl.conformance.adapters import installed

CONVENTIONS = {"head_options.no_rows": "refuses states without rows, with an error that says so"}
REMARKS = {"head_options.compiles": "The CPU path looks at the values of the targets to check them"}


def adapters() -> list[Adapter]:
    version = installed("liger-kernel", "0.8.5")
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as head

    gpu = torch.cuda.is_available()
    triton: dict[str, Any] = {"token_logprobs": token_logprobs, "linear_cross_entropy": linear_cross_entropy}
    absent = dict.fromkeys(PARTS, "kernels of losses alone") | dict.fromkeys(triton, "Triton kernels: needs a GPU")
    return [
        Adapter(
            "Liger",
            version + ("" if gpu else " (CPU path)"),
            device="cuda" if gpu else "cpu",
            linear_logprobs=partial(linear_logprobs, head),
            **(triton if gpu else {}),
            conventions=CONVENTIONS,
            remarks={} if gpu else REMARKS,
            absent=absent,
        )
    ]


def linear_logprobs(
    head: Any, hidden, weight, token_ids, *, bias=None, lora=None, temperature=1.0, softcap=None
) -> Tensor:
    """`LigerFusedLinearScaledCrossEntropyFunction`, whose result is -log p."""
    for name, option in (("bias", bias), ("adapter", lora), ("softcap", softcap)):
        if option is not None:
            raise NotOffered(f"the scaled cross-entropy has no {name}")
    if hidden.ndim != 2:
        raise NotOffered("the scaled cross-entropy takes (M, H) states")
    return -head.apply(hidden, weight, token_ids, temperature)


def linear_cross_entropy(hidden, weight, labels, *, denominator=None) -> Tensor:
    """`liger_fused_linear_cross_entropy`, reduced to a mean or a sum."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    reduction = "mean" if denominator is None else "sum"
    total = liger_fused_linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    return total if denominator is None else total / denominator


def token_logprobs(logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0, softcap: float | None = None):
    """`liger_cross_entropy` without a reduction."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    if temperature != 1.0:
        raise NotOffered("liger_cross_entropy has no temperature")
    rows = logits.reshape(-1, logits.shape[-1])
    loss = liger_cross_entropy(rows, token_ids.reshape(-1), reduction="none", softcap=softcap)
    return -loss.view(token_ids.shape)
