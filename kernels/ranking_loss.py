"""Triton kernels of ranking_loss, over tiles of all pairs of answers: there are at most a few thousand."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastrl.kernels.launch import launch
from fastrl.kernels.maths import exp

TILE = 32
SUMS = 4  # of an answer's pairs: loss, right and difference where it is the better one; gradient


@triton.jit
def log1p(e):
    """log(1 + e) for e in [0, 1]: 2 atanh(s) with s = e / (2 + e) <= 1/3."""
    s = e / (e + 2.0)
    q = s * s
    p = q * (1.0 / 15) + 1.0 / 13
    p = p * q + 1.0 / 11
    p = p * q + 1.0 / 9
    p = p * q + 1.0 / 7
    p = p * q + 1.0 / 5
    p = p * q + 1.0 / 3
    return 2.0 * s * (p * q + 1.0)


@triton.jit(do_not_specialize=["size"])
def ranking_answers_kernel(scores, group_ids, ranks, margins, center_coef, size, wins, sums, TILE: tl.constexpr):
    """Of every answer: how many it beats, and its sums."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    group = tl.load(group_ids + i, mask=i < size, other=0)[:, None]
    rank = tl.load(ranks + i, mask=i < size, other=0.0)[:, None]
    score = tl.load(scores + i, mask=i < size, other=0.0)[:, None]
    margin = tl.zeros((TILE, 1), tl.float32)
    if margins is not None:
        margin = tl.load(margins + i, mask=i < size, other=0.0)[:, None]
    count = tl.zeros((TILE,), tl.int32)
    loss = tl.zeros((TILE,), tl.float32)
    right = tl.zeros((TILE,), tl.float32)
    difference = tl.zeros((TILE,), tl.float32)
    gradient = tl.zeros((TILE,), tl.float32)
    for start in range(0, size, TILE):
        j = start + tl.arange(0, TILE)
        same = (group == tl.load(group_ids + j, mask=j < size, other=0)[None, :]) & (j < size)[None, :]
        other_rank = tl.load(ranks + j, mask=j < size, other=0.0)[None, :]
        beats, beaten = same & (rank < other_rank), same & (other_rank < rank)
        other = tl.load(scores + j, mask=j < size, other=0.0)[None, :]
        d = tl.where(beats, score - other, other - score)  # better less worse
        x = d - margin
        if margins is not None:
            x = d - tl.where(beats, margin, tl.load(margins + j, mask=j < size, other=0.0)[None, :])
        total = score + other
        e = exp(-tl.abs(x))
        p_wrong = tl.where(x < 0.0, 1.0, e) / (e + 1.0)  # sigmoid(-x)
        pair_loss = log1p(e) + tl.where(x < 0.0, -x, 0.0) + center_coef * total * total
        slope = 2.0 * center_coef * total + tl.where(beats, -p_wrong, p_wrong)
        count += tl.sum(beats.to(tl.int32), 1)
        loss += tl.sum(tl.where(beats, pair_loss, 0.0), 1)
        difference += tl.sum(tl.where(beats, d, 0.0), 1)
        right += tl.sum(tl.where(beats, tl.where(d > 0.0, 1.0, tl.where(d == 0.0, 0.5, 0.0)), 0.0), 1)
        gradient += tl.sum(tl.where(beats | beaten, slope, 0.0), 1)
    tl.store(wins + i, count, mask=i < size)
    tl.store(sums + i, loss, mask=i < size)
    tl.store(sums + size + i, right, mask=i < size)
    tl.store(sums + 2 * size + i, difference, mask=i < size)
    tl.store(sums + 3 * size + i, gradient, mask=i < size)


