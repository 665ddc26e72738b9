"""Cases that span ops: log-probs above 0, banned tokens through the PPO loss, gradients of improbable tokens."""

from __future__ import annotations

import pytest
import torch
from heads import small_blocks
from oracle import DTYPES

from fastrl.ops import linear_logprobs, ppo_loss, token_logprobs

BACKENDS = ["reference", "cpu"]


@pytest.mark.parametrize("vocab", [1, 2, 7, 129, 1000, 2049, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logprobs_are_never_above_zero(backend, dtype, vocab):
    """T4, T7, pitfall 23: the likeliest token of sure, even, huge, far-off and partly banned rows."""
    g = torch.Generator().manual_seed(vocab)
    top = torch.randint(0, vocab, (48,), generator=g)
    largest = torch.finfo(dtype).max / 8  # over a temperature it must still be finite
    rows = torch.randn(48, vocab, generator=g)
    rows[8:16] *= 1e3
    rows[16:24] = 0.1  # equal logits: log-prob -log V
    rows[24:32] += 3e4
    rows[32:40, 1::2] = -torch.inf
    gaps = torch.linspace(-20, 20, 48)
    rows[torch.arange(48), top] = rows.amax(1) + gaps.clamp(min=0)
    rows[40:44] = -largest
    rows[44:48, 0] = largest
    logits = rows.to(dtype)
    ids = logits.argmax(-1)
    for options in ({}, {"temperature": 0.3}, {"temperature": 7.0}, {"softcap": 30.0}):
        logprobs, entropy = token_logprobs(logits, ids, return_entropy=True, backend=backend, **options)
        assert (logprobs <= 0).all() and (logprobs >= -torch.tensor(float(vocab)).log() - 1e-3).all()
        assert (entropy >= -1e-5).all()
    hidden = torch.randn(48, 16, generator=g).to(dtype) * gaps.abs()[:, None].to(dtype)
    weight = torch.randn(vocab, 16, generator=g).to(dtype)
    ids = (hidden @ weight.T).argmax(-1)
    for options in ({}, {"temperature": 0.3}, {"softcap": 30.0}):
        assert (linear_logprobs(hidden, weight, ids, backend=backend, **options) <= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropped", [True, False])
def test_banned_token_through_the_ppo_loss(backend, dropped):
    """T18, T19: a replayed filter bans the token that was sampled: the ratio is e^-20, every gradient finite."""
    logits = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[3, 7, 11, 2]])
    old = token_logprobs(logits, ids, backend=backend)
    logits[0, 1, 7] = -torch.inf
    logits.requires_grad_()
    mask = torch.tensor([[True, not dropped, True, True]])
    new = token_logprobs(logits, ids, backend=backend)
    assert new[0, 1] == -torch.inf
    ones = torch.ones(1, 4)
    loss, stats = ppo_loss(new, ones, old, ones, ones, ones, mask, backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all() and all(torch.isfinite(s) for s in stats)
    assert (gradient[0, 1] == 0).all() and (gradient[0, 0] != 0).any()
    torch.testing.assert_close(stats.ratio_mean, torch.tensor(1.0 if dropped else (3 + torch.e**-20) / 4))


@pytest.mark.parametrize("op", ["token_logprobs", "linear_logprobs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_improbable_tokens_keep_their_gradient(backend, op, monkeypatch):
    """T37: nothing is filtered: a token of probability 1e-14 gets its gradient as exactly as one of 1e-1."""
    small_blocks(monkeypatch)
    rows, vocab = 6, 130
    exact = -torch.arange(vocab).div(4).expand(rows, vocab) + torch.arange(rows)[:, None] / 8  # down to e^-32
    ids = torch.arange(rows)
    upstream = torch.linspace(0.5, 2, rows)

    def gradient(logits, weight, backend):
        if op == "token_logprobs":
            logits = logits.clone().requires_grad_()
            (token_logprobs(logits, ids, backend=backend) * upstream.to(logits.dtype)).sum().backward()
            return logits.grad
        weight = weight.clone().requires_grad_()  # hidden is the identity, so that logits = weight.T
        hidden = torch.eye(rows, dtype=weight.dtype)
        (linear_logprobs(hidden, weight, ids, backend=backend) * upstream.to(weight.dtype)).sum().backward()
        return weight.grad.T

    truth = gradient(exact.double(), exact.T.double(), "reference")
    found = gradient(exact, exact.T.contiguous(), backend)
    assert truth.abs().min() < 1e-14
    torch.testing.assert_close(found.double(), truth, rtol=2e-5, atol=0)
