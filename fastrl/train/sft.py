"""Supervised fine-tuning on instructions: the loss is on responses only.

Only supervised positions reach the output head, through `linear_cross_entropy`, so that the
logits of the whole sequence never exist. The loss of an optimizer step is the mean over the
supervised tokens of the whole step, however it is cut into micro-batches.

    fastrl sft --model SmolLM2-135M --data tasks.jsonl --output runs/sft
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from itertools import chain, count, islice
from typing import Any

import torch
import transformers

from fastrl.data import Example, load_examples, shuffled_batches, split_holdout
from fastrl.data.batches import chunks, sft_batch, supervised_tokens
from fastrl.data.templates import record_template
from fastrl.models import (
    LoRASettings,
    add_lora,
    base_model,
    check_context,
    check_lora,
    default_device,
    load_policy,
    load_tokenizer,
)
from fastrl.models.probe import check_policy
from fastrl.models.saving import save_merged_base, save_model
from fastrl.rollout import decode_responses, rollout
from fastrl.run.checkpoint import last_checkpoint, save_checkpoint
from fastrl.run.config import checked, option
from fastrl.run.metrics import MetricsLog, peak_memory_gib
from fastrl.run.optim import SCHEDULES, check_finite, count_steps, make_optimizer, make_schedule, optimizer_step
from fastrl.run.output import check_output, claim_output
from fastrl.run.resume import Run, step_seed
from fastrl.train.losses import sft_logprobs, sft_loss


@dataclass(frozen=True)
class SFTConfig:
    """Settings of supervised fine-tuning."""

    model: str = option(MISSING, "policy to start from: folder or hub id; an adapter folder is merged", path=True)
    data: list[str] | str = option(MISSING, "instructions: hub id, JSON/JSONL(.gz), CSV, Parquet, folder, glob, list")
    output: str = option("runs/sft", "folder for the model, checkpoints/ and metrics.jsonl", path=True)
    eval_data: list[str] | str = option("", "held-out instructions; empty: split off `holdout` of data")
    holdout: float = option(0.05, "share of data held out for evaluation", at_least=0, below=1)
    eval_limit: int = option(500, "held-out items evaluated at most; 0: all", at_least=0)
    columns: dict[str, str] | str = option("", "names of the data's columns, as prompt=question,completion=answer")
    max_bad_records: float = option(
        0.01, "share of unusable records that is left out; ten always are, at 0 none", at_least=0, at_most=1
    )
    template: str = option("auto", "auto (the model's: as trained, else its chat template), chat, alpaca or none")
    max_length: int = option(1024, "longest prompt + response in tokens", at_least=2)
    epochs: int = option(1, "passes over the data", at_least=1)
    max_steps: int = option(0, "optimizer steps; 0: as many as the epochs need", at_least=0)
    batch_size: int = option(16, "examples per optimizer step", at_least=1)
    micro_batch_size: int = option(4, "examples per forward pass; does not change the result", at_least=1)
    learning_rate: float = option(2e-4, "peak learning rate (about 1e-5 for full fine-tuning)", above=0)
    schedule: str = option("cosine", "constant, linear or cosine decay to 0", choices=tuple(SCHEDULES))
    warmup_steps: int = option(10, "optimizer steps of linear warm-up", at_least=0)
    weight_decay: float = option(0.0, "AdamW weight decay on matrices", at_least=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not clipped", at_least=0)
    lora_rank: int = option(16, "LoRA rank; 0: full fine-tuning", at_least=0)
    lora_alpha: int = option(32, "LoRA scaling is lora_alpha / lora_rank", at_least=1)
    lora_dropout: float = option(0.0, "dropout on the input of the adapters", at_least=0, below=1)
    lora_targets: str = option("all-linear", "all-linear, or layer names separated by commas")
    dtype: str = option(
        "float32",
        "of weights and passes: float32 or bfloat16; steps are in float32 (18 bytes a trained weight in place of 16)",
        choices=("float32", "bfloat16"),
    )
    device: str = option(default_device(), "cpu or cuda; by default cuda where there is one")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    seed: int = option(0, "same seed, same run; on CPU bit for bit", at_least=0, below=2**32)
    eval_every: int = option(50, "optimizer steps between evaluations; 0: at start and end only", at_least=0)
    save_every: int = option(100, "optimizer steps between checkpoints; 0: none", at_least=0)
    resume: bool = option(False, "go on from the newest checkpoint under output, to the same result")
    samples: int = option(2, "held-out prompts answered at each evaluation", at_least=0)
    sample_tokens: int = option(64, "longest sampled answer in tokens", at_least=1)


@torch.no_grad()
def evaluate(model: Any, examples: Sequence[Example], pad_id: int, micro_batch_size: int) -> dict[str, float]:
    """Loss per supervised token and perplexity = exp(loss), without dropout."""
    model.eval()
    total = 0.0
    for micro in chunks(examples, micro_batch_size):
        batch = sft_batch(micro, pad_id, model.device)
        total -= sft_logprobs(model, batch).sum(dtype=torch.float64).item()
    loss = total / max(1, supervised_tokens(examples))
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}


def sample_answers(model: Any, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int) -> list[str]:
    """Greedy answers to the prompts of examples, as printable text."""
    prompts = [e.input_ids[: e.loss_mask.index(True)] for e in examples if True in e.loss_mask]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        return []
    trajectory = rollout(model, tokenizer, prompts, max_new_tokens=max_new_tokens, greedy=True)
    answers = decode_responses(tokenizer, trajectory)
    return [
        f"  prompt: {tokenizer.decode(prompt, skip_special_tokens=True)!r}\n  answer: {answer!r}"
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def report_held_out(
    log: MetricsLog,
    step: int,
    model: Any,
    tokenizer: Any,
    held_out: Sequence[Example],
    cfg: SFTConfig,
) -> dict[str, float]:
    """Evaluate on the held-out examples and print answers to the first few; {} if there are none."""
    if not held_out:
        return {}
    metrics = evaluate(model, held_out, tokenizer.pad_token_id, cfg.micro_batch_size)
    check_finite(metrics["eval_loss"], step, last_checkpoint(cfg.output))
    log.write(step, "eval", **metrics)
    for text in sample_answers(model, tokenizer, held_out[: cfg.samples], cfg.sample_tokens):
        log.print(text)
    return metrics


def main(cfg: SFTConfig) -> dict[str, Any]:
    """Train, evaluate and save; returns the final metrics.

    Raises:
        ValueError: a setting, the model, its tokenizer or the data do not fit.
        NonFiniteError: the loss or the gradient became NaN; the last checkpoint is left in place.
    """
    # 1 what can be refused at once; the seed, before adapters are drawn
    cfg = checked(cfg)
    check_output(cfg)
    transformers.set_seed(cfg.seed)

    # 2 model and tokenizer
    tokenizer = load_tokenizer(cfg.model)
    record_template(tokenizer, cfg.template, teach=True)
    model: Any = load_policy(cfg.model, dtype=cfg.dtype, device=cfg.device)
    check_policy(model, tokenizer, cfg.model)
    check_context(model, cfg.max_length, "max_length")
    if cfg.samples > 0:
        check_context(model, cfg.sample_tokens + 1, "sample_tokens + 1")
    lora = LoRASettings(cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets)
    if cfg.lora_rank > 0:
        check_lora(model, lora)

    # 3 data
    load = partial(
        load_examples,
        tokenizer=tokenizer,
        max_length=cfg.max_length,
        template=cfg.template,
        columns=cfg.columns,
        max_bad_records=cfg.max_bad_records,
    )
    train, report = load(cfg.data)
    print(report)
    if cfg.eval_data:
        held_out, report = load(cfg.eval_data)
        print(report)
    else:
        train, held_out = split_holdout(train, cfg.holdout, cfg.seed)
    held_out = held_out[: cfg.eval_limit or None]

    # 4 adapters, optimizer and schedule; the folder is this run's once nothing can be refused
    total = count_steps(len(train), cfg.batch_size, epochs=cfg.epochs, max_steps=cfg.max_steps)
    claim_output(cfg)
    if cfg.lora_rank > 0:
        save_merged_base(model, tokenizer, cfg.output)
        model = add_lora(model, lora)
    if cfg.gradient_checkpointing:
        base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model, learning_rate=cfg.learning_rate, weight_decay=cfg.weight_decay)
    schedule = make_schedule(optimizer, kind=cfg.schedule, warmup_steps=cfg.warmup_steps, total_steps=total)
    batches = chain.from_iterable(
        shuffled_batches(len(train), cfg.batch_size, seed=cfg.seed, epoch=epoch) for epoch in count()
    )

    run = Run(cfg, [model], [optimizer], [schedule])
    done = run.start()

    with MetricsLog(cfg.output, total=total, title="sft", done=done) as log:
        if done == 0:
            report_held_out(log, 0, model, tokenizer, held_out, cfg)
        for step, indices in islice(zip(range(1, total + 1), batches, strict=False), done, None):
            start = time.perf_counter()
            torch.manual_seed(step_seed(cfg.seed, step))  # a step's dropout depends on no earlier step
            model.train()

            # 5 gradients of the whole step, micro-batch by micro-batch; similar lengths together
            examples = sorted((train[i] for i in indices), key=lambda e: len(e.input_ids))
            targets = supervised_tokens(examples)
            losses = []
            for micro in chunks(examples, cfg.micro_batch_size):
                batch = sft_batch(micro, tokenizer.pad_token_id, model.device)
                micro_loss = sft_loss(model, batch, denominator=max(1, targets))
                micro_loss.backward()
                losses.append(micro_loss.detach())
            loss = torch.stack(losses).sum().item()
            check_finite(loss, step, last_checkpoint(cfg.output))

            # 6 keep the weights that gave this finite loss
            if cfg.save_every and step > 1 and (step - 1) % cfg.save_every == 0:
                run.save(save_checkpoint(model, tokenizer, cfg.output, step - 1), step - 1)

            # 7 update
            lr = optimizer.param_groups[0]["lr"]
            grad_norm = optimizer_step(model, optimizer, schedule, max_grad_norm=cfg.max_grad_norm, step=step)

            # 8 report
            seconds = time.perf_counter() - start
            metrics = {
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "supervised_tokens": targets,
                "tokens_per_s": sum(len(e.input_ids) for e in examples) / seconds,
                "peak_mem_gib": peak_memory_gib(model.device),
            }
            log.write(step, **metrics)
            if cfg.eval_every and step % cfg.eval_every == 0 and step < total:
                report_held_out(log, step, model, tokenizer, held_out, cfg)

        # 9 evaluate and save
        metrics |= report_held_out(log, total, model, tokenizer, held_out, cfg)
        save_model(model, tokenizer, cfg.output)
    return {"steps": total, "output": cfg.output, **metrics}
