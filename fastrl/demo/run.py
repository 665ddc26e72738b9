"""`fastrl demo`: pre-training, SFT, reward model and PPO of a small model on this machine, then a judgement.

Nothing is downloaded and no GPU is needed. The data is written by code (`fastrl.demo.world`), the loops are those of
`fastrl sft`, `fastrl reward` and `fastrl ppo`. The reward model sees only a labeller's rankings, PPO sees only the
reward model; the world's checker comes back at the end, to judge both policies on held-out prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fastrl.demo.answers import CRITERIA
from fastrl.demo.stages import (
    FULL,
    QUICK,
    RANKED,
    Budget,
    judge_policy,
    train_ppo,
    train_reward,
    train_sft,
    write_rankings,
    write_world,
)
from fastrl.demo.world import tasks

if TYPE_CHECKING:
    from fastrl.run.run import Record, Sink

SHOWN = ("loss", "accuracy", "score", "kl_k1", "stopped")  # of a training record's metrics


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Run the demo; returns what `results.json` holds."""
    parser = argparse.ArgumentParser(
        prog="fastrl demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="fastrl-demo", help="folder for data, models and report.html")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same run")
    parser.add_argument("--quick", action="store_true", help="a tiny budget that shows the stages, and no quality")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    options = parser.parse_args(list(argv))
    return run(Path(options.output), options.seed, QUICK if options.quick else FULL, options.device)


def run(output: Path, seed: int, budget: Budget, device: str) -> dict[str, Any]:
    """All stages, one after the other, and the report."""
    import torch

    from fastrl.commands import doctor
    from fastrl.demo import summary
    from fastrl.models import usable_device

    on_gpu = usable_device(device).type == "cuda"
    seconds: dict[str, float] = {}
    log = output / "log.txt"
    log.unlink(missing_ok=True)
    backends = doctor.backends(device, "float32")
    where = torch.cuda.get_device_name() if on_gpu else f"no GPU, {torch.get_num_threads()} threads"
    print(f"fastrl demo: no download, {where}, files in {output}/")
    print(f"\nbackend of each op:\n{backends}")

    with _stage("World, tokenizer and untrained model", seconds, log):
        write_world(output, seed, budget)
    with _stage("Pre-training on reading lessons", seconds, log) as show:
        train_sft(output, "untrained", "lessons", "pretrained", budget.pretrain_steps, 2e-3, seed, device, show)
    with _stage("SFT on instructions of mixed quality", seconds, log) as show:
        train_sft(output, "pretrained", "instructions", "sft", budget.sft_steps, 1e-3, seed, device, show)
    with _stage(f"{RANKED} answers to each prompt, ranked by a simulated labeller", seconds, log):
        criteria = write_rankings(output, seed, budget, device)
    with _stage("Reward model, a score for each criterion, on the rankings", seconds, log) as show:
        ranked = train_reward(output, budget.reward_steps, seed, device, show)
    with _stage("PPO on the weighted sum of the scores", seconds, log) as show:
        tuned = train_ppo(output, criteria, budget.ppo_iterations, seed, device, show)
    with _stage("Judgement on held-out prompts", seconds, log):
        held_out = list(islice(tasks(seed, held_out=True), budget.judged))
        judged = {
            name: judge_policy(output / folder, held_out, seed, device)
            for name, folder in (("SFT", "sft"), ("PPO", "ppo"))
        }

    results = {
        "seed": seed,
        "quick": budget == QUICK,
        "reward_accuracy": ranked["eval_accuracy"],
        "reward_accuracies": {c: ranked[f"eval_accuracy/{c}"] for c in criteria if f"eval_accuracy/{c}" in ranked},
        "kl": tuned["kl_k1"],
        **{name: {c: judged[name].share(c) for c in (*CRITERIA, "good")} for name in judged},
        "seconds": seconds,
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(summary.text(results))
    print(f"\nreport: {summary.save(output, results, held_out, judged, backends)}")
    return results


@contextmanager
def _stage(title: str, seconds: dict[str, float], log: Path) -> Iterator[Sink]:
    """Print a heading, put what is printed inside into the log, and record the time under the title; yields what shows
    a loop's progress.
    """
    from fastrl.models import quiet_transformers

    print(f"\n== {len(seconds) + 1}  {title}", flush=True)
    start = time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    show = _progress(sys.stdout)
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), quiet_transformers():
        yield show
    seconds[title] = time.perf_counter() - start
    print(f"   {seconds[title]:.1f} s", flush=True)


def _progress(terminal: TextIO) -> Sink:
    """Shows about ten training records of a loop, shortened."""
    tenths: set[int] = set()

    def show(record: Record) -> None:
        tenth = 10 * record.step // record.total
        if record.kind == "train" and (record.step == 1 or tenth not in tenths):
            tenths.update((0, tenth))
            parts = [f"{name} {record.metrics[name]:.4g}" for name in SHOWN if name in record.metrics]
            line = f"   {record.title} {record.step:>4}/{record.total}  {'  '.join(parts)}"
            print(line, file=terminal, flush=True)

    return show
