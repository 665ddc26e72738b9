"""How a conversation is written as text: the tokenizer's own chat template, Alpaca's where it has none, or nothing.

One rule for SFT, preferences and rollouts: text and tokens are those of the whole conversation as the template writes
it, and the prompt is what the template writes up to the place where the response starts. The template that a model was
trained with is recorded in its tokenizer_config.json, and holds for all that comes after.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrl.data.bad_records import BadRecord
from fastrl.data.messages import Message
from fastrl.folders import read_json

TEMPLATES = ("auto", "chat", "alpaca", "none")
RECORD = "fastrl_template"  # key of tokenizer_config.json

# Taori et al. 2023, Stanford Alpaca, train.py: PROMPT_DICT.
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request."
)

# What templates are asked with, to see where they put things: words that no system prompt contains.
QUESTION, ANSWER, TOOL = "fastrl:question", "fastrl:answer", "fastrl_tool"


@dataclass(frozen=True)
class Template:
    """How a template writes conversations with a tokenizer, read from it once."""

    tokenizer: Any
    name: str  # chat, alpaca or none
    end_id: int  # the token that ends a response
    end_text: str = ""  # that token as the template writes it after every answer; empty: it writes none
    tail: str = ""  # space that the template writes after the last answer, where it writes no end
    header: str = ""  # what comes before an answer, of a template that has no generation prompt
    in_parts: bool = False  # content must be a list of parts
    shows_tools: bool = False  # whether tool calls appear in the text


def choose_template(tokenizer: Any, template: str = "auto") -> str:
    """`chat`, `alpaca` or `none`; `auto` takes the one the model was trained with, else the tokenizer's chat template
    if it has one, else Alpaca's.

    Raises:
        ValueError: no such template, or the model was trained with another one.
    """
    has_chat = getattr(tokenizer, "chat_template", None) is not None
    recorded = recorded_template(tokenizer)
    if template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got '{template}'")
    if template == "auto" and recorded is None:
        return "chat" if has_chat else "alpaca"
    if recorded is not None and template not in ("auto", recorded):
        raise ValueError(
            f"template: expected '{recorded}', with which {tokenizer.name_or_path or 'the model'} was trained, got "
            f"'{template}'; leave template at auto, or start from a model that was trained with '{template}'"
        )
    chosen = recorded if template == "auto" and recorded else template
    if chosen == "chat" and not has_chat:
        raise ValueError("template is 'chat', but the tokenizer has no chat template; use 'alpaca'")
    return chosen


def record_template(tokenizer: Any, template: str = "auto", *, teach: bool = False) -> str:
    """`choose_template`, written down in the tokenizer, so that every model saved with it says how it was trained.

    `teach`: what was trained on raw text alone (`none`) is taught another template.
    """
    if teach and recorded_template(tokenizer) == "none" and template not in ("auto", "none"):
        del tokenizer.init_kwargs[RECORD]
    chosen = choose_template(tokenizer, template)
    tokenizer.init_kwargs[RECORD] = chosen
    return chosen


def recorded_template(source: Any) -> str | None:
    """The template that a tokenizer, or the model in a folder, was trained with; None if it does not say."""
    if isinstance(source, (str, Path)):
        file = Path(source) / "tokenizer_config.json"
        return read_json(file).get(RECORD) if file.is_file() else None
    return getattr(source, "init_kwargs", {}).get(RECORD)


def without_record(tokenizer: Any) -> Any:
    """The tokenizer as one of a model that was trained with no template yet: for data that is written otherwise than
    the model's own, such as the plain texts of PTX.
    """
    other = copy.copy(tokenizer)
    other.init_kwargs = {name: value for name, value in tokenizer.init_kwargs.items() if name != RECORD}
    return other


def check_same_template(template: str, model: str, reward_model: str) -> None:
    """Raise ValueError if the reward model in that folder was trained with another template than the policy's."""
    other = recorded_template(Path(reward_model).expanduser())
    if other not in (None, template):
        raise ValueError(
            f"template: expected the same for both models, got '{template}' for the policy {model} and '{other}', with "
            f"which the reward model {reward_model} was trained; train one of them anew with the other's template"
        )


def read_template(tokenizer: Any, template: str = "auto") -> Template:
    """What the loaders have to know of a template, found by letting it write a question and an answer.

    Raises:
        ValueError: the template cannot write them, or nothing could end a response.
    """
    name = choose_template(tokenizer, template)
    if name != "chat":
        end = _eos(tokenizer)
        text = tokenizer.convert_ids_to_tokens(end) if name == "alpaca" else ""
        return Template(tokenizer, name, end, end_text=text)
    ask, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    for in_parts in (False, True):
        plain = Template(tokenizer, name, -1, in_parts=in_parts)
        try:
            before, found, after = render(plain, [ask, answer]).rpartition(ANSWER)
        except BadRecord as error:
            raise ValueError(f"the tokenizer's chat template cannot write a question and an answer: {error}") from error
        if found and QUESTION in before:
            break
    else:
        raise ValueError("the tokenizer's chat template leaves out the question or the answer of a conversation")
    end_text = _first_special(tokenizer, after)
    return Template(
        tokenizer,
        name,
        tokenizer.convert_tokens_to_ids(end_text) if end_text else _eos(tokenizer),
        end_text=end_text,
        tail="" if end_text else after[len(after.rstrip()) :],
        header=_missing_header(plain, ask, before),
        in_parts=in_parts,
        shows_tools=_shows_tools(plain, ask),
    )


def render_prompt(tokenizer: Any, messages: list[Message], template: str = "auto") -> str:
    """Text of `messages` up to where the assistant's next turn starts, special tokens included."""
    return prompt_text(read_template(tokenizer, template), messages)


