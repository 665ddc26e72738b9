"""Reward model: a score on the last kept token, trained on ranked responses.

The loss is InstructGPT's K-wise one (pairs are K = 2): all responses of a prompt are in the same
batch, and each prompt weighs the same however many pairs it has. Where the records name several
criteria (helpful, harmless, ...) the head has a score for each: a comparison trains that of its
criterion, one that names none trains all, by the mean of their losses. Different from the paper:
each score is normalised to mean 0 and variance 1 at the end, over the responses of all training
prompts whatever their criterion, so that weights compare like with like; the gain goes into the
head, the bias into config.json as `fastrl_score_bias`.

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
from fastrl.data.criteria import check_trained, several_criteria
from fastrl.data.split import load_split
from fastrl.data.templates import record_template
from fastrl.models import (
    Scorer,
    as_scorer,
    check_context,
    check_tuner,
    load_tokenizer,
    score_head,
    start_scalar_model,
)
from fastrl.models.heads import normalize_head
from fastrl.models.probe import check_scalar
from fastrl.models.saving import save_model
from fastrl.models.score_heads import pad_apart, set_pad_token
from fastrl.run.config import checked, option
from fastrl.run.distributed import share, unshare
from fastrl.run.run import Run, Sink
from fastrl.run.settings import DataSettings, EpochSettings, HeldOutSettings, OptimSettings, RunSettings, TunerSettings
from fastrl.train.early_stop import EarlyStop
from fastrl.train.epochs import accumulate, begin_epochs, learn
from fastrl.train.losses import reward_loss
from fastrl.train.reward_metrics import held_out_metrics, train_accuracy


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
    patience: int = option(
        0, "evaluations without a better accuracy that end the run, with the best weights; 0: off", at_least=0
    )


@torch.no_grad()
def score_preferences(model: Any, preferences: Sequence[Preference], pad_id: int, micro_batch_size: int) -> Tensor:
    """(N, C) scores of all responses of all preferences, in order, without dropout."""
    model.eval()
    scores = []
    for micro in chunks(share(preferences), micro_batch_size):
        batch = ranking_batch(micro, pad_id, model.device)
        scores.append(as_scorer(model)(batch.input_ids, batch.attention_mask, last_only=True))
    return all_scores(scores, preferences, model.device)


def all_scores(parts: Sequence[Tensor], preferences: Sequence[Preference], device: torch.device) -> Tensor:
    """(N, C) scores of all responses of all preferences; `parts` are those of this rank's share, in order."""
    values = iter(torch.cat(list(parts)).tolist() if parts else [])
    own = [list(islice(values, len(p.responses))) for p in share(preferences)]
    return torch.tensor(list(chain.from_iterable(unshare(own))), device=device)


def report_held_out(
    run: Run, scorer: Scorer, tokenizer: Any, held_out: Sequence[Preference], cfg: RewardConfig
) -> dict[str, Any]:
    """`held_out_metrics`, and scored answers to the first few prompts; {} if there is nothing held out."""
    if not held_out:
        return {}
    run.phase("evaluate")
    scores = score_preferences(scorer, held_out, tokenizer.pad_token_id, cfg.micro_batch_size)
    names = score_head(scorer.model).names
    metrics = held_out_metrics(scores, held_out, names)
    run.check_finite(metrics["eval_loss"])
    run.report(metrics, "eval")
    remaining = iter(scores.tolist())
    for preference in held_out[: cfg.samples]:
        prompt = tokenizer.decode(preference.prompt_ids)
        run.print(f"  prompt: {prompt!r}")
        for rank, response in zip(preference.ranks, preference.responses, strict=True):
            text, values = tokenizer.decode(response, skip_special_tokens=True), next(remaining)
            scores_of = dict(zip(names, values, strict=True))
            run.samples([{"prompt": prompt, "response": text, "rank": rank, **scores_of}])
            run.print(f"  {', '.join(f'{n} {score:+.3f}' for n, score in scores_of.items())} (rank {rank}): {text!r}")
    return metrics


