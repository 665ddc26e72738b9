"""Preferences: answers to one prompt with their ranks, from pairs of strings or messages, transcripts, or groups."""

from __future__ import annotations

import math
import os.path
from typing import Any, NamedTuple

from fastrl.data.bad_records import BadRecord, Unusable
from fastrl.data.messages import Message, assistant, holds_messages, mistyped, read_messages, user
from fastrl.data.questions import (
    ASSISTANT,
    HUMAN,
    check_first,
    check_paired,
    context_of,
    is_transcript,
    parse_transcript,
    prompt_of,
    question_of,
    tools_of,
    unknown_format,
)
from fastrl.data.sources import Record

PREFERENCE_FORMATS = (
    "prompt + chosen + rejected",
    "chosen + rejected",
    "prompt + responses + ranks",
    "prompt + responses + scores",
)


class Comparison(NamedTuple):
    """Answers (the assistant's messages) to one prompt with their ranks; lower is better, equal ranks are ties."""

    messages: list[Message]
    responses: list[Message]
    ranks: list[int]
    margin: float
    criterion: str | None
    tools: list[Any] | None = None


def comparison(record: Record, *, raw: bool = False) -> Comparison:
    """The ranked answers of a preference record. Raises BadRecord or Unusable."""
    if "chosen" in record and "rejected" in record:
        messages, responses = pair_of(record, raw)
        ranks = [0, 1]
    elif "prompt" in record and "responses" in record and ("ranks" in record or "scores" in record):
        messages, responses, ranks = _ranked(record, raw)
    else:
        check_paired(record)
        raise unknown_format(record, "preference", PREFERENCE_FORMATS)
    check_first(messages)
    margin = record.get("margin")
    criterion = record.get("criterion")
    if criterion is not None and not isinstance(criterion, str):
        raise mistyped("criterion", "a string", criterion)
    return Comparison(
        messages,
        responses,
        ranks,
        margin=0.0 if margin is None else _number(margin, "margin"),
        criterion=(criterion or "").strip() or None,
        tools=tools_of(record),
    )


def pair_of(record: Record, raw: bool) -> tuple[list[Message], list[Message]]:
    chosen, rejected = record["chosen"], record["rejected"]
    lists = [holds_messages(side) for side in (chosen, rejected)]
    if lists[0] != lists[1] or not (all(lists) or (isinstance(chosen, str) and isinstance(rejected, str))):
        raise BadRecord(
            "field of the wrong kind",
            "'chosen' and 'rejected' must both be strings or both be message lists, "
            f"got {type(chosen).__name__} and {type(rejected).__name__}",
        )
    if chosen == rejected:
        raise BadRecord("identical sides", "'chosen' and 'rejected' are identical; a preference needs two answers")
    if all(lists):
        return _message_pair(record, raw)
    prompt = question_of(record, raw) or context_of(record)
    if prompt:
        answers = _without_prompt(record.get("prompt"), [chosen, rejected], raw)
        return prompt, [assistant(answer) for answer in answers]
    return _transcript_pair(chosen, rejected, raw)


def _message_pair(record: Record, raw: bool) -> tuple[list[Message], list[Message]]:
    sides = [read_messages(record["chosen"], "chosen"), read_messages(record["rejected"], "rejected")]
    if any(side[-1]["role"] != "assistant" for side in sides):
        raise BadRecord(
            "side without an answer", "the last message of 'chosen' and of 'rejected' must be the assistant's"
        )
    if sides[0][:-1] != sides[1][:-1]:
        raise Unusable("sides differ before their last turn")
    if sides[0][-1] == sides[1][-1]:
        raise BadRecord("identical sides", "'chosen' and 'rejected' are identical; a preference needs two answers")
    shared = sides[0][:-1]
    prompt = question_of(record, raw) or context_of(record) or []
    if not shared or shared[0]["role"] == "assistant":
        if not prompt:
            raise BadRecord("no prompt", f"missing 'prompt'; keys found: {', '.join(map(str, record))}")
        shared = prompt + shared
    elif prompt and prompt[0]["role"] == "system" and shared[0]["role"] != "system":
        shared = prompt[:1] + shared
    return shared, [side[-1] for side in sides]


def _without_prompt(prompt: Any, answers: list[str], raw: bool) -> list[str]:
    """The answers without the prompt that all of them repeat, and without the space around them in a transcript.

    A prompt of one word may be how the answers begin; more is a repetition.
    """
    if not isinstance(prompt, str):
        return answers
    start = prompt.rstrip()
    if len(start.split()) > 1 and all(answer.startswith(start) for answer in answers):
        answers = [answer.removeprefix(start) for answer in answers]
        if raw:
            space = prompt[len(start) :]
            return [answer.removeprefix(space) for answer in answers]
        answers = [answer.lstrip() for answer in answers]
    return [answer.strip() for answer in answers] if is_transcript(prompt) and not raw else answers


def _transcript_pair(chosen: str, rejected: str, raw: bool) -> tuple[list[Message], list[Message]]:
    shared = os.path.commonprefix([chosen, rejected])
    end = shared.rfind(ASSISTANT)
    if end < 0 or not shared.startswith(HUMAN):
        raise BadRecord(
            "no prompt",
            "no 'prompt', and 'chosen' and 'rejected' are no transcripts with a shared beginning "
            f"({HUMAN!r} ... {ASSISTANT!r} ...); add a 'prompt'",
        )
    end += len(ASSISTANT)
    answers = [chosen[end:], rejected[end:]]
    if any(marker in answer for answer in answers for marker in (HUMAN, ASSISTANT)):
        raise Unusable("sides differ before their last turn")
    if raw:
        return [user(shared[:end])], [assistant(answer) for answer in answers]
    return parse_transcript(shared[:end]), [assistant(answer.strip()) for answer in answers]


def _ranked(record: Record, raw: bool) -> tuple[list[Message], list[Message], list[int]]:
    responses = record["responses"]
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise mistyped("responses", "a list of strings", responses)
    key = "ranks" if record.get("ranks") is not None else "scores"
    grades = record[key]
    if not isinstance(grades, list):
        raise mistyped(key, "a list of numbers", grades)
    if len(responses) < 2 or len(grades) != len(responses):
        raise BadRecord(
            "answers without a rank each",
            f"'responses' and '{key}' must have the same length, at least 2; got {len(responses)} and {len(grades)}",
        )
    sign = 1 if key == "ranks" else -1
    costs = [sign * _number(grade, key) for grade in grades]
    order = sorted(set(costs))
    ranks = [order.index(cost) for cost in costs]
    rank_of: dict[str, int] = {}
    for response, rank in zip(responses, ranks, strict=True):
        if rank_of.setdefault(response, rank) != rank:
            raise BadRecord("identical sides", f"identical responses with different {key}: {response[:60]!r}")
    if len(order) == 1:
        raise Unusable("all responses tie")
    answers = _without_prompt(record["prompt"], responses, raw)
    return prompt_of(record, raw), [assistant(answer) for answer in answers], ranks


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise mistyped(key, "a finite number", value)
    return float(value)
