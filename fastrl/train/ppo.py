"""PPO on rewards: sample, score, estimate advantages, update policy and critic.

After Ziegler et al. 2019 and Ouyang et al. 2022: a KL penalty per token, a critic of its own that starts from the
reward model, whitened advantages, clipped policy and value losses, and where asked for the SFT loss on other data.

    fastrl ppo --model runs/sft --reward_model runs/reward --data prompts.jsonl --output runs/ppo
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import MISSING, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastrl.data import Prompt, load_prompts
from fastrl.data.split import load_split
from fastrl.data.templates import check_same_template, record_template
from fastrl.masked import masked_mean
from fastrl.models import Policy, check_context, context_length, load_tokenizer, saves_adapter
from fastrl.models.saving import save_model
from fastrl.models.stopping import find_stop_token_ids
from fastrl.rollout import Trajectory, decode_responses, rollout
from fastrl.run.config import checked, option
from fastrl.run.distributed import share
from fastrl.run.metrics import PhaseTimer, keep_lines
from fastrl.run.optim import SCHEDULES
from fastrl.run.output import SAMPLES
from fastrl.run.resume import step_seed
from fastrl.run.run import Run, Sink
from fastrl.run.settings import DataSettings, OptimSettings, RunSettings, SamplingSettings, TunerSettings
from fastrl.train.experience import ScoredTrajectory, gather_rows, make_experience, part_means, shuffled_indices
from fastrl.train.ppo_settings import (
    AdvantageSettings,
    KLSettings,
    LossSettings,
    PTXSettings,
    RewardSettings,
    ScoreSettings,
    UpdateSettings,
    check_contradictions,
)
from fastrl.train.ppo_state import PPOState, adapt, compute_advantages, kl_coef, see_scores, summarise, unended
from fastrl.train.ppo_update import make_learners, update
from fastrl.train.ptx import load_ptx, ptx_batches
from fastrl.train.roles import Roles, load_roles, save_merged_bases, score_trajectory, tune_roles, with_rewards

PRINTED_SAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class PPOConfig(
    PTXSettings, RewardSettings, UpdateSettings, LossSettings, AdvantageSettings, ScoreSettings, KLSettings,
    SamplingSettings, TunerSettings, OptimSettings, DataSettings, RunSettings,
):  # fmt: skip
    """PPO"""

    model: str = option(MISSING, "SFT policy: folder or hub id; an adapter folder is merged", path=True)
    reward_model: str = option(MISSING, "reward model: folder or hub id; the critic starts from it", path=True)
    data: list[str] | str = option(MISSING, "prompts: hub id, JSON/JSONL(.gz), CSV, Parquet, folder, glob, list")
    eval_data: list[str] | str = option("", "held-out prompts; empty: a tenth of data")
    output: str = option("runs/ppo", "folder for the policy, critic/, checkpoints/ and logs", path=True)
    learning_rate: float = option(5e-5, "peak rate of the policy (about 3e-6 for full fine-tuning)", above=0)
    critic_learning_rate: float = option(5e-5, "peak rate of the critic (about 3e-6 for full fine-tuning)", above=0)
    schedule: str = option("linear", "constant, linear or cosine decay to 0", choices=tuple(SCHEDULES))
    warmup_steps: int = option(0, "iterations of linear warm-up", at_least=0)
    adam_eps: float = option(1e-5, "Adam's epsilon; a larger one damps the first updates", above=0)
    max_grad_norm: float = option(1.0, "clip gradients of policy and critic, each to this norm; 0: none", at_least=0)
    lora_rank: int = option(16, "LoRA rank of policy and critic; 0: full fine-tuning", at_least=0)
    lora_alpha: int = option(0, "LoRA scaling is lora_alpha / lora_rank; 0: twice the rank", at_least=0)
    iterations: int = option(200, "rounds of sampling and updating", at_least=1)
    batch_size: int = option(64, "responses sampled per iteration; at most as many prompts are held out", at_least=1)
    eval_every: int = option(20, "iterations between evaluations and checkpoints; 0: at start and end only", at_least=0)
    keep_best: bool = option(False, "also keep the policy with the best held-out score, in output/best")

    def check(self) -> None:
        """Called by `checked`."""
        check_contradictions(self)


def read_prompts(cfg: PPOConfig, roles: Roles, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on and held-out ones, at most `batch_size`. Too long ones are dropped and counted."""
    models = roles.policy.model, roles.critic.model
    for model in models:
        check_context(model, cfg.max_new_tokens + 1, "max_new_tokens + 1", cfg)
    contexts = [context_length(model, cfg) or math.inf for model in models]
    room = int(min(cfg.max_prompt_length, *(context - cfg.max_new_tokens for context in contexts)))
    return load_split(load_prompts, cfg, tokenizer, holdout=0.1, most=cfg.batch_size, max_prompt_length=room)


