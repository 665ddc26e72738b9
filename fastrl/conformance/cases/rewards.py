"""KL estimates, the shaped reward, its coefficient, and whitening."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.conformance.compare import close, expect, finite


def kl_estimators(kl):
    """pitfall 21: k1, k2 and k3 are d, d^2 / 2 and exp(-d) - 1 + d, for d = logprobs - ref_logprobs."""
    logprobs, difference = torch.tensor([-2.0, -1.0, -3.0, -0.5]), torch.tensor([0.5, -0.25, 0.0, 2.0])
    d = difference.double()
    truth = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}
    for estimator, wanted in truth.items():
        close(kl(logprobs, logprobs - difference, estimator), wanted, f"log-ratios 0.5 -0.25 0 2: {estimator}")


def extreme_log_ratios(kl):
    """T19: k3 of log-ratios of +-20 is right, of +-200 neither NaN nor negative, and of 0.001 keeps its digits."""
    d = torch.tensor([200.0, 20.0, -20.0, 1e-3])
    truth = torch.expm1(-d.double()) + d.double()
    close(kl(d, torch.zeros(4), "k3"), truth, "log-ratios 200 20 -20 0.001: k3", rtol=1e-2, atol=0)
    got = kl(torch.tensor([-200.0]), torch.zeros(1), "k3")
    expect(bool(got > 1e8), "log-ratio -200: k3", "inf or a large number", float(got))


def score_on_the_last_token(kl_reward):
    """pitfall 5, T27: the score lands on the last kept token, each token's penalty is -kl_coef * k1."""
    logprobs, ref, scores = -torch.rand(3, 6), -torch.rand(3, 6), torch.tensor([1.0, -2.0, 3.0])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0]]).bool()
    truth = torch.where(mask, -0.1 * (logprobs - ref).double(), 0)
    truth[torch.arange(3), torch.tensor([5, 1, 3])] += scores.double()
    got = kl_reward(logprobs, ref, scores, mask, 0.1)
    close(torch.where(mask, got, 0), truth, "mask 111111, 110000, 101100, scores 1 -2 3, kl_coef 0.1")


def padding_has_no_reward(kl_reward):
    """T20, pitfall 9, pitfall 38: padding may hold NaN, and has reward 0."""
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    logprobs, ref = (torch.randn(2, 5).masked_fill(~mask, torch.nan) for _ in range(2))
    got = kl_reward(logprobs, ref, torch.ones(2), mask, 0.1)
    finite(got, "lengths 5 2, NaN behind")
    expect((got[~mask] == 0).all(), "lengths 5 2, NaN behind: reward of padding", 0, got[~mask].tolist())


def a_score_of_zero(kl_reward):
    """pitfall 43: a score of 0 is a score like one of 1e-6."""
    logprobs, ref, mask = -torch.rand(1, 4), -torch.rand(1, 4), torch.ones(1, 4).bool()
    near = kl_reward(logprobs, ref, torch.tensor([1e-6]), mask, 0.1).double()
    close(kl_reward(logprobs, ref, torch.zeros(1), mask, 0.1), near, "score 0 beside score 1e-6", atol=2e-6)


def adaptive_coefficient(kl_controller):
    """pitfall 22: coef * (1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon)."""
    for kl, factor in ((6.6, 1.001), (12.0, 1.002), (5.4, 0.999), (0.0, 0.998), (6.0, 1.0)):
        got, wanted = float(kl_controller(0.15, kl, 6.0, 10000, 100)), 0.15 * factor
        expect(abs(got - wanted) < 1e-6, f"coef 0.15, kl {kl}, target 6, horizon 10000, 100 samples", wanted, got)


def whitening(whiten):
    """pitfall 13, pitfall 15: mean 0 and variance 1 over all kept slots, by n or n - 1, not by row or column."""
    x = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 3.0, 0.0, -5.0], [7.0, 7.0, 1.0, 2.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    kept = x[mask].double()
    got = whiten(x, mask)[mask].double()
    errors = [float((got - (kept - kept.mean()) / kept.std(correction=c)).abs().max()) for c in (0, 1)]
    expect(min(errors) < 1e-5, "x (3, 4), 9 kept", "(x - mean) / std of the kept", f"{min(errors):.3g} away from it")


def centring(whiten):
    """pitfall 12: centred means a mean of 0; not centred means that it is kept."""
    x, mask = torch.tensor([[4.0, 5.0, 6.0, 5.5]]), torch.ones(1, 4).bool()
    centred, kept = float(whiten(x, mask, center=True).mean()), float(whiten(x, mask, center=False).mean())
    expect(abs(centred) < 1e-5, "4 5 6 5.5, centred: mean", 0, centred)
    expect(kept > 1, "4 5 6 5.5, not centred: mean", "above 1", kept)


def whitening_beside_padding(whiten):
    """T20, pitfall 9: padding may hold NaN, and changes nothing."""
    x, mask = torch.randn(2, 6), torch.arange(6) < torch.tensor([[6], [2]])
    clean = torch.where(mask, whiten(torch.where(mask, x, 0), mask), 0).double()
    got = whiten(x.masked_fill(~mask, torch.nan), mask)
    close(torch.where(mask, got, 0), clean, "lengths 6 2, NaN behind")


def whitening_next_to_nothing(whiten):
    """T25, pitfall 10: one kept token, equal tokens and none at all give finite numbers."""
    for mask, what in (([1, 0, 0], "one token"), ([1, 1, 1], "three equal tokens"), ([0, 0, 0], "no token")):
        keep = torch.tensor([mask]).bool()
        finite(torch.where(keep, whiten(torch.full((1, 3), 2.0), keep), 0), f"whitening {what}")


def whitening_a_common_offset(whiten):
    """T7: the mean is taken off before the squares are summed: an offset of 1000 costs no digits."""
    x, mask = torch.randn(4, 250), torch.ones(4, 250).bool()
    got: Tensor = whiten(x + 1000, mask)
    exact = (x + 1000).double()
    close(got, (exact - exact.mean()) / exact.std(correction=0), "x (4, 250) around 1000", atol=4e-3)
