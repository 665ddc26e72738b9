"""The rewards that PPO adds to its reward model's: other reward models, and functions in Python.

How they are written is in `fastrl/rlhf/rewards.py`. Models score on every rank its share of the responses. Functions
run on rank 0 alone, on all responses at once, and the others are told what came out: a function that draws, or asks a
service, cannot make the ranks differ. They wait for a call as long as torch lets them: ten minutes with NCCL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.data import Prompt, pad
from fastrl.data.bad_records import BadRecord
from fastrl.data.messages import Message
from fastrl.data.rendering import render_asked, render_conversation
from fastrl.data.templates import ANSWER, QUESTION, Template, encode, read_template, recorded_template
from fastrl.models import Scorer, context_length, load_scalar_model, load_tokenizer, score_head
from fastrl.models.probe import check_scalar
from fastrl.models.tuners import Full
from fastrl.rlhf.rewards import Term, function_scores, load_function, parse_rewards, short_names, taken_columns
from fastrl.rollout import Trajectory, decode_responses, make_trajectory
from fastrl.run.distributed import on_main
from fastrl.train.experience import response_scores


class Sampled(NamedTuple):
    """Responses as rewards see them."""

    prompts: Sequence[Prompt]
    responses: list[str]  # the texts
    trajectory: Trajectory
    micro_batch_size: int


class Reward(NamedTuple):
    """A function or a model, which may give several of the numbers that are added up."""

    names: list[str]  # as which their means are reported
    weights: list[float]
    scores: Callable[[Sampled], Tensor]  # (B, len(names))


class Rewards(NamedTuple):
    """All that are added, and the policy's tokenizer, which makes texts of its responses."""

    tokenizer: Any
    rewards: list[Reward]


def load_rewards(
    rewards: str | Sequence[str],
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    taken: Sequence[str],
    max_new_tokens: int,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
) -> Rewards | None:
    """What the option `rewards` names, None if nothing; a model with several criteria in it is loaded and run once.

    Args:
        tokenizer: the policy's, with its template recorded.
        prompts: all that responses will be sampled to; a model must have room for the longest one.
        taken: names under which other means are reported.
    Raises:
        ValueError: there is no such function, model or criterion; a function does not take the prompts' columns; a
            model's context is too short, or the texts cannot be given to it as it was trained to read them.
    """
    terms = parse_rewards(rewards)
    names = dict(zip(terms, short_names(terms, taken), strict=True))
    loaded = []
    for source in dict.fromkeys(term.source for term in terms):
        own = [term for term in terms if term.source == source]
        if own[0].is_function:
            scores = _function(source, prompts)
        else:
            scores = _model(source, own, tokenizer, prompts, max_new_tokens, dtype, device)
        loaded.append(Reward([names[term] for term in own], [term.weight for term in own], scores))
    return Rewards(tokenizer, loaded) if loaded else None


