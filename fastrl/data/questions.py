"""The question of a record: prompts, transcripts, columns with a question's name, and what goes before it."""

from __future__ import annotations

import re
from typing import Any

from fastrl.data.bad_records import BadRecord
from fastrl.data.columns import QUESTIONS, find_column
from fastrl.data.messages import Message, assistant, holds_messages, mistyped, parse_json, read_messages, user
from fastrl.data.sources import Record

CONVERSATIONS = ("messages", "conversations", "conversation")
UNREAD = ("images", "videos", "audios", "chat_template_kwargs")  # columns that would change what is trained
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def question_of(record: Record, raw: bool) -> list[Message] | None:
    """The question of a record with columns; None if no column has a question's name."""
    if "prompt" in record:
        return prompt_of(record, raw)
    column = "instruction" if "instruction" in record else find_column(record, QUESTIONS, "prompt")
    if column is None:
        return None
    return with_system(record, [task(record, record, column)])


def prompt_of(record: Record, raw: bool) -> list[Message]:
    """The `prompt` field: a string, an HH-RLHF transcript or messages."""
    text = record["prompt"]
    if holds_messages(text):
        messages = read_messages(text, "prompt")
        if messages[-1]["role"] == "assistant":
            raise BadRecord("prompt that ends in an answer", "the last message of 'prompt' must not be the assistant's")
        return with_system(record, messages)
    if not isinstance(text, str):
        raise mistyped("prompt", "a string or a list of messages", text)
    if is_transcript(text) and not raw:
        return with_system(record, parse_transcript(text.rstrip()))
    return with_system(record, [user(text)])


def context_of(record: Record) -> list[Message] | None:
    """Messages before a pair's answers, in a column of their own."""
    for key in CONVERSATIONS:
        if key in record:
            messages = with_system(record, read_messages(record[key], key))
            return None if messages[-1]["role"] == "assistant" else messages
    return None


def with_system(record: Record, messages: list[Message]) -> list[Message]:
    """The messages with the record's `system` message and `history` before them."""
    before: list[Message] = []
    system = record.get("system", record.get("system_prompt"))
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        before.append({"role": "system", "content": system})
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in history
    ):
        raise mistyped("history", "a list of [question, answer]", history)
    for question, answer in history:
        before += [user(question), {**assistant(answer), "train": False}]
    return before + messages


def tools_of(record: Record) -> list[Any] | None:
    for column in UNREAD:
        if record.get(column):
            raise BadRecord("column that cannot be followed", f"'{column}' is not supported; leave the column out")
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = parse_json(tools, "tools")
    if tools and not isinstance(tools, list):
        raise mistyped("tools", "a list of tools", tools)
    return tools or None


def task(record: Record, instance: Record, column: str = "instruction") -> Message:
    """The question with what stands beside it: Alpaca's `input`, Dolly's `context`."""
    message = user(text_of(record, column))
    beside = find_column(
        {key: value for key, value in instance.items() if value is not None and value != "" and key != column},
        ("input", "context"),
        "input",
    )
    if beside is not None and text_of(instance, beside).strip():
        message["input"] = instance[beside]
    return message


def instances_of(record: Record) -> list[Record]:
    instances = record["instances"]
    if not isinstance(instances, list) or not all(
        isinstance(instance, dict) and "output" in instance for instance in instances
    ):
        raise mistyped("instances", "a list of objects with 'input' and 'output'", instances)
    return instances


def text_of(record: Record, key: str) -> str:
    if not isinstance(record[key], str):
        raise mistyped(key, "a string", record[key])
    return record[key]


def check_first(messages: list[Message]) -> None:
    if next((m["role"] for m in messages if m["role"] not in ("system", "developer")), None) == "assistant":
        raise BadRecord("the assistant speaks first")


def check_paired(record: Record) -> None:
    """Refuse records that say of one answer whether it is good."""
    if "completion" in record and record.get("label") in (0, 1):
        raise BadRecord(
            "unpaired preference",
            "'completion' + 'label' says of one answer whether it is good; fastrl learns from pairs (chosen + rejected)"
            " or instructions (without 'label'): pair the answers, or keep the good ones and drop the column",
        )


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


def is_transcript(text: str) -> bool:
    return text.startswith(HUMAN) and text.rstrip().endswith(ASSISTANT)


def unknown_format(record: Record, kind: str, formats: tuple[str, ...]) -> BadRecord:
    found = ", ".join(sorted(map(str, record))) or "none"
    return BadRecord(
        f"no known {kind} format",
        f"no known {kind} format: keys found: {found}; expected {' | '.join(formats)}, or name the columns "
        "with columns: prompt=...",
    )
