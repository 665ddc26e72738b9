"""What linear_logprobs and linear_cross_entropy share: the checks of a language-model head and its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrl.checks import check, check_device, check_float, check_ids, check_mask, check_shape


def check_head(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    ids_name: str,
    bias: torch.Tensor | None,
    lora: Sequence[Any] | None,
    mask: torch.Tensor | None,
) -> None:
    check(hidden.ndim >= 1, op, "hidden", "shape (..., H)", tuple(hidden.shape))
    check_float(op, "hidden", hidden)
    check(weight.ndim == 2, op, "weight", "shape (V, H); a sharded head must be gathered first", tuple(weight.shape))
    vocab, width = weight.shape[0], hidden.shape[-1]
    check_shape(op, "weight", weight, (vocab, width))
    check(vocab > 0, op, "weight", "a vocabulary of at least 1", tuple(weight.shape))
    _check_like_hidden(op, "weight", weight, hidden)
    if bias is not None:
        check_shape(op, "bias", bias, (vocab,))
        _check_like_hidden(op, "bias", bias, hidden)
    if lora is not None:
        check(len(lora) == 3, op, "lora", "(lora_a, lora_b, scaling)", f"{len(lora)} items")
        lora_a, lora_b, _ = lora
        check(lora_a.ndim == 2 and len(lora_a) > 0, op, "lora", "lora_a (r, H), r at least 1", tuple(lora_a.shape))
        check_shape(op, "lora: lora_a", lora_a, (len(lora_a), width))
        check_shape(op, "lora: lora_b", lora_b, (vocab, len(lora_a)))
        for name, tensor in (("lora: lora_a", lora_a), ("lora: lora_b", lora_b)):
            check_float(op, name, tensor)
            check_device(op, name, tensor, hidden)
    check_ids(op, ids_name, ids, hidden.shape[:-1], hidden)
    check_mask(op, mask, hidden.shape[:-1], hidden)


def _check_like_hidden(op: str, name: str, tensor: torch.Tensor, hidden: torch.Tensor) -> None:
    if tensor.dtype != hidden.dtype:
        check(False, op, name, f"{hidden.dtype} as hidden (cast one of them, or use torch.autocast)", tensor.dtype)
    check_device(op, name, tensor, hidden)


def autocast(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora: Sequence[Any] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Sequence[Any] | None]:
    """The arguments of a linear layer as torch.autocast would hand them to nn.Linear."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias, lora
    dtype = torch.get_autocast_dtype(device)
    if lora is not None:
        lora = (lora[0].to(dtype), lora[1].to(dtype), lora[2])
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), lora