def add_rewards(
    scores: Tensor, rewards: Rewards, prompts: Sequence[Prompt], trajectory: Trajectory, micro_batch_size: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scores (B,) with every reward's share; also what each reward gave, before its weight, by its name."""
    sampled = Sampled(prompts, decode_responses(rewards.tokenizer, trajectory), trajectory, micro_batch_size)
    parts: dict[str, Tensor] = {}
    for reward in rewards.rewards:
        columns = reward.scores(sampled)
        for name, weight, column in zip(reward.names, reward.weights, columns.unbind(-1), strict=True):
            scores = scores + weight * column
            parts[name] = column
    return scores, parts


def _function(source: str, prompts: Sequence[Prompt]) -> Callable[[Sampled], Tensor]:
    function = load_function(source)
    names = taken_columns(source, function, sorted({name for prompt in prompts for name in prompt.columns}))

    def scores(sampled: Sampled) -> Tensor:
        texts = [prompt.text for prompt in sampled.prompts]
        columns = {name: [prompt.columns.get(name) for prompt in sampled.prompts] for name in names}
        values = on_main(lambda: function_scores(source, function, texts, sampled.responses, columns))
        return torch.tensor(values, device=sampled.trajectory.input_ids.device)[:, None]

    return scores


def _model(
    path: str,
    terms: Sequence[Term],
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    dtype: str,
    device: str | torch.device,
) -> Callable[[Sampled], Tensor]:
    own = load_tokenizer(path)
    model: Any = load_scalar_model(path, dtype=dtype, device=device).requires_grad_(False)
    check_scalar(model, own, path)
    scorer, head = Scorer(Full(model)).eval(), score_head(model)
    columns = [_column(term, head.names) for term in terms]
    template = None if _same_ids(tokenizer, own) else _template(tokenizer, own, path)
    asked = [p.input_ids for p in prompts] if template is None else _asked_anew(template, prompts, path)
    _check_room(model, max(map(len, asked)), max_new_tokens, path)

    def scores(sampled: Sampled) -> Tensor:
        trajectory = sampled.trajectory
        if template is not None:
            rows = list(_read_anew(template, sampled))
            _check_room(model, max(map(len, rows)), 0, path)
            trajectory = _whole(rows, trajectory, own.pad_token_id)
        with torch.no_grad():
            return response_scores(scorer, trajectory, sampled.micro_batch_size)[:, columns]

    return scores


def _column(term: Term, names: Sequence[str]) -> int:
    if not term.criterion and len(names) == 1:
        return 0
    if term.criterion not in names:
        raise ValueError(
            f"rewards: {term.text}: expected {term.source}#CRITERION with one of its criteria, {', '.join(names)}, got"
            f" {term.criterion or 'none'}"
        )
    return names.index(term.criterion)


def _same_ids(tokenizer: Any, own: Any) -> bool:
    """Whether a model of the tokenizer `own` reads the ids that the policy does."""
    return own.get_vocab() == tokenizer.get_vocab() and recorded_template(own) in (None, recorded_template(tokenizer))


def _template(tokenizer: Any, own: Any, path: str) -> Template:
    """How a model of another tokenizer or template is given texts: as it was trained to read them.

    Raises:
        ValueError: nobody says how, or the template writes answers otherwise than after its prompt.
    """
    name, asked = recorded_template(own) or ("chat" if own.chat_template else ""), recorded_template(tokenizer)
    refused = f"rewards: {path}: its tokenizer or template is another than the policy's, so it is given texts anew, and"
    if not name:
        raise ValueError(f"{refused} nothing says how it was trained to read them: it has no chat template")
    if (name == "none") != (asked == "none"):
        raise ValueError(f"{refused} one of the templates, '{name}' and the policy's '{asked}', is raw text: no turns")
    try:
        template = read_template(own, name)
    except ValueError as error:
        raise ValueError(f"{refused} {error}") from error
    ask: list[Message] = [{"role": "user", "content": QUESTION}]
    whole = render_conversation(template, [*ask, {"role": "assistant", "content": ANSWER}])
    appended = render_asked(template, ask) + ANSWER + template.end_text
    if (whole.text, whole.append_end) != (appended, not template.end_text):
        raise ValueError(f"{refused} its template does not write an answer where its own prompt ends: {whole.text!r}")
    return template


def _asked_anew(template: Template, prompts: Sequence[Prompt], path: str) -> list[list[int]]:
    """The ids of each prompt. Raises ValueError if the template refuses one."""
    texts = []
    for prompt in prompts:
        try:
            texts.append(render_asked(template, list(prompt.messages), prompt.tools))
        except BadRecord as error:
            raise ValueError(f"rewards: {path}: its template cannot write {prompt.text[:200]!r}: {error}") from error
    return encode(template.tokenizer, texts)


def _read_anew(template: Template, sampled: Sampled) -> Iterator[list[int]]:
    """The ids of each prompt with its response, which ends with the end token if the policy ended it."""
    stopped = sampled.trajectory.stopped.tolist()
    for prompt, response, ended in zip(sampled.prompts, sampled.responses, stopped, strict=True):
        text = render_asked(template, list(prompt.messages), prompt.tools) + response
        ids = encode(template.tokenizer, [text + template.end_text * ended])[0]
        yield [*ids, template.end_id] if ended and not template.end_text else ids


def _whole(rows: list[list[int]], like: Trajectory, pad_id: int) -> Trajectory:
    """Rows of ids as a trajectory, to be scored on their last token."""
    before = pad([row[:-1] for row in rows], pad_id, side="left")
    last = pad([row[-1:] for row in rows], pad_id, side="right")
    device = like.input_ids.device
    return Trajectory(*(x.to(device) for x in make_trajectory(*before, *last, like.stopped.cpu())))


def _check_room(model: Any, prompt: int, response: int, path: str) -> None:
    context = context_length(model)
    if context is not None and prompt + response > context:
        what = f"{prompt} of a prompt and max_new_tokens {response}" if response else "a prompt and its response"
        raise ValueError(
            f"rewards: {path}: expected a context of at least {prompt + response} tokens, {what}, got {context}; lower"
            " max_prompt_length or max_new_tokens, or take a reward model with a longer context"
        )
