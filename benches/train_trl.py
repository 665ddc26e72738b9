"""PPO updates of TRL's PPOTrainer on a workload; run by bench_train.py in an interpreter that has TRL and no fastrl.

    python train_trl.py WORKLOAD ppo-lora|ppo-lora-critic|ppo-full

ppo-lora: PEFT adapters on the policy, the critic trained in full, as TRL's own example has it. ppo-lora-critic:
adapters on the critic too, fastrl's arrangement. ppo-full: policy and critic trained in full.
Sampling is not measured: generation is replaced by the workload's responses and their logits, which TRL keeps whole.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from datasets import Dataset
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train_workload import PAD, clock, peak_mib, read


class FixedResponses:
    """Stands in for generation; notes when an update phase begins (it returns) and ends (it is called again)."""

    def __init__(self, prompts, responses, micro_batch: int) -> None:
        width = max(map(len, responses))
        padded = [response + [PAD] * (width - len(response)) for response in responses]
        self.responses = {tuple(prompt): torch.tensor(p) for prompt, p in zip(prompts, padded, strict=True)}
        self.micro_batch = micro_batch
        self.begun: list[float] = []
        self.ended: list[float] = []

    def __call__(self, model, queries, *_):
        self.ended.append(clock(queries.device.type))
        response = torch.stack([self.responses[tuple(row[row != PAD].tolist())] for row in queries]).to(queries)
        sequences = torch.cat([queries, response], 1)
        parts = []
        with torch.no_grad():
            for part in sequences.split(self.micro_batch):
                output = ppo_trainer.forward(model, part, PAD)
                parts.append(output.logits[:, queries.shape[1] - 1 : -1].clone())
                del output
        logits = torch.cat(parts)
        self.begun.append(clock(queries.device.type))
        return sequences, logits


def make_trainer(folder: Path, task: str, output: str) -> tuple[PPOTrainer, FixedResponses]:
    settings, prompts, responses = read(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy")
    dtype = getattr(torch, settings.dtype)
    classifier = transformers.AutoModelForSequenceClassification
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype)
    reward_model, value_model = (
        classifier.from_pretrained(folder / "reward", num_labels=1, dtype=dtype) for _ in range(2)
    )
    rank = settings.lora_rank
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    if task == "ppo-lora-critic":
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        adapters = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
        peft.inject_adapter_in_model(adapters, value_model)
        value_model.score.requires_grad_(True)
    config = PPOConfig(
        output_dir=output,
        use_cpu=settings.device == "cpu",
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        seed=settings.seed,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.micro_batch,
        local_rollout_forward_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch // settings.micro_batch,
        num_mini_batches=settings.batch // settings.minibatch,
        num_ppo_epochs=settings.epochs,
        total_episodes=settings.batch * (settings.iterations + 2),  # one to warm up, one to end the last
        num_sample_generations=0,
        response_length=settings.response,
        temperature=1.0,
        stop_token="eos",
        gradient_checkpointing=False,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        peft_config=lora if task != "ppo-full" else None,
    )
    return trainer, FixedResponses(prompts, responses, settings.micro_batch)


def main(folder: Path, task: str) -> None:
    settings = read(folder)[0]
    torch.set_num_threads(settings.threads)
    imported = peak_mib(settings.device)
    with tempfile.TemporaryDirectory() as output:
        trainer, generation = make_trainer(folder, task, output)
        ppo_trainer.batch_generation = generation
        trainer.train()
    seconds = [end - begin for begin, end in zip(generation.begun[1:], generation.ended[2:], strict=False)]
    first = next(entry for entry in trainer.state.log_history if "objective/entropy" in entry)
    check = {"surprisal": first["objective/entropy"], "score": first["objective/scores"]}
    report = {"seconds": seconds, "peak_mib": peak_mib(settings.device), "imported_mib": imported, "check": check}
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
