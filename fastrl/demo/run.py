"""`fastrl demo`: pre-training, SFT, reward model and PPO of a small model on this machine, then a judgement.

Nothing is downloaded and no GPU is needed. The data is written by code (`fastrl.demo.world`), the loops are those of
`fastrl sft`, `fastrl reward` and `fastrl ppo`. The reward model sees only a labeller's rankings, PPO sees only the
reward model; the world's checker comes back at the end, to judge both policies on held-out prompts.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import IO, Any, NamedTuple

from fastrl.demo.answers import CRITERIA, Verdict, judge, rank, written_answer
from fastrl.demo.model import MAX_LENGTH, build_model, build_tokenizer
from fastrl.demo.world import Task, lessons, tasks

GOOD_SHARE = 0.45  # of the answers in the SFT data
SLIP_SHARE = 0.02  # of the answers that the labeller misjudges
SAMPLED, RANKED = 3, 4  # answers per ranking: sampled from the SFT model, and in all; writers give the rest
MAX_NEW_TOKENS = 28
BATCH = 16  # lessons, instructions or prompts per optimizer step; PPO has its own
PPO_BATCH = 64
EVALUATED = 100  # held-out lessons and instructions


class Budget(NamedTuple):
    """How much of everything; steps are optimizer steps, except PPO's iterations."""

    pretrain_steps: int = 500
    sft_steps: int = 400
    rankings: int = 1600
    reward_steps: int = 200
    ppo_iterations: int = 60
    judged: int = 600


FULL = Budget()
QUICK = Budget(pretrain_steps=20, sft_steps=20, rankings=96, reward_steps=10, ppo_iterations=2, judged=32)


