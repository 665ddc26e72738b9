"""Reward model: a scalar head on the last kept token, trained on ranked responses.

The loss is InstructGPT's K-wise one (pairs are K = 2): all responses of a prompt are in the same
batch, and each prompt weighs the same however many pairs it has. Different from the paper: the
scores are normalised to mean 0 and variance 1 at the end, over the training prompts' responses;
the gain goes into the head, the bias into config.json as `fastrl_score_bias`.

    fastrl reward --model runs/sft --data preferences.jsonl --output runs/reward
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from fastrl.data import Preference, load_preferences, shuffled_batches
from fastrl.data.batches import chunks, ranking_batch
from fastrl.data.split import load_split
from fastrl.data.templates import record_template
from fastrl.models import (
    Scorer,
    check_context,
    check_tuner,
    last_token_scores,
    load_tokenizer,
    start_scalar_model,
)
from fastrl.models.heads import normalize_head
from fastrl.models.probe import check_scalar
from fastrl.models.saving import save_model
from fastrl.models.score_heads import pad_apart, set_pad_token
from fastrl.ops import ranking_loss
from fastrl.run.config import checked, option
from fastrl.run.distributed import share, unshare
from fastrl.run.run import Run, Sink
from fastrl.run.settings import DataSettings, EpochSettings, HeldOutSettings, OptimSettings, RunSettings, TunerSettings
from fastrl.train.epochs import accumulate, begin_epochs, learn
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
    for micro in chunks(share(preferences), micro_batch_size):
        batch = ranking_batch(micro, pad_id, model.device)
        scores.append(last_token_scores(model, batch.input_ids, batch.attention_mask))
    return all_scores(scores, preferences, model.device)


def all_scores(parts: Sequence[Tensor], preferences: Sequence[Preference], device: torch.device) -> Tensor:
    """(N,) scores of all responses of all preferences; `parts` are those of this rank's share, in order."""
    values = iter(torch.cat(list(parts)).tolist() if parts else [])
    own = [list(islice(values, len(p.responses))) for p in share(preferences)]
    return torch.tensor(list(chain.from_iterable(unshare(own))), device=device)


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
    run: Run, scorer: Scorer, tokenizer: Any, held_out: Sequence[Preference], cfg: RewardConfig
) -> dict[str, float]:
    """Held-out loss and accuracy, and scored answers to the first few prompts; {} if none."""
    if not held_out:
        return {}
    run.phase("evaluate")
    scores = score_preferences(scorer, held_out, tokenizer.pad_token_id, cfg.micro_batch_size)
    metrics = ranking_metrics(scores, held_out)
    run.check_finite(metrics["eval_loss"])
    run.report(metrics, "eval")
    remaining = iter(scores.tolist())
    for preference in held_out[: cfg.samples]:
        prompt = tokenizer.decode(preference.prompt_ids)
        run.print(f"  prompt: {prompt!r}")
        for rank, response in zip(preference.ranks, preference.responses, strict=True):
            text, score = tokenizer.decode(response, skip_special_tokens=True), next(remaining)
            run.samples([{"prompt": prompt, "response": text, "rank": rank, "score": score}])
            run.print(f"  score {score:+.3f} (rank {rank}): {text!r}")
    return metrics


def normalize_scores(model: Any, scores: Tensor) -> dict[str, float]:
    """Make the given scores of `model` have mean 0 and (population) variance 1.

    score' = (score - mean) / std: the gain is folded into the head's weight, the bias is kept in
    the config, where it is subtracted from the head's output by `Scorer.forward`.
    """
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    if not std > 1e-6:
        raise ValueError(
            f"normalize_scores: scores: expected some variance, got mean {mean}, std {std}:"
            " the reward model tells no responses apart; train longer or check the preferences"
        )
    normalize_head(model, [mean], [std])
    return {"score_mean": mean, "score_std": std}


def main(cfg: RewardConfig, sink: Sink | None = None) -> dict[str, Any]:
    """Train, evaluate, normalise and save; returns the final metrics. A sink gets each record of metrics.

    Raises:
        ValueError: a setting, the model, its tokenizer or the data do not fit.
        NonFiniteError: the loss or the gradient became NaN; the last checkpoint is left in place.
    """
    cfg = checked(cfg)
    with Run(cfg, "reward", sink) as run:
        return train(cfg, run)


def train(cfg: RewardConfig, run: Run) -> dict[str, Any]:
    """The steps of `main`."""
    # 1 model, its score head drawn or its own, and tokenizer
    tokenizer = load_tokenizer(cfg.model)
    record_template(tokenizer, cfg.template)
    model: Any = start_scalar_model(cfg.model, dtype=cfg.dtype, device=run.device)
    pad_apart(tokenizer, cfg.template)
    set_pad_token(model, tokenizer)
    check_scalar(model, tokenizer, cfg.model)
    check_context(model, cfg.max_length, "max_length")
    check_tuner(model, cfg)

    # 2 preferences
    items, held_out = load_split(load_preferences, cfg, tokenizer, holdout=cfg.holdout, max_length=cfg.max_length)
    held_out = held_out[: cfg.eval_limit or None]

    # 3 tuner, optimizer, schedule, batches
    scorer, learner, batches = begin_epochs(run, cfg, model, tokenizer, items, Scorer)
    metrics: dict[str, float] = {}
    if run.done == 0:
        report_held_out(run, scorer, tokenizer, held_out, cfg)

    def loss_of(micro: Sequence[Preference], count: int, scores: list[Tensor]) -> Tensor:
        batch = ranking_batch(micro, tokenizer.pad_token_id, scorer.device)
        loss, micro_scores = reward_loss(scorer, batch, center_coef=cfg.center_coef)
        scores.append(micro_scores)
        return loss * (len(micro) / count)

    for step in run.steps():
        # 4 gradients; each prompt weighs the same, however many pairs it has
        scorer.train()
        prompts = sorted(next(batches), key=_length)
        scores: list[Tensor] = []
        loss = accumulate(share(prompts), cfg.micro_batch_size, partial(loss_of, count=len(prompts), scores=scores))

        # 5 update, and report with the accuracy before it
        metrics = learn(run, learner, loss)
        before = all_scores(scores, prompts, scorer.device)
        metrics |= {"accuracy": ranking_metrics(before, prompts)["eval_accuracy"]}
        run.report(metrics, tokens=sum(map(_tokens, prompts)))
        if run.due(cfg.eval_every) and step < run.total:
            report_held_out(run, scorer, tokenizer, held_out, cfg)

    # 6 evaluate, normalise and save
    metrics |= report_held_out(run, scorer, tokenizer, held_out, cfg)
    seen = next(shuffled_batches(len(items), cfg.normalize_prompts or len(items), seed=cfg.seed, epoch=0))
    raw = score_preferences(scorer, [items[i] for i in seen], tokenizer.pad_token_id, cfg.micro_batch_size)
    metrics |= normalize_scores(scorer.model, raw)
    run.write(lambda: save_model(scorer.model, tokenizer, cfg.output))
    return {"steps": run.total, "output": cfg.output, **metrics}


def _length(preference: Preference) -> int:
    return len(preference.prompt_ids) + max(len(r) for r in preference.responses)


def _tokens(preference: Preference) -> int:
    responses = preference.responses
    return len(preference.prompt_ids) * len(responses) + sum(len(r) for r in responses)
