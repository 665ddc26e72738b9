"""The record formats that fastrl reads, detected from their keys.

Instruction data   `messages` or `conversations` | `prompt` + `completion` | `instruction` (+ `input`) + `output`
                   | `instruction` + `instances` (Self-Instruct's seed tasks) | one column with a question's name
                   (question, query, problem, ...) and one with an answer's (response, answer, ...)
                   | `text` under template none
Preferences        (`prompt` +) `chosen` + `rejected`, optional `margin`
                   | `prompt` + `responses` + `ranks` (lower is better) or `scores` (higher is better);
                   optional `criterion` in both
Prompts            `prompt` | `messages` | any of the above, of which the prompt is taken

Besides: `system`, `history` (pairs of question and answer) and `tools`. A prompt, completion, chosen or rejected is a
string or a list of messages (`fastrl.data.messages`). The prompt of a pair may be implicit: the messages both sides
share, or, for HH-RLHF transcripts ("\\n\\nHuman: ... \\n\\nAssistant: ..."), the shared text up to the last
"\\n\\nAssistant:"; one that both sides repeat is taken off them. `raw` (template none) leaves every text as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastrl.data.bad_records import BadRecord, Unusable
from fastrl.data.columns import ANSWERS, find_column
from fastrl.data.messages import Message, assistant, holds_messages, read_messages
from fastrl.data.pairs import pair_of
from fastrl.data.questions import (
    CONVERSATIONS,
    check_first,
    check_paired,
    instances_of,
    prompt_of,
    question_of,
    task,
    text_of,
    tools_of,
    unknown_format,
    with_system,
)
from fastrl.data.sources import Record

INSTRUCTION_FORMATS = (
    "messages",
    "conversations",
    "prompt + completion",
    "instruction (+ input) + output",
    "instruction + instances",
    "text",
)
PROMPT_FORMATS = ("prompt", "messages", "instruction (+ input)", "chosen + rejected")


class Conversation(NamedTuple):
    """Messages and the tools that the template may show; every assistant's message says whether it is a target."""

    messages: list[Message]
    tools: list[Any] | None = None


def conversations(record: Record, *, raw: bool = False) -> list[Conversation]:
    """The conversations of an instruction record: one, or one per Self-Instruct instance.

    Raises:
        BadRecord, Unusable: the record cannot be trained on.
    """
    tools = tools_of(record)
    return [Conversation(_checked(messages), tools) for messages in _instructions(record, raw)]


def prompts(record: Record, *, raw: bool = False) -> list[Conversation]:
    """The prompts of a record of any format: messages that end where a response is due. Raises BadRecord, Unusable."""
    found = _prompts(record, raw)
    for messages in found:
        if not any((message["content"] or "").strip() for message in messages):
            raise BadRecord("empty prompt")
        check_first(messages)
    return [Conversation(messages, tools_of(record)) for messages in found]


def _instructions(record: Record, raw: bool) -> list[list[Message]]:
    if raw and "text" in record:
        return [[assistant(text_of(record, "text"))]]
    for key in CONVERSATIONS:
        if key in record:
            return [with_system(record, read_messages(record[key], key))]
    check_paired(record)
    if "instruction" in record and "instances" in record:
        return [[task(record, instance), assistant(text_of(instance, "output"))] for instance in instances_of(record)]
    answer = _answer_column(record)
    question = question_of(record, raw) if answer else None
    if answer and question:
        if not holds_messages(record[answer]):
            return [_untrained(question) + [assistant(text_of(record, answer))]]
        completion = read_messages(record[answer], answer)
        if completion[: len(question)] == question:
            completion = completion[len(question) :]
        return [_untrained(question) + completion]
    if "text" in record:
        raise BadRecord("raw text", "'text' is raw text: set template to none to train on it as it is")
    raise unknown_format(record, "instruction", INSTRUCTION_FORMATS)


def _prompts(record: Record, raw: bool) -> list[list[Message]]:
    if "prompt" in record:
        return [prompt_of(record, raw)]
    for key in CONVERSATIONS:
        if key in record:
            messages = with_system(record, read_messages(record[key], key))
            while messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            return [messages]
    if "instruction" in record and "instances" in record:
        return [[task(record, instance)] for instance in instances_of(record)]
    if question := question_of(record, raw):
        return [question]
    if "chosen" in record and "rejected" in record:
        return [pair_of(record, raw)[0]]
    raise unknown_format(record, "prompt", PROMPT_FORMATS)


def _checked(messages: list[Message]) -> list[Message]:
    """The conversation up to its last answer, every answer with its mark; what has nothing to learn is refused."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRecord("no response")
    messages = messages[: answers[-1] + 1]
    for index in answers:
        messages[index].setdefault("train", True)
    if not any((messages[i]["content"] or "").strip() or messages[i].get("tool_calls") for i in answers):
        raise BadRecord("empty response")
    if not any(messages[index]["train"] for index in answers):
        raise Unusable("no turn is a target")
    if len(messages) > 1:
        check_first(messages)
    return messages


def _untrained(messages: list[Message]) -> list[Message]:
    """History of a completion: its answers are no targets unless the record says so."""
    for message in messages:
        if message["role"] == "assistant":
            message.setdefault("train", False)
    return messages


def _answer_column(record: Record) -> str | None:
    for question, answer in (("prompt", "completion"), ("instruction", "output")):
        if question in record and answer in record:
            return answer
    return find_column(record, ANSWERS, "completion")
