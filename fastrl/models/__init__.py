"""Models as the loops use them: loading, probing, tuners, forward passes, heads, saving.

Inside a `Policy` or `Scorer` is an ordinary transformers or PEFT module, which is what is sampled and saved.
"""

from fastrl.devices import default_device, usable_device
from fastrl.folders import adapter_base, is_adapter
from fastrl.models.forward import (
    Policy,
    Scorer,
    as_policy,
    as_scorer,
    last_token_scores,
    response_logprobs,
    token_scores,
)
from fastrl.models.heads import ScoreHead, base_model, lm_head, only_criterion, score_head
from fastrl.models.hidden import final_hidden, position_ids
from fastrl.models.loading import (
    check_context,
    context_length,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    quiet_transformers,
    start_scalar_model,
)
from fastrl.models.lora_adapters import LoRASettings, add_lora
from fastrl.models.tuners import TUNERS, Tuner, check_tuner, describe, saves_adapter, tune

__all__ = [
    "TUNERS",
    "LoRASettings",
    "Policy",
    "ScoreHead",
    "Scorer",
    "Tuner",
    "adapter_base",
    "add_lora",
    "as_policy",
    "as_scorer",
    "base_model",
    "check_context",
    "check_tuner",
    "context_length",
    "default_device",
    "describe",
    "final_hidden",
    "is_adapter",
    "last_token_scores",
    "lm_head",
    "load_policy",
    "load_scalar_model",
    "load_tokenizer",
    "only_criterion",
    "position_ids",
    "quiet_transformers",
    "response_logprobs",
    "saves_adapter",
    "score_head",
    "start_scalar_model",
    "token_scores",
    "tune",
    "usable_device",
]
