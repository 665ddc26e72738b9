"""PPO updates or SFT steps of fastrl's loops on a workload; run by bench_train.py.

python -m fastrl.benches.train_fastrl WORKLOAD ppo-lora|ppo-lora-separate|ppo-lora-shared|ppo-full|sft-lora|sft-full
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from fastrl.benches.train_workload import Settings, clock, peak_mib, read
from fastrl.data import Example, pad
from fastrl.data.batches import chunks, sft_batch, supervised_tokens
from fastrl.models import Policy, load_policy, load_tokenizer, tune
from fastrl.rollout import Trajectory, make_trajectory
from fastrl.run.optim import make_optimizer, optimizer_step
from fastrl.run.run import Run
from fastrl.train import ppo, sft
from fastrl.train.experience import make_experience
from fastrl.train.losses import sft_loss
from fastrl.train.ppo_update import update
from fastrl.train.roles import load_roles, tune_roles


def ppo_updates(folder: Path, rank: int, output: str, critic: str = "") -> tuple[list[float], dict[str, float]]:
    """Seconds per update phase: scores, log-probs, values, advantages, minibatch epochs; sampling excluded.

    With `critic`, separate or shared, the reward model is an adapter on the policy.
    """
    settings, prompts, responses = read(folder)
    cfg = ppo.PPOConfig(
        model=str(folder / "policy"),
        reward_model=str(folder / ("adapter" if critic else "reward")),
        critic=critic or "separate",
        data="",
        output=output,
        batch_size=settings.batch,
        minibatch_size=settings.minibatch,
        micro_batch_size=settings.micro_batch,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        critic_learning_rate=settings.learning_rate,
        lora_rank=rank,
        device=settings.device,
        dtype=settings.dtype,
    )
    tokenizer = load_tokenizer(cfg.model)
    on: dict[str, Any] = {"one_base": cfg.critic == "shared", "dtype": cfg.dtype, "device": cfg.device}
    roles = load_roles(cfg.model, cfg.reward_model, tokenizer, tuner=cfg, **on)
    roles = tune_roles(roles, cfg)
    run, learners = Run(cfg, "ppo"), ppo.make_learners(roles, cfg)
    trajectory = Trajectory(*(tensor.to(settings.device) for tensor in fixed_trajectory(prompts, responses)))
    seconds, check = [], {}
    for iteration in range(settings.iterations + 1):
        start = clock(settings.device)
        scored = ppo.score_samples(roles, trajectory, cfg)
        shaped = ppo.compute_advantages(scored, trajectory.response_mask, cfg, ppo.PPOState())
        run.step = iteration
        update(run, roles, learners, make_experience(trajectory, scored, shaped), cfg, kl_coef=cfg.kl_coef)
        seconds.append(clock(settings.device) - start)
        if iteration == 0:
            check = {"surprisal": float(-scored.logprobs.sum(1).mean()), "score": float(scored.scores.mean())}
    return seconds[1:], check


def fixed_trajectory(prompts: list[list[int]], responses: list[list[int]]) -> Trajectory:
    stopped = torch.ones(len(prompts), dtype=torch.bool)
    return make_trajectory(*pad(prompts, 0, side="left"), *pad(responses, 0, side="right"), stopped)


def sft_steps(folder: Path, rank: int, output: str) -> tuple[list[float], dict[str, float]]:
    """Seconds per optimizer step, as in fastrl.train.sft."""
    settings, prompts, responses = read(folder)
    cfg = sft.SFTConfig(model=str(folder / "policy"), data="", lora_rank=rank, lora_alpha=2 * rank)
    policy = Policy(tune(load_policy(cfg.model, dtype=settings.dtype, device=settings.device), cfg)).train()
    optimizer = make_optimizer(policy, learning_rate=settings.learning_rate)
    examples = [Example(p + r, [False] * len(p) + [True] * len(r)) for p, r in zip(prompts, responses, strict=True)]
    examples.sort(key=lambda example: len(example.input_ids))
    targets = supervised_tokens(examples)
    seconds, losses = [], []
    for step in range(settings.iterations + 1):
        start = clock(settings.device)
        loss = 0.0
        for micro in chunks(examples, settings.micro_batch):
            part = sft_loss(policy, sft_batch(micro, 0, policy.device), denominator=targets)
            part.backward()
            loss += float(part.detach())
        optimizer_step(policy, optimizer, None, max_grad_norm=1.0, step=step)
        seconds.append(clock(settings.device) - start)
        losses.append(loss)
    return seconds[1:], {"loss": losses[0]}


def main(folder: Path, task: str) -> None:
    settings: Settings = read(folder)[0]
    torch.set_num_threads(settings.threads)
    transformers.set_seed(settings.seed)
    imported = peak_mib(settings.device)
    loop, tuner, *critic = task.split("-")
    rank = settings.lora_rank if tuner == "lora" else 0
    with tempfile.TemporaryDirectory() as output:
        updates = ppo_updates if loop == "ppo" else sft_steps
        seconds, check = updates(folder, rank, output, *critic)
    report = {"seconds": seconds, "peak_mib": peak_mib(settings.device), "imported_mib": imported, "check": check}
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
