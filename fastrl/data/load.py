"""Examples, preferences and prompts as token ids, ready for the three loops.

Every loader returns its items and a `LoadReport`. A broken file is an error that names file and line; a record that
is bad, empty or too long is dropped and counted, and too many bad ones are an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from fastrl.data import formats, pairs
from fastrl.data.bad_records import Dropped
from fastrl.data.columns import read_columns, rename
from fastrl.data.messages import Message
from fastrl.data.rendering import Rendered, render_asked, render_conversation, tokenize
from fastrl.data.sources import Record, Source, read_records, source_name
from fastrl.data.templates import Template, encode, join_input, read_template

Columns = str | Mapping[str, str] | None
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
    """A prompt to sample from; what rewards may want to know of it comes after the text."""

    input_ids: list[int]
    text: str  # as people read it
    messages: Sequence[Message] = ()
    tools: list[Any] | None = None
    columns: Mapping[str, Any] = {}  # the record's fields other than `prompt`


@dataclass(frozen=True)
class LoadReport:
    """How many records became items, and how many were left out or cut short; `first` has the first of each reason."""

    source: str
    kept: int
    dropped: int
    truncated: int
    reasons: dict[str, int]
    first: dict[str, str]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        reasons = "; ".join(f"{reason}: {count}, first {self.first[reason]}" for reason, count in self.reasons.items())
        return "; ".join(
            [
                f"{self.source}: {self.kept} kept, {self.dropped} dropped"
                + (f" ({reasons})" if reasons else "")
                + f", {self.truncated} truncated",
                *self.notes,
            ]
        )


def load_examples(
    source: Source,
    tokenizer: Any,
    *,
    max_length: int,
    template: str = "auto",
    columns: Columns = None,
    max_bad_records: float = 0.01,
) -> tuple[list[Example], LoadReport]:
    """Instruction data for SFT: only the assistant's turns and their end tokens are targets.

    The ids are those of `tokenizer.apply_chat_template` on the whole conversation, up to its last answer. Answers in
    the history of a prompt + completion record, and turns marked `weight: 0` or `train: false`, are no targets.

    Args:
        source: anything `fastrl.data.sources.read_records` reads, in a format of `fastrl.data.formats`.
        tokenizer: a transformers tokenizer with an eos token or a chat template that ends turns.
        max_length: tokens. A longer example is cut (then it has no end token); one whose first
            prompt leaves no room for a target is dropped.
        template: `chat`, `alpaca`, `none` (texts as they are), or `auto`: see `fastrl.data.templates.choose_template`.
        columns: fastrl's names to the data's, as a mapping or as `prompt=question,completion=answer`.
        max_bad_records: share of bad records above which they are an error; ten are always allowed, 0 allows none.
    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken file (the message names file and line), too many bad records, or nothing left.
    """
    writer = read_template(tokenizer, template)
    dropped = Dropped()
    rendered: list[Rendered] = []
    places: list[str] = []
    for where, record in _records(source, columns, dropped):
        with dropped.at(where):
            for conversation in formats.conversations(record, raw=writer.name == "none"):
                with dropped.at(where):
                    rendered.append(render_conversation(writer, *conversation))
                    places.append(where)

    examples, truncated = [], 0
    for where, (input_ids, spans) in zip(places, tokenize(writer, rendered), strict=True):
        loss_mask = [False] * len(input_ids)
        for start, end in spans:
            loss_mask[start:end] = [True] * (end - start)
        loss_mask[0] = False  # nothing precedes the first token, so nothing predicts it
        if True not in loss_mask[:max_length]:
            dropped.add(f"prompt does not fit max_length {max_length}", where)
            continue
        truncated += len(input_ids) > max_length
        examples.append(Example(input_ids[:max_length], loss_mask[:max_length]))
    return examples, _report(source, examples, dropped, truncated, max_bad_records, _notes(rendered))


def load_preferences(
    source: Source,
    tokenizer: Any,
    *,
    max_length: int,
    template: str = "auto",
    columns: Columns = None,
    max_bad_records: float = 0.01,
) -> tuple[list[Preference], LoadReport]:
    """Pairs and K-wise groups for the reward model; every response ends with the end token.

    Args and errors as in `load_examples`. Prompt and response ids add up to those of the whole conversation. Responses
    are cut to `max_length` - prompt; a record is dropped when its prompt alone fills `max_length`
    or when responses of different rank are equal after the cut.
    """
    writer = read_template(tokenizer, template)
    dropped = Dropped()
    comparisons: list[tuple[str, pairs.Comparison]] = []
    rendered: list[Rendered] = []
    for where, record in _records(source, columns, dropped):
        with dropped.at(where):
            comparison = pairs.comparison(record, raw=writer.name == "none")
            rendered += _render_responses(writer, comparison)
            comparisons.append((where, comparison))

    tokens = tokenize(writer, rendered)
    preferences, truncated = [], 0
    for where, comparison in comparisons:
        sides = list(islice(tokens, len(comparison.responses)))
        length = _shared_length([side.input_ids for side in sides], min(side.spans[0][0] for side in sides))
        prompt_ids, whole = sides[0].input_ids[:length], [side.input_ids[length:] for side in sides]
        room = max_length - length
        if room <= 0:
            dropped.add(f"prompt does not fit max_length {max_length}", where)
            continue
        responses = [response[:room] for response in whole]
        ranked = {(tuple(ids), rank) for ids, rank in zip(responses, comparison.ranks, strict=True)}
        if len(ranked) != len({ids for ids, _ in ranked}):
            dropped.add("responses are equal after tokenising and cutting", where)
            continue
        truncated += responses != whole
        preferences.append(Preference(prompt_ids, responses, comparison.ranks, comparison.margin, comparison.criterion))
    return preferences, _report(source, preferences, dropped, truncated, max_bad_records, _notes(rendered))


def load_prompts(
    source: Source,
    tokenizer: Any,
    *,
    max_prompt_length: int,
    template: str = "auto",
    columns: Columns = None,
    max_bad_records: float = 0.01,
) -> tuple[list[Prompt], LoadReport]:
    """Prompts to sample from; instruction and preference files serve too.

    Args and errors as in `load_examples`. A prompt of more than `max_prompt_length` tokens is
    dropped and counted, never cut: half a prompt asks something else.
    """
    writer = read_template(tokenizer, template)
    dropped = Dropped()
    asked: list[tuple[str, str, Prompt]] = []  # where, as the template writes it, the prompt without its ids
    for where, record in _records(source, columns, dropped):
        with dropped.at(where):
            others = {name: value for name, value in record.items() if name != "prompt"}
            for messages, tools in formats.prompts(record, raw=writer.name == "none"):
                prompt = Prompt([], _readable(messages), messages, tools, others)
                asked.append((where, render_asked(writer, messages, tools), prompt))

    items = []
    encoded = encode(tokenizer, [text for _, text, _ in asked])
    for input_ids, (where, _, prompt) in zip(encoded, asked, strict=True):
        if len(input_ids) > max_prompt_length:
            dropped.add(f"prompt longer than max_prompt_length {max_prompt_length}", where)
        else:
            items.append(prompt._replace(input_ids=input_ids))
    return items, _report(source, items, dropped, 0, max_bad_records)


def _records(source: Source, columns: Columns, dropped: Dropped) -> Iterator[tuple[str, Record]]:
    """The records of the source under fastrl's names."""
    names = read_columns(columns)
    for where, record in read_records(source):
        dropped.records += 1
        with dropped.at(where):
            yield where, rename(record, names)


