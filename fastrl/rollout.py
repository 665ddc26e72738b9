"""Sampling of responses: left-padded prompts, key-value cache, stop tokens, early exit.

Every token is drawn from exactly `softmax(logits / temperature)`, the distribution whose log-probabilities
`fastrl.models.response_logprobs` computes. Nothing else (top-k, top-p, a minimum length, a repetition penalty) takes
part, because a policy-gradient step on tokens from any other distribution is biased, and its KL to the reference can
turn negative.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.data import pad
from fastrl.models import context_length
from fastrl.models.decoding import evaluating, next_logits
from fastrl.models.stopping import find_stop_token_ids

RESHAPING = {
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "suppress_tokens": (None, []),
    "bad_words_ids": (None, []),
}


class Trajectory(NamedTuple):
    """A batch of prompts and sampled responses; R is the longest response, at most `max_new_tokens`."""

    input_ids: Tensor  # (B, P + R) left-padded prompts, then responses, right-padded
    attention_mask: Tensor  # (B, P + R) bool, True = a token of the prompt or of the response
    responses: Tensor  # (B, R) the last R columns of input_ids
    response_mask: Tensor  # (B, R) bool, True up to and including the stop token
    stopped: Tensor  # (B,) bool, True = ended by a stop token, not by max_new_tokens


def make_trajectory(
    prompt_ids: Tensor, prompt_mask: Tensor, responses: Tensor, response_mask: Tensor, stopped: Tensor
) -> Trajectory:
    """Left-padded prompts (B, P) and their right-padded responses (B, R) as a trajectory."""
    return Trajectory(
        input_ids=torch.cat([prompt_ids, responses], dim=1),
        attention_mask=torch.cat([prompt_mask, response_mask], dim=1),
        responses=responses,
        response_mask=response_mask,
        stopped=stopped,
    )


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    greedy: bool = False,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """One token per row from `softmax(logits / temperature)`: (B, V) -> (B, 1) int64.

    Same distribution as `torch.multinomial(softmax(logits / temperature), 1)`, by inversion of the cumulative sum
    in fp64: one uniform number a row in place of V exponentials (12% of a rollout of a 3 M parameter model on 2 cores).
    These numbers are `uniform` (B, 1) float64 in [0, 1), or are drawn from the generator.
    """
    if greedy:
        return logits.argmax(-1, keepdim=True)
    probs = (logits.float() / temperature).softmax(-1)
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    if uniform is None:
        uniform = torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device, generator=generator)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return drawn.clamp_(max=probs.shape[-1] - 1)


def fit_prompts(prompts: Sequence[Sequence[int]], context: int | None, max_new_tokens: int) -> list[list[int]]:
    """Prompts cut to their last `context - max_new_tokens` tokens, with one warning that counts the cut ones.

    The end of a prompt holds the question and the marker that the response follows, hence the end is kept.
    """
    if not prompts:
        raise ValueError("rollout: prompts: expected at least one, got none")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"rollout: prompts[{row}]: expected at least one token, got none; add the bos token")
    if context is None:
        return [list(prompt) for prompt in prompts]
    room = context - max_new_tokens
    if room < 1:
        raise ValueError(
            f"rollout: max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's context of "
            f"{context} tokens; lower max_new_tokens below {context}"
        )
    too_long = sum(len(prompt) > room for prompt in prompts)
    if too_long:
        warnings.warn(
            f"rollout: {too_long} of {len(prompts)} prompts are longer than {room} tokens (context {context} minus "
            f"max_new_tokens {max_new_tokens}); their last {room} tokens are kept",
            stacklevel=3,
        )
    return [list(prompt[-room:]) for prompt in prompts]


def warn_of_reshaping(model: Any) -> None:
    """Warn when the model's generation config asks for another distribution than `softmax(logits / temperature)`."""
    generation_config = getattr(model, "generation_config", None)
    ignored = [
        f"{name}={getattr(generation_config, name)}"
        for name, neutral in RESHAPING.items()
        if getattr(generation_config, name, None) not in neutral
    ]
    if ignored:
        warnings.warn(
            f"rollout: the model's generation config sets {', '.join(ignored)}; not applied, because log-probabilities "
            "and KL would then be those of another distribution than the sampled one",
            stacklevel=3,
        )


