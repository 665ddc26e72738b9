"""Is a loaded model what the loops take it for? Measured on a handful of tokens, before anything is trained.

The fused ops reach into a model: they take the hidden states below the head and the head's weights, scale and cap, they
leave padding out and decode with a cache. Whether that gives the model's own numbers is not read off the name of its
family but tried, and what does not fit is refused with the measured difference:

    causality    another last token changes no earlier logit
    log-probs    `response_logprobs`, with and without left padding, against log_softmax of the model's own logits
    packing      states of sequences that share a row against those of each alone, where packing is asked for
    cache        decoded steps, rows left-padded and exchanged, against the same logits; without a usable cache a model
                 is sampled without one
    scores       `Scorer` against the logits of transformers' own classifier
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastrl.models import final_hidden, response_logprobs
from fastrl.models.decoding import NO_CACHE, evaluating, next_logits
from fastrl.models.forward import as_scorer
from fastrl.models.heads import base_model, lm_head, score_head
from fastrl.models.hidden import VIRTUAL_TOKENS
from fastrl.models.packed_attention import attend_by_sequence
from fastrl.models.tuners import TunerSettings, coming_tokens
from fastrl.models.weights import check_sizes

LENGTH, SHORT, STEPS = 12, 6, 3  # tokens of the probe's two rows; decoded steps
TOLERANCE = 1e-3  # in float32, of the spread (standard deviation) of what is compared
COARSE_TOLERANCE = 0.1  # in lower precision, of root mean squares: the maximum over a vocabulary grows with its size
CAUSAL_TOLERANCE = 0.01  # in lower precision, where both rows are the same arithmetic
NOT_CAUSAL = "it sees the tokens that it should predict; choose a causal (decoder-only) model"
NOT_OURS = (
    "the model does something that fastrl does not compute, so its log-probs would be wrong; choose another model"
)
NO_STEPS = "decoding with its cache gives other logits than reading the whole sequence"
NOT_PACKED = "something of a sequence reaches the next one in its row; use --packing none"

Result = TypeVar("Result")


@torch.no_grad()
def check_policy(model: Any, tokenizer: Any, path: str | Path) -> None:
    """Raise ValueError unless model and tokenizer fit and the fused log-probs are those of the model's own logits.

    A model whose cache cannot be used is marked as one to sample without, and a line is printed that says so. Virtual
    tokens are left out: `check_tuner` tries them.
    """
    check_sizes(model, tokenizer, path)
    model = base_model(model)
    check = Comparison(model, path)
    ids = probe_tokens(model, tokenizer)
    with evaluating(model):
        every = torch.ones_like(ids)
        own = check.attempt("forward pass", lambda: model(input_ids=ids, attention_mask=every).logits.float())
        if own.shape[:2] != ids.shape:
            raise ValueError(f"{path}: logits: expected {(*ids.shape, 'V')}, got {tuple(own.shape)}; {NOT_OURS}")
        spread = own.std(-1).mean()
        before, changed = own[:, :-1]
        check.same("causality: logits before a changed token", before, changed, spread, NOT_CAUSAL, CAUSAL_TOLERANCE)
        rows = len(lm_head(model).weight)
        if own.shape[-1] != rows:
            raise ValueError(f"{path}: output head: expected {own.shape[-1]} rows, one a logit, got {rows}; {NOT_OURS}")

        expected = own[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])  # (T-1, 1)
        padded, mask = with_padding(ids[0])
        fused: Any = check.attempt("log-probs", lambda: response_logprobs(model, padded, mask, mask[:, 1:]))
        check.same("log-probs", fused[0, :, None], expected, spread, NOT_OURS)
        short = fused[1, 1 - SHORT :, None]
        check.same("log-probs after left padding", short, expected[: SHORT - 1], spread, NOT_OURS)
        try:
            check_steps(model, ids[0], own[0], spread, check)
        except ValueError as error:
            print(f"sampling without a cache, which is slower: {error}")
            setattr(base_model(model), NO_CACHE, True)


@torch.no_grad()
def check_packing(model: Any, tokenizer: Any, path: str | Path, settings: TunerSettings | None = None) -> None:
    """Raise ValueError unless sequences that share a row have the hidden states that each has alone; nor do they if the
    model has virtual tokens, or will have them from the tuner of `settings`. The model gets `attend_by_sequence`.
    """
    if settings and coming_tokens(model, settings):
        raise ValueError(f"{path}: {VIRTUAL_TOKENS}")
    check = Comparison(model, path)
    ids = probe_tokens(model, tokenizer)[0]
    alone, kept = with_padding(ids)
    neighbours = torch.stack([ids, ids.flip(0)])  # rows of `packed` differ in the first of their two sequences
    packed = torch.cat([neighbours, alone[1:, -SHORT:].expand(2, -1)], dim=1)
    positions = torch.cat([torch.arange(LENGTH), torch.arange(SHORT)]).to(ids.device).expand_as(packed)
    with evaluating(model):
        first, second = final_hidden(model, alone, kept)
        attend_by_sequence(model)
        every = torch.ones_like(packed).bool()
        found = check.attempt("packing", lambda: final_hidden(model, packed, every, positions))
        spread = first.float().std(-1).mean()
        beside, other = found[0, LENGTH:], found[1, LENGTH:]
        check.same("packing: states beside another neighbour", other, beside, spread, NOT_PACKED, CAUSAL_TOLERANCE)
        check.same("packing: states beside a neighbour", beside, second[-SHORT:], spread, NOT_PACKED)
        check.same("packing: states of the first in a row", found[0, :LENGTH], first, spread, NOT_PACKED)


@torch.no_grad()
def check_scalar(model: Any, tokenizer: Any, path: str | Path) -> None:
    """Raise ValueError unless model and tokenizer fit and the scores are those of transformers' own classifier."""
    check_sizes(model, tokenizer, path)
    model = base_model(model)
    check = Comparison(model, path)
    ids = probe_tokens(model, tokenizer)
    every = torch.ones_like(ids).bool()
    base: Any = base_model(model)
    with evaluating(model):
        hidden = check.attempt("forward pass", lambda: final_hidden(model, ids, every))
        spread = hidden.float().std(-1).mean()
        before, changed = hidden[:, :-1]
        check.same("causality: states before a changed token", before, changed, spread, NOT_CAUSAL, CAUSAL_TOLERANCE)
        short = final_hidden(model, *with_padding(ids[0]))[1, -SHORT:]
        check.same("states after left padding", short, hidden[0, :SHORT], spread, NOT_OURS)

        scores = as_scorer(model)(ids, every, last_only=False)  # (2, T, C)
        scores = scores + torch.tensor(score_head(model).bias, device=scores.device)
        cast = base.score.register_forward_pre_hook(lambda head, inputs: (inputs[0].to(head.weight.dtype),))
        try:
            own = check.attempt("forward pass", lambda: torch.cat([base(input_ids=row[None]).logits for row in ids]))
        finally:
            cast.remove()
        check.same("scores", scores[:, -1], own, scores.abs().mean(), NOT_OURS)


