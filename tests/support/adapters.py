"""Reward models that are LoRA adapters, as `fastrl reward` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from fastrl.models import start_scalar_model
from fastrl.models.heads import normalize_head
from fastrl.models.saving import save_merged_base, save_model
from fastrl.models.score_heads import set_pad_token


def make_reward_adapter(base: Path, folder: Path, tokenizer: Any, criteria: Sequence[str] = (), **lora: Any) -> Path:
    """Folder of a reward model on the policy `base`, with drawn weights."""
    torch.manual_seed(3)
    model = start_scalar_model(base, criteria)
    set_pad_token(model, tokenizer)
    save_merged_base(model, tokenizer, folder)
    options = {"r": 6, "target_modules": "all-linear", "init_lora_weights": False, "modules_to_save": ["score"], **lora}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **options))
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.data *= 0.1
    outputs = max(len(criteria), 1)
    normalize_head(adapted, [0.3] * outputs, [2.0] * outputs)
    return save_model(adapted, tokenizer, folder)
