"""Supervised fine-tuning on instructions: the loss is on responses only.

Only supervised positions reach the output head, through `linear_cross_entropy`, so that the
logits of the whole sequence never exist. The loss of an optimizer step is the mean over the
supervised tokens of the whole step, however it is cut into micro-batches.

    fastrl sft --model SmolLM2-135M --data tasks.jsonl --output runs/sft
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastrl.data import Example, load_examples
from fastrl.data.batches import chunks, supervised_tokens
from fastrl.data.packing import PACKINGS, arrange, packed_batch
from fastrl.data.split import load_split
from fastrl.data.templates import record_template
from fastrl.models import Policy, check_context, check_tuner, load_policy, load_tokenizer
from fastrl.models.probe import check_packing, check_policy
from fastrl.models.saving import save_model
from fastrl.rollout import decode_responses, rollout
from fastrl.run.config import checked, option
from fastrl.run.distributed import is_main, share, sum_over_ranks
from fastrl.run.run import Run, Sink
from fastrl.run.settings import DataSettings, EpochSettings, HeldOutSettings, OptimSettings, RunSettings, TunerSettings
from fastrl.train.epochs import accumulate, begin_epochs, learn
from fastrl.train.losses import sft_logprobs, sft_loss


@dataclass(frozen=True, kw_only=True)
class SFTConfig(HeldOutSettings, TunerSettings, OptimSettings, EpochSettings, DataSettings, RunSettings):
    """Supervised fine-tuning"""

    output: str = option("runs/sft", "folder for the model, checkpoints/ and metrics.jsonl", path=True)
    data: list[str] | str = option(MISSING, "instructions: hub id, JSON/JSONL(.gz), CSV, Parquet, folder, glob, list")
    packing: str = option(
        "none",
        "examples that share a row, unseen by each other: none; balanced (rows of equal length, at most max_length"
        " tokens; micro_batch_size counts rows); padding-free (a micro-batch is one row)",
        choices=PACKINGS,
    )
    sample_tokens: int = option(64, "longest answer printed at evaluations, in tokens", at_least=1)


@torch.no_grad()
def evaluate(
    model: Any,
    examples: Sequence[Example],
    pad_id: int,
    micro_batch_size: int,
    *,
    packing: str = "none",
    max_length: int = 0,
) -> dict[str, float]:
    """Loss per supervised token, perplexity = exp(loss), and the share of supervised tokens that are the likeliest, as
    in greedy decoding; without dropout. Rows are as `arrange` makes them.
    """
    model.eval()
    rows, size = arrange(share(examples), packing, max_length=max_length, size=micro_batch_size)
    totals = torch.zeros(2, dtype=torch.float64)
    for micro in chunks(rows, size):
        batch = packed_batch(micro, pad_id, model.device)
        logprobs, top1 = sft_logprobs(model, batch, return_top1=True)
        totals += torch.stack([-logprobs.sum(dtype=torch.float64), top1.sum()]).cpu()
    loss, accuracy = (sum_over_ranks(totals) / max(1, supervised_tokens(examples))).tolist()
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0)), "eval_token_accuracy": accuracy}


def sample_answers(
    model: Any, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int
) -> list[dict[str, str]]:
    """Greedy answers to the prompts of examples: [{"prompt", "response"}, ...]."""
    prompts = [e.input_ids[: e.loss_mask.index(True)] for e in examples if True in e.loss_mask]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        return []
    trajectory = rollout(model, tokenizer, prompts, max_new_tokens=max_new_tokens, greedy=True)
    answers = decode_responses(tokenizer, trajectory)
    return [
        {"prompt": tokenizer.decode(prompt, skip_special_tokens=True), "response": answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def report_held_out(
    run: Run, policy: Policy, tokenizer: Any, held_out: Sequence[Example], cfg: SFTConfig
) -> dict[str, float]:
    """Evaluate on the held-out examples and print answers to the first few; {} if there are none."""
    if not held_out:
        return {}
    run.phase("evaluate")
    size, pad_id = cfg.micro_batch_size, tokenizer.pad_token_id
    metrics = evaluate(policy, held_out, pad_id, size, packing=cfg.packing, max_length=cfg.max_length)
    run.check_finite(metrics["eval_loss"])
    run.report(metrics, "eval")
    if is_main():
        samples = sample_answers(policy.model, tokenizer, held_out[: cfg.samples], cfg.sample_tokens)
        run.samples(samples)
        for sample in samples:
            run.print("  prompt: {prompt!r}\n  answer: {response!r}".format(**sample))
    return metrics


def main(cfg: SFTConfig, sink: Sink | None = None) -> dict[str, Any]:
    """Train, evaluate and save; returns the final metrics. A sink gets each record of metrics.

    Raises:
        ValueError: a setting, the model, its tokenizer or the data do not fit.
        NonFiniteError: the loss or the gradient became NaN; the last checkpoint is left in place.
    """
    cfg = checked(cfg)
    with Run(cfg, "sft", sink) as run:
        return train(cfg, run)


def train(cfg: SFTConfig, run: Run) -> dict[str, Any]:
    """The steps of `main`."""
    # 1 model and tokenizer
    tokenizer = load_tokenizer(cfg.model)
    record_template(tokenizer, cfg.template, teach=True)
    model: Any = load_policy(cfg.model, dtype=cfg.dtype, device=run.device)
    check_policy(model, tokenizer, cfg.model)
    if cfg.packing != "none":
        check_packing(model, tokenizer, cfg.model, cfg)
    check_context(model, cfg.max_length, "max_length", cfg)
    if cfg.samples > 0:
        check_context(model, cfg.sample_tokens + 1, "sample_tokens + 1", cfg)
    check_tuner(model, cfg)

    # 2 data
    items, held_out = load_split(load_examples, cfg, tokenizer, holdout=cfg.holdout, max_length=cfg.max_length)
    held_out = held_out[: cfg.eval_limit or None]

    # 3 tuner, optimizer, schedule, batches; the folder is this run's once nothing can be refused
    policy, learner, batches = begin_epochs(run, cfg, model, tokenizer, items, Policy)
    metrics: dict[str, float] = {}
    if run.done == 0:
        report_held_out(run, policy, tokenizer, held_out, cfg)

    def loss_of(micro: Sequence[Sequence[Example]], targets: int) -> Tensor:
        batch = packed_batch(micro, tokenizer.pad_token_id, policy.device)
        return sft_loss(policy, batch, denominator=max(1, targets))

    for step in run.steps():
        # 4 gradients of the whole step, micro-batch by micro-batch; similar lengths together
        policy.train()
        examples = sorted(next(batches), key=lambda e: len(e.input_ids))
        targets = supervised_tokens(examples)
        rows, size = arrange(share(examples), cfg.packing, max_length=cfg.max_length, size=cfg.micro_batch_size)
        loss = accumulate(rows, size, partial(loss_of, targets=targets))

        # 5 update and report
        metrics = learn(run, learner, loss) | {"supervised_tokens": targets}
        run.report(metrics, tokens=sum(len(e.input_ids) for e in examples))
        if run.due(cfg.eval_every) and step < run.total:
            report_held_out(run, policy, tokenizer, held_out, cfg)

    # 6 evaluate and save
    metrics |= report_held_out(run, policy, tokenizer, held_out, cfg)
    run.write(lambda: save_model(policy.model, tokenizer, cfg.output))
    return {"steps": run.total, "output": cfg.output, **metrics}