def check_steps(model: Any, ids: Tensor, own: Tensor, spread: Tensor, check: Comparison) -> None:
    """Raise ValueError unless decoding as rollouts do it, its rows exchanged once, gives the logits `own` (T, V)."""
    padded, mask = with_padding(ids[:-STEPS], SHORT - STEPS)
    logits, cache = check.attempt("decoding", lambda: next_logits(model, padded, mask, None))
    last = [len(ids) - STEPS - 1, SHORT - STEPS - 1]  # positions of the tokens that were read last
    check.same("logits after left padding", logits, own[last], spread, NO_STEPS)
    order = torch.tensor([1, 0], device=ids.device)
    check.attempt("reordering the cache", lambda: cache.reorder_cache(order))
    padded, mask, last = padded[order], mask[order], last[::-1]
    steps = []
    for _ in range(STEPS):
        last = [position + 1 for position in last]
        padded = torch.cat([padded, ids[last][:, None]], dim=1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        logits, cache = check.attempt("decoding", lambda: next_logits(model, padded, mask, cache))  # noqa: B023
        steps.append((logits, own[last]))
    got, expected = (torch.cat(logits) for logits in zip(*steps, strict=True))
    check.same("logits of decoded tokens", got, expected, spread, NO_STEPS)


class Comparison:
    """Differences on one model, each relative to a spread; raises ValueError where one is more than rounding."""

    def __init__(self, model: Any, path: str | Path):
        self.name = f"{path}: {type(base_model(model)).__name__}"
        self.exact = model.dtype == torch.float32

    def same(
        self,
        what: str,
        got: Tensor,
        expected: Tensor,
        spread: Tensor,
        advice: str,
        coarse: float = COARSE_TOLERANCE,
    ) -> None:
        """Compare (positions, values). In low precision the median position counts: rounding may send single tokens
        to other experts."""
        gap = got.float() - expected.float()
        difference = float(gap.abs().max() if self.exact else gap.square().mean(-1).sqrt().median())
        allowed = (TOLERANCE if self.exact else coarse) * float(spread)
        if not difference <= allowed:
            raise ValueError(
                f"{self.name}: {what}: expected a difference below {allowed:.2g}, got {difference:.2g}: {advice}"
            )

    def attempt(self, what: str, function: Callable[[], Result]) -> Result:
        """The function's result; what a foreign model raises becomes a ValueError of one line."""
        try:
            return function()
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ValueError(f"{self.name}: {what} failed: {type(error).__name__}: {reason}") from error


def probe_tokens(model: Any, tokenizer: Any) -> Tensor:
    """(2, T) ordinary token ids, spread over the vocabulary; the rows differ in the last one."""
    pad = getattr(base_model(model).config.get_text_config(), "pad_token_id", None)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, tokenizer.pad_token_id, pad}
    usable = sorted(set(tokenizer.get_vocab().values()) - special) or [0]
    chosen = [usable[i * (len(usable) - 1) // LENGTH] for i in range(LENGTH + 1)]
    return torch.tensor([chosen[:-1], [*chosen[:-2], chosen[-1]]], device=model.device)


def with_padding(ids: Tensor, short: int = SHORT) -> tuple[Tensor, Tensor]:
    """A batch (2, T) of `ids` (T,) and of its first `short` tokens, left-padded, and its mask."""
    padding = len(ids) - short
    rows = torch.stack([ids, torch.cat([ids.new_zeros(padding), ids[:short]])])
    mask = torch.ones_like(rows).bool()
    mask[1, :padding] = False
    return rows, mask
