"""`fastrl chat MODEL`: talk to a model; the answer is printed as it is sampled.

At a terminal, /reset starts a new conversation and /exit (or Ctrl-D) ends it. When standard input is
a file or a pipe, every line of it is one turn of the conversation and only the answers are printed.
`fastrl chat --compare A B` puts every question to two models, each in its own conversation, and prints their answers
beside each other; both draw the same random numbers.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers

from fastrl.data.messages import Message
from fastrl.data.templates import TEMPLATES, encode_prompt
from fastrl.models import context_length, default_device, load_policy, load_tokenizer
from fastrl.models.stopping import find_stop_token_ids
from fastrl.models.weights import check_sizes


class Speaker(NamedTuple):
    """A model with what it needs to answer, and the conversation that it had."""

    name: str
    model: Any
    tokenizer: Any
    stops: list[int]
    messages: list[Message]


def main(argv: Sequence[str]) -> None:
    """Load the model, or the two that are compared, and answer the lines of standard input."""
    options = _parser().parse_args(list(argv))
    if (options.model is None) == (options.compare is None):
        raise ValueError("chat: expected one MODEL, or two after --compare")
    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {options.temperature}")
    if not 0 < options.top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {options.top_p}")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"seed must be at least 0 and below 2**32, got {options.seed}")
    if options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {options.max_new_tokens}")
    transformers.set_seed(options.seed)
    speakers = [load_speaker(name, options) for name in options.compare or [options.model]]

    for turn, line in enumerate(_lines()):
        if line == "/exit":
            break
        if line == "/reset":
            for speaker in speakers:
                del speaker.messages[len(_start(options)) :]
            continue
        if len(speakers) == 1:
            answer(speakers[0], line, options)
            continue
        answers = []
        for speaker in speakers:
            torch.manual_seed(options.seed + turn)
            answers.append(answer(speaker, line, options, stream=False))
        print(beside([speaker.name for speaker in speakers], answers))


def load_speaker(name: str, options: argparse.Namespace) -> Speaker:
    """The model in a folder or on the hub, at the start of a conversation."""
    path = os.path.expanduser(name)
    tokenizer = load_tokenizer(path)
    model = load_policy(path, dtype=options.dtype, device=options.device)
    check_sizes(model, tokenizer, path)
    stops = find_stop_token_ids(tokenizer, model)
    if options.stop:
        stops += find_stop_token_ids(tokenizer, model, options.stop)
    return Speaker(name, model, tokenizer, stops, _start(options))


def answer(speaker: Speaker, line: str, options: argparse.Namespace, *, stream: bool = True) -> str:
    """The answer to the next turn of a conversation; "" for a turn that does not fit, which is left out."""
    speaker.messages.append({"role": "user", "content": line})
    keep = len(_start(options))
    prompt_ids = fitting_prompt(speaker.model, speaker.tokenizer, speaker.messages, options, keep=keep)
    if prompt_ids is None:
        speaker.messages.pop()
        print("(this message does not fit the model's context; shorten it)", file=sys.stderr)
        return ""
    text = reply(speaker.model, speaker.tokenizer, prompt_ids, speaker.stops, options, stream=stream)
    speaker.messages.append({"role": "assistant", "content": text})
    return text


def beside(names: Sequence[str], texts: Sequence[str], width: int | None = None) -> str:
    """Texts in columns under their names, as wide as the terminal together."""
    width = width or shutil.get_terminal_size().columns
    room = max(16, (width - 3 * (len(texts) - 1)) // len(texts))
    columns = [
        [name[-room:], "-" * room, *(part for line in text.splitlines() for part in textwrap.wrap(line, room) or [""])]
        for name, text in zip(names, texts, strict=True)
    ]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(f"{part:{room}}" for part in row).rstrip() for row in rows) + "\n"


@torch.no_grad()
def reply(
    model: Any,
    tokenizer: Any,
    prompt_ids: list[int],
    stop_token_ids: list[int],
    options: argparse.Namespace,
    *,
    stream: bool = True,
) -> str:
    """Sample one answer, print it token by token if `stream`, return its text without the stop token."""
    input_ids = torch.tensor([prompt_ids], device=model.device)  # (1, P)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    shown = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")  # PEFT, of virtual tokens
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=options.max_new_tokens,
            eos_token_id=stop_token_ids,
            pad_token_id=stop_token_ids[0],
            streamer=shown,
            **sampling,
        )[0, len(prompt_ids) :].tolist()
    if output and output[-1] in stop_token_ids:
        output.pop()
    return tokenizer.decode(output, skip_special_tokens=True).strip()


def fitting_prompt(
    model: Any, tokenizer: Any, messages: list[Message], options: argparse.Namespace, *, keep: int
) -> list[int] | None:
    """Prompt ids that leave room for the answer; the oldest turns are forgotten until they do.

    `messages` is shortened in place; its first `keep` stay. None: the last message alone is too long.
    """
    limit = context_length(model)
    while True:
        prompt_ids = encode_prompt(tokenizer, messages, options.template)
        if limit is None or len(prompt_ids) + options.max_new_tokens <= limit:
            return prompt_ids
        if len(messages) <= keep + 2:
            return None
        del messages[keep : keep + 2]


def _start(options: argparse.Namespace) -> list[Message]:
    return [{"role": "system", "content": options.system}] if options.system else []


def _lines() -> Iterator[str]:
    """User turns: typed at a prompt, or the lines of a pipe."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrl chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="folder or hub id; an adapter is merged, if it can be"
    )
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="put the same questions to two models, answers beside each other"
    )
    parser.add_argument("--template", default="auto", choices=TEMPLATES, help="auto: the chat template, else Alpaca")
    parser.add_argument("--system", default="", help="system message that opens the conversation")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of probability sampled from (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: 256)")
    parser.add_argument("--stop", action="append", default=[], metavar="TOKEN", help="further stop token; repeatable")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: float32")
    parser.add_argument("--device", default=default_device(), help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="same seed and turns, same answers (default: 0)")
    return parser
