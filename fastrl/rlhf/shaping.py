"""What is done to a response's score before it becomes a reward. The order, here and nowhere else:

1. The score is the reward model's, or what several are combined to.
2. A response that no stop token ended has `no_stop_score` in its place.
   (1 and 2: `train.roles.score_trajectory`. This is the `score` that is reported, and that `best/` goes by.)
3. With `score_norm` it is normalised: the mean of all scores of the run is taken off, and it is divided by their
   standard deviation. The scores of the iteration itself are among them, those of held-out prompts are not.
4. `length_penalty` is taken off for each token beyond `length_free`.
5. `score_clip` bounds it on both sides (in `ppo_advantages`, as is the KL penalty that the reward then loses).

So `no_stop_score` is on the reward model's scale, `length_penalty` and `score_clip` on the normalised one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.constants import WHITEN_EPS


def no_scores() -> Tensor:
    """(3,) float64 count, mean and sum of squared deviations of the scores seen so far: none."""
    return torch.zeros(3, dtype=torch.float64)


def add_scores(moments: Tensor, scores: Tensor) -> Tensor:
    """The moments with these scores (B,), all ranks' alike, among those seen: Welford's update by a batch."""
    new = scores.double().cpu()
    n, mean, m2 = moments.unbind()
    total = n + len(new)
    share = len(new) / total.clamp(min=1)
    difference = new.mean() - mean if len(new) else torch.zeros_like(mean)
    spread = ((new - new.mean()) ** 2).sum() if len(new) else torch.zeros_like(m2)
    return torch.stack([total, mean + difference * share, m2 + spread + difference**2 * n * share])


def normalized(scores: Tensor, moments: Tensor) -> Tensor:
    """(scores - mean) / sqrt(population variance + 1e-8) of the scores seen; unchanged if none were."""
    n, mean, m2 = moments.tolist()
    return (scores - mean) / (m2 / n + WHITEN_EPS) ** 0.5 if n else scores


def shape_scores(
    scores: Tensor,
    lengths: Tensor,
    *,
    moments: Tensor | None = None,
    length_penalty: float = 0.0,
    length_free: int = 0,
) -> Tensor:
    """Steps 3 and 4: (B,) scores of responses of `lengths` (B,) tokens, normalised by `moments` if given, less
    length_penalty * max(0, length - length_free).

    DAPO's soft punishment of overlong responses, from 0 to -1 over the last n tokens, is length_penalty 1 / n and
    length_free `max_new_tokens` - n (Yu et al. 2025, arXiv:2503.14476, equation 13).
    """
    if moments is not None:
        scores = normalized(scores, moments)
    if length_penalty:
        scores = scores - length_penalty * (lengths - length_free).clamp(min=0)
    return scores
