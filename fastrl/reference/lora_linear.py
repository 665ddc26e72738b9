"""lora_linear_group in plain torch: any device, differentiable, in float64 when the input is."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastrl.constants import dropout_threshold

PHILOX_KEYS = (0x9E3779B9, 0xBB67AE85)  # added to the key words after each round
PHILOX_FACTORS = (0xD2511F53, 0xCD9E8D57)
WORD = 0xFFFFFFFF


def lora_linear_group(
    x: torch.Tensor, group: list, dropout: float, seed: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """See `fastrl.ops.lora_linear_group`; `group` holds LoRAWeights, `seed` the one int64 of the dropout mask."""
    keep = None if seed is None else dropout_keep(x.numel() // x.shape[-1], x.shape[-1], dropout, seed).view(x.shape)
    dropped = x if keep is None else torch.where(keep, x, 0)
    outputs = []
    for weight, lora_a, lora_b, scaling, bias in group:
        low_rank = F.linear(F.linear(dropped.to(lora_a.dtype), lora_a), lora_b.to(lora_a.dtype))
        base = F.linear(x, weight, bias)
        outputs.append((base + low_rank * (scaling / (1 - dropout))).to(base.dtype))
    return tuple(outputs)


def dropout_keep(rows: int, cols: int, dropout: float, seed: torch.Tensor) -> torch.Tensor:
    """Which elements of a (rows, cols) matrix dropout keeps: bool, True = keep, with probability 1 - dropout.

    Element (m, k) compares one word of Philox4x32-10 with dropout * 2^32. The key is the seed; the counter is
    (16 (k // 64) + k % 16, m), and k // 16 % 4 is the word, so that 64 neighbours come from 16 counters in vectors.
    """
    m = torch.arange(rows, device=seed.device)[:, None]
    k = torch.arange(cols, device=seed.device)[None, :]
    words = _philox(torch.broadcast_to(16 * (k // 64) + k % 16, (rows, cols)), m & WORD, m >> 32, seed)
    word = torch.stack(words).gather(0, torch.broadcast_to(k // 16 % 4, (1, rows, cols)))[0]
    return word >= dropout_threshold(dropout)


def _philox(c0, c1, c2, seed):
    """Four words in [0, 2^32) as int64; the products wrap, which leaves all 64 bits in place."""
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(10):
        p0, p1 = c0 * PHILOX_FACTORS[0], c2 * PHILOX_FACTORS[1]
        c0, c1, c2, c3 = (p1 >> 32 & WORD) ^ c1 ^ k0, p1 & WORD, (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + PHILOX_KEYS[0] & WORD, k1 + PHILOX_KEYS[1] & WORD
    return c0, c1, c2, c3
