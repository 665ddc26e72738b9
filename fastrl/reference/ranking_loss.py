"""ranking_loss in plain torch, over the N x N matrix of pairs: differentiable, in float64 when an input is."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastrl.checks import check, debugging, has_values


def ranking_loss(
    scores: torch.Tensor,
    group_ids: torch.Tensor,
    ranks: torch.Tensor,
    margins: torch.Tensor | None,
    center_coef: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, float32 vector in the order of RankingStats): see `fastrl.ops.ranking_loss`."""
    unusable = ranks.isnan().any()
    if has_values(ranks) and (ranks.device.type == "cpu" or debugging()):  # a look at a GPU's values waits for it
        check(not bool(unusable), "ranking_loss", "ranks", "numbers", "nan")
    same = group_ids[:, None] == group_ids[None, :]
    beats = same & (ranks[:, None] < ranks[None, :])  # beats[i, j]: answer i is better than answer j
    pairs_of_group = torch.where(same, beats.sum(1), 0).sum(1).to(scores.dtype)  # (N,), of the group that i is in
    first = ~(same & torch.ones_like(same).tril(-1)).any(1)  # one representative of each group
    groups = (first & (pairs_of_group > 0)).sum()
    weight = 1 / (pairs_of_group.clamp(min=1) * groups.clamp(min=1))

    difference = torch.where(beats, scores[:, None] - scores[None, :], 0)
    margin = 0 if margins is None else torch.where(beats, margins[:, None], 0)
    pair_loss = -F.logsigmoid(difference - margin)
    if center_coef > 0:
        total = torch.where(beats, scores[:, None] + scores[None, :], 0)
        pair_loss = pair_loss + center_coef * total**2
    loss = (torch.where(beats, pair_loss, 0) * weight[:, None]).sum().masked_fill(unusable, torch.nan)
    with torch.no_grad():
        pairs = beats.sum()
        right = torch.where(beats, 0.5 * (difference.sign() + 1), 0).sum()
        count = max(scores.numel(), 1)
        mean = scores.sum() / count
        stats = [
            right / pairs.clamp(min=1),
            pairs,
            groups,
            difference.sum() / pairs.clamp(min=1),
            mean,
            (((scores - mean) ** 2).sum() / count).sqrt(),
        ]
        return loss, torch.stack([s.float() for s in stats])