@triton.jit(do_not_specialize=["size"])
def ranking_groups_kernel(group_ids, wins, size, pairs, leads, TILE: tl.constexpr):
    """Of every answer: the pairs of its group, and whether it is the first answer of a group with pairs."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    group = tl.load(group_ids + i, mask=i < size, other=0)[:, None]
    count = tl.zeros((TILE,), tl.int64)
    earlier = tl.zeros((TILE,), tl.int32)
    for start in range(0, size, TILE):
        j = start + tl.arange(0, TILE)
        same = (group == tl.load(group_ids + j, mask=j < size, other=0)[None, :]) & (j < size)[None, :]
        won = tl.load(wins + j, mask=j < size, other=0).to(tl.int64)[None, :]
        count += tl.sum(tl.where(same, won, 0), 1)
        earlier += tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), 1)
    tl.store(pairs + i, count, mask=i < size)
    tl.store(leads + i, ((earlier == 0) & (count > 0)).to(tl.int32), mask=i < size)


@triton.jit(do_not_specialize=["size"])
def ranking_totals_kernel(scores, ranks, wins, sums, pairs, leads, size, loss, stats, dscores, BLOCK: tl.constexpr):
    """One program: the loss, statistics in the order of RankingStats, and the gradients with their weights."""
    zero = tl.zeros((BLOCK,), tl.float64)
    mean_loss, right, difference, score, pair, group, poison = zero, zero, zero, zero, zero, zero, zero
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < size
        of_group = tl.maximum(tl.load(pairs + i, mask=inside, other=1), 1).to(tl.float64)
        mean_loss += tl.load(sums + i, mask=inside, other=0.0).to(tl.float64) / of_group
        right += tl.load(sums + size + i, mask=inside, other=0.0).to(tl.float64)
        difference += tl.load(sums + 2 * size + i, mask=inside, other=0.0).to(tl.float64)
        score += tl.load(scores + i, mask=inside, other=0.0).to(tl.float64)
        pair += tl.load(wins + i, mask=inside, other=0).to(tl.float64)
        group += tl.load(leads + i, mask=inside, other=0).to(tl.float64)
        rank = tl.load(ranks + i, mask=inside, other=0.0)
        poison += tl.where(rank == rank, 0.0, rank)
    groups, all_pairs = tl.sum(group, 0), tl.sum(pair, 0)
    # A rank that is NaN has no order: loss and gradients are NaN.
    scale = 1.0 / tl.maximum(groups, 1.0) + tl.sum(poison, 0)
    count = tl.maximum(size, 1).to(tl.float64)
    mean = tl.sum(score, 0) / count
    squares = zero
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < size
        d = tl.where(inside, tl.load(scores + i, mask=inside, other=0.0).to(tl.float64) - mean, 0.0)
        squares += d * d
        of_group = tl.maximum(tl.load(pairs + i, mask=inside, other=1), 1).to(tl.float64)
        gradient = tl.load(sums + 3 * size + i, mask=inside, other=0.0).to(tl.float64) / of_group * scale
        tl.store(dscores + i, gradient.to(tl.float32), mask=inside)
    tl.store(loss, (tl.sum(mean_loss, 0) * scale).to(tl.float32))
    tl.store(stats, (tl.sum(right, 0) / tl.maximum(all_pairs, 1.0)).to(tl.float32))
    tl.store(stats + 1, all_pairs.to(tl.float32))
    tl.store(stats + 2, groups.to(tl.float32))
    tl.store(stats + 3, (tl.sum(difference, 0) / tl.maximum(all_pairs, 1.0)).to(tl.float32))
    tl.store(stats + 4, mean.to(tl.float32))
    tl.store(stats + 5, tl.sqrt(tl.sum(squares, 0) / count).to(tl.float32))


def ranking_loss(
    scores: torch.Tensor,
    group_ids: torch.Tensor,
    ranks: torch.Tensor,
    margins: torch.Tensor | None,
    center_coef: float,
    loss: torch.Tensor,
    stats: torch.Tensor,
    dscores: torch.Tensor,
) -> None:
    size = scores.numel()
    grid = (triton.cdiv(size, TILE),)
    sums = scores.new_empty(SUMS * size)
    wins, leads = scores.new_empty((2, size), dtype=torch.int32).unbind()
    pairs = scores.new_empty(size, dtype=torch.int64)
    launch(
        ranking_answers_kernel, grid, scores,
        scores, group_ids, ranks, margins, center_coef, size, wins, sums, TILE=TILE, num_warps=4,
    )  # fmt: skip
    launch(ranking_groups_kernel, grid, scores, group_ids, wins, size, pairs, leads, TILE=TILE, num_warps=4)
    launch(
        ranking_totals_kernel, (1,), scores,
        scores, ranks, wins, sums, pairs, leads, size, loss, stats, dscores, BLOCK=512, num_warps=4,
    )  # fmt: skip
