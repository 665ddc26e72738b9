"""Policy and Scorer: the only way to log-probabilities, losses, values and scores is the `forward` of a module.

What wraps a module (DDP, FSDP2, a hook) hooks its `forward`, and a tuner may do its work in one: a pass that reached
past it for a submodule would train nothing, or not synchronise, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import peft
import torch
import transformers
from torch import Tensor, nn

from fastrl.models.heads import base_model, lm_head, only_criterion, score_head
from fastrl.models.tuners import Full, Tuner
from fastrl.ops import linear_cross_entropy, linear_logprobs


class Tuned(nn.Module):
    """A model with its tuner."""

    def __init__(self, tuner: Tuner) -> None:
        super().__init__()
        self.tuner = tuner
        self.model = tuner.model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return cast(torch.device, self.model.device)


class Policy(Tuned):
    """A causal language model with its tuner."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        mask: Tensor,
        *,
        temperature: float = 1.0,
        return_entropy: bool = False,
        return_top1: bool = False,
        denominator: float | Tensor | None = None,
        packed_positions: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Log-probabilities of the last R tokens of each row, or their summed loss; logits are never formed whole.

        `logprobs[b, t]` is of the token in column T - R + t, from the hidden state of the token before it. Only the
        tokens that `mask` keeps reach the head.

        Args:
            input_ids: (B, T) tokens, padded on either side.
            attention_mask: (B, T) True = a token.
            mask: (B, R) bool, R < T; True = the token counts.
            temperature: > 0, divides the logits.
            return_entropy: also return the entropies.
            return_top1: also return which tokens are the likeliest (bool).
            denominator: positive; the result is then the loss, -sum of the log-probs / denominator. For micro-batches
                pass the count of the whole batch.
            packed_positions: (B, T) for rows that hold several sequences: each token's position in its own sequence. No
                sequence sees another, and its first token, which nothing of its own predicts, does not count.
        Returns:
            (B, R) float32 nats, 0 where masked; with `return_entropy` or `return_top1` the tuple (log-probs,
            [entropies], [top1]) of what is asked for; with `denominator` the 0-d float32 loss.
        Raises:
            ValueError: `mask` has as many columns as `input_ids`, or entropies or top1 of a loss are asked for.
        """
        length = mask.shape[1]
        if length >= input_ids.shape[1]:
            raise ValueError(
                "Policy: mask: expected fewer columns than input_ids (at least one prompt token),"
                f" got {tuple(mask.shape)} and {tuple(input_ids.shape)}"
            )
        if denominator is not None and (return_entropy or return_top1):
            name = "return_entropy" if return_entropy else "return_top1"
            raise ValueError(f"Policy: {name}: expected False with a denominator, got True; take the log-probs")
        start = input_ids.shape[1] - length
        hidden = self.tuner.hidden(input_ids, attention_mask, packed_positions)[:, start - 1 : -1]  # (B, R, H)
        if packed_positions is not None:
            mask = mask & (packed_positions[:, start:] > 0)
        head = lm_head(self.model)
        arguments = hidden, head.weight, input_ids[:, start:]
        options = {"mask": mask, "temperature": temperature, **head.options()}
        if denominator is not None:
            return linear_cross_entropy(*arguments, denominator=denominator, **options)
        return linear_logprobs(*arguments, return_entropy=return_entropy, return_top1=return_top1, **options)


class Scorer(Tuned):
    """A reward model or critic with its tuner: a backbone and a `ScoreHead` of C criteria, with the weights by which
    they are one score where one is needed (`one_score`).
    """

    def __init__(self, tuner: Tuner, weights: Mapping[str, float] | None = None) -> None:
        super().__init__(tuner)
        self.weights = dict(weights or {})

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *, last_only: bool) -> Tensor:
        """(B, C) fp32 scores at each row's last token, or (B, T, C) at every token (what is not kept is unspecified).

        The stored bias of each criterion is subtracted. As transformers' classifiers do, a token that is the config's
        pad token is not taken for the last one, so that a foreign reward model which was trained with pad == eos gives
        its own scores; ours have a pad token that ends no response. `heads.only_criterion` takes the one column of
        C = 1, `ScoreHead.combine` makes one score of several.
        """
        hidden = self.tuner.hidden(input_ids, attention_mask)  # (B, T, H)
        if last_only:
            config = base_model(self.model).config.get_text_config()
            last = last_tokens(input_ids, attention_mask, getattr(config, "pad_token_id", None))
            hidden = hidden[torch.arange(len(last), device=last.device), last]
        return score_head(self.model).scores(hidden)


def last_tokens(input_ids: Tensor, attention_mask: Tensor, pad: int | None) -> Tensor:
    """(B,) column of each row's last token that is kept and not `pad`."""
    kept = attention_mask.bool()
    if pad is not None:
        kept = kept & (input_ids != pad)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (columns * kept).argmax(-1)


def as_policy(model: nn.Module) -> nn.Module:
    """A `Policy` around a model of transformers or PEFT; a module that is one, or wraps one, as it is."""
    return Policy(Full(model)) if isinstance(model, (transformers.PreTrainedModel, peft.PeftModel)) else model


def as_scorer(model: nn.Module) -> nn.Module:
    """A `Scorer` around a model of transformers or PEFT; a module that is one, or wraps one, as it is."""
    return Scorer(Full(model)) if isinstance(model, (transformers.PreTrainedModel, peft.PeftModel)) else model


def response_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Any:
    """`Policy.forward` of any causal language model: (B, R) log-probs of the response, the last R columns of (B, P + R)
    `input_ids`, 0 where `response_mask` drops; with `return_entropy` also the entropies.
    """
    return as_policy(model)(
        input_ids, attention_mask, response_mask, temperature=temperature, return_entropy=return_entropy
    )


def one_score(scorer: nn.Module, scores: Tensor) -> Tensor:
    """(...) the weighted sum of a scorer's scores (..., C), or without weights those of its one criterion.

    Raises:
        ValueError: there are several criteria and no weights.
    """
    weights = getattr(scorer, "weights", None)
    return score_head(cast(Any, scorer).model).combine(scores, weights) if weights else only_criterion(scores)


def token_scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T) fp32 `one_score` of any reward model or critic at every token; see `Scorer.forward`."""
    scorer = as_scorer(model)
    return one_score(scorer, scorer(input_ids, attention_mask, last_only=False))


def last_token_scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B,) fp32 `one_score` of any reward model or critic at each row's last kept token, on any padding side, with or
    without eos; see `Scorer.forward`.
    """
    scorer = as_scorer(model)
    return one_score(scorer, scorer(input_ids, attention_mask, last_only=True))
