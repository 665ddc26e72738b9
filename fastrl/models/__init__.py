"""Models as the loops use them: loading, probing, adapters, forward passes, heads, saving.

Everything is an ordinary transformers or PEFT module; the functions here only reach the parts that the fused ops need,
whatever wrapper is around them.
"""

from fastrl.folders import adapter_base, is_adapter
from fastrl.models.forward import (
    final_hidden,
    last_token_scores,
    position_ids,
    response_logprobs,
    token_scores,
)
from fastrl.models.heads import base_model, lm_head
from fastrl.models.loading import (
    check_context,
    context_length,
    default_device,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    quiet_transformers,
    start_scalar_model,
    usable_device,
)
from fastrl.models.lora import LoRASettings, add_lora, check_lora

__all__ = [
    "LoRASettings",
    "adapter_base",
    "add_lora",
    "base_model",
    "check_context",
    "check_lora",
    "context_length",
    "default_device",
    "final_hidden",
    "is_adapter",
    "last_token_scores",
    "lm_head",
    "load_policy",
    "load_scalar_model",
    "load_tokenizer",
    "position_ids",
    "quiet_transformers",
    "response_logprobs",
    "start_scalar_model",
    "token_scores",
    "usable_device",
]
