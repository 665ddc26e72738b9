"""Reward model: a scalar head on the last kept token, trained on ranked responses.

The loss is InstructGPT's K-wise one (pairs are K = 2): all responses of a prompt are in the same
batch, and each prompt weighs the same however many pairs it has. Different from the paper: the
scores are normalised to mean 0 and variance 1 at the end, over the training prompts' responses;
the gain goes into the head, the bias into config.json as `fastrl_score_bias`.

    fastrl reward --model runs/sft --data preferences.jsonl --output runs/reward
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from itertools import chain, count, islice
from typing import Any

import torch
import transformers
from torch import Tensor

from fastrl.data import Preference, load_preferences, shuffled_batches
from fastrl.data.batches import chunks, ranking_batch
from fastrl.data.split import load_split
from fastrl.data.templates import record_template
from fastrl.models import (
    add_lora,
    base_model,
    check_context,
    check_lora,
    last_token_scores,
    load_tokenizer,
    start_scalar_model,
)
from fastrl.models.lora import lora_settings
from fastrl.models.probe import check_scalar
from fastrl.models.saving import save_merged_base, save_model
from fastrl.models.score_heads import pad_apart, set_pad_token
from fastrl.ops import ranking_loss
from fastrl.run.checkpoint import last_checkpoint, save_checkpoint
from fastrl.run.config import checked, option
from fastrl.run.metrics import MetricsLog, peak_memory_gib
from fastrl.run.optim import check_finite, count_steps, make_optimizer, make_schedule, optimizer_step
from fastrl.run.output import check_output, claim_output
from fastrl.run.resume import Run, step_seed
from fastrl.run.settings import DataSettings, EpochSettings, HeldOutSettings, OptimSettings, RunSettings, TunerSettings
from fastrl.train.losses import reward_loss


@dataclass(frozen=True, kw_only=True)
class RewardConfig(HeldOutSettings, TunerSettings, OptimSettings, EpochSettings, DataSettings, RunSettings):
    """Reward model"""

    model: str = option(MISSING, "causal LM or reward model to start from: folder or hub id", path=True)
    output: str = option("runs/reward", "folder for the model, checkpoints/ and metrics.jsonl", path=True)
    data: list[str] | str = option(MISSING, "preferences: hub id, JSON/JSONL(.gz), CSV, Parquet, folder, glob, list")
    batch_size: int = option(16, "prompts per optimizer step, each with all its responses", at_least=1)
    learning_rate: float = option(1e-4, "peak learning rate (about 1e-5 for full fine-tuning)", above=0)
    lora_rank: int = option(16, "LoRA rank; 0: full fine-tuning (the score head is always trained)", at_least=0)
    center_coef: float = option(0.0, "weight of the penalty that keeps scores near 0", at_least=0)
    normalize_prompts: int = option(2000, "training prompts that set mean and variance; 0: all", at_least=0)


@torch.no_grad()
def score_preferences(model: Any, preferences: Sequence[Preference], pad_id: int, micro_batch_size: int) -> Tensor:
    """(N,) scores of all responses of all preferences, in order, without dropout."""
    model.eval()
    scores = []
    for micro in chunks(preferences, micro_batch_size):
        batch = ranking_batch(micro, pad_id, model.device)
        scores.append(last_token_scores(model, batch.input_ids, batch.attention_mask))
    return torch.cat(scores)


def ranking_metrics(scores: Tensor, preferences: Sequence[Preference]) -> dict[str, float]:
    """Loss and pairwise accuracy of scores, in all and per criterion."""
    batch = ranking_batch(preferences, 0, scores.device)
    loss, stats = ranking_loss(scores, batch.group_ids, batch.ranks, margins=batch.margins)
    metrics = {"eval_loss": float(loss), "eval_accuracy": float(stats.accuracy)}
    criteria = [p.criterion for p in preferences]
    for criterion in sorted({c for c in criteria if c is not None}):
        rows = torch.tensor([c == criterion for c in criteria], device=scores.device)
        rows = rows[batch.group_ids]
        _, stats = ranking_loss(scores[rows], batch.group_ids[rows], batch.ranks[rows])
        metrics[f"eval_accuracy/{criterion}"] = float(stats.accuracy)
    return metrics


def report_held_out(
    log: MetricsLog,
    step: int,
    model: Any,
    tokenizer: Any,
    held_out: Sequence[Preference],
    cfg: RewardConfig,
) -> dict[str, float]:
    """Held-out loss and accuracy, and scored answers to the first few prompts; {} if none."""
    if not held_out:
        return {}
    scores = score_preferences(model, held_out, tokenizer.pad_token_id, cfg.micro_batch_size)
    metrics = ranking_metrics(scores, held_out)
    check_finite(metrics["eval_loss"], step, last_checkpoint(cfg.output))
    log.write(step, "eval", **metrics)
    remaining = iter(scores.tolist())
    for preference in held_out[: cfg.samples]:
        log.print(f"  prompt: {tokenizer.decode(preference.prompt_ids)!r}")
        for rank, response in zip(preference.ranks, preference.responses, strict=True):
            text = tokenizer.decode(response, skip_special_tokens=True)
            log.print(f"  score {next(remaining):+.3f} (rank {rank}): {text!r}")
    return metrics


@torch.no_grad()
def normalize_scores(model: Any, scores: Tensor) -> dict[str, float]:
    """Make the given scores of `model` have mean 0 and (population) variance 1.

    score' = (score - mean) / std: the gain is folded into the head's weight, the bias is kept in
    the config, where it is subtracted from the head's output by `models.token_scores`.
    """
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    if not std > 1e-6:
        raise ValueError(
            f"normalize_scores: scores: expected some variance, got mean {mean}, std {std}:"
            " the reward model tells no responses apart; train longer or check the preferences"
        )
    base: Any = base_model(model)
    base.score.weight.div_(std)
    base.config.fastrl_score_bias = (getattr(base.config, "fastrl_score_bias", 0.0) + mean) / std
    base.config.fastrl_score_mean, base.config.fastrl_score_std = mean, std
    return {"score_mean": mean, "score_std": std}


def main(cfg: RewardConfig) -> dict[str, Any]:
    """Train, evaluate, normalise and save; returns the final metrics.

    Raises:
        ValueError: a setting, the model, its tokenizer or the data do not fit.
        NonFiniteError: the loss or the gradient became NaN; the last checkpoint is left in place.
    """
    # 1 what can be refused at once; the seed, before the head and the adapters are drawn
    cfg = checked(cfg)
    check_output(cfg)
    transformers.set_seed(cfg.seed)

    # 2 model and tokenizer
    tokenizer = load_tokenizer(cfg.model)
    record_template(tokenizer, cfg.template)
    model: Any = start_scalar_model(cfg.model, dtype=cfg.dtype, device=cfg.device)
    pad_apart(tokenizer, cfg.template)
    set_pad_token(model, tokenizer)
    check_scalar(model, tokenizer, cfg.model)
    check_context(model, cfg.max_length, "max_length")
    lora = lora_settings(cfg)
    if lora:
        check_lora(model, lora)

    # 3 data
    train, held_out = load_split(load_preferences, cfg, tokenizer, holdout=cfg.holdout, max_length=cfg.max_length)
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

    with MetricsLog(cfg.output, total=total, title="reward", done=done) as log:
        if done == 0:
            report_held_out(log, 0, model, tokenizer, held_out, cfg)
        for step, indices in islice(zip(range(1, total + 1), batches, strict=False), done, None):
            start = time.perf_counter()
            torch.manual_seed(step_seed(cfg.seed, step))  # a step's dropout depends on no earlier step
            model.train()

            # 5 gradients of the whole step, micro-batch by micro-batch; similar lengths together
            prompts = sorted((train[i] for i in indices), key=_length)
            losses, scores = [], []
            for micro in chunks(prompts, cfg.micro_batch_size):
                batch = ranking_batch(micro, tokenizer.pad_token_id, model.device)
                micro_loss, micro_scores = reward_loss(model, batch, center_coef=cfg.center_coef)
                micro_loss = micro_loss * (len(micro) / len(prompts))
                micro_loss.backward()
                losses.append(micro_loss.detach())
                scores.append(micro_scores)
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
                "accuracy": ranking_metrics(torch.cat(scores), prompts)["eval_accuracy"],
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens_per_s": sum(_tokens(p) for p in prompts) / seconds,
                "peak_mem_gib": peak_memory_gib(model.device),
            }
            log.write(step, **metrics)
            if cfg.eval_every and step % cfg.eval_every == 0 and step < total:
                report_held_out(log, step, model, tokenizer, held_out, cfg)

        # 9 evaluate, normalise and save
        metrics |= report_held_out(log, total, model, tokenizer, held_out, cfg)
        indices = next(shuffled_batches(len(train), cfg.normalize_prompts or len(train), seed=cfg.seed, epoch=0))
        seen = [train[i] for i in indices]
        raw = score_preferences(model, seen, tokenizer.pad_token_id, cfg.micro_batch_size)
        metrics |= normalize_scores(model, raw)
        save_model(model, tokenizer, cfg.output)
    return {"steps": total, "output": cfg.output, **metrics}


def _length(preference: Preference) -> int:
    return len(preference.prompt_ids) + max(len(r) for r in preference.responses)


def _tokens(preference: Preference) -> int:
    responses = preference.responses
    return len(preference.prompt_ids) * len(responses) + sum(len(r) for r in responses)
