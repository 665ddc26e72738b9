"""The record formats that fastrl reads, detected from their keys.

Instruction data   `messages` | `prompt` + `completion` | `instruction` (+ `input`) + `output`
                   | `instruction` + `instances` (Self-Instruct's seed tasks)
Preferences        (`prompt` +) `chosen` + `rejected`, optional `margin`
                   | `prompt` + `responses` + `ranks` (lower is better) or `scores` (higher is
                   better); optional `criterion` in both
Prompts            `prompt` | `messages` | any of the above, of which the prompt is taken

A prompt, completion, chosen or rejected is a string or a list of messages. The prompt of a pair
may be implicit: the messages both sides share, or, for HH-RLHF transcripts
("\\n\\nHuman: ... \\n\\nAssistant: ..."), the shared text up to the last "\\n\\nAssistant:".
"""

from __future__ import annotations

import math
import os.path
import re
from typing import Any, NamedTuple

from fastrl.sources import Record

Message = dict[str, str]  # role, content and, for Alpaca's third slot, input

ROLES = ("system", "user", "assistant")
INSTRUCTION_FORMATS = (
    "messages",
    "prompt + completion",
    "instruction (+ input) + output",
    "instruction + instances",
)
PREFERENCE_FORMATS = (
    "prompt + chosen + rejected",
    "chosen + rejected",
    "prompt + responses + ranks",
    "prompt + responses + scores",
)
PROMPT_FORMATS = ("prompt", "messages", "instruction (+ input)", "chosen + rejected")

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Comparison(NamedTuple):
    """Answers to one prompt with their ranks; lower is better, equal ranks are ties."""

    messages: list[Message]
    responses: list[str]
    ranks: list[int]
    margin: float
    criterion: str | None


class Unusable(Exception):
    """A well-formed record that holds nothing to learn from; dropped and counted."""


def conversations(record: Record) -> list[list[Message]]:
    """The conversations of an instruction record: one, or one per Self-Instruct instance."""
    if "messages" in record:
        return [_messages(record, "messages")]
    if "prompt" in record and "completion" in record:
        completion = record["completion"]
        if isinstance(completion, str):
            answer = [_assistant(completion)]
        else:
            answer = _messages(record, "completion")
        return [_prompt(record) + answer]
    if "instruction" in record and "output" in record:
        return [[_task(record, record), _assistant(_text(record, "output"))]]
    if "instruction" in record and "instances" in record:
        return [[_task(record, instance), _assistant(_text(instance, "output"))] for instance in _instances(record)]
    raise _unknown(record, "instruction", INSTRUCTION_FORMATS)


def comparison(record: Record) -> Comparison:
    """The ranked answers of a preference record."""
    if "chosen" in record and "rejected" in record:
        messages, responses = _pair(record)
        ranks = [0, 1]
    elif "prompt" in record and "responses" in record and ("ranks" in record or "scores" in record):
        messages, responses, ranks = _ranked(record)
    else:
        raise _unknown(record, "preference", PREFERENCE_FORMATS)
    margin = record.get("margin")
    criterion = record.get("criterion")
    if criterion is not None and not isinstance(criterion, str):
        raise _mistyped("criterion", "a string", criterion)
    return Comparison(
        messages,
        responses,
        ranks,
        margin=0.0 if margin is None else _number(margin, "margin"),
        criterion=criterion,
    )


def prompts(record: Record) -> list[list[Message]]:
    """The prompts of a record of any format: messages that end where a response is due."""
    if "prompt" in record:
        return [_prompt(record)]
    if "messages" in record:
        messages = _messages(record, "messages")
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return [messages]
    if "instruction" in record and "instances" in record:
        return [[_task(record, instance)] for instance in _instances(record)]
    if "instruction" in record:
        return [[_task(record, record)]]
    if "chosen" in record and "rejected" in record:
        return [_pair(record)[0]]
    raise _unknown(record, "prompt", PROMPT_FORMATS)


def parse_transcript(text: str) -> list[Message]:
    """Messages of an HH-RLHF transcript; an open "\\n\\nAssistant:" at the end adds none.

    Neighbouring turns of one speaker are joined, since chat templates expect speakers to alternate.
    """
    messages: list[Message] = []
    parts = re.split(r"\n\n(Human|Assistant):", text.removesuffix(ASSISTANT))
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role, content = "user" if speaker == "Human" else "assistant", content.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content}".strip()
        else:
            messages.append({"role": role, "content": content})
    return messages


def _pair(record: Record) -> tuple[list[Message], list[str]]:
    chosen, rejected = record["chosen"], record["rejected"]
    if type(chosen) is not type(rejected):
        raise ValueError(
            "'chosen' and 'rejected' must both be strings or both be message lists, "
            f"got {type(chosen).__name__} and {type(rejected).__name__}"
        )
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are identical; a preference needs two answers")
    if isinstance(chosen, str):
        if "prompt" in record:
            return _prompt(record), [chosen.strip(), rejected.strip()]
        return _transcript_pair(chosen, rejected)
    sides = [_messages(record, "chosen"), _messages(record, "rejected")]
    if any(side[-1]["role"] != "assistant" for side in sides):
        raise ValueError("the last message of 'chosen' and of 'rejected' must be the assistant's")
    if sides[0][:-1] != sides[1][:-1]:
        raise Unusable("sides differ before their last turn")
    shared = sides[0][:-1]
    if not shared or (shared[0]["role"] == "assistant" and "prompt" in record):
        shared = _prompt(record) + shared
    return shared, [side[-1]["content"].strip() for side in sides]