def normalize_scores(model: Any, scores: Tensor) -> dict[str, float]:
    """Make each column of the given scores (N, C) of `model` have mean 0 and (population) variance 1; what they were.

    score' = (score - mean) / std: the gain is folded into the head's weight, the bias is kept in
    the config, where it is subtracted from the head's output by `Scorer.forward`.
    """
    names = score_head(model).names
    mean = [column.mean().item() for column in scores.T]
    std = [column.std(correction=0).item() for column in scores.T]
    for name, m, s in zip(names, mean, std, strict=True):
        if not s > 1e-6:
            raise ValueError(
                f"normalize_scores: {name}: expected scores with some variance, got mean {m}, std {s}:"
                " the reward model tells no responses apart; train longer or check the preferences"
            )
    normalize_head(model, mean, std)
    if len(names) == 1:
        return {"score_mean": mean[0], "score_std": std[0]}
    numbers = {"score_mean": mean, "score_std": std}
    return {f"{what}/{name}": x for what, xs in numbers.items() for name, x in zip(names, xs, strict=True)}


def check_early_stop(cfg: RewardConfig, held_out: Sequence[Preference]) -> None:
    """Raise ValueError if the run is to end by evaluations and makes none."""
    if cfg.patience and not (cfg.eval_every and held_out):
        raise ValueError(
            f"patience: {cfg.patience}: expected evaluations, with eval_every above 0 and held-out preferences, got"
            f" eval_every {cfg.eval_every} and {len(held_out)} held-out preferences"
        )


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
    # 1 preferences and their criteria
    tokenizer = load_tokenizer(cfg.model)
    record_template(tokenizer, cfg.template)
    items, held_out = load_split(load_preferences, cfg, tokenizer, holdout=cfg.holdout, max_length=cfg.max_length)
    held_out = held_out[: cfg.eval_limit or None]
    check_early_stop(cfg, held_out)
    criteria = [p.criterion for p in items]

    # 2 model, its score head drawn or its own
    several = several_criteria(criteria, [p.criterion for p in held_out])
    model: Any = start_scalar_model(cfg.model, several, dtype=cfg.dtype, device=run.device)
    names = score_head(model).names
    if several and len(names) == 1:
        print(f"{cfg.model} has one score, which the comparisons of all criteria train: {', '.join(several)}")
    check_trained(names, criteria)
    pad_apart(tokenizer, cfg.template)
    set_pad_token(model, tokenizer)
    check_scalar(model, tokenizer, cfg.model)
    check_context(model, cfg.max_length, "max_length", cfg)
    check_tuner(model, cfg)

    # 3 tuner, optimizer, schedule, batches
    scorer, learner, batches = begin_epochs(run, cfg, model, tokenizer, items, Scorer)
    metrics: dict[str, Any] = {}
    stop = EarlyStop(run, scorer, cfg.patience)
    if run.done == 0:
        stop.note(report_held_out(run, scorer, tokenizer, held_out, cfg))

    def loss_of(micro: Sequence[Preference], count: int, scores: list[Tensor]) -> Tensor:
        batch = ranking_batch(micro, tokenizer.pad_token_id, scorer.device, names)
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
        metrics |= {"accuracy": train_accuracy(before, prompts, names)}
        run.report(metrics, tokens=sum(map(_tokens, prompts)))
        if run.due(cfg.eval_every) and step < run.total:
            stop.note(report_held_out(run, scorer, tokenizer, held_out, cfg))
            if stop.over:
                break

    # 6 evaluate, normalise and save
    if not stop.noted:
        stop.note(report_held_out(run, scorer, tokenizer, held_out, cfg))
    metrics |= stop.finish()
    seen = next(shuffled_batches(len(items), cfg.normalize_prompts or len(items), seed=cfg.seed, epoch=0))
    raw = score_preferences(scorer, [items[i] for i in seen], tokenizer.pad_token_id, cfg.micro_batch_size)
    metrics |= normalize_scores(scorer.model, raw)
    run.write(lambda: save_model(scorer.model, tokenizer, cfg.output))
    return {"steps": run.step, "output": cfg.output, **metrics}


def _length(preference: Preference) -> int:
    return len(preference.prompt_ids) + max(len(r) for r in preference.responses)


def _tokens(preference: Preference) -> int:
    responses = preference.responses
    return len(preference.prompt_ids) * len(responses) + sum(len(r) for r in responses)
