"""Criteria of comparisons: which there are, and which columns of a score head compare by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def several_criteria(*data: Sequence[str | None]) -> list[str]:
    """The criteria that the comparisons of all data sets name, sorted; [] if fewer than two: one score is enough then,
    and it has no name.
    """
    named = {criterion for criteria in data for criterion in criteria if criterion is not None}
    return sorted(named) if len(named) > 1 else []


def check_trained(names: Sequence[str], train: Sequence[str | None]) -> None:
    """Raise ValueError if one of several scores has no training comparisons: by its criterion, or without one."""
    lacking = [name for name in names if name not in train]
    if len(names) > 1 and lacking and None not in train:
        raise ValueError(
            f"criterion: expected training comparisons for each score ({', '.join(names)}), got none for"
            f" {', '.join(lacking)}, which nothing would train; add some, or some without a criterion, which train all"
        )


def criterion_columns(criteria: Sequence[str | None], names: Sequence[str]) -> Tensor:
    """(P, C) for each comparison the columns of a head of C named scores by which it is compared, C times: that of its
    criterion, or each column once if it names none. The mean over the C is then what it counts for. A head of one score
    takes every comparison.
    """
    if len(names) == 1:
        return torch.zeros(len(criteria), 1, dtype=torch.int64)
    every = list(range(len(names)))
    return torch.tensor([every if c is None else [names.index(c)] * len(names) for c in criteria])
