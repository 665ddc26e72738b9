"""Steps of transformers' own Trainer with a PEFT model, as it is and with FastRLCallback; run by bench_train.py.

python -m fastrl.benches.train_trainer WORKLOAD lora|lora-fastrl
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from fastrl.benches.train_workload import clock, peak_mib, read


class Steps(transformers.TrainerCallback):
    """Seconds from one optimizer step to the next: loading, both passes, clipping and the update."""

    def __init__(self, device: str) -> None:
        self.device, self.ends = device, [0.0]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends = [clock(self.device)]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(clock(self.device))


def collate(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Right-padded prompts and responses; the responses are learned."""
    width = max(len(p) + len(r) for p, r in rows)
    padding = [width - len(p) - len(r) for p, r in rows]
    return {
        "input_ids": torch.tensor([p + r + [0] * n for (p, r), n in zip(rows, padding, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - n) + [0] * n for n in padding]),
        "labels": torch.tensor([[-100] * len(p) + r + [-100] * n for (p, r), n in zip(rows, padding, strict=True)]),
    }


def main(folder: Path, task: str) -> None:
    settings, prompts, responses = read(folder)
    torch.set_num_threads(settings.threads)
    transformers.set_seed(settings.seed)
    tuner, *patched = task.split("-")
    callbacks: list[Any] = [Steps(settings.device)]
    if patched:
        from fastrl.integrations.transformers import FastRLCallback

        callbacks.append(FastRLCallback())
    imported = peak_mib(settings.device)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "policy", dtype=getattr(torch, settings.dtype)
    )
    if tuner == "lora":
        rank = settings.lora_rank
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    rows = sorted(zip(prompts, responses, strict=True), key=lambda row: len(row[0]) + len(row[1]))
    with tempfile.TemporaryDirectory() as output:
        arguments = transformers.TrainingArguments(
            output,
            max_steps=settings.iterations + 1,
            per_device_train_batch_size=settings.micro_batch,
            gradient_accumulation_steps=settings.batch // settings.micro_batch,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=settings.device == "cpu",
        )
        trainer = transformers.Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=callbacks)
        trainer.train()
    first = trainer.state.log_history[0]
    ends = callbacks[0].ends
    report = {
        "seconds": [end - start for start, end in zip(ends[1:], ends[2:], strict=False)],
        "peak_mib": peak_mib(settings.device),
        "imported_mib": imported,
        "check": {"loss": first["loss"], "gradient norm": first["grad_norm"]},
    }
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
