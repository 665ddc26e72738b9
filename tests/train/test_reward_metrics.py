"""Metrics of reward scores, each against numbers by hand."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from fastrl.data import Preference
from fastrl.train.reward_metrics import (
    Pairs,
    calibration_error,
    correlation,
    held_out_metrics,
    reliability,
    standard_error,
    train_accuracy,
)


def comparison(ranks, criterion=None, lengths=None):
    lengths = lengths or [1] * len(ranks)
    return Preference([5], [[6] * n for n in lengths], ranks, 0.0, criterion)


def log_odds(p):
    return math.log(p / (1 - p))


def test_reliability_of_pairs_by_hand():
    """Confidence is sigmoid of the difference's size; a pair is right if its sign is."""
    differences = torch.tensor([log_odds(0.51), -log_odds(0.53), log_odds(0.97), log_odds(0.99)]).double()
    curve = reliability(differences, bins=5)
    expected = [[pytest.approx(0.52), 0.5, 2], [pytest.approx(0.98), 1.0, 2]]
    assert curve == expected
    assert calibration_error(curve) == pytest.approx((2 * 0.02 + 2 * 0.02) / 4)


def test_bins_hold_every_confidence():
    """The ends of the range too: equal scores are a confidence of 1/2, half right; far apart ones a confidence of 1."""
    assert reliability(torch.tensor([0.0, 80.0, -80.0]).double()) == [[0.5, 0.5, 1], [1.0, 0.5, 2]]


def test_outcomes_drawn_from_the_model_are_calibrated():
    torch.manual_seed(0)
    gaps = torch.randn(20000).double() * 2
    outcomes = torch.where(torch.rand(20000) < gaps.sigmoid(), gaps, -gaps)  # better less worse
    assert calibration_error(reliability(outcomes)) < 0.02
    assert calibration_error(reliability(outcomes * 5)) > 0.1


def test_standard_errors():
    """Of independent pairs the binomial one; of pairs of one prompt that agree, that of as many prompts."""
    differences = torch.tensor([1.0, 2.0, -1.0, 3.0])[:, None].double()
    alone = standard_error(Pairs(differences, torch.arange(4)))
    assert alone == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    together = standard_error(Pairs(differences.repeat_interleave(3, 0), torch.arange(4).repeat_interleave(3)))
    assert together == pytest.approx(alone)
    assert standard_error(Pairs(differences, torch.zeros(4).long())) is None


def test_correlation_is_pearsons():
    torch.manual_seed(0)
    x, y = torch.randn(2, 50).double()
    assert correlation(x, y) == pytest.approx(numpy.corrcoef(x, y)[0, 1])
    assert correlation(x, -3 * x + 1) == pytest.approx(-1)
    assert correlation(x, torch.full((50,), 0.1).double()) is None


def test_each_criterion_is_judged_by_its_own_column():
    """Columns a, b. By a: 1 of 1 right; by b: 2 of 3 (K-wise); without a name: the mean over both columns."""
    preferences = [comparison([0, 1], "a"), comparison([0, 1, 2], "b"), comparison([1, 0])]
    scores = torch.tensor([[1, -9], [0, 9], [-9, 3], [9, 1], [0, 2], [0.5, 1.0], [1.0, 0.5]])
    metrics = held_out_metrics(scores, preferences, ["a", "b"])
    assert metrics["eval_accuracy/a"] == 1.0 and metrics["eval_accuracy/b"] == pytest.approx(2 / 3)
    assert (
        metrics["eval_accuracy"] == pytest.approx((1 + 2 + 0.5) / 5) == train_accuracy(scores, preferences, ["a", "b"])
    )
    by_a = -math.log(1 / (1 + math.exp(-1)))
    by_b = sum(math.log(1 + math.exp(-d)) for d in (2, 1, -1)) / 3
    by_both = sum(math.log(1 + math.exp(-d)) for d in (0.5, -0.5)) / 2
    assert metrics["eval_loss"] == pytest.approx((by_a + by_b + by_both) / 3, abs=1e-6)
    assert metrics["eval_ece/a"] == pytest.approx(1 - 1 / (1 + math.exp(-1)))
    assert sum(pairs for _, _, pairs in metrics["eval_reliability"]) == 2 * 5  # every pair counts in both columns
    assert "eval_accuracy_se/a" not in metrics and metrics["eval_accuracy_se"] > 0


def test_length_bias_and_correlations_of_criteria():
    preferences = [comparison([0, 1], None, [n, n + 3]) for n in range(1, 9)]
    lengths = torch.tensor([float(len(r)) for p in preferences for r in p.responses])
    metrics = held_out_metrics(torch.stack([lengths, -lengths, torch.ones(16)], 1), preferences, ["a", "b", "c"])
    assert metrics["length_correlation/a"] == pytest.approx(1) == -metrics["length_correlation/b"]
    assert metrics["criteria_correlation/a/b"] == pytest.approx(-1)
    assert not [name for name in metrics if name.endswith("/c")]  # a column that does not vary correlates with nothing
    one = held_out_metrics(lengths[:, None], preferences, ["score"])
    assert one["length_correlation"] == pytest.approx(1) and not [name for name in one if "/" in name]


def test_nan_scores_reach_the_loss_alone():
    """The loop ends on a loss that is not finite; nothing before it may raise."""
    metrics = held_out_metrics(torch.full((4, 2), math.nan), [comparison([0, 1])] * 2, ["a", "b"])
    assert math.isnan(metrics["eval_loss"])
