"""Scores before they are rewards: running normalisation, length penalty, and their order."""

from __future__ import annotations

import pytest
import torch

from fastrl.rlhf.shaping import add_scores, no_scores, normalized, shape_scores


def test_running_moments_are_those_of_all_scores():
    """pitfall 47: whatever the batches; an empty one, one of one score, and scores far from 0."""
    torch.manual_seed(0)
    batches = [1e4 + 3 * torch.randn(n) for n in (5, 1, 0, 17, 40)]
    moments = no_scores()
    for batch in batches:
        moments = add_scores(moments, batch)
    scores = torch.cat(batches).double()
    assert moments[0] == len(scores)
    torch.testing.assert_close(moments[1], scores.mean())
    torch.testing.assert_close(moments[2] / moments[0], scores.var(correction=0))
    shaped = normalized(torch.cat(batches), moments)
    assert abs(shaped.mean()) < 1e-3 and shaped.std(correction=0) == pytest.approx(1, abs=1e-3)


def test_no_score_and_equal_scores_are_no_division_by_zero():
    assert normalized(torch.tensor([3.0, 4.0]), no_scores()).tolist() == [3.0, 4.0]
    equal = torch.full((4,), 2.5)
    assert normalized(equal, add_scores(no_scores(), equal)).tolist() == [0.0] * 4
    assert torch.equal(add_scores(no_scores(), torch.empty(0)), no_scores())


def test_scores_are_normalised_first_and_lose_the_penalty_of_their_length_then():
    scores, lengths = torch.tensor([0.0, 2.0, 4.0]), torch.tensor([3, 6, 10])
    moments = add_scores(no_scores(), torch.tensor([0.0, 4.0]))  # mean 2, deviation 2
    shaped = shape_scores(scores, lengths, moments=moments, length_penalty=0.25, length_free=4)
    torch.testing.assert_close(shaped, torch.tensor([-1.0, 0.0 - 0.5, 1.0 - 1.5]))
    assert shape_scores(scores, lengths) is scores


def test_the_length_penalty_is_dapos_soft_punishment():
    """From 0 at max_new_tokens - buffer to -1 at max_new_tokens."""
    longest, buffer = 20, 4
    lengths = torch.arange(1, longest + 1)
    shaped = shape_scores(torch.zeros(longest), lengths, length_penalty=1 / buffer, length_free=longest - buffer)
    ramp = [0.0 if n <= longest - buffer else (longest - buffer - n) / buffer for n in range(1, longest + 1)]
    assert shaped.tolist() == ramp and ramp[-1] == -1
