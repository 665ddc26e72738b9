"""Lists of messages as they come in data, brought to one form: `role`, `content` and what else the template reads.

OpenAI's and TRL's `role` + `content`, ShareGPT's `from` + `value`, content in parts, tool calls with null content,
lists stored as JSON text, and the marks that say whether an assistant's turn is a target.
"""

from __future__ import annotations

import json
from typing import Any

from fastrl.data.bad_records import BadRecord

# role, content (text, or null beside tool_calls), what else the record gives the template (tool_calls, name, ...);
# Alpaca's third slot as `input`; and `train`, whether an assistant's turn is a target.
Message = dict[str, Any]

ROLES = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool", "function", "ipython")},
    **dict.fromkeys(("human", "User", "Human"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call", "tool_call", "Assistant"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response"), "tool"),
}
TRAIN_MARKS = ("train", "training", "weight", "loss")  # axolotl, OpenAI, ms-swift
OWN_KEYS = {"role", "content", "from", "value", "train_detail", *TRAIN_MARKS}


def read_messages(value: Any, key: str) -> list[Message]:
    """Validated copy of a list of messages; one message, or JSON text of either, counts as such a list."""
    if isinstance(value, str):
        value = parse_json(value, key)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise mistyped(key, "a list of messages", value)
    if not value:
        raise BadRecord("empty conversation", f"'{key}' is an empty list")
    return [_read_message(message, f"{key}[{index}]") for index, message in enumerate(value)]


def holds_messages(value: Any) -> bool:
    """Whether the value is a list of messages, or a text that is one in JSON."""
    if isinstance(value, (list, dict)):
        return True
    if not isinstance(value, str) or value[:20].lstrip()[:1] != "[" or '"' not in value:
        return False
    try:
        messages = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return False
    return bool(messages) and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in messages)


def parse_json(text: str, key: str) -> Any:
    """The value of a column that holds JSON text."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRecord("text that is no JSON", f"'{key}' is text, but no JSON: {error}") from error


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def mistyped(key: str, expected: str, got: Any) -> BadRecord:
    """The error of a field with a value of the wrong kind."""
    shown = repr(got)
    shown = shown if len(shown) <= 60 else shown[:60] + "..."
    return BadRecord("field of the wrong kind", f"'{key}' must be {expected}, got {type(got).__name__} {shown}")


def _read_message(message: Any, key: str) -> Message:
    if not isinstance(message, dict) or not ("role" in message or "from" in message):
        raise mistyped(key, "an object with 'role' and 'content', or 'from' and 'value'", message)
    role_key, content_key = ("role", "content") if "role" in message else ("from", "value")
    role = message[role_key]
    if not isinstance(role, str) or role not in ROLES:
        raise mistyped(f"{key}.{role_key}", f"one of {', '.join(ROLES)}", role)
    read: Message = {"role": ROLES[role], "content": _content(message, content_key, key)}
    extra = {name: value for name, value in message.items() if value is not None and name not in OWN_KEYS}
    train = _train_mark(message, read["role"], key)
    return {**read, **extra} if train is None else {**read, **extra, "train": train}


def _content(message: dict[str, Any], content_key: str, key: str) -> str | None:
    content = message.get(content_key)
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(part, f"{key}.{content_key}") for part in content)
    if content is None and (message.get("tool_calls") or message.get("function_call")):
        return None
    if content is None:
        raise BadRecord("message without content", f"'{key}.{content_key}' is null or missing")
    raise mistyped(f"{key}.{content_key}", "a string or a list of text parts", content)


def _part_text(part: Any, key: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise BadRecord("content that is no text", f"'{key}' has a part of type {kind!r}; only text can be trained on")


def _train_mark(message: dict[str, Any], role: str, key: str) -> bool | None:
    """What the message says about being a target: None where it says nothing."""
    if message.get("train_detail"):
        raise BadRecord("marks inside a turn", f"'{key}.train_detail' marks parts of a turn; only whole turns can be")
    marks = {name: message[name] for name in TRAIN_MARKS if message.get(name) is not None}
    for name, value in marks.items():
        if value not in (0, 1):
            raise BadRecord(
                "turn weight other than 0 and 1", f"'{key}.{name}' must be 0, 1, true or false, got {value!r}"
            )
    if not marks:
        return None
    train = all(marks.values())
    if train and role != "assistant":
        raise BadRecord("target that is not the assistant's", f"'{key}' marks a turn of {role} as a target")
    return train