class Judged(NamedTuple):
    """A policy's answers to the held-out tasks, with the checker's verdicts."""

    answers: list[str]
    verdicts: list[Verdict]

    def share(self, criterion: str) -> float:
        return sum(getattr(verdict, criterion) for verdict in self.verdicts) / len(self.verdicts)


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Run the demo; returns what `results.json` holds."""
    parser = argparse.ArgumentParser(
        prog="fastrl demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="fastrl-demo", help="folder for data, models and report.html")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same run")
    parser.add_argument("--quick", action="store_true", help="a tiny budget that shows the stages, and no quality")
    options = parser.parse_args(list(argv))
    return run(Path(options.output), options.seed, QUICK if options.quick else FULL)


def run(output: Path, seed: int, budget: Budget) -> dict[str, Any]:
    """All stages, one after the other, and the report."""
    import torch

    from fastrl import doctor
    from fastrl.demo import summary
    from fastrl.train import ppo, reward, sft

    seconds: dict[str, float] = {}
    log = output / "log.txt"
    log.unlink(missing_ok=True)
    backends = doctor.backends("cpu", "float32")
    print(f"fastrl demo: no download, no GPU, {torch.get_num_threads()} threads, files in {output}/")
    print(f"\nbackend of each op:\n{backends}")
    data = output / "data"
    batch: dict[str, Any] = {"batch_size": BATCH, "micro_batch_size": BATCH, "seed": seed}
    quiet: dict[str, Any] = {"save_every": 0, "eval_every": 0, "lora_rank": 0}

    with _stage("World, tokenizer and untrained model", seconds, log):
        write_world(output, seed, budget)
    with _stage("Pre-training on reading lessons", seconds, log):
        sft.main(
            sft.SFTConfig(
                model=f"{output}/untrained",
                data=f"{data}/lessons.jsonl",
                output=f"{output}/pretrained",
                max_length=MAX_LENGTH,
                max_steps=budget.pretrain_steps,
                eval_limit=EVALUATED,
                learning_rate=2e-3,
                warmup_steps=50,
                **batch,
                **quiet,
            )
        )
    with _stage("SFT on instructions of mixed quality", seconds, log):
        sft.main(
            sft.SFTConfig(
                model=f"{output}/pretrained",
                data=f"{data}/instructions.jsonl",
                output=f"{output}/sft",
                max_length=MAX_LENGTH,
                max_steps=budget.sft_steps,
                eval_limit=EVALUATED,
                learning_rate=1e-3,
                warmup_steps=50,
                **batch,
                **quiet,
            )
        )
    with _stage(f"{RANKED} answers to each prompt, ranked by a simulated labeller", seconds, log):
        write_rankings(output, seed, budget)
    with _stage("Reward model on the rankings", seconds, log):
        ranked = reward.main(
            reward.RewardConfig(
                model=f"{output}/sft",
                data=f"{data}/rankings.jsonl",
                eval_data=f"{data}/held_out_rankings.jsonl",
                output=f"{output}/reward",
                max_length=MAX_LENGTH,
                max_steps=budget.reward_steps,
                learning_rate=3e-4,
                **batch,
                **quiet,
            )
        )
    with _stage("PPO on the reward model", seconds, log):
        tuned = ppo.main(
            ppo.PPOConfig(
                model=f"{output}/sft",
                reward_model=f"{output}/reward",
                data=f"{data}/prompts.jsonl",
                output=f"{output}/ppo",
                iterations=budget.ppo_iterations,
                batch_size=PPO_BATCH,
                minibatch_size=PPO_BATCH // 2,
                micro_batch_size=PPO_BATCH // 2,
                epochs=2,
                max_prompt_length=MAX_LENGTH - MAX_NEW_TOKENS,
                max_new_tokens=MAX_NEW_TOKENS,
                no_stop_score=-2.0,
                learning_rate=3e-4,
                critic_learning_rate=3e-4,
                kl_coef=0.03,
                lora_rank=0,
                seed=seed,
                eval_every=max(1, budget.ppo_iterations // 4),
            )
        )
    with _stage("Judgement on held-out prompts", seconds, log):
        held_out = list(islice(tasks(seed, held_out=True), budget.judged))
        judged = {
            name: judge_policy(output / folder, held_out, seed) for name, folder in (("SFT", "sft"), ("PPO", "ppo"))
        }

    results = {
        "seed": seed,
        "quick": budget == QUICK,
        "reward_accuracy": ranked["eval_accuracy"],
        "kl": tuned["kl_k1"],
        **{name: {c: judged[name].share(c) for c in (*CRITERIA, "good")} for name in judged},
        "seconds": seconds,
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(summary.text(results))
    print(f"\nreport: {summary.save(output, results, held_out, judged, backends)}")
    return results


@contextmanager
def _stage(title: str, seconds: dict[str, float], log: Path) -> Iterator[None]:
    """Print a heading, shorten what is printed inside, and record the time under the title."""
    from fastrl.models import quiet_transformers

    print(f"\n== {len(seconds) + 1}  {title}", flush=True)
    start = time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, redirect_stdout(_Digest(file, sys.stdout)), quiet_transformers():
        yield
    seconds[title] = time.perf_counter() - start
    print(f"   {seconds[title]:.1f} s", flush=True)


class _Digest(io.TextIOBase):
    """Writes all lines to a log, and a loop's training lines to the terminal, shortened and about ten of them."""

    LINE = re.compile(r"(\w+) (\d+)/(\d+) train: (.*)")
    SHOWN = ("loss", "accuracy", "score", "kl_k1", "stopped")

    def __init__(self, log: IO[str], terminal: IO[str]) -> None:
        self.log, self.terminal, self.shown = log, terminal, 0

    def write(self, text: str) -> int:
        self.log.write(text)
        if match := self.LINE.match(text):
            title, step, total, metrics = match[1], int(match[2]), int(match[3]), match[4]
            tenth = 10 * step // total
            if step == 1 or tenth > self.shown:
                self.shown = tenth
                pairs = (pair.split("=") for pair in metrics.split())
                parts = [f"{name} {value}" for name, value in pairs if name in self.SHOWN]
                print(f"   {title} {step:>4}/{total}  {'  '.join(parts)}", file=self.terminal, flush=True)
        return len(text)