def _transcript_pair(chosen: str, rejected: str) -> tuple[list[Message], list[str]]:
    shared = os.path.commonprefix([chosen, rejected])
    end = shared.rfind(ASSISTANT)
    if end < 0 or not shared.startswith(HUMAN):
        raise ValueError(
            "no 'prompt', and 'chosen' and 'rejected' are no transcripts with a shared beginning "
            f"({HUMAN!r} ... {ASSISTANT!r} ...); add a 'prompt'"
        )
    end += len(ASSISTANT)
    answers = [chosen[end:], rejected[end:]]
    if any(marker in answer for answer in answers for marker in (HUMAN, ASSISTANT)):
        raise Unusable("sides differ before their last turn")
    return parse_transcript(shared[:end]), [answer.strip() for answer in answers]


def _ranked(record: Record) -> tuple[list[Message], list[str], list[int]]:
    responses = record["responses"]
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise _mistyped("responses", "a list of strings", responses)
    key = "ranks" if record.get("ranks") is not None else "scores"
    grades = record[key]
    if not isinstance(grades, list):
        raise _mistyped(key, "a list of numbers", grades)
    if len(responses) < 2 or len(grades) != len(responses):
        raise ValueError(
            f"'responses' and '{key}' must have the same length, at least 2; got {len(responses)} and {len(grades)}"
        )
    sign = 1 if key == "ranks" else -1
    costs = [sign * _number(grade, key) for grade in grades]
    order = sorted(set(costs))
    ranks = [order.index(cost) for cost in costs]
    rank_of: dict[str, int] = {}
    for response, rank in zip(responses, ranks, strict=True):
        if rank_of.setdefault(response, rank) != rank:
            raise ValueError(f"identical responses with different {key}: {response[:60]!r}")
    if len(order) == 1:
        raise Unusable("all responses tie")
    return _prompt(record), [response.strip() for response in responses], ranks


def _prompt(record: Record) -> list[Message]:
    """The `prompt` field: a string, an HH-RLHF transcript or messages."""
    if "prompt" not in record:
        raise ValueError(f"missing 'prompt'; keys found: {', '.join(map(str, record))}")
    if not isinstance(record["prompt"], str):
        messages = _messages(record, "prompt")
        if messages[-1]["role"] == "assistant":
            raise ValueError("the last message of 'prompt' must not be the assistant's")
        return messages
    text = record["prompt"]
    if text.startswith(HUMAN) and text.rstrip().endswith(ASSISTANT):
        return parse_transcript(text.rstrip())
    return [{"role": "user", "content": text}]


def _messages(record: Record, key: str) -> list[Message]:
    """Validated copy of a message list, reduced to role and content."""
    messages = record[key]
    if not isinstance(messages, list) or not messages:
        raise _mistyped(key, "a string or a non-empty list of messages", messages)
    result = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise _mistyped(f"{key}[{index}]", "an object with 'role' and 'content'", message)
        if message["role"] not in ROLES:
            raise _mistyped(f"{key}[{index}].role", f"one of {', '.join(ROLES)}", message["role"])
        if not isinstance(message["content"], str):
            raise _mistyped(f"{key}[{index}].content", "a string", message["content"])
        result.append({"role": message["role"], "content": message["content"]})
    return result


def _instances(record: Record) -> list[Record]:
    instances = record["instances"]
    if not isinstance(instances, list) or not all(
        isinstance(instance, dict) and "output" in instance for instance in instances
    ):
        raise _mistyped("instances", "a list of objects with 'input' and 'output'", instances)
    return instances


def _task(record: Record, instance: Record) -> Message:
    message = {"role": "user", "content": _text(record, "instruction")}
    if instance.get("input") is not None and _text(instance, "input").strip():
        message["input"] = instance["input"]
    return message


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _text(record: Record, key: str) -> str:
    if not isinstance(record[key], str):
        raise _mistyped(key, "a string", record[key])
    return record[key]


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _mistyped(key, "a finite number", value)
    return float(value)


def _mistyped(key: str, expected: str, got: Any) -> ValueError:
    shown = repr(got)
    shown = shown if len(shown) <= 60 else shown[:60] + "..."
    return ValueError(f"'{key}' must be {expected}, got {type(got).__name__} {shown}")


def _unknown(record: Record, kind: str, formats: tuple[str, ...]) -> ValueError:
    found = ", ".join(sorted(map(str, record))) or "none"
    return ValueError(f"no known {kind} format: keys found: {found}; expected {' | '.join(formats)}")