@torch.no_grad()
def rollout(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop_token_ids: Sequence[int] | None = None,
    greedy: bool = False,
    generator: torch.Generator | None = None,
    rows: Sequence[int] | None = None,
) -> Trajectory:
    """One sampled response to each prompt.

    `responses[b, t] ~ softmax(logits[b] / temperature)` given the prompt and `responses[b, :t]`, until a stop token
    or `max_new_tokens`. A row that ended leaves the batch, and sampling ends with the last row. The model runs in
    eval mode (no dropout, cache kept under gradient checkpointing) and gets its training flags back.

    Row b's token t takes number b of the generator's t-th B uniform numbers, whatever the other rows do: processes
    that sample parts of a batch (`rows`) from equal generators sample what one process would.

    Args:
        model: causal language model of transformers, plain or wrapped by PEFT.
        tokenizer: its tokenizer, with a pad token.
        prompts: B token lists; one longer than the context less `max_new_tokens` keeps its end, with a warning.
        temperature: > 0, divides the logits.
        stop_token_ids: ids that end a response; None takes `find_stop_token_ids(tokenizer, model)`.
        greedy: take the most probable token in place of a sample (for evaluation and chat).
        generator: source of randomness on the model's device; None is torch's own. Same seed, same tokens.
        rows: numbers of the prompts to answer here; None: all. The trajectory has these rows alone.
    Raises:
        ValueError: a value that does not fit, with what was expected.
    """
    if not temperature > 0:
        raise ValueError(f"rollout: temperature: expected > 0, got {temperature}; for the argmax use greedy=True")
    if max_new_tokens < 1:
        raise ValueError(f"rollout: max_new_tokens: expected >= 1, got {max_new_tokens}")
    warn_of_reshaping(model)
    prompts = fit_prompts(prompts, context_length(model), max_new_tokens)
    prompt_ids, prompt_mask = (x.to(model.device) for x in pad(prompts, tokenizer.pad_token_id, side="left"))
    if stop_token_ids is None:
        stop_token_ids = find_stop_token_ids(tokenizer, model)
    stop = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=model.device)

    answered = torch.arange(len(prompts)) if rows is None else torch.tensor(rows, dtype=torch.int64)
    answered = answered.to(model.device)
    prompt_ids, prompt_mask = prompt_ids[answered], prompt_mask[answered]
    responses = prompt_ids.new_full((len(answered), max_new_tokens), tokenizer.pad_token_id)
    lengths = prompt_ids.new_full((len(answered),), max_new_tokens)
    stopped = torch.zeros_like(lengths, dtype=torch.bool)
    running = torch.arange(len(answered), device=model.device)  # rows that have not ended
    with evaluating(model):
        ids, mask, cache = prompt_ids, prompt_mask, None
        for t in range(max_new_tokens if len(answered) else 0):
            logits, cache = next_logits(model, ids, mask, cache)
            uniform = None
            if not greedy:
                uniform = torch.rand(len(prompts), 1, dtype=torch.float64, device=model.device, generator=generator)
                uniform = uniform[answered[running]]
            tokens = sample_tokens(logits, temperature=temperature, greedy=greedy, uniform=uniform)
            responses[running, t] = tokens[:, 0]
            ids, mask = torch.cat([ids, tokens], dim=1), torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            ended = torch.isin(tokens[:, 0], stop)
            if ended.any():
                lengths[running[ended]] = t + 1
                stopped[running[ended]] = True
                if ended.all():
                    break
                kept = (~ended).nonzero()[:, 0]
                running, ids, mask = (x[kept] for x in (running, ids, mask))
                if cache is not None:
                    cache.reorder_cache(kept)  # batch_select_indices leaves recurrent states as they are

    responses = responses[:, : int(lengths.max()) if len(answered) else 0]
    response_mask = torch.arange(responses.shape[1], device=model.device) < lengths[:, None]
    return make_trajectory(prompt_ids, prompt_mask, responses, response_mask, stopped)


def decode_responses(tokenizer: Any, trajectory: Trajectory) -> list[str]:
    """The kept tokens of each response as text, without special tokens."""
    kept = [row[mask].tolist() for row, mask in zip(trajectory.responses, trajectory.response_mask, strict=True)]
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in kept]