def write_world(output: Path, seed: int, budget: Budget) -> None:
    """Data files and the untrained model. The tokenizer is trained on the texts of the data."""
    rng = Random(f"writers {seed}")
    reading = list(islice(lessons(seed), budget.pretrain_steps * BATCH))
    stream = tasks(seed, held_out=False)
    instructions = [(t.prompt, written_answer(t, rng, GOOD_SHARE)) for t in islice(stream, budget.sft_steps * BATCH)]
    _write_jsonl(output / "data/lessons.jsonl", ({"messages": _messages(lesson)} for lesson in reading))
    _write_jsonl(output / "data/instructions.jsonl", ({"prompt": p, "completion": a} for p, a in instructions))
    prompts = islice(stream, budget.ppo_iterations * PPO_BATCH)
    _write_jsonl(output / "data/prompts.jsonl", ({"prompt": task.prompt} for task in prompts))
    tokenizer = build_tokenizer(chain.from_iterable(instructions[:4000]))
    build_model(tokenizer, seed).save_pretrained(output / "untrained")
    tokenizer.save_pretrained(output / "untrained")


def write_rankings(output: Path, seed: int, budget: Budget) -> None:
    """K answers of the SFT model to each prompt, ranked by the labeller; held-out prompts in a file of their own."""
    for name, held_out, count in (
        ("rankings", False, budget.rankings),
        ("held_out_rankings", True, max(16, budget.rankings // 8)),
    ):
        rng = Random(f"labeller {seed} {held_out}")
        chosen = list(islice(tasks(seed + 1_000, held_out=held_out), count))
        answers = iter(sample_answers(output / "sft", [task.prompt for task in chosen for _ in range(SAMPLED)], seed))
        groups = [
            [*islice(answers, SAMPLED), *(written_answer(task, rng, GOOD_SHARE) for _ in range(SAMPLED, RANKED))]
            for task in chosen
        ]
        records = (
            {"prompt": task.prompt, "responses": group, "ranks": rank(task, group, rng, SLIP_SHARE)}
            for task, group in zip(chosen, groups, strict=True)
        )
        _write_jsonl(output / f"data/{name}.jsonl", (r for r in records if len(set(r["ranks"])) > 1))


def judge_policy(folder: Path, held_out: Sequence[Task], seed: int) -> Judged:
    """Sampled answers (temperature 1, as in PPO) of the policy in a folder, and the checker's verdicts."""
    answers = sample_answers(folder, [task.prompt for task in held_out], seed)
    return Judged(answers, [judge(task, answer) for task, answer in zip(held_out, answers, strict=True)])


def sample_answers(folder: Path, prompts: Sequence[str], seed: int, batch_size: int = 256) -> list[str]:
    """One sampled answer to each prompt from the policy in a folder."""
    import torch
    from tqdm import trange

    from fastrl.models import load_policy, load_tokenizer
    from fastrl.rollout import decode_responses, rollout
    from fastrl.templates import encode_prompt

    tokenizer, model = load_tokenizer(folder), load_policy(folder)
    generator = torch.Generator().manual_seed(seed)
    encoded = [encode_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    answers: list[str] = []
    for start in trange(0, len(encoded), batch_size, desc="sample", disable=None, leave=False):
        trajectory = rollout(
            model,
            tokenizer,
            encoded[start : start + batch_size],
            max_new_tokens=MAX_NEW_TOKENS,
            generator=generator,
        )
        answers += [answer.strip() for answer in decode_responses(tokenizer, trajectory)]
    return answers


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    pairs = ((("user", prompt), ("assistant", answer)) for prompt, answer in turns)
    return [{"role": role, "content": content} for role, content in chain.from_iterable(pairs)]


def _write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
