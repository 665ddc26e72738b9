"""Triton kernel of gae: two scans from right to left over tiles of rows and steps.

A step is an affine map of the advantage on its right; a dropped step is the identity. Maps compose in any bracketing,
so a tile needs log2(steps) rounds; what enters a tile from its right is one value and one advantage a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastrl.kernels.launch import launch

# (rows, steps, warps) of a tile: the first that holds a row whole, else the last, several times. Rows never share
# more than a program, so a row's bits do not depend on the batch.
TILES = ((16, 32, 8), (4, 128, 8), (2, 512, 8), (1, 1024, 8))


def tile_of(steps: int) -> tuple[int, int, int]:
    return next((tile for tile in TILES if steps <= tile[1]), TILES[-1])


@triton.jit
def _first_kept(right_found, right_value, found, value):
    return right_found | found, tl.where(found != 0, value, right_value)


@triton.jit
def _compose(right_decay, right_sum, decay, sum_):
    return decay * right_decay, sum_ + decay * right_sum


@triton.jit
def _compose_ends(right_ended, right_decay, right_sum, ended, decay, sum_):
    """As _compose; nothing from the right, NaN included, passes the end of an episode."""
    right_sum = tl.where(ended != 0, 0.0, decay * right_sum)
    return right_ended | ended, tl.where(ended != 0, 0.0, decay * right_decay), sum_ + right_sum


@triton.jit
def first_column(x, STEPS: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, STEPS)[None, :] == 0, x, 0.0), 1)


@triton.jit
def next_kept(right_value, right_keep, after):
    """Whether a kept step follows in the tile, and the value of the next one anywhere.

    right_value, right_keep: of the step to the right; `after` (rows,): the first kept value right of the tile.
    """
    found, value = tl.associative_scan((right_keep.to(tl.int32), right_value), 1, _first_kept, reverse=True)
    return found != 0, tl.where(found != 0, value, after[:, None])


@triton.jit
def tile_advantages(delta, keep, ends, decay, carry):
    """Advantages of a tile, on dropped steps that of the next kept one.

    ends: kept steps that end an episode, or None; decay (rows,): gamma * lambda; carry (rows,): the advantage of the
    first kept step right of the tile.
    """
    decays = tl.where(keep, decay[:, None], 1.0)
    sums = tl.where(keep, delta, 0.0)
    if ends is None:
        decays, sums = tl.associative_scan((decays, sums), 1, _compose, reverse=True)
        return sums + decays * carry[:, None]
    else:
        ended, decays, sums = tl.associative_scan((ends.to(tl.int32), decays, sums), 1, _compose_ends, reverse=True)
        return sums + tl.where(ended != 0, 0.0, decays * carry[:, None])


@triton.jit(do_not_specialize=["rows"])
def gae_kernel(
    rewards, values, mask, dones, lambdas, bootstrap_value, advantages, returns, rows, steps, gamma, gae_lambda,
    ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    decay = tl.full((ROWS,), 0.0, tl.float32) + gamma * gae_lambda
    if lambdas is not None:
        decay = gamma * tl.load(lambdas + row, mask=in_rows, other=0.0)
    after = tl.zeros((ROWS,), tl.float32)
    if bootstrap_value is not None:
        after = tl.load(bootstrap_value + row, mask=in_rows, other=0.0)
    carry = tl.zeros((ROWS,), tl.float32)
    chunks = tl.cdiv(steps, STEPS)
    for i in range(chunks):
        step = (chunks - 1 - i) * STEPS + tl.arange(0, STEPS)[None, :]
        at = row[:, None] * steps + step
        keep = in_rows[:, None] & (step < steps)
        right_inside = in_rows[:, None] & (step + 1 < steps)
        reward = tl.load(rewards + at, mask=keep, other=0.0)
        value = tl.load(values + at, mask=keep, other=0.0)
        right_value = tl.load(values + at + 1, mask=right_inside, other=0.0)
        inside = keep
        if mask is None:
            next_value = tl.where(right_inside, right_value, after[:, None])
        else:
            keep = keep & tl.load(mask + at, mask=keep, other=0).to(tl.int1)
            right_keep = right_inside & tl.load(mask + at + 1, mask=right_inside, other=0).to(tl.int1)
            _, next_value = next_kept(right_value, right_keep, after)
            after = first_column(tl.where(keep, value, next_value), STEPS)
        ends = None
        if dones is not None:
            ends = keep & tl.load(dones + at, mask=keep, other=0).to(tl.int1)
            next_value = tl.where(ends, 0.0, next_value)
        advantage = tile_advantages(reward + gamma * next_value - value, keep, ends, decay, carry)
        carry = first_column(advantage, STEPS)
        tl.store(advantages + at, tl.where(keep, advantage, 0.0), mask=inside)
        tl.store(returns + at, tl.where(keep, advantage + value, 0.0), mask=inside)


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    dones: torch.Tensor | None,
    lambdas: torch.Tensor | None,
    bootstrap_value: torch.Tensor | None,
    gamma: float,
    gae_lambda: float,
    advantages: torch.Tensor,
    returns: torch.Tensor,
) -> None:
    rows, steps = rewards.shape
    tile_rows, tile_steps, warps = tile_of(steps)
    launch(
        gae_kernel, (triton.cdiv(rows, tile_rows),), rewards,
        rewards, values, mask, dones, lambdas, bootstrap_value, advantages, returns, rows, steps, gamma, gae_lambda,
        ROWS=tile_rows, STEPS=tile_steps, num_warps=warps,
    )  # fmt: skip
