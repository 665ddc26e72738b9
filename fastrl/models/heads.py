"""Output heads: of causal language models, as the fused log-probabilities need them; of reward models and critics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from fastrl.ops import LoRAHead

# Fields of configs: the logits are multiplied by those of the first tuple and divided by those of the second.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3, Inkling
MULTIPLIED_BY_LOGITS_SCALING = ("hyperclovax",)  # model types that use Granite's name the other way round
SCORE = "score"  # the layer, and the one criterion of a head that names none
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


class Head(NamedTuple):
    """Output head of a causal LM: logits = cap((hidden @ weight.T + bias + adapter) * logit_scale)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None
    lora: LoRAHead | None = None
    logit_scale: float = 1.0
    softcap: float | None = None  # cap(x) = softcap * tanh(x / softcap)

    def options(self) -> dict[str, Any]:
        """All but the weight, as keyword arguments of `linear_logprobs` and `linear_cross_entropy`."""
        return {"bias": self.bias, "lora": self.lora, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) fp32 logits of hidden states (..., H)."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.lora is not None:
            logits = logits + hidden @ self.lora.lora_a.T @ self.lora.lora_b.T * self.lora.scaling
        logits = logits.float() * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class ScoreHead(NamedTuple):
    """Linear head of a reward model or critic: scores = layer(hidden) - bias, one column for each of C criteria.

    The layer is the model's `score`, and stays transformers' own; the rest is in config.json, so that a folder is an
    ordinary classifier with C labels: `fastrl_score_bias`, beside it mean and standard deviation before the scores were
    normalised, `fastrl_score_mean` and `_std`; for C > 1 these are lists, and `fastrl_score_names` is there.
    """

    layer: nn.Module  # (..., H) -> (..., C)
    names: tuple[str, ...] = (SCORE,)
    bias: tuple[float, ...] = (0.0,)

    def scores(self, hidden: Tensor) -> Tensor:
        """(..., C) fp32 scores of hidden states (..., H)."""
        dtype = next(self.layer.parameters()).dtype
        raw = self.layer(hidden.to(dtype)).float()
        return raw - (self.bias[0] if len(self.bias) == 1 else torch.tensor(self.bias, device=raw.device))

    def combine(self, scores: Tensor, weights: Mapping[str, float]) -> Tensor:
        """(...) sum over the criteria of weight * score; `scores` is (..., C), a criterion without a weight counts 0.

        Raises:
            ValueError: a weight names no criterion, or there is none.
        """
        unknown = sorted(weights.keys() - set(self.names))
        if unknown or not weights:
            raise ValueError(
                f"combine: weights: expected some of {', '.join(self.names)}, got {', '.join(unknown) or 'none'}"
            )
        columns = [weights[name] * scores[..., i] for i, name in enumerate(self.names) if name in weights]
        return torch.stack(columns).sum(0)


def only_criterion(scores: Tensor) -> Tensor:
    """(...) the scores (..., 1) of a head with one criterion, which need no weights.

    Raises:
        ValueError: there are several criteria.
    """
    if scores.shape[-1] != 1:
        raise ValueError(f"scores: expected one criterion, got {scores.shape[-1]}; combine them with weights")
    return scores[..., 0]


def base_model(model: nn.Module) -> transformers.PreTrainedModel:
    """The transformers model inside a PEFT wrapper (adapters stay in place), or the model itself."""
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return cast(transformers.PreTrainedModel, inner)


def decoder(model: nn.Module) -> nn.Module:
    """The backbone below the head, which gives the last hidden states."""
    base: Any = base_model(model)
    found = base.get_decoder()
    if found is base or not isinstance(found, transformers.PreTrainedModel):  # what is called decoder may be the head
        found = base.base_model if base.base_model is not base else base.model
    return found


def lm_head(model: nn.Module) -> Head:
    """Weights of the output head, with the active adapter on it: LoRA, or a head that is trained
    whole.

    Raises:
        ValueError: the head is missing, or is no linear layer.
    """
    base = base_model(model)
    config = base.config.get_text_config()
    head = base.get_output_embeddings()
    lora = None
    if isinstance(head, ModulesToSaveWrapper):
        head = head.original_module if head.disable_adapters else head.modules_to_save[_only(head.active_adapters)]
    elif isinstance(head, LoraLayer):
        lora, head = _head_adapter(head), head.get_base_layer()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"lm_head: output head: expected nn.Linear, got {type(head).__name__}")
    return Head(head.weight, head.bias, lora, logit_scale(config), softcap(config))


def score_head(model: nn.Module) -> ScoreHead:
    """The score head of a reward model or critic, with the names and biases of its config.

    Raises:
        ValueError: there is not one bias a criterion.
    """
    base: Any = base_model(model)
    names = tuple(getattr(base.config, "fastrl_score_names", None) or (SCORE,))
    bias = getattr(base.config, "fastrl_score_bias", None)
    if bias is None:
        bias = [0.0] * len(names)
    elif not isinstance(bias, (list, tuple)):
        bias = [bias]
    if len(bias) != len(names):
        raise ValueError(f"config.json: fastrl_score_bias: expected {len(names)} values, one a criterion, got {bias}")
    return ScoreHead(base.score, names, tuple(bias))


@torch.no_grad()
def normalize_head(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Replace the scores of each criterion by (score - mean) / std: the gain goes into the head's weight, the bias into
    the config.
    """
    head, config = score_head(model), base_model(model).config
    for row, deviation in zip(cast(Any, head.layer).weight, std, strict=True):
        row.div_(deviation)
    bias = [(old + m) / s for old, m, s in zip(head.bias, mean, std, strict=True)]
    for field, values in {"bias": bias, "mean": mean, "std": std}.items():
        setattr(config, f"fastrl_score_{field}", values[0] if len(values) == 1 else list(values))


def logit_scale(config: Any) -> float:
    """Factor between `hidden @ weight.T` and the logits, from whatever field the family gives it in."""
    if config.model_type == "mpt":  # has the field, does not apply it
        return 1.0
    factors = [getattr(config, field, None) or 1.0 for field in MULTIPLIERS]
    divisors = [getattr(config, field, None) or 1.0 for field in DIVISORS]
    if config.model_type.startswith(MULTIPLIED_BY_LOGITS_SCALING):
        divisors[0] = 1 / divisors[0]
    return math.prod(factors) / math.prod(divisors)


def softcap(config: Any) -> float | None:
    """Bound of the soft-capped logits; None where the family does not cap them."""
    return next((cap for field in SOFTCAPS if (cap := getattr(config, field, None))), None)


def _head_adapter(layer: Any) -> LoRAHead | None:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not names:
        return None
    name = _only(names)
    if name in layer.lora_variant or layer.lora_B[name].bias is not None:  # DoRA and its like, lora_bias
        raise ValueError(f"lm_head: adapter {name}: expected plain LoRA on the output head, got a variant of it")
    if layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0:
        raise ValueError("lm_head: lora_dropout: expected 0 on an adapted output head, got a positive one")
    return LoRAHead(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def _only(active_adapters: list[str]) -> str:
    if len(active_adapters) != 1:
        raise ValueError(f"lm_head: active adapters: expected one, got {list(active_adapters)}")
    return active_adapters[0]
