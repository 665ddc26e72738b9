"""`fastrl chat MODEL`: talk to a model; the answer is printed as it is sampled.

At a terminal, /reset starts a new conversation and /exit (or Ctrl-D) ends it. When standard input is
a file or a pipe, every line of it is one turn of the conversation and only the answers are printed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from fastrl.data.messages import Message
from fastrl.data.templates import TEMPLATES, encode_prompt
from fastrl.models import context_length, default_device, load_policy, load_tokenizer
from fastrl.models.stopping import find_stop_token_ids
from fastrl.models.weights import check_sizes


def main(argv: Sequence[str]) -> None:
    """Load the model and answer the lines of standard input."""
    options = _parser().parse_args(list(argv))
    options.model = os.path.expanduser(options.model)
    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {options.temperature}")
    if not 0 < options.top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {options.top_p}")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"seed must be at least 0 and below 2**32, got {options.seed}")
    if options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {options.max_new_tokens}")
    transformers.set_seed(options.seed)
    tokenizer = load_tokenizer(options.model)
    model = load_policy(options.model, dtype=options.dtype, device=options.device)
    check_sizes(model, tokenizer, options.model)
    stops = find_stop_token_ids(tokenizer, model)
    if options.stop:
        stops += find_stop_token_ids(tokenizer, model, options.stop)

    start: list[Message] = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(start)
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        prompt_ids = fitting_prompt(model, tokenizer, messages, options, keep=len(start))
        if prompt_ids is None:
            messages.pop()
            print("(this message does not fit the model's context; shorten it)", file=sys.stderr)
            continue
        answer = reply(model, tokenizer, prompt_ids, stops, options)
        messages.append({"role": "assistant", "content": answer})


@torch.no_grad()
def reply(
    model: Any, tokenizer: Any, prompt_ids: list[int], stop_token_ids: list[int], options: argparse.Namespace
) -> str:
    """Sample one answer, print it token by token, return its text without the stop token."""
    input_ids = torch.tensor([prompt_ids], device=model.device)  # (1, P)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")  # PEFT, of virtual tokens
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=options.max_new_tokens,
            eos_token_id=stop_token_ids,
            pad_token_id=stop_token_ids[0],
            streamer=transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
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
        "model", metavar="MODEL", help="folder or hub id; an adapter folder is merged into its base, if it can be"
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
