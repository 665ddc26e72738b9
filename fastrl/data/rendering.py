"""Conversations as the template writes them, and where in text and tokens their answers lie.

The whole conversation is rendered and tokenised once; prompts are found in it as prefixes. Where a template writes an
answer otherwise than its own generation prompt begins it, the whole rendering counts.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from fastrl.data.bad_records import BadRecord
from fastrl.data.messages import Message
from fastrl.data.templates import Template, encode, join_input, prompt_text, render, special_texts

CHUNK = 256  # texts tokenised at once: a tokenizer's own results take a hundred bytes a token
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


class Rendered(NamedTuple):
    """Text up to the end of the last answer; `spans` are the places of the targets in it, end of turn included."""

    text: str
    spans: list[tuple[int, int]]
    append_end: bool  # the template writes no end after the last answer: the end token goes there
    off_prompt: str = ""  # how the last answer's beginning differs from the generation prompt
    rewritten: int = 0  # targets that the template writes differently once the conversation goes on: context only


class Tokens(NamedTuple):
    """Token ids of a rendered text and the places of its spans in them."""

    input_ids: list[int]
    spans: list[tuple[int, int]]


def render_conversation(
    template: Template, messages: list[Message], tools: list[Any] | None = None, prompt: str | None = None
) -> Rendered:
    """The conversation, which ends with an answer, as the template writes it; `train` marks the targets. `prompt` is
    what `prompt_text` gives for all but the answer, where that is known.

    Raises:
        BadRecord: the template refuses it, leaves out a turn of it, or its last answer cannot be found in the text.
    """
    messages = [_without_end(template, message) for message in messages]
    _check_tools(template, messages, tools)
    full = render(template, messages, tools)
    _check_complete(template, messages, full)
    last = len(messages) - 1
    prompt = prompt_text(template, messages[:last], tools) if prompt is None else prompt
    start = _answer_start(template, messages, last, tools, prompt, full)
    end, append_end = _last_end(template, full, start)
    spans, rewritten = [], 0
    for index, message in enumerate(messages[:-1]):
        if message["role"] != "assistant" or not message.get("train", True):
            continue
        span = _earlier_span(template, messages, index, tools, full)
        if span is None:
            rewritten += 1
        else:
            spans.append(span)
    if messages[last].get("train", True):
        spans.append((start, end))
    if not spans:
        raise BadRecord("targets that the template rewrites", "the template writes no answer as it was given")
    off_prompt = "" if full.startswith(prompt) else _difference(prompt, full)
    return Rendered(full[:end], spans, append_end, off_prompt, rewritten)


def render_asked(template: Template, messages: list[Message], tools: list[Any] | None = None) -> str:
    """The prompt that a response is sampled to.

    Raises:
        BadRecord: the template refuses it or leaves out a turn of it.
    """
    messages = [_without_end(template, message) for message in messages]
    _check_tools(template, messages, tools)
    text = prompt_text(template, messages, tools)
    _check_complete(template, messages, text)
    return text


def tokenize(template: Template, rendered: Sequence[Rendered]) -> Iterator[Tokens]:
    """Tokens of each whole text, those that `apply_chat_template` gives."""
    tokenizer = template.tokenizer
    for first in range(0, len(rendered), CHUNK):
        chunk = rendered[first : first + CHUNK]
        batch = tokenizer([r.text for r in chunk], add_special_tokens=False, verbose=False)
        for row, (item, input_ids) in enumerate(zip(chunk, batch["input_ids"], strict=True)):
            at = partial(_token_at, tokenizer, item.text, input_ids, batch[row] if batch.is_fast else None)
            places = [(at(start), at(end)) for start, end in item.spans]
            if item.append_end:
                input_ids = [*input_ids, template.end_id]
                if item.spans[-1][1] == len(item.text):
                    places[-1] = (places[-1][0], len(input_ids))
            yield Tokens(input_ids, places)


def _token_at(tokenizer: Any, text: str, input_ids: list[int], encoding: Any, place: int) -> int:
    """The first token that reaches beyond text[:place]: where a span begins, or the one after it ends."""
    if place == len(text):
        return len(input_ids)
    token = encoding.char_to_token(place) if encoding is not None else None
    if token is not None and encoding.token_to_chars(token)[0] == place:
        if token == 0 or encoding.token_to_chars(token - 1)[1] == place:
            return token
    # a token across the place, space that offsets leave out, or a tokenizer without offsets
    return len(os.path.commonprefix([encode(tokenizer, [text[:place]])[0], input_ids]))


def _without_end(template: Template, message: Message) -> Message:
    """An answer that brings its own end token: the template writes it."""
    if message["role"] != "assistant" or not message["content"]:
        return message
    content, end = message["content"].rstrip(), template.tokenizer.convert_ids_to_tokens(template.end_id)
    return {**message, "content": content.removesuffix(end)} if content.endswith(end) else message


def _check_tools(template: Template, messages: list[Message], tools: list[Any] | None) -> None:
    """The template writes tools and their calls, if there are any."""
    if not template.shows_tools and any(message.get("tool_calls") for message in messages):
        raise BadRecord("tool calls that the template leaves out", "the template does not write tool calls")
    if any(m.get("function_call") for m in messages) and "function_call" not in str(template.tokenizer.chat_template):
        raise BadRecord("tool calls that the template leaves out", "the template does not write 'function_call'")
    if tools and "tools" not in str(template.tokenizer.chat_template):
        raise BadRecord("tools that the template leaves out", "the template does not write a list of tools")


def _check_complete(template: Template, messages: list[Message], full: str) -> None:
    """Nothing that the record says is lost in the text, and the text can be encoded."""
    try:
        full.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            "half of a surrogate pair", f"no text: {error.reason} at {full[error.start - 20 : error.start]!r}"
        ) from error
    if template.name != "chat":
        return
    for message in messages:
        if message["role"] in ("system", "developer", "user") and join_input(message).strip() not in full:
            raise BadRecord(
                f"a turn of {message['role']} that the template leaves out",
                f"the chat template does not write {join_input(message)[:60]!r}",
            )
    thoughts = [messages[-1][key] for key in THOUGHTS if isinstance(messages[-1].get(key), str)]
    if any(thought.strip() not in full for thought in thoughts):
        raise BadRecord("thoughts that the template leaves out", "the chat template does not write the last answer's")


def _answer_start(
    template: Template, messages: list[Message], index: int, tools: list[Any] | None, prompt: str, full: str
) -> int:
    """Where the answer messages[index] begins in the whole text: after its prompt, or after what of it is there."""
    if full.startswith(prompt):
        return len(prompt)
    asked = len(os.path.commonprefix([_asked(template, messages[:index], tools), prompt]))
    start = len(os.path.commonprefix([prompt, full]))
    if start < asked:
        raise BadRecord(
            "prompt that is no beginning of the conversation",
            f"the chat template writes the prompt differently once the answer is there: {_difference(prompt, full)}",
        )
    content = (messages[index]["content"] or "").strip()
    place = full.find(content, asked) if content else -1
    return place if 0 <= place < start else start


def _asked(template: Template, messages: list[Message], tools: list[Any] | None) -> str:
    try:
        return render(template, messages, tools)
    except BadRecord:
        return ""


def _last_end(template: Template, full: str, start: int) -> tuple[int, bool]:
    """(where the last answer ends, whether an end token is to be put there)."""
    if template.end_text and (place := full.rfind(template.end_text, start)) >= 0:
        return place + len(template.end_text), False
    if template.name == "none":
        return len(full), True
    text = full.rstrip()
    if any(text.endswith(token) for token in special_texts(template.tokenizer)):  # a call of a tool ends otherwise
        return len(text), False
    return (len(full) - len(template.tail) if template.tail and full.endswith(template.tail) else len(full)), True


def _earlier_span(
    template: Template, messages: list[Message], index: int, tools: list[Any] | None, full: str
) -> tuple[int, int] | None:
    """The place of an answer before the last, as it is written there; None if the template rewrites it."""
    prompt = prompt_text(template, messages[:index], tools)
    try:
        start = _answer_start(template, messages, index, tools, prompt, full)
    except BadRecord:
        return None
    done = render(template, messages[: index + 1], tools)
    end, _ = _last_end(template, done, min(start, len(done)))
    if full.startswith(done[:end]):
        return start, end
    content = (messages[index]["content"] or "").strip()
    place = full.find(content, start) if content else -1
    if place < 0 or full[start:place].strip():
        return None
    end = place + len(content)
    ending = re.match(rf"\s*{re.escape(template.end_text)}", full[end:]) if template.end_text else None
    return start, end + (ending.end() if ending else 0)


def _difference(prompt: str, full: str) -> str:
    """The first difference of two texts, with what is around it."""
    place = len(os.path.commonprefix([prompt, full]))
    around = max(0, place - 20)
    return f"{prompt[around : place + 20]!r} is {full[around : place + 20]!r}"
