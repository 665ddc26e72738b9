"""The stages of the demo: each reads files below the output folder and writes files there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from fastrl.demo.answers import CRITERIA, Verdict, judge, rank, rank_by_one, written_answer
from fastrl.demo.model import MAX_LENGTH, build_model, build_tokenizer
from fastrl.demo.world import Task, lessons, tasks

if TYPE_CHECKING:
    from fastrl.run.run import Sink

GOOD_SHARE = 0.45  # of the answers in the SFT data
SLIP_SHARE = 0.02  # of the answers that the labeller misjudges
OVERALL_SHARE = 0.8  # of the rankings are by all criteria, the others by one
WEIGHTS = {"helpful": 0.5, "honest": 0.5, "harmless": 0.5}  # of the scores in PPO
SAMPLED, RANKED = 3, 4  # answers per ranking: sampled from the SFT model, and in all; writers give the rest
MAX_NEW_TOKENS = 28
BATCH, REWARD_BATCH, PPO_BATCH = 16, 8, 64  # lessons and instructions, rankings, prompts per step or iteration
EVALUATED = 100  # held-out lessons and instructions


class Budget(NamedTuple):
    """How much of everything; steps are optimizer steps, except PPO's iterations."""

    pretrain_steps: int = 240
    sft_steps: int = 280
    rankings: int = 2560
    reward_steps: int = 320
    ppo_iterations: int = 40
    judged: int = 600


FULL = Budget()
QUICK = Budget(pretrain_steps=5, sft_steps=5, rankings=32, reward_steps=3, ppo_iterations=1, judged=16)


class Judged(NamedTuple):
    """A policy's answers to the held-out tasks, with the checker's verdicts."""

    answers: list[str]
    verdicts: list[Verdict]

    def share(self, criterion: str) -> float:
        return sum(getattr(verdict, criterion) for verdict in self.verdicts) / len(self.verdicts)


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


def train_sft(
    output: Path, model: str, data: str, name: str, steps: int, learning_rate: float, seed: int, device: str, show: Sink
) -> None:
    """Full fine-tuning of one of the output's models on one of its data files; the result is saved under ``name``."""
    from fastrl.train import sft

    sft.main(
        sft.SFTConfig(
            model=str(output / model),
            data=str(output / f"data/{data}.jsonl"),
            output=str(output / name),
            max_length=MAX_LENGTH,
            max_steps=steps,
            batch_size=BATCH,
            micro_batch_size=BATCH,
            packing="balanced",
            learning_rate=learning_rate,
            warmup_steps=50,
            eval_limit=EVALUATED,
            lora_rank=0,
            device=device,
            seed=seed,
            eval_every=0,
            save_every=0,
        ),
        show,
    )


def train_reward(output: Path, steps: int, seed: int, device: str, show: Sink) -> dict[str, Any]:
    """The reward model, from the SFT model and the rankings; returns its final metrics."""
    from fastrl.train import reward

    return reward.main(
        reward.RewardConfig(
            model=str(output / "sft"),
            data=str(output / "data/rankings.jsonl"),
            eval_data=str(output / "data/held_out_rankings.jsonl"),
            output=str(output / "reward"),
            max_length=MAX_LENGTH,
            max_steps=steps,
            batch_size=REWARD_BATCH,
            micro_batch_size=REWARD_BATCH // 2,
            learning_rate=7e-4,
            warmup_steps=20,
            normalize_prompts=500,
            lora_rank=0,
            device=device,
            seed=seed,
            eval_every=0,
            save_every=0,
        ),
        show,
    )


def train_ppo(
    output: Path, criteria: Sequence[str], iterations: int, seed: int, device: str, show: Sink
) -> dict[str, Any]:
    """PPO from the SFT model on the weighted sum of the scores; returns its final metrics on held-out prompts."""
    from fastrl.train import ppo

    return ppo.main(
        ppo.PPOConfig(
            model=str(output / "sft"),
            reward_model=str(output / "reward"),
            reward_weights={criterion: WEIGHTS[criterion] for criterion in criteria},
            data=str(output / "data/prompts.jsonl"),
            output=str(output / "ppo"),
            iterations=iterations,
            batch_size=PPO_BATCH,
            minibatch_size=PPO_BATCH // 2,
            micro_batch_size=PPO_BATCH // 2,
            epochs=2,
            max_prompt_length=MAX_LENGTH - MAX_NEW_TOKENS,
            max_new_tokens=MAX_NEW_TOKENS,
            no_stop_score=-2.0,
            learning_rate=2e-4,
            critic_learning_rate=3e-4,
            kl_coef=0.05,
            lora_rank=0,
            device=device,
            seed=seed,
            eval_every=0,
        ),
        show,
    )


def write_rankings(output: Path, seed: int, budget: Budget, device: str) -> list[str]:
    """K answers of the SFT model to each prompt, ranked by the labeller; held-out prompts in a file of their own.

    Returns the criteria that rankings of training prompts are by.
    """
    for name, held_out, count in (
        ("rankings", False, budget.rankings),
        ("held_out_rankings", True, max(16, budget.rankings // 16)),
    ):
        rng = Random(f"labeller {seed} {held_out}")
        chosen = list(islice(tasks(seed + 1_000, held_out=held_out), count))
        prompts = [task.prompt for task in chosen for _ in range(SAMPLED)]
        answers = iter(sample_answers(output / "sft", prompts, seed, device))
        groups = [
            [*islice(answers, SAMPLED), *(written_answer(task, rng, GOOD_SHARE) for _ in range(SAMPLED, RANKED))]
            for task in chosen
        ]
        records = [_ranking(task, group, rng) for task, group in zip(chosen, groups, strict=True)]
        records = [record for record in records if len(set(record["ranks"])) > 1]
        _write_jsonl(output / f"data/{name}.jsonl", records)
        if not held_out:
            criteria = [c for c in CRITERIA if any(record.get("criterion") == c for record in records)]
    return criteria


def _ranking(task: Task, answers: Sequence[str], rng: Random) -> dict[str, Any]:
    """A record of preference data; one that names no criterion is by all of them."""
    record: dict[str, Any] = {"prompt": task.prompt, "responses": answers}
    if rng.random() < OVERALL_SHARE:
        return record | {"ranks": rank(task, answers, rng, SLIP_SHARE)}
    criterion, ranks = rank_by_one(task, answers, rng, SLIP_SHARE)
    return record | {"ranks": ranks, "criterion": criterion}


def judge_policy(folder: Path, held_out: Sequence[Task], seed: int, device: str) -> Judged:
    """Sampled answers (temperature 1, as in PPO) of the policy in a folder, and the checker's verdicts."""
    answers = sample_answers(folder, [task.prompt for task in held_out], seed, device)
    return Judged(answers, [judge(task, answer) for task, answer in zip(held_out, answers, strict=True)])


def sample_answers(folder: Path, prompts: Sequence[str], seed: int, device: str, batch_size: int = 256) -> list[str]:
    """One sampled answer to each prompt from the policy in a folder."""
    import torch
    from tqdm import trange

    from fastrl.data.templates import encode_prompt
    from fastrl.models import load_policy, load_tokenizer
    from fastrl.rollout import decode_responses, rollout

    tokenizer, model = load_tokenizer(folder), load_policy(folder, device=device)
    generator = torch.Generator(device).manual_seed(seed)
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
