"""Trajectories and what is computed on their rows: chunks without padding, scores, log-probs, values, summaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastrl.data import pad, shuffled_batches
from fastrl.models import as_scorer, response_logprobs, token_scores
from fastrl.ops import Advantages, PPOStats
from fastrl.rollout import Trajectory, make_trajectory
from fastrl.run.distributed import gather, share, sum_over_ranks, unshare, world_size


class ScoredTrajectory(NamedTuple):
    """What the four models, and the rewards that are added, say about a trajectory before the update."""

    scores: Tensor  # (B,)
    logprobs: Tensor  # (B, R)
    entropy: Tensor  # (B, R)
    ref_logprobs: Tensor  # (B, R)
    values: Tensor  # (B, R)
    parts: Mapping[str, Tensor] = {}  # (B,) what the scores are summed of, where that is more than one number


def part_means(scored: ScoredTrajectory) -> dict[str, float]:
    """Means over responses of what the scores are summed of, before weights: `score/helpful` and its like."""
    return {f"score/{name}": float(part.double().mean()) for name, part in scored.parts.items()}


class Experience(NamedTuple):
    """What an update learns from; one row per sequence, responses in the last R columns of `input_ids`."""

    input_ids: Tensor  # (B, P + R)
    attention_mask: Tensor  # (B, P + R) bool
    response_mask: Tensor  # (B, R) bool
    old_logprobs: Tensor  # (B, R)
    ref_logprobs: Tensor  # (B, R)
    old_values: Tensor  # (B, R)
    advantages: Tensor  # (B, R)
    returns: Tensor  # (B, R)


def gather_rows(part: Trajectory, pad_id: int) -> Trajectory:
    """The whole trajectory of whose rows every rank has its share."""
    if world_size() == 1:
        return part
    prompts = part.attention_mask[:, : -part.responses.shape[1] or None]
    rows = [
        (ids[: len(kept)][kept].tolist(), response[mask].tolist(), bool(stopped))
        for ids, kept, response, mask, stopped in zip(
            part.input_ids, prompts, part.responses, part.response_mask, part.stopped, strict=True
        )
    ]
    prompt, response, ended = zip(*unshare(rows), strict=True)
    device = part.input_ids.device
    whole = make_trajectory(
        *pad(prompt, pad_id, side="left"), *pad(response, pad_id, side="right"), torch.tensor(ended)
    )
    return Trajectory(*(tensor.to(device) for tensor in whole))


def make_experience(trajectory: Trajectory, scored: ScoredTrajectory, shaped: Advantages) -> Experience:
    """What an update learns from a trajectory, its scores and its advantages."""
    return Experience(
        input_ids=trajectory.input_ids,
        attention_mask=trajectory.attention_mask,
        response_mask=trajectory.response_mask,
        old_logprobs=scored.logprobs,
        ref_logprobs=scored.ref_logprobs,
        old_values=scored.values,
        advantages=shaped.advantages,
        returns=shaped.returns,
    )


Rows = TypeVar("Rows", Trajectory, Experience)


def select_rows(batch: Rows, rows: Tensor) -> Rows:
    """The given rows, without the columns that are padding in all of them.

    Fields as wide as `input_ids` lose columns on both sides, fields as wide as `response_mask` on the right.
    """
    width, length = batch.input_ids.shape[1], batch.response_mask.shape[1]
    start = int(batch.attention_mask[rows].any(0).nonzero()[0])  # first column with a prompt token
    end = int(batch.response_mask[rows].sum(1).max())  # longest of these responses
    columns = {width: slice(start, width - length + end), length: slice(0, end)}
    return type(batch)(*(x[rows] if x.dim() == 1 else x[rows, columns[x.shape[1]]] for x in batch))


def by_length(batch: Trajectory | Experience, rows: Tensor) -> Tensor:
    """`rows`, longest sequences first: `select_rows` drops most of the padding of neighbours, and ranks that share
    them have about the same to do.
    """
    rows = rows.to(batch.attention_mask.device)
    lengths = batch.attention_mask[rows].sum(1)
    return rows[lengths.argsort(descending=True, stable=True)]


def map_rows(function: Callable[[Trajectory], Sequence[Tensor]], trajectory: Trajectory, size: int) -> list[Tensor]:
    """`function` on chunks of `size` rows, of which each rank takes its share; its outputs (b,) or (b, R') joined in
    order to (B,) or (B, R).
    """
    batch, length = trajectory.response_mask.shape
    order = by_length(trajectory, torch.arange(batch))
    own = share(order)
    outputs: list[Tensor] = []
    for rows in (own if len(own) else order[:1]).split(size):
        results = function(select_rows(trajectory, rows))
        if not outputs:
            outputs = [x.new_zeros((batch, length)[: x.dim()]) for x in results]
        for output, result in zip(outputs, results, strict=True):
            if len(own):  # else the row is another rank's
                output[(rows, slice(0, result.shape[-1]))[: result.dim()]] = result
    return [sum_over_ranks(output) for output in outputs]


def response_scores(scorer: nn.Module, trajectory: Trajectory, size: int) -> Tensor:
    """(B, C) scores, one a criterion, on the last kept token of each row."""

    def score(part: Trajectory) -> Sequence[Tensor]:
        return as_scorer(scorer)(part.input_ids, part.attention_mask, last_only=True).unbind(-1)

    return torch.stack(map_rows(score, trajectory, size), dim=-1)


def sampled_logprobs(policy: nn.Module, trajectory: Trajectory, size: int, temperature: float) -> list[Tensor]:
    """Log-probs and entropies (B, R) at the sampled tokens."""

    def logprobs(part: Trajectory) -> Any:
        return response_logprobs(
            policy,
            part.input_ids,
            part.attention_mask,
            part.response_mask,
            temperature=temperature,
            return_entropy=True,
        )

    return map_rows(logprobs, trajectory, size)


def batch_values(critic: nn.Module, batch: Trajectory | Experience) -> Tensor:
    """(B, R) `values[b, t]` of the state before response token t: the critic on the token before it."""
    values = token_scores(critic, batch.input_ids[:, :-1], batch.attention_mask[:, :-1])
    return values[:, -batch.response_mask.shape[1] :]  # columns P - 1 ... P + R - 2


def response_values(critic: nn.Module, trajectory: Trajectory, size: int) -> Tensor:
    """`batch_values` of a whole trajectory, chunk by chunk."""
    return map_rows(lambda part: [batch_values(critic, part)], trajectory, size)[0]


def minibatches(rows: int, size: int, *, epochs: int, seed: int, iteration: int) -> Iterator[Tensor]:
    """Row indices of every minibatch of `epochs` passes, in an order given by `seed` and `iteration`."""
    for epoch in range(epochs):
        for indices in shuffled_batches(rows, size, seed=seed, epoch=iteration * epochs + epoch):
            yield torch.tensor(indices)


def shuffled_indices(items: int, *, seed: int) -> Iterator[int]:
    """Indices of one shuffled pass over the items after the other."""
    for epoch in count():
        for indices in shuffled_batches(items, items, seed=seed, epoch=epoch):
            yield from indices


def gather_stats(parts: Sequence[PPOStats]) -> list[PPOStats]:
    """The statistics of all ranks' micro-batches."""
    if world_size() == 1:
        return list(parts)
    rows = gather([torch.stack(part).tolist() for part in parts])
    return [PPOStats(*torch.tensor(row)) for row in chain.from_iterable(rows)]


def merge_stats(parts: Sequence[PPOStats]) -> PPOStats:
    """Statistics of several batches as those of one: means weighted by tokens, the largest ratio."""
    table = torch.stack([torch.stack(part) for part in parts])  # (parts, statistics)
    tokens = table[:, 0]
    means = PPOStats(*(table * (tokens / tokens.sum())[:, None]).sum(0))
    return means._replace(tokens=tokens.sum(), ratio_max=torch.stack([x.ratio_max for x in parts]).max())
