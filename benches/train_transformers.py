"""SFT steps as transformers and PEFT do them (and TRL's SFTTrainer through them); run by bench_train.py.

python -m fastrl.benches.train_transformers WORKLOAD sft-lora|sft-full|sft-lora-liger|sft-full-liger

-liger: with Liger's kernels in place of the model's own norms, rotary embedding, MLP and loss; on a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from fastrl.benches.train_workload import clock, peak_mib, read


def batches(prompts, responses, size: int):
    """Right-padded micro-batches in transformers' form; similar lengths together, as group_by_length has it."""
    rows = sorted(zip(prompts, responses, strict=True), key=lambda row: len(row[0]) + len(row[1]))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = max(len(p) + len(r) for p, r in part)
        ids = [p + r + [0] * (width - len(p) - len(r)) for p, r in part]
        labels = [[-100] * len(p) + r + [-100] * (width - len(p) - len(r)) for p, r in part]
        mask = [[1] * (len(p) + len(r)) + [0] * (width - len(p) - len(r)) for p, r in part]
        yield torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


def main(folder: Path, task: str) -> None:
    settings, prompts, responses = read(folder)
    torch.set_num_threads(settings.threads)
    transformers.set_seed(settings.seed)
    imported = peak_mib(settings.device)
    if task.endswith("-liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    dtype = getattr(torch, settings.dtype)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype)
    model.to(settings.device)
    if task.startswith("sft-lora"):
        rank = settings.lora_rank
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
    targets = sum(map(len, responses))
    seconds, losses = [], []
    for _ in range(settings.iterations + 1):
        start = clock(settings.device)
        loss = torch.zeros((), device=settings.device)
        for batch in batches(prompts, responses, settings.micro_batch):
            ids, mask, labels = (tensor.to(settings.device) for tensor in batch)
            part = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=targets).loss
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(clock(settings.device) - start)
        losses.append(float(loss))
    peak = peak_mib(settings.device)
    report = {"seconds": seconds[1:], "peak_mib": peak, "imported_mib": imported, "check": {"loss": losses[0]}}
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