def encode_prompt(tokenizer: Any, messages: list[Message], template: str = "auto") -> list[int]:
    """Token ids of `render_prompt`; a response is sampled right after them."""
    return encode(tokenizer, [render_prompt(tokenizer, messages, template)])[0]


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with no special tokens but those the text spells out."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def end_token_id(tokenizer: Any, template: str = "auto") -> int:
    """The token that ends a response: the chat template's end of turn, else eos.

    Raises:
        ValueError: the template ends a turn with no special token and the tokenizer has no eos.
    """
    return read_template(tokenizer, template).end_id


def prompt_text(template: Template, messages: list[Message], tools: list[Any] | None = None) -> str:
    """Text of `messages` up to where a response starts."""
    return render(template, messages, tools, prompt=True) + template.header


def render(template: Template, messages: list[Message], tools: list[Any] | None = None, *, prompt: bool = False) -> str:
    """Text of `messages` as the template writes them; with `prompt`, up to where a response starts.

    Raises:
        BadRecord: the template refuses them.
    """
    if template.name == "chat":
        return _render_chat(template, messages, tools, prompt)
    if any(
        message["content"] is None or message["role"] not in ("system", "user", "assistant") for message in messages
    ):
        raise BadRecord("tool turns without a chat template", f"template '{template.name}' cannot write turns of tools")
    if template.name == "none":
        return _render_raw(template, messages)
    return _render_alpaca(template, messages, prompt)


def join_input(message: Message) -> str:
    """The content with Alpaca's separate input below it, as one chat message."""
    return "\n\n".join(text for text in (message["content"], message.get("input")) if text)


def _render_chat(template: Template, messages: list[Message], tools: list[Any] | None, prompt: bool) -> str:
    from jinja2 import TemplateError

    tokenizer = template.tokenizer
    written = [_chat_message(template, message) for message in messages]
    try:
        return tokenizer.apply_chat_template(written, tools=tools, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        roles = ", ".join(m["role"] for m in messages)
        raise BadRecord(
            "the chat template refuses the conversation",
            f"the chat template refuses this conversation (roles: {roles}): {error}",
        ) from error


def _chat_message(template: Template, message: Message) -> dict[str, Any]:
    """The message as chat templates expect it; `developer` is a system message where the template has no such role."""
    written = {key: value for key, value in message.items() if key not in ("input", "train")}
    content = None if message["content"] is None else join_input(message)
    written["content"] = [{"type": "text", "text": content}] if template.in_parts and content is not None else content
    if message["role"] == "developer" and "developer" not in str(template.tokenizer.chat_template):
        written["role"] = "system"
    return written


def _render_raw(template: Template, messages: list[Message]) -> str:
    """Prompt and answer as they are; bos in front if the tokenizer puts it there."""
    if len(messages) > 2 or any(m["role"] == "assistant" for m in messages[:-1]):
        roles = ", ".join(m["role"] for m in messages)
        raise BadRecord(
            "turns without a template", f"template 'none' writes text, or a prompt and an answer, got {roles}"
        )
    return _bos_text(template.tokenizer) + "".join(join_input(message) for message in messages)


def _render_alpaca(template: Template, messages: list[Message], prompt: bool) -> str:
    """Stanford Alpaca's prompt; further turns repeat its blocks, a system message replaces line 1.

    The original has no line break after "### Response:"; it is there so that the response's first
    token does not depend on a leading space.
    """
    with_input = any("input" in message for message in messages)
    parts = [ALPACA_WITH_INPUT if with_input else ALPACA]
    if messages and messages[0]["role"] == "system":
        parts, messages = [messages[0]["content"]], messages[1:]
    for message in messages:
        if message["role"] == "assistant":
            parts.append(f"### Response:\n{message['content']}{template.end_text}")
        else:
            parts.append(f"### Instruction:\n{message['content']}")
            if "input" in message:
                parts.append(f"### Input:\n{message['input']}")
    return _bos_text(template.tokenizer) + "\n\n".join([*parts, *["### Response:\n"] * prompt])


def _missing_header(template: Template, ask: Message, before: str) -> str:
    """What a template that knows no generation prompt writes between a question and its answer.

    Space alone (Llama 2's "[/INST] ") belongs to the answer: its first token holds it.
    """
    try:
        asked = render(template, [ask])
    except BadRecord:
        return ""  # refuses to end with a question: it has a generation prompt
    if render(template, [ask], prompt=True) != asked or not before.startswith(asked):
        return ""
    header = before[len(asked) :]
    return header.rstrip(" ") if header.strip() else ""


def _shows_tools(template: Template, ask: Message) -> bool:
    call = {"id": "1", "type": "function", "function": {"name": TOOL, "arguments": {}}}
    try:
        return TOOL in render(template, [ask, {"role": "assistant", "content": None, "tool_calls": [call]}])
    except BadRecord:
        return "tool_calls" in str(template.tokenizer.chat_template)


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos token, so no response could end; set tokenizer.eos_token and save the tokenizer"
        )
    return tokenizer.eos_token_id


def _first_special(tokenizer: Any, text: str) -> str:
    """The special or added token that comes first in the text; empty if there is none."""
    places = [(text.find(token), -len(token), token) for token in special_texts(tokenizer) if token in text]
    return min(places)[2] if places else ""


def special_texts(tokenizer: Any) -> list[str]:
    """The special and added tokens that are more than space."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return [token for token in {*tokenizer.all_special_tokens, *added} if token.strip()]


def _bos_text(tokenizer: Any) -> str:
    """The bos token's text if the tokenizer starts every sequence with it, else nothing."""
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
    return tokenizer.bos_token if adds_bos else ""
