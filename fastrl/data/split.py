"""Training and held-out items of a loop."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastrl.data.load import LoadReport

Item = TypeVar("Item")


def load_split(
    load: Callable[..., tuple[list[Item], LoadReport]],
    settings: Any,
    tokenizer: Any,
    *,
    holdout: float,
    most: int | None = None,
    **length: int,
) -> tuple[list[Item], list[Item]]:
    """(train, held_out): the items of `settings.data` and those of `settings.eval_data`, or a share of the former.

    What was loaded is printed.

    Args:
        load: `load_examples`, `load_preferences` or `load_prompts`.
        settings: `run.settings.DataSettings` and `seed`.
        holdout: share of the data that is set aside where `eval_data` is empty.
        most: held-out items at most.
        length: the loader's own limit, as max_length=1024.
    """

    def read(source: Any) -> list[Item]:
        items, report = load(
            source,
            tokenizer,
            template=settings.template,
            columns=settings.columns,
            max_bad_records=settings.max_bad_records,
            **length,
        )
        print(report)
        return items

    items = read(settings.data)
    if settings.eval_data:
        return items, read(settings.eval_data)[:most]
    share = holdout if most is None else min(holdout, most / len(items))
    return split_holdout(items, share, settings.seed)


def split_holdout(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(train, held_out): a random share of the items set aside, both in their original order.

    `fraction` in [0, 1); above 0 at least one item is held out, and at least one stays.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"holdout fraction must be in [0, 1), got {fraction}")
    if fraction == 0:
        return list(items), []
    if len(items) < 2:
        raise ValueError(f"cannot hold out a share of {len(items)} items; need at least 2")
    count = min(max(round(len(items) * fraction), 1), len(items) - 1)
    held = set(random.Random(seed).sample(range(len(items)), count))
    train = [item for index, item in enumerate(items) if index not in held]
    return train, [items[index] for index in sorted(held)]
