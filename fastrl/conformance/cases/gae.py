"""Generalised advantage estimation over responses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.conformance.compare import close, expect, layouts, same_bits


def by_hand(gae):
    """pitfall 6, T28: the value after the last token is 0, and no value or reward is off by one."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.25, 0.5, 1.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3).bool(), 0.5, 0.5)
    # deltas: 0.5 * 0.5 - 0.25 = 0,  0.5 * 1 - 0.5 = 0,  1 - 1 = 0
    close(advantages, torch.zeros(1, 3), "rewards 0 0 1, values 0.25 0.5 1, gamma 0.5, lambda 0.5: advantages")
    advantages, returns = gae(rewards, torch.tensor([[0.0, 2.0, 4.0]]), torch.ones(1, 3).bool(), 0.5, 0.5)
    given = "rewards 0 0 1, values 0 2 4, gamma 0.5, lambda 0.5"
    close(advantages, torch.tensor([[0.8125, -0.75, -3.0]]), f"{given}: advantages")  # deltas 1, 0, -3
    close(returns, torch.tensor([[0.8125, 1.25, 1.0]]), f"{given}: returns")


def any_length(gae):
    """T28: lengths around those of vectors and blocks."""
    for length in (1, 2, 3, 31, 32, 33, 127, 1025):
        rewards, values = torch.randn(3, length), torch.randn(3, length)
        mask = torch.ones(3, length).bool()
        for gamma, gae_lambda in ((1.0, 0.95), (0.99, 1.0), (1.0, 1.0), (0.9, 0.0)):
            truth = _naive(rewards, values, mask, gamma, gae_lambda)
            given = f"rewards (3, {length}), gamma {gamma:g}, lambda {gae_lambda:g}"
            tolerance = 2e-6 * max(1.0, float(truth[0].abs().max()))
            for got, wanted, name in zip(gae(rewards, values, mask, gamma, gae_lambda), truth, _NAMES, strict=True):
                close(got, wanted, f"{given}: {name}", atol=tolerance)


def padding(gae):
    """T20, pitfall 9, pitfall 38: right padding may hold NaN; what is kept does not see it, and it is 0 itself."""
    rewards, values = torch.randn(3, 9), torch.randn(3, 9)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    truth = _naive(rewards, values, mask, 0.99, 0.95)
    poisoned = (x.masked_fill(~mask, torch.nan) for x in (rewards, values))
    for got, wanted, name in zip(gae(*poisoned, mask, 0.99, 0.95), truth, _NAMES, strict=True):
        close(torch.where(mask, got, 0), wanted, f"rewards (3, 9), lengths 9 4 1, NaN behind: {name}")
        expect((got[~mask] == 0).all(), f"rewards (3, 9), lengths 9 4 1, NaN behind: {name} of padding", 0, got[~mask])


def holes(gae):
    """T27, pitfall 8: dropped tokens inside a response (a tool's) are passed over: as GAE of the row without them."""
    rewards, values = torch.randn(1, 7), torch.randn(1, 7)
    mask = torch.tensor([[True, True, False, False, True, False, True]])
    kept = mask[0].nonzero()[:, 0]
    truth = _naive(rewards[:, kept], values[:, kept], torch.ones(1, 4).bool(), 0.9, 0.8)
    for got, wanted, name in zip(gae(rewards, values, mask, 0.9, 0.8), truth, _NAMES, strict=True):
        close(got[:, kept], wanted, f"mask 1 1 0 0 1 0 1, gamma 0.9, lambda 0.8: {name} of the kept tokens")


def nothing_kept(gae):
    """pitfall 10: a row that keeps nothing has advantages of 0, and changes no other."""
    rewards, values, mask = torch.randn(2, 5), torch.randn(2, 5), torch.ones(2, 5).bool()
    mask[0] = False
    truth = _naive(rewards, values, mask, 0.99, 0.95)
    for got, wanted, name in zip(gae(rewards, values, mask, 0.99, 0.95), truth, _NAMES, strict=True):
        close(got, wanted, f"rewards (2, 5), the first row drops everything: {name}")


def reordering(gae):
    """pitfall 7, T15: rows in another order, or alone, give the same bits."""
    rewards, values, mask = torch.randn(6, 40), torch.randn(6, 40), torch.ones(6, 40).bool()
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    whole = gae(rewards, values, mask, 0.99, 0.95)
    moved = gae(rewards[order], values[order], mask[order], 0.99, 0.95)
    alone = gae(rewards[:1], values[:1], mask[:1], 0.99, 0.95)
    for a, b, c, name in zip(whole, moved, alone, _NAMES, strict=True):
        same_bits(a[order], b, f"rewards (6, 40) with rows in another order: {name}")
        same_bits(a[:1], c, f"the first of 6 rows alone: {name}")


def any_layout(gae):
    """T21: strided, transposed and unaligned inputs give what contiguous ones give."""
    inputs = {"rewards": torch.randn(4, 9), "values": torch.randn(4, 9), "mask": torch.rand(4, 9) < 2}
    truth = _naive(inputs["rewards"], inputs["values"], inputs["mask"], 0.99, 0.95)
    for name in inputs:
        for layout, same in layouts(inputs[name]):
            got = gae(*(inputs | {name: same}).values(), 0.99, 0.95)
            close(got[0], truth[0], f"{name} (4, 9) as {layout}: advantages")


_NAMES = ("advantages", "returns")


def _naive(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """The loop over one row after the other, without its dropped tokens, in float64."""
    advantages = torch.zeros_like(rewards, dtype=torch.float64)
    for row, keep in enumerate(mask):
        places = keep.nonzero()[:, 0]
        carry, following, found = 0.0, 0.0, []
        for reward, value in zip(rewards[row, places].tolist()[::-1], values[row, places].tolist()[::-1], strict=True):
            carry = reward + gamma * following - value + gamma * gae_lambda * carry
            following = value
            found.append(carry)
        advantages[row, places] = torch.tensor(found[::-1], dtype=torch.float64)
    return advantages, torch.where(mask, advantages + values.double(), 0)
