"""What comparisons say of a reward model's scores: accuracy, calibration, length bias, correlations of criteria.

Scores are (N, C): one row for each response of each comparison, in order, one column for each criterion. Nothing here
knows of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.data import Preference
from fastrl.data.batches import ranking_batch
from fastrl.data.criteria import criterion_columns
from fastrl.train.losses import rank_scores

BINS = 10  # of the reliability curve, between a confidence of 1/2 and 1


class Pairs(NamedTuple):
    """Every pair of responses to one prompt of which one is better."""

    differences: Tensor  # (M, C) float64 score of the better less that of the worse, by the columns that compare them
    prompts: Tensor  # (M,) number of the comparison that the pair is of


def train_accuracy(scores: Tensor, preferences: Sequence[Preference], names: Sequence[str]) -> float:
    """Share of pairs whose better response scores higher; equal scores count half."""
    return float(rank_scores(scores, ranking_batch(preferences, 0, scores.device, names))[1].accuracy)


def held_out_metrics(scores: Tensor, preferences: Sequence[Preference], names: Sequence[str]) -> dict[str, Any]:
    """Metrics of the scores of a head with these names, over all comparisons and for each criterion in them.

    eval_loss, eval_accuracy            of the loss that is trained, without centring; share of pairs that are right
    eval_accuracy_se                    standard error of that share; the pairs of one prompt are not independent
    eval_ece, eval_reliability          `calibration_error` and the curve it is of, see `reliability`
    eval_accuracy/NAME, ..._se/NAME, eval_ece/NAME      the same of the comparisons by that criterion
    length_correlation[/NAME]           of score and response length in tokens, over all responses
    criteria_correlation/NAME/OTHER     of two criteria's scores, over all responses

    A comparison that names no criterion counts by the mean over the columns. A standard error of one prompt, and a
    correlation with what does not vary, are left out.
    """
    loss, stats = rank_scores(scores, ranking_batch(preferences, 0, scores.device, names))
    scores = scores.double().cpu()
    pairs = compare(scores, preferences, names)
    curve = reliability(pairs.differences.flatten())
    metrics: dict[str, Any] = {
        "eval_loss": float(loss),
        "eval_accuracy": float(stats.accuracy),
        "eval_accuracy_se": standard_error(pairs),
        "eval_ece": calibration_error(curve),
    }
    criteria = [p.criterion for p in preferences]
    for criterion in sorted({c for c in criteria if c is not None}):
        own = torch.tensor([c == criterion for c in criteria])[pairs.prompts]
        part = Pairs(pairs.differences[own], pairs.prompts[own])
        metrics[f"eval_accuracy/{criterion}"] = float(right(part.differences).mean())
        metrics[f"eval_accuracy_se/{criterion}"] = standard_error(part)
        metrics[f"eval_ece/{criterion}"] = calibration_error(reliability(part.differences.flatten()))
    metrics |= correlations(scores, [len(r) for p in preferences for r in p.responses], names)
    metrics = {name: value for name, value in metrics.items() if value is not None}
    return {**metrics, "eval_reliability": curve}


def compare(scores: Tensor, preferences: Sequence[Preference], names: Sequence[str]) -> Pairs:
    """The differences of all pairs: (M, C) each, where a comparison by one criterion has the same one C times."""
    better, worse, prompts, start = [], [], [], 0
    for number, preference in enumerate(preferences):
        ranks = preference.ranks
        found = [(i, j) for i, j in permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]
        better += [start + i for i, _ in found]
        worse += [start + j for _, j in found]
        prompts += [number] * len(found)
        start += len(ranks)
    where = torch.tensor(prompts)
    columns = criterion_columns([p.criterion for p in preferences], names)[where]
    return Pairs(scores[better].gather(1, columns) - scores[worse].gather(1, columns), where)


def right(differences: Tensor) -> Tensor:
    """1 where the better response scores higher, 0 where lower, 1/2 where equal."""
    return (differences.sign() + 1) / 2


def standard_error(pairs: Pairs) -> float | None:
    """Standard error of the share of right pairs p, with each prompt's pairs taken together:

        sqrt(sum over prompts of (sum over its pairs of (right - p))^2) / pairs

    With one pair a prompt that is sqrt(p (1 - p) / pairs). None for one prompt.
    """
    correct = right(pairs.differences).mean(1)
    apart = torch.zeros(int(pairs.prompts.max()) + 1, dtype=correct.dtype)
    apart.index_add_(0, pairs.prompts, correct - correct.mean())
    several = len(pairs.prompts.unique()) > 1
    return float(apart.square().sum().sqrt() / len(correct)) if several else None


def reliability(differences: Tensor, bins: int = BINS) -> list[list[float]]:
    """The reliability curve of score differences (M,): [confidence, share right, pairs] of each bin that has pairs.

    A difference d says, as Bradley and Terry's model reads it, that the response with the higher score is the better
    one with probability sigmoid(|d|). Bins are of equal width from 1/2 to 1. A model is calibrated if share and mean
    confidence are equal in every bin.
    """
    confidence, correct = differences.abs().sigmoid(), right(differences)
    places = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    found = ((places == place).nonzero()[:, 0] for place in range(bins))
    return [[float(confidence[x].mean()), float(correct[x].mean()), len(x)] for x in found if len(x)]


def calibration_error(curve: Sequence[Sequence[float]]) -> float:
    """Expected calibration error: mean over pairs of |share right - confidence| of their bin."""
    total = sum(count for _, _, count in curve)
    return sum(count * abs(share - confidence) for confidence, share, count in curve) / total


def correlations(scores: Tensor, lengths: Sequence[int], names: Sequence[str]) -> dict[str, float | None]:
    """Pearson's correlation of each criterion's scores (N, C) with the lengths (N,), and of each two criteria's."""
    tokens = torch.tensor(lengths, dtype=scores.dtype)
    if len(names) == 1:
        return {"length_correlation": correlation(scores[:, 0], tokens)}
    found = {f"length_correlation/{name}": correlation(scores[:, i], tokens) for i, name in enumerate(names)}
    for (i, name), (j, other) in combinations(enumerate(names), 2):
        found[f"criteria_correlation/{name}/{other}"] = correlation(scores[:, i], scores[:, j])
    return found


def correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's correlation of two vectors; None where one of them does not vary beyond rounding."""
    centred = x - x.mean(), y - y.mean()
    norms = [float(c.norm()) for c in centred]
    if not all(n > 1e-9 * float(v.norm()) for n, v in zip(norms, (x, y), strict=True)):
        return None
    return float(centred[0] @ centred[1]) / (norms[0] * norms[1])
