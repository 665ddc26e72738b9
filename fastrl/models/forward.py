"""Forward passes as the loops need them: hidden states without padding, scores, log-probabilities."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastrl.models.heads import base_model, decoder, lm_head


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, T) position of each kept token among its row's kept tokens; 0 on padding, either side."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


@cache
def arguments(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the arguments that a function takes."""
    return frozenset(inspect.signature(function).parameters)


def final_hidden(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T, H) hidden states below the head, from the backbone alone; logits are never formed.

    Padding costs nothing, wherever it is: kept tokens are moved to the left, where a causal model needs no mask, and
    their hidden states are moved back. What a position that is not kept returns is unspecified.
    """
    backbone: Any = decoder(model)
    lengths = attention_mask.sum(-1)
    width = max(int(lengths.max()), 1)
    columns = torch.arange(width, device=input_ids.device)
    kept_first = attention_mask.logical_not().long().argsort(dim=-1, stable=True)[:, :width]
    compact = torch.where(columns < lengths[:, None], input_ids.gather(1, kept_first), 0)  # (B, W)
    inputs = {"input_ids": compact}
    if "position_ids" in arguments(type(backbone).forward):
        inputs["position_ids"] = columns.expand_as(compact)
    hidden = backbone(**inputs, use_cache=False).last_hidden_state
    places = position_ids(attention_mask)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, places)


def token_scores(scalar_model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T) fp32 output of the scalar head on every position, less the stored score bias."""
    return _scores(scalar_model, final_hidden(scalar_model, input_ids, attention_mask))


def last_token_scores(scalar_model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B,) fp32 score on each row's last kept token, on any padding side, with or without eos.

    As transformers' classifiers do, a token that is the config's pad token is passed over, so that a foreign reward
    model which was trained with pad == eos gives its own scores; ours have a pad token that ends no response.
    """
    hidden = final_hidden(scalar_model, input_ids, attention_mask)  # (B, T, H)
    config = base_model(scalar_model).config.get_text_config()
    kept, pad = attention_mask.bool(), getattr(config, "pad_token_id", None)
    if pad is not None:
        kept = kept & (input_ids != pad)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (columns * kept).argmax(-1)  # (B,)
    return _scores(scalar_model, hidden[torch.arange(len(last), device=last.device), last])


def response_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of the response, which is the last R columns of `input_ids` (B, P + R).

    `logprobs[b, t]` is of response token t, from the hidden state of the token before it; only
    positions kept by `response_mask` (B, R) reach the head.

    Returns:
        (B, R) fp32 nats, 0 where masked; with `return_entropy` also the entropies (B, R).
    """
    from fastrl.ops import linear_logprobs

    length = response_mask.shape[1]
    if length >= input_ids.shape[1]:
        raise ValueError(
            "response_logprobs: response_mask: expected fewer columns than input_ids (at"
            " least one prompt token),"
            f" got {tuple(response_mask.shape)} and {tuple(input_ids.shape)}"
        )
    start = input_ids.shape[1] - length
    hidden = final_hidden(model, input_ids, attention_mask)[:, start - 1 : -1]  # (B, R, H)
    head = lm_head(model)
    return linear_logprobs(
        hidden,
        head.weight,
        input_ids[:, start:],
        mask=response_mask,
        temperature=temperature,
        return_entropy=return_entropy,
        **head.options(),
    )


def _scores(scalar_model: nn.Module, hidden: Tensor) -> Tensor:
    base = base_model(scalar_model)
    head = cast(nn.Module, base.score)
    dtype = next(head.parameters()).dtype
    scores = head(hidden.to(dtype)).squeeze(-1).float()
    return scores - getattr(base.config, "fastrl_score_bias", 0.0)
