"""Steps of TRL's trainers on a two-layer Llama and a tokenizer of words, both made by code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

KINDS = ("sft", "dpo", "kto", "grpo", "rloo")
VOCAB = 131  # no multiple of a vector
CLASSES = {kind: (f"{kind.upper()}Trainer", f"{kind.upper()}Config") for kind in KINDS}
LAYERS = ["q_proj", "v_proj", "down_proj"]


class Run(NamedTuple):
    losses: list[float]
    entropies: list[float]
    parameters: dict[str, torch.Tensor]  # that are trained


def write_model(folder: Path, **overrides: Any) -> Path:
    """A folder with model and tokenizer, as the hub has them."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**settings | overrides)).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{n}": n for n in range(2, VOCAB)}
    core = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    return folder


def records(kind: str, count: int = 8) -> list[dict[str, Any]]:
    """Prompts of different lengths with what a trainer of that kind needs beside them."""

    def words(start: int, length: int) -> str:
        return " ".join(f"w{2 + (7 * start + 3 * i) % (VOCAB - 2)}" for i in range(length))

    rows = []
    for i in range(count):
        row: dict[str, Any] = {"prompt": words(i, 3 + i % 4)}
        if kind in ("sft", "kto"):
            row["completion"] = " " + words(i + 5, 2 + i % 5)
        if kind == "kto":
            row["label"] = i % 2 == 0
        if kind == "dpo":
            row |= {"chosen": " " + words(i + 5, 2 + i % 5), "rejected": " " + words(i + 9, 1 + i % 3)}
        rows.append(row)
    return rows


def write_records(kind: str, folder: Path) -> Path:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(kind)))
    return folder


def brevity(completions: list[str], **_: Any) -> list[float]:
    """A reward."""
    return [-float(len(set(completion.split()))) for completion in completions]


def make_trainer(kind: str, model: Any, output: Path, *, lora: bool = False, **settings: Any) -> Any:
    """TRL's trainer; SGD, so that parameters differ by no more than gradients do."""
    import trl

    torch.manual_seed(0)  # adapters are drawn
    trainer_class, config_class = (getattr(trl, name) for name in CLASSES[kind])
    options: dict[str, Any] = {
        "output_dir": str(output), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.05,
        "optim": "sgd", "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "gradient_checkpointing": False, "max_grad_norm": 1e6,
    }  # fmt: skip
    arguments: dict[str, Any] = {"train_dataset": Dataset.from_list(records(kind))}
    if kind in ("grpo", "rloo"):
        options |= {"max_completion_length": 6, "num_generations": 2, "beta": 0.1}
        arguments["reward_funcs"] = brevity
    if lora:
        arguments["peft_config"] = LoraConfig(r=4, target_modules=LAYERS, task_type="CAUSAL_LM")
    folder = model if isinstance(model, Path) else Path(model.config.name_or_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder) if isinstance(model, Path) else model
    if kind in ("dpo", "kto") and not lora:
        arguments["ref_model"] = AutoModelForCausalLM.from_pretrained(folder)
    arguments |= {"args": config_class(**options | settings), "processing_class": tokenizer}
    return trainer_class(model=model, **arguments)


def run(trainer: Any) -> Run:
    torch.manual_seed(0)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return Run([entry["loss"] for entry in history], [entry.get("entropy", 0.0) for entry in history], trained)
