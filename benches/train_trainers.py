"""Steps of TRL's trainers on a workload; run by bench_trl.py.

python -m fastrl.benches.train_trainers WORKLOAD sft|dpo|grpo-plain|head|all

plain: TRL and PEFT as they are. head: fastrl.integrations.trl.patch(). all: fastrl.patch(trainer.model) as well.
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
import trl
from datasets import Dataset

import fastrl
import fastrl.integrations.trl
from fastrl.benches.train_workload import Settings, clock, peak_mib, read

TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
}


class StepClock(transformers.TrainerCallback):
    """Seconds of each optimizer step, with all of its passes."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = clock(self.device)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(clock(self.device) - self.begun)


def dataset(kind: str, prompts: list[list[int]], responses: list[list[int]]) -> Dataset:
    def text(ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids)

    answers = [f" {text(response[:-1])}" for response in responses]  # trainers add eos
    columns = {"prompt": [text(prompt) for prompt in prompts]}
    if kind == "sft":
        columns["completion"] = answers
    if kind == "dpo":
        columns |= {"chosen": answers, "rejected": [*answers[1:], answers[0]]}
    return Dataset.from_dict(columns)


def given_completions(prompts: list[list[int]], responses: list[list[int]], tokenizer: Any) -> dict[str, Any]:
    """GRPO's arguments for completions that are not sampled; longer ones have the higher reward."""

    def rollout(texts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [tokenizer(text)["input_ids"] for text in texts]
        taken = [responses[i % len(responses)] for i in range(len(texts))]
        return {"prompt_ids": ids, "completion_ids": taken, "logprobs": [[0.0] * len(ids) for ids in taken]}

    def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    return {"rollout_func": rollout, "reward_funcs": length}


def make_trainer(kind: str, folder: Path, output: str) -> Any:
    settings, prompts, responses = read(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=getattr(torch, settings.dtype))
    trainer_class, config_class = TRAINERS[kind]
    options: dict[str, Any] = {
        "output_dir": output,
        "max_steps": settings.iterations + 1,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.batch // settings.micro_batch,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
        "use_cpu": settings.device == "cpu",
        "bf16": settings.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    more: dict[str, Any] = {}
    if kind == "grpo":
        options |= {"max_completion_length": settings.response, "num_generations": 4}
        more = given_completions(prompts, responses, tokenizer)
    rank = settings.lora_rank
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return trainer_class(
        model=model,
        args=config_class(**options),
        train_dataset=dataset(kind, prompts, responses),
        processing_class=tokenizer,
        peft_config=lora,
        **more,
    )


def trained_tokens(kind: str, responses: list[list[int]]) -> int:
    return sum(map(len, responses)) * (2 if kind == "dpo" else 1)


def main(folder: Path, task: str) -> None:
    kind, way = task.split("-")
    settings: Settings
    settings, _, responses = read(folder)
    torch.set_num_threads(settings.threads)
    imported = peak_mib(settings.device)
    if way != "plain":
        fastrl.integrations.trl.patch()
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(kind, folder, output)
        if way == "all":
            fastrl.patch(trainer.model)
        steps = StepClock(settings.device)
        trainer.add_callback(steps)
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    check = {
        f"{name} {number}": entry[name]
        for number, entry in enumerate(history)
        for name in ("loss", "entropy", "grad_norm")
    }
    report = {"seconds": steps.seconds[1:], "tokens": trained_tokens(kind, responses), "check": check}
    print("\n" + json.dumps(report | {"peak_mib": peak_mib(settings.device), "imported_mib": imported}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
