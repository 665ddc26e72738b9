"""Examples, preferences and prompts as token ids, ready for the three loops.

Every loader returns its items and a `LoadReport`. A broken record is an error that names file and
line; a record that is well-formed but too long or empty is dropped and counted.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from fastrl import formats
from fastrl.sources import read_records
from fastrl.templates import encode, end_token_id, join_input, render_prompt, response_turns

Source = str | os.PathLike[str]
Item = TypeVar("Item")


class Example(NamedTuple):
    """A conversation for SFT; `loss_mask[i]`: token i is a target that counts."""

    input_ids: list[int]
    loss_mask: list[bool]


class Preference(NamedTuple):
    """Ranked responses to one prompt; lower rank is better, equal ranks are ties."""

    prompt_ids: list[int]
    responses: list[list[int]]
    ranks: list[int]
    margin: float
    criterion: str | None


class Prompt(NamedTuple):
    """A prompt to sample from; `text` is the readable prompt, for printed samples."""

    input_ids: list[int]
    text: str


@dataclass(frozen=True)
class LoadReport:
    """How many records became items, and how many were left out or cut short."""

    source: str
    kept: int
    dropped: int
    truncated: int
    reasons: dict[str, int]

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.reasons.items())
        return (
            f"{self.source}: {self.kept} kept, {self.dropped} dropped"
            + (f" ({reasons})" if reasons else "")
            + f", {self.truncated} truncated"
        )


def load_examples(
    source: Source, tokenizer: Any, *, max_length: int, template: str = "auto"
) -> tuple[list[Example], LoadReport]:
    """Instruction data for SFT: only the assistant's turns and their end tokens are targets.

    Args:
        source: anything `fastrl.sources.read_records` reads, in a format of `fastrl.formats`.
        tokenizer: a transformers tokenizer with an eos token or a chat template that ends turns.
        max_length: tokens. A longer example is cut (then it has no end token); one whose first
            prompt leaves no room for a target is dropped.
        template: `chat`, `alpaca`, or `auto` for the tokenizer's chat template if it has one.
    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken or unknown record (the message names file and line), or nothing left.
    """
    end = end_token_id(tokenizer, template)
    end_token = tokenizer.convert_ids_to_tokens(end)
    dropped: Counter[str] = Counter()
    conversations: list[list[tuple[str, str]]] = []
    for where, record in read_records(source):
        with _located(where):
            for messages in formats.conversations(record):
                turns = response_turns(tokenizer, messages, template, end_token)
                if any(response for _, response in turns):
                    conversations.append(turns)
                else:
                    dropped["no response" if not turns else "empty response"] += 1

    encoded = iter(encode(tokenizer, [t for turns in conversations for turn in turns for t in turn]))
    examples, truncated = [], 0
    for turns in conversations:
        input_ids: list[int] = []
        loss_mask: list[bool] = []
        for _ in turns:
            context, response = next(encoded), [*next(encoded), end]
            input_ids += context + response
            loss_mask += [False] * len(context) + [True] * len(response)
        loss_mask[0] = False  # nothing precedes the first token, so nothing predicts it
        if True not in loss_mask[:max_length]:
            dropped[f"prompt does not fit max_length {max_length}"] += 1
            continue
        truncated += len(input_ids) > max_length
        examples.append(Example(input_ids[:max_length], loss_mask[:max_length]))
    return examples, _report(source, examples, dropped, truncated)


def load_preferences(
    source: Source, tokenizer: Any, *, max_length: int, template: str = "auto"
) -> tuple[list[Preference], LoadReport]:
    """Pairs and K-wise groups for the reward model; every response ends with the end token.

    Args and errors as in `load_examples`, and ValueError for a pair with identical sides. Responses
    are cut to `max_length` - prompt; a record is dropped when its prompt alone fills `max_length`
    or when responses of different rank are equal after the cut.
    """
    end = end_token_id(tokenizer, template)
    dropped: Counter[str] = Counter()
    comparisons: list[formats.Comparison] = []
    texts: list[str] = []
    for where, record in read_records(source):
        with _located(where):
            try:
                comparison = formats.comparison(record)
            except formats.Unusable as reason:
                dropped[str(reason)] += 1
                continue
            texts += [render_prompt(tokenizer, comparison.messages, template)]
            texts += comparison.responses
            comparisons.append(comparison)

    encoded = iter(encode(tokenizer, texts))
    preferences, truncated = [], 0
    for comparison in comparisons:
        prompt_ids = next(encoded)
        whole = [[*next(encoded), end] for _ in comparison.responses]
        room = max_length - len(prompt_ids)
        if room <= 0:
            dropped[f"prompt does not fit max_length {max_length}"] += 1
            continue
        responses = [response[:room] for response in whole]
        ranked = {(tuple(ids), rank) for ids, rank in zip(responses, comparison.ranks, strict=True)}
        if len(ranked) != len({ids for ids, _ in ranked}):
            dropped["responses are equal after tokenising and cutting"] += 1
            continue
        truncated += responses != whole
        preferences.append(Preference(prompt_ids, responses, comparison.ranks, comparison.margin, comparison.criterion))
    return preferences, _report(source, preferences, dropped, truncated)


def load_prompts(
    source: Source, tokenizer: Any, *, max_prompt_length: int, template: str = "auto"
) -> tuple[list[Prompt], LoadReport]:
    """Prompts to sample from; instruction and preference files serve too.

    Args and errors as in `load_examples`. A prompt of more than `max_prompt_length` tokens is
    dropped and counted, never cut: half a prompt asks something else.
    """
    dropped: Counter[str] = Counter()
    rendered: list[str] = []
    readable: list[str] = []
    for where, record in read_records(source):
        with _located(where):
            try:
                prompts = formats.prompts(record)
            except formats.Unusable as reason:
                dropped[str(reason)] += 1
                continue
            for messages in prompts:
                if not any(message["content"].strip() for message in messages):
                    dropped["empty prompt"] += 1
                    continue
                rendered.append(render_prompt(tokenizer, messages, template))
                readable.append(_readable(messages))

    items = []
    for input_ids, text in zip(encode(tokenizer, rendered), readable, strict=True):
        if len(input_ids) > max_prompt_length:
            dropped[f"prompt longer than max_prompt_length {max_prompt_length}"] += 1
        else:
            items.append(Prompt(input_ids, text))
    return items, _report(source, items, dropped, truncated=0)


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


def shuffled_batches(count: int, batch_size: int, *, seed: int, epoch: int) -> Iterator[list[int]]:
    """Batches of the indices 0..count-1 in an order fixed by (seed, epoch); the last may be short."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    for start in range(0, count, batch_size):
        yield order[start : start + batch_size]


def pad(sequences: Sequence[Sequence[int]], pad_value: int, *, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences as one tensor: (B, T) int64 and the (B, T) bool mask of what is no padding.

    `side` is `left` (for sampling) or `right`. The mask comes from the lengths, never from
    `pad_value`, which may equal a real token such as eos.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got '{side}'")
    width = max((len(sequence) for sequence in sequences), default=0)
    tokens = torch.full((len(sequences), width), pad_value, dtype=torch.int64)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        if not len(sequence):
            continue
        part = slice(width - len(sequence), width) if side == "left" else slice(len(sequence))
        tokens[row, part] = torch.as_tensor(sequence, dtype=torch.int64)
        mask[row, part] = True
    return tokens, mask


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Put the record's file and line before a ValueError's message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _report(source: Source, items: Sequence[Any], dropped: Counter[str], truncated: int) -> LoadReport:
    report = LoadReport(os.fspath(source), len(items), dropped.total(), truncated, dict(dropped))
    if not items:
        raise ValueError(f"empty data set: {report}")
    return report


def _readable(messages: list[formats.Message]) -> str:
    if len(messages) == 1:
        return join_input(messages[0])
    return "\n\n".join(f"{m['role'].capitalize()}: {join_input(m)}" for m in messages)