def stop_ids(policy: Policy, tokenizer: Any, cfg: PPOConfig) -> list[int]:
    """Ids of the tokens that end a response."""
    return find_stop_token_ids(tokenizer, policy.model, [token for token in cfg.stop_tokens.split(",") if token])


def sample(policy: Policy, tokenizer: Any, prompts: Sequence[Prompt], cfg: PPOConfig, iteration: int) -> Trajectory:
    """Responses that depend on the weights, the seed and the number of the iteration alone, and on no other row."""
    with policy.tuner.merged() if cfg.merge_adapter else nullcontext():
        part = rollout(
            policy.model,
            tokenizer,
            [prompt.input_ids for prompt in prompts],
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            stop_token_ids=stop_ids(policy, tokenizer, cfg),
            generator=torch.Generator(policy.device).manual_seed(step_seed(cfg.seed, iteration)),
            rows=share(range(len(prompts))),
        )
    return gather_rows(part, tokenizer.pad_token_id)


def score_samples(
    roles: Roles,
    trajectory: Trajectory,
    cfg: PPOConfig,
    prompts: Sequence[Prompt] = (),
    timer: PhaseTimer | None = None,
) -> ScoredTrajectory:
    """What the rewards, policy, reference and critic say."""
    return score_trajectory(
        roles,
        trajectory,
        micro_batch_size=cfg.micro_batch_size,
        temperature=cfg.temperature,
        no_stop_score=cfg.no_stop_score,
        prompts=prompts,
        timer=timer,
    )


def evaluate(
    run: Run, roles: Roles, tokenizer: Any, prompts: Sequence[Prompt], cfg: PPOConfig, state: PPOState
) -> tuple[dict[str, Any], list[str]]:
    """Metrics and texts of responses to held-out prompts, sampled with the same random numbers every time."""
    run.phase("evaluate")
    trajectory = sample(roles.policy, tokenizer, prompts, cfg, 0)
    scored = score_samples(roles, trajectory, cfg, prompts)
    shaped = compute_advantages(scored, trajectory.response_mask, cfg, state)
    metrics: dict[str, Any] = summarise(trajectory, scored.scores, shaped.stats, cfg.kl_estimator) | part_means(scored)
    if cfg.keep_best:
        if metrics["score"] > state.best_score:
            state.best_score, state.best_step = metrics["score"], run.step
            run.write(lambda: save_model(roles.policy.model, tokenizer, Path(cfg.output) / "best"))
        metrics |= {"best_score": state.best_score, "best_step": state.best_step}
    run.report(metrics, "eval")
    texts, scores = decode_responses(tokenizer, trajectory), scored.scores.tolist()
    rows = zip(prompts, texts, scores, strict=True)
    run.samples([{"prompt": prompt.text, "response": text, "score": score} for prompt, text, score in rows])
    return metrics, texts


def main(cfg: PPOConfig, sink: Sink | None = None) -> dict[str, Any]:
    """Train, evaluate and save; returns the final metrics. A sink gets each record of metrics.

    Raises:
        ValueError: a setting, a model, its tokenizer or the data do not fit.
        NonFiniteError: a loss or gradient became NaN; the last checkpoint is left in place.
    """
    cfg = checked(cfg)
    with Run(cfg, "ppo", sink) as run:
        return train(cfg, run)


