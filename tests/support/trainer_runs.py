"""Runs of transformers' Trainer on a tiny model; as a program, of two processes: `torchrun ... trainer_runs.py FOLDER`.

Every process leaves {case: [numbers unpatched, numbers patched]} in FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import fastrl
from fastrl.integrations.transformers import FastRLCallback

VOCABULARY = 300


def tiny_model(lora: bool = True, **options: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    if not lora:
        return model
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], **options}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    """Right-padded rows of 4 to 12 tokens, the first few of each not learned."""
    generator, rows = torch.Generator().manual_seed(3), []
    for _ in range(count):
        length = int(torch.randint(4, 13, (), generator=generator))
        ids = torch.zeros(12, dtype=torch.long)
        ids[:length] = torch.randint(2, VOCABULARY, (length,), generator=generator)
        mask = torch.arange(12) < length
        labels = torch.where(mask & (torch.arange(12) >= length // 3), ids, -100)
        rows.append({"input_ids": ids, "attention_mask": mask.long(), "labels": labels})
    return rows


def trainer(folder: Any, model: Any, **options: Any) -> transformers.Trainer:
    own = {name: options.pop(name) for name in ("callbacks", "compute_loss_func", "compute_metrics") if name in options}
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "seed": 0,
        "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "logging_strategy": "steps",
    }  # fmt: skip
    arguments = transformers.TrainingArguments(output_dir=str(folder), **{**settings, **options})
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=examples(48), eval_dataset=examples(6), **own
    )


def trained(folder: str, patched: bool, **options: Any) -> list[float]:
    """Losses of the Trainer, and sums of the trained parameters after it."""
    run = trainer(folder, tiny_model(**options), callbacks=[FastRLCallback()] if patched else [], max_steps=3)
    run.train()
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    return losses + [float(p.double().abs().sum()) for p in run.model.parameters() if p.requires_grad]


def sharded(patched: bool, head_alone: bool, **options: Any) -> list[float]:
    """Two steps of SGD under FSDP2: losses, and sums of whole parameters after them."""
    model = tiny_model(**options).train()
    if patched:
        fastrl.patch(model, head=True)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if head_alone:
        fully_shard(base.lm_head)
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(model)
    batch = {name: torch.stack([row[name] for row in examples(8)]) for name in examples(1)[0]}
    share = {name: rows[distributed.get_rank() :: 2] for name, rows in batch.items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, seen = torch.optim.SGD(parameters, lr=0.1), []
    for _ in range(2):
        output = model(**share)
        assert (output.logits is None) == patched
        output.loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(output.loss.item())
    return seen + [float(p.full_tensor().double().abs().sum()) for p in parameters]


def main(folder: str) -> None:
    torch.set_num_threads(1)
    seen = {
        "Trainer, LoRA": [trained(folder, patched) for patched in (False, True)],
        "Trainer, full": [trained(folder, patched, lora=False) for patched in (False, True)],
        "FSDP2, LoRA": [sharded(patched, False) for patched in (False, True)],
        "FSDP2, full, the head a unit": [sharded(patched, True, lora=False) for patched in (False, True)],
        "FSDP2, LoRA on the head": [sharded(patched, True, target_modules=["lm_head"]) for patched in (False, True)],
    }
    (Path(folder) / f"{distributed.get_rank()}.json").write_text(json.dumps(seen))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