def _render_responses(template: Template, comparison: pairs.Comparison) -> list[Rendered]:
    """Every response as the last turn of its conversation, alone a target."""
    history = [{**message, "train": False} for message in comparison.messages]
    prompt = render_asked(template, history, comparison.tools)
    return [
        render_conversation(template, [*history, {**response, "train": True}], comparison.tools, prompt)
        for response in comparison.responses
    ]


def _shared_length(sequences: Sequence[list[int]], most: int) -> int:
    """How many of the first `most` ids all sequences share: fewer where a token spans prompt and answer."""
    while any(ids[:most] != sequences[0][:most] for ids in sequences[1:]):
        most -= 1
    return most


def _notes(rendered: Sequence[Rendered]) -> tuple[str, ...]:
    """What the template does that may surprise."""
    off = [item.off_prompt for item in rendered if item.off_prompt]
    rewritten = sum(item.rewritten for item in rendered)
    notes = []
    if off:
        notes.append(f"{len(off)} answers do not begin as the template's generation prompt does (first: {off[0]})")
    if rewritten:
        notes.append(f"{rewritten} earlier answers are no targets, since the template rewrites them later on")
    return tuple(notes)


def _report(
    source: Source,
    items: Sequence[Any],
    dropped: Dropped,
    truncated: int,
    max_bad_records: float,
    notes: tuple[str, ...] = (),
) -> LoadReport:
    name, count = source_name(source), dropped.reasons.total()
    report = LoadReport(name, len(items), count, truncated, dict(dropped.reasons), dict(dropped.first), notes)
    if not items:
        raise ValueError(f"empty data set: {report}")
    dropped.check(report, max_bad_records)
    return report


def _readable(messages: list[Message]) -> str:
    if len(messages) == 1:
        return join_input(messages[0])
    return "\n\n".join(f"{m['role'].capitalize()}: {join_input(m)}" for m in messages)
