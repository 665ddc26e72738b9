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
string or a list of messages (`fastrl.messages`). The prompt of a pair may be implicit: the messages both sides share,
or, for HH-RLHF transcripts ("\\n\\nHuman: ... \\n\\nAssistant: ..."), the shared text up to the last
"\\n\\nAssistant:"; one that both sides repeat is taken off them. `raw` (template none) leaves every text as it is.
"""

from __future__ import annotations

import math
import os.path
import re
from typing import Any, NamedTuple

from fastrl.bad_records import BadRecord, Unusable
from fastrl.columns import ANSWERS, QUESTIONS, find_column
from fastrl.messages import Message, assistant, holds_messages, mistyped, parse_json, read_messages, user
from fastrl.sources import Record

INSTRUCTION_FORMATS = (
    "messages",
    "conversations",
    "prompt + completion",
    "instruction (+ input) + output",
    "instruction + instances",
    "text",
)
PREFERENCE_FORMATS = (
    "prompt + chosen + rejected",
    "chosen + rejected",
    "prompt + responses + ranks",
    "prompt + responses + scores",
)
PROMPT_FORMATS = ("prompt", "messages", "instruction (+ input)", "chosen + rejected")
UNREAD = ("images", "videos", "audios", "chat_template_kwargs")  # columns that would change what is trained
CONVERSATIONS = ("messages", "conversations", "conversation")

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Conversation(NamedTuple):
    """Messages and the tools that the template may show; every assistant's message says whether it is a target."""

    messages: list[Message]
    tools: list[Any] | None = None


class Comparison(NamedTuple):
    """Answers (the assistant's messages) to one prompt with their ranks; lower is better, equal ranks are ties."""

    messages: list[Message]
    responses: list[Message]
    ranks: list[int]
    margin: float
    criterion: str | None
    tools: list[Any] | None = None


def conversations(record: Record, *, raw: bool = False) -> list[Conversation]:
    """The conversations of an instruction record: one, or one per Self-Instruct instance.

    Raises:
        BadRecord, Unusable: the record cannot be trained on.
    """
    tools = _tools(record)
    return [Conversation(_checked(messages), tools) for messages in _instructions(record, raw)]


def comparison(record: Record, *, raw: bool = False) -> Comparison:
    """The ranked answers of a preference record. Raises BadRecord or Unusable."""
    if "chosen" in record and "rejected" in record:
        messages, responses = _pair(record, raw)
        ranks = [0, 1]
    elif "prompt" in record and "responses" in record and ("ranks" in record or "scores" in record):
        messages, responses, ranks = _ranked(record, raw)
    else:
        _check_paired(record)
        raise _unknown(record, "preference", PREFERENCE_FORMATS)
    _check_first(messages)
    margin = record.get("margin")
    criterion = record.get("criterion")
    if criterion is not None and not isinstance(criterion, str):
        raise mistyped("criterion", "a string", criterion)
    return Comparison(
        messages,
        responses,
        ranks,
        margin=0.0 if margin is None else _number(margin, "margin"),
        criterion=criterion,
        tools=_tools(record),
    )


def prompts(record: Record, *, raw: bool = False) -> list[Conversation]:
    """The prompts of a record of any format: messages that end where a response is due. Raises BadRecord, Unusable."""
    found = _prompts(record, raw)
    for messages in found:
        if not any((message["content"] or "").strip() for message in messages):
            raise BadRecord("empty prompt")
        _check_first(messages)
    return [Conversation(messages, _tools(record)) for messages in found]


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


def _instructions(record: Record, raw: bool) -> list[list[Message]]:
    if raw and "text" in record:
        return [[assistant(_text(record, "text"))]]
    for key in CONVERSATIONS:
        if key in record:
            return [_system(record, read_messages(record[key], key))]
    _check_paired(record)
    if "instruction" in record and "instances" in record:
        return [[_task(record, instance), assistant(_text(instance, "output"))] for instance in _instances(record)]
    answer = _answer_column(record)
    question = _question(record, raw) if answer else None
    if answer and question:
        if not holds_messages(record[answer]):
            return [_untrained(question) + [assistant(_text(record, answer))]]
        completion = read_messages(record[answer], answer)
        if completion[: len(question)] == question:
            completion = completion[len(question) :]
        return [_untrained(question) + completion]
    if "text" in record:
        raise BadRecord("raw text", "'text' is raw text: set template to none to train on it as it is")
    raise _unknown(record, "instruction", INSTRUCTION_FORMATS)


def _prompts(record: Record, raw: bool) -> list[list[Message]]:
    if "prompt" in record:
        return [_prompt(record, raw)]
    for key in CONVERSATIONS:
        if key in record:
            messages = _system(record, read_messages(record[key], key))
            while messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            return [messages]
    if "instruction" in record and "instances" in record:
        return [[_task(record, instance)] for instance in _instances(record)]
    if question := _question(record, raw):
        return [question]
    if "chosen" in record and "rejected" in record:
        return [_pair(record, raw)[0]]
    raise _unknown(record, "prompt", PROMPT_FORMATS)


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
        _check_first(messages)
    return messages


