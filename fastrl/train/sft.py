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
from itertools import chain, count, islice
from typing import Any

import torch
import transformers

from fastrl.data import Example, load_examples, shuffled_batches
from fastrl.data.batches import chunks, sft_batch, supervised_tokens
from fastrl.data.split import load_split
from fastrl.data.templates import record_template
from fastrl.models import (
    add_lora,
    base_model,
    check_context,
    check_lora,
    load_policy,
    load_tokenizer,
)
from fastrl.models.lora import lora_settings
from fastrl.models.probe import check_policy
from fastrl.models.saving import save_merged_base, save_model
from fastrl.rollout import decode_responses, rollout
from fastrl.run.checkpoint import last_checkpoint, save_checkpoint
from fastrl.run.config import checked, option
from fastrl.run.metrics import MetricsLog, peak_memory_gib
from fastrl.run.optim import check_finite, count_steps, make_optimizer, make_schedule, optimizer_step
from fastrl.run.output import check_output, claim_output
from fastrl.run.resume import Run, step_seed
from fastrl.run.settings import DataSettings, EpochSettings, HeldOutSettings, OptimSettings, RunSettings, TunerSettings
from fastrl.train.losses import sft_logprobs, sft_loss


@dataclass(frozen=True, kw_only=True)
class SFTConfig(HeldOutSettings, TunerSettings, OptimSettings, EpochSettings, DataSettings, RunSettings):
    """Supervised fine-tuning"""

    output: str = option("runs/sft", "folder for the model, checkpoints/ and metrics.jsonl", path=True)
    data: list[str] | str = option(MISSING, "instructions: hub id, JSON/JSONL(.gz), CSV, Parquet, folder, glob, list")
    sample_tokens: int = option(64, "longest answer printed at evaluations, in tokens", at_least=1)


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
    lora = lora_settings(cfg)
    if lora:
        check_lora(model, lora)

    # 3 data
    train, held_out = load_split(load_examples, cfg, tokenizer, holdout=cfg.holdout, max_length=cfg.max_length)
    held_out = held_out[: cfg.eval_limit or None]

    # 4 adapters, optimizer and schedule; the folder is this run's once nothing can be refused
    total = count_steps(len(train), cfg.batch_size, epochs=cfg.epochs, max_steps=cfg.max_steps)
    claim_output(cfg)
    if lora:
        save_merged_base(model, tokenizer, cfg.output)
        model = add_lora(model, lora)
    if cfg.gradient_checkpointing:
        base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model, learning_rate=cfg.learning_rate, weight_decay=cfg.weight_decay, eps=cfg.adam_eps)
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