def train(cfg: PPOConfig, run: Run) -> dict[str, Any]:
    """The steps of `main`."""
    # models, prompts; the folder is this run's once nothing can be refused
    tokenizer = load_tokenizer(cfg.model)
    check_same_template(record_template(tokenizer, cfg.template), cfg.model, cfg.reward_model)
    how: dict[str, Any] = {"one_base": cfg.critic == "shared", "dtype": cfg.dtype, "device": run.device}
    roles = load_roles(cfg.model, cfg.reward_model, tokenizer, tuner=cfg, weights=cfg.reward_weights, **how)
    stop_ids(roles.policy, tokenizer, cfg)  # names a token that is none
    prompts, held_out = read_prompts(cfg, roles, tokenizer)
    roles = with_rewards(roles, cfg, tokenizer, [*prompts, *held_out])
    others = load_ptx(cfg, roles.policy, tokenizer)
    run.claim()
    if saves_adapter(cfg):
        run.write(lambda: save_merged_bases(roles, tokenizer, cfg.output))
    roles = tune_roles(roles, cfg)
    learners = make_learners(roles, cfg)

    def save(folder: Path) -> None:
        save_model(roles.policy.model, tokenizer, folder)
        save_model(roles.critic.model, tokenizer, folder / "critic")

    state = PPOState()
    run.begin(cfg.iterations, learners, save, state)
    order = islice(shuffled_indices(len(prompts), seed=cfg.seed), run.done * cfg.batch_size, None)
    mixed = ptx_batches(others, cfg, run.done)
    timer = PhaseTimer(run.device, run.phase)
    metrics: dict[str, Any] = {}
    samples = run.write(lambda: keep_lines(Path(cfg.output) / SAMPLES, run.done or -1))
    before = [sample["response"] for sample in samples if sample["step"] == 0]
    if run.done == 0:
        metrics, before = evaluate(run, roles, tokenizer, held_out, cfg, state)

    for iteration in run.steps():
        # 1 sample a response to each prompt
        chosen = [prompts[i] for i in islice(order, cfg.batch_size)]
        with timer.phase("sample"):
            trajectory = sample(roles.policy, tokenizer, chosen, cfg, iteration)
        mask = trajectory.response_mask
        if warning := unended(state, trajectory, cfg):
            run.print(warning)

        # 2 score the responses, 3 log-probs of policy and reference, values of the critic
        scored = score_samples(roles, trajectory, cfg, chosen, timer)

        # 4 shaped scores and KL penalty into rewards, generalized advantages, whitening
        with timer.phase("advantages"):
            see_scores(state, scored.scores, cfg)
            shaped = compute_advantages(scored, mask, cfg, state)

        # 5 minibatch epochs on policy and critic, with the SFT loss on other data
        experience = make_experience(trajectory, scored, shaped)
        lr = learners[0].learning_rate
        with timer.phase("update"):
            ptx, pad_id, coef = next(mixed, []), tokenizer.pad_token_id, kl_coef(cfg, state)
            updated = update(run, roles, learners, experience, cfg, kl_coef=coef, ptx=ptx, pad_id=pad_id)
        for learner in learners:
            learner.schedule.step()

        # 6 report, over kept tokens only; the reported KL adapts its coefficient
        report = {
            **summarise(trajectory, scored.scores, shaped.stats, cfg.kl_estimator),
            **part_means(scored),
            **adapt(state, shaped.stats, cfg),
            "entropy": float(masked_mean(scored.entropy, mask)),
            "value": float(shaped.stats.value_mean),
            "explained_variance": float(shaped.stats.explained_variance),
            **updated,
            "lr": lr,
            **timer.take(),
        }
        run.report(report, tokens=int(mask.sum()))

        # 7 evaluate, show samples, keep the weights
        if run.due(cfg.eval_every) or iteration == cfg.iterations:
            metrics, texts = evaluate(run, roles, tokenizer, held_out, cfg, state)
            for prompt, *answers in list(zip(held_out, before, texts, strict=True))[:PRINTED_SAMPLES]:
                run.print("  prompt: {!r}\n  before: {!r}\n  now:    {!r}".format(prompt.text, *answers))
            run.save(iteration)

    # 8 save
    run.write(lambda: save(Path(cfg.output)))
    return {"iterations": cfg.iterations, "output": cfg.output, **metrics}