def _check_first(messages: list[Message]) -> None:
    if next((m["role"] for m in messages if m["role"] not in ("system", "developer")), None) == "assistant":
        raise BadRecord("the assistant speaks first")


def _check_paired(record: Record) -> None:
    """Refuse records that say of one answer whether it is good."""
    if "completion" in record and record.get("label") in (0, 1):
        raise BadRecord(
            "unpaired preference",
            "'completion' + 'label' says of one answer whether it is good; fastrl learns from pairs (chosen + rejected)"
            " or instructions (without 'label'): pair the answers, or keep the good ones and drop the column",
        )


def _untrained(messages: list[Message]) -> list[Message]:
    """History of a completion: its answers are no targets unless the record says so."""
    for message in messages:
        if message["role"] == "assistant":
            message.setdefault("train", False)
    return messages


def _pair(record: Record, raw: bool) -> tuple[list[Message], list[Message]]:
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
    prompt = _question(record, raw) or _context(record)
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
    prompt = _question(record, raw) or _context(record) or []
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
    return [answer.strip() for answer in answers] if _is_transcript(prompt) and not raw else answers


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
    return _prompt(record, raw), [assistant(answer) for answer in answers], ranks


def _prompt(record: Record, raw: bool) -> list[Message]:
    """The `prompt` field: a string, an HH-RLHF transcript or messages."""
    text = record["prompt"]
    if holds_messages(text):
        messages = read_messages(text, "prompt")
        if messages[-1]["role"] == "assistant":
            raise BadRecord("prompt that ends in an answer", "the last message of 'prompt' must not be the assistant's")
        return _system(record, messages)
    if not isinstance(text, str):
        raise mistyped("prompt", "a string or a list of messages", text)
    if _is_transcript(text) and not raw:
        return _system(record, parse_transcript(text.rstrip()))
    return _system(record, [user(text)])


def _is_transcript(text: str) -> bool:
    return text.startswith(HUMAN) and text.rstrip().endswith(ASSISTANT)


def _question(record: Record, raw: bool) -> list[Message] | None:
    """The question of a record with columns; None if no column has a question's name."""
    if "prompt" in record:
        return _prompt(record, raw)
    column = "instruction" if "instruction" in record else find_column(record, QUESTIONS, "prompt")
    if column is None:
        return None
    return _system(record, [_task(record, record, column)])


def _answer_column(record: Record) -> str | None:
    for question, answer in (("prompt", "completion"), ("instruction", "output")):
        if question in record and answer in record:
            return answer
    return find_column(record, ANSWERS, "completion")


def _context(record: Record) -> list[Message] | None:
    """Messages before a pair's answers, in a column of their own."""
    for key in CONVERSATIONS:
        if key in record:
            messages = _system(record, read_messages(record[key], key))
            return None if messages[-1]["role"] == "assistant" else messages
    return None


def _system(record: Record, messages: list[Message]) -> list[Message]:
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


def _tools(record: Record) -> list[Any] | None:
    for column in UNREAD:
        if record.get(column):
            raise BadRecord("column that cannot be followed", f"'{column}' is not supported; leave the column out")
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = parse_json(tools, "tools")
    if tools and not isinstance(tools, list):
        raise mistyped("tools", "a list of tools", tools)
    return tools or None


def _instances(record: Record) -> list[Record]:
    instances = record["instances"]
    if not isinstance(instances, list) or not all(
        isinstance(instance, dict) and "output" in instance for instance in instances
    ):
        raise mistyped("instances", "a list of objects with 'input' and 'output'", instances)
    return instances


def _task(record: Record, instance: Record, column: str = "instruction") -> Message:
    """The question with what stands beside it: Alpaca's `input`, Dolly's `context`."""
    message = user(_text(record, column))
    beside = find_column(
        {key: value for key, value in instance.items() if value is not None and value != "" and key != column},
        ("input", "context"),
        "input",
    )
    if beside is not None and _text(instance, beside).strip():
        message["input"] = instance[beside]
    return message


def _text(record: Record, key: str) -> str:
    if not isinstance(record[key], str):
        raise mistyped(key, "a string", record[key])
    return record[key]


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise mistyped(key, "a finite number", value)
    return float(value)


def _unknown(record: Record, kind: str, formats: tuple[str, ...]) -> BadRecord:
    found = ", ".join(sorted(map(str, record))) or "none"
    return BadRecord(
        f"no known {kind} format",
        f"no known {kind} format: keys found: {found}; expected {' | '.join(formats)}, or name the columns "
        "with columns: prompt=...",
    )
