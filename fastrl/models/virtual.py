"""Virtual tokens: what is trained stands before every sequence. Prompt, P- and prefix tuning, through PEFT.

PEFT puts them there in `PeftModel.forward`. fastrl calls the model inside, or its backbone alone, and gives it what
PEFT would: embeddings before the embedded tokens (prompt tuning, Lester et al. 2021; P-tuning, Liu et al. 2021), or
keys and values in the cache (prefix tuning, Li and Liang 2021). Positions count on from the virtual tokens.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn
from transformers import Cache

from fastrl.models.heads import base_model


def virtual_tokens(model: nn.Module) -> int:
    """How many virtual tokens stand before every sequence of a model; 0 if it has none, or they are off."""
    if not isinstance(model, peft.PeftModel) or model._adapters_disabled:
        return 0
    config: Any = model.active_peft_config
    return config.num_virtual_tokens if config.is_prompt_learning else 0


def with_virtual_tokens(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs for the model inside, with the virtual tokens before the B rows, unless a cache holds them already.

    What comes out has columns for them where they are embeddings, none where they are keys and values.

    Args:
        inputs: `input_ids` (B, T); where there are `position_ids` (B, T), `attention_mask` (B, T') and
            `past_key_values`, they are as they would be without virtual tokens.
    """
    count = virtual_tokens(model)
    if count == 0:
        return inputs
    rows, inputs = len(inputs["input_ids"]), dict(inputs)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (count, 0), value=1)
    if "position_ids" in inputs:
        inputs["position_ids"] = inputs["position_ids"] + count
    if inputs.get("past_key_values") is not None:
        return inputs
    prompt: Any = model.get_prompt(rows)  # type: ignore[operator]
    if isinstance(prompt, Cache):
        return inputs | {"past_key_values": prompt}
    embedded = base_model(model).get_input_embeddings()(inputs.pop("input_ids"))
    if "position_ids" in inputs:
        before = torch.arange(count, device=embedded.device).expand(rows, -1)
        inputs["position_ids"] = torch.cat([before, inputs["position_ids"]], dim=1)
    return inputs | {"inputs_embeds": torch.cat([prompt.to(embedded.dtype), embedded], dim=1)}
