"""token_logprobs in plain torch: any device, differentiable, in float64 when the logits are."""

from __future__ import annotations

import torch

from fastrl.checks import check_range


def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    return_entropy: bool,
    return_top1: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """See `fastrl.ops.token_logprobs`; softcap 0 means none. Returns float64 for float64 logits."""
    keep = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
    token_ids = torch.where(keep, token_ids.long(), 0)
    check_range(token_ids, logits.shape[-1])
    x = torch.where(keep[..., None], logits, 0)
    top1 = keep & (x.argmax(-1) == token_ids) if return_top1 else None
    x = x if x.dtype == torch.float64 else x.float()
    x = x * logit_scale
    if softcap > 0:
        x = torch.where(x == -torch.inf, x, softcap * torch.tanh(x / softcap))
    dead = (x == -torch.inf).all(-1)  # no distribution: log-prob -inf, entropy 0, no gradient
    x = torch.where(dead[..., None], 0, x) / temperature
    all_logprobs = x.log_softmax(-1)
    logprobs = all_logprobs.gather(-1, token_ids[..., None])[..., 0].clamp(max=0)
    logprobs = torch.where(keep, torch.where(dead, -torch.inf, logprobs), 0)
    results = [logprobs]
    if return_entropy:
        finite = all_logprobs.masked_fill(all_logprobs == -torch.inf, 0)  # 0 log 0 = 0
        entropy = -(all_logprobs.exp() * finite).sum(-1)
        results.append(torch.where(keep & ~dead, entropy, 0))
    if top1 is not None:
        results.append(top1)
    return results[0] if len(results) == 1 else tuple(results)
