"""Prompt text and tokens: the tokenizer's own chat template, or Alpaca's where it has none.

One rule for SFT, preferences and rollouts: prompt ids are the tokens of the prompt rendered up to
the place where the response starts; response ids are the tokens of the response alone and the end
token. So a model is trained on exactly the sequence that it is later sampled with.
"""

from __future__ import annotations

from typing import Any

from fastrl.formats import Message

TEMPLATES = ("auto", "chat", "alpaca")

# Taori et al. 2023, Stanford Alpaca, train.py: PROMPT_DICT.
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request."
)


def choose_template(tokenizer: Any, template: str = "auto") -> str:
    """`chat` or `alpaca`; `auto` takes the tokenizer's chat template if it has one."""
    has_chat = getattr(tokenizer, "chat_template", None) is not None
    if template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got '{template}'")
    if template == "chat" and not has_chat:
        raise ValueError("template is 'chat', but the tokenizer has no chat template; use 'alpaca'")
    if template == "auto":
        return "chat" if has_chat else "alpaca"
    return template


def render_prompt(tokenizer: Any, messages: list[Message], template: str = "auto") -> str:
    """Text of `messages` up to where the assistant's next turn starts, special tokens included."""
    if choose_template(tokenizer, template) == "chat":
        return _render_chat(tokenizer, messages, add_generation_prompt=True)
    return _render_alpaca(tokenizer, messages)


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
    if choose_template(tokenizer, template) == "chat":
        probe = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "answer"},
        ]
        rendered = _render_chat(tokenizer, probe, add_generation_prompt=False)
        tail = encode(tokenizer, [rendered.rpartition("answer")[2].lstrip()])[0]
        if tail and tail[0] in _special_ids(tokenizer):
            return tail[0]
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos token, so no response could end; set tokenizer.eos_token and save the tokenizer"
        )
    return tokenizer.eos_token_id


def response_turns(
    tokenizer: Any, messages: list[Message], template: str = "auto", end_token: str = ""
) -> list[tuple[str, str]]:
    """(context, response) texts of every assistant turn, in order.

    Contexts and responses alternate to the whole conversation; `end_token`, which the caller puts
    after each response, is left out of the contexts. No generation markers are needed in the chat
    template, but it must render a conversation as an extension of its own beginning.

    Raises:
        ValueError: the template rewrites earlier turns.
    """
    turns: list[tuple[str, str]] = []
    before = response = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:index], template)
        rest = prompt[len(before) :].lstrip() if turns else prompt
        if not prompt.startswith(before) or not rest.startswith(response):
            raise ValueError(
                f"the chat template renders the turns before message {index} differently once the "
                "conversation goes on, so the turns cannot be trained in one sequence; give one "
                "record per assistant turn, or use template 'alpaca'"
            )
        context = rest[len(response) :]
        if turns and context.lstrip().startswith(end_token):
            context = context.lstrip()[len(end_token) :]
        before, response = prompt, message["content"].strip()
        turns.append((context, response))
    return turns


def _render_chat(tokenizer: Any, messages: list[Message], *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    joined = [{"role": m["role"], "content": join_input(m)} for m in messages]
    try:
        return tokenizer.apply_chat_template(joined, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise ValueError(f"the chat template refuses this conversation (roles: {roles}): {error}") from error


def join_input(message: Message) -> str:
    """The content with Alpaca's separate input below it, as one chat message."""
    return "\n\n".join(text for text in (message["content"], message.get("input")) if text)


def _render_alpaca(tokenizer: Any, messages: list[Message]) -> str:
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
            parts.append(f"### Response:\n{message['content'].strip()}{tokenizer.eos_token or ''}")
        else:
            parts.append(f"### Instruction:\n{message['content']}")
            if "input" in message:
                parts.append(f"### Input:\n{message['input']}")
    return _bos_text(tokenizer) + "\n\n".join([*parts, "### Response:\n"])


def _bos_text(tokenizer: Any) -> str:
    """The bos token's text if the tokenizer starts every sequence with it, else nothing."""
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
    return tokenizer.bos_token if adds_bos else ""


def _special_ids(tokenizer: Any) -> set[int]:
    return set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
