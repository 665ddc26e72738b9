"""KL to the reference: the coefficient's controller in closed form, the penalty as a term of the loss."""

from __future__ import annotations

import math

import pytest
import torch

from fastrl.ops import ppo_advantages
from fastrl.rlhf.kl import adapted, kl_penalty

MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])


@pytest.mark.parametrize(
    ("kl", "error"),
    [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (7.2, 0.2), (0.0, -0.2), (-3.0, -0.2)],
)
def test_the_coefficient_adapts_by_the_clipped_error(kl, error):
    """pitfall 22: Ziegler's numbers: 0.15 at first, target 6, horizon 10,000, 512 samples a step."""
    after = adapted(0.15, kl, target=6.0, horizon=10_000, samples=512)
    assert after == pytest.approx(0.15 * (1 + error * 512 / 10_000), rel=1e-12)


def test_the_coefficient_grows_by_a_fifth_over_a_horizon_of_too_much_kl():
    coef = 1.0
    for _ in range(100):
        coef = adapted(coef, 50.0, target=5.0, horizon=1000, samples=10)
    assert coef == pytest.approx(1.002**100) and 1.2 < coef < 1.23
    assert adapted(1.0, 0.0, target=5.0, horizon=10, samples=10) == pytest.approx(0.8)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_penalty_is_the_estimate_that_is_reported(estimator):
    """pitfall 21: in the loss and in the report the same numbers, over kept tokens alone."""
    torch.manual_seed(0)
    logprobs, ref_logprobs = -torch.rand(2, 4), -torch.rand(2, 4)
    stats = ppo_advantages(
        logprobs, ref_logprobs, torch.zeros(2, 4), torch.zeros(2), MASK, kl_estimator=estimator
    ).stats
    penalty = kl_penalty(logprobs, ref_logprobs, MASK, estimator=estimator, denominator=4)
    torch.testing.assert_close(penalty, stats.kl_mean)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_penalty_has_its_gradient_and_none_behind_the_mask(estimator):
    """pitfall 9: NaN there changes nothing."""
    logprobs = torch.where(MASK, torch.linspace(-2, 0, 8, dtype=torch.float64).view(2, 4), math.nan).requires_grad_()
    ref_logprobs = torch.full_like(logprobs, -1.3).requires_grad_()
    penalty = kl_penalty(logprobs, ref_logprobs, MASK, estimator=estimator, denominator=7.0)
    penalty.backward()
    difference = (logprobs - ref_logprobs).detach()
    expected = difference if estimator == "k2" else 1 - (-difference).exp()
    torch.testing.assert_close(logprobs.grad, torch.where(MASK, expected / 7.0, 0))
    assert ref_logprobs.grad is None and torch.isfinite(penalty)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_expected_gradients_of_the_estimators(estimator):
    """Over all tokens of a distribution: k2's is that of KL(p || q), k3's that of KL(q || p), and k1's is 0."""
    torch.manual_seed(1)
    logits, q = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    q = q.softmax(0)
    p = logits.softmax(0)
    d = p.log() - q.log()
    estimate = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator]
    (got,) = torch.autograd.grad((p.detach() * estimate).sum(), logits, retain_graph=True)
    divergence = {"k1": d.sum() * 0, "k2": (p * d).sum(), "k3": (q * -d).sum()}[estimator]
    (want,) = torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_a_far_token_stays_finite():
    logprobs = torch.tensor([[-300.0, -0.1]], requires_grad=True)
    penalty = kl_penalty(logprobs, torch.tensor([[-0.1, -300.0]]), MASK[:1, :2], estimator="k3", denominator=2)
    penalty.backward()
    assert torch.isfinite(penalty) and logprobs.grad.tolist() == [[0.0, 0.5]]


@pytest.mark.parametrize("estimator", ["k1", "kl"])
def test_an_estimator_without_use_in_a_loss_is_refused(estimator):
    with pytest.raises(ValueError, match=f"kl_penalty: estimator: expected k2 or k3, got '{estimator}'"):
        kl_penalty(torch.zeros(1, 2), torch.zeros(1, 2), MASK[:1, :2], estimator=estimator, denominator=1)
