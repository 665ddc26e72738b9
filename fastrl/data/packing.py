"""Several sequences in one row, so that nothing is computed for padding. No sequence sees its neighbours.

Which example stands where changes speed and rounding alone: a step's loss is the mean over its supervised tokens,
however they are cut into rows and passes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import chain, count

import torch

from fastrl.data.batches import SFTBatch, chunks, pad, sft_batch
from fastrl.data.load import Example

PACKINGS = ("none", "balanced", "padding-free")


def balanced_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in rows of about equal length, at most `capacity`, every index once.

    The longest first, each into the shortest row (the first of equals); one row more where that does not fit. Rows of
    equal length leave no padding; best fit fills all rows but the last one, which the others' length pads.

    Raises:
        ValueError: a length exceeds the capacity.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise ValueError(f"packing: expected sequences of at most {capacity} tokens, got one of {longest}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for number in count(-(-sum(lengths) // capacity)):
        rows: list[list[int]] = [[] for _ in range(number)]
        shortest = [(0, row) for row in range(number)]  # a heap of (tokens, row)
        for index in order:
            tokens, row = shortest[0]
            if tokens + lengths[index] > capacity:
                break
            heapq.heapreplace(shortest, (tokens + lengths[index], row))
            rows[row].append(index)
        else:
            return rows
    raise AssertionError("a row for each index fits")


def arrange(
    examples: Sequence[Example], packing: str, *, max_length: int, size: int
) -> tuple[list[list[Example]], int]:
    """Rows of examples, and how many rows are one forward pass.

    `none` gives each example a row, `size` rows a pass. `balanced` makes rows of at most `max_length` tokens (see
    `balanced_rows`), `size` rows a pass. `padding-free` makes one row of `size` examples, one row a pass.

    Raises:
        ValueError: an example is longer than `max_length` (`balanced`), or there is no such packing.
    """
    if packing == "none":
        return [[example] for example in examples], size
    if packing == "balanced":
        rows = balanced_rows([len(example.input_ids) for example in examples], max_length)
        return [[examples[i] for i in row] for row in rows], size
    if packing == "padding-free":
        return [list(row) for row in chunks(examples, size)], 1
    raise ValueError(f"packing: expected one of {', '.join(PACKINGS)}, got {packing!r}")


def packed_batch(rows: Sequence[Sequence[Example]], pad_id: int, device: str | torch.device = "cpu") -> SFTBatch:
    """Rows of one or more examples as a batch; rows of one each are the batch of `sft_batch`.

    The first token of each example is no target, whatever its mask says: nothing of its own sequence predicts it.
    """
    if all(len(row) == 1 for row in rows):
        return sft_batch([example for (example,) in rows], pad_id, device)
    joined = [
        Example(
            list(chain.from_iterable(example.input_ids for example in row)),
            list(chain.from_iterable([False, *example.loss_mask[1:]] for example in row)),
        )
        for row in rows
    ]
    positions = [list(chain.from_iterable(range(len(example.input_ids)) for example in row)) for row in rows]
    padded, _ = pad(positions, 0, side="right")
    return sft_batch(joined, pad_id, device)._replace(packed_positions=padded.to(device))
