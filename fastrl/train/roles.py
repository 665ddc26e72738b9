"""The four models of PPO: policy and critic are trained; reference and reward model are what these were loaded as."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastrl.models import (
    Policy,
    Scorer,
    check_tuner,
    describe,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    tune,
)
from fastrl.models.probe import check_policy, check_scalar
from fastrl.models.saving import save_merged_base
from fastrl.models.score_heads import check_one_criterion
from fastrl.models.tuners import Full, TunerSettings
from fastrl.rollout import Trajectory
from fastrl.run.metrics import PhaseTimer
from fastrl.train.experience import ScoredTrajectory, response_scores, response_values, sampled_logprobs


class Roles(NamedTuple):
    """The reference is the policy while its tuner is off, the reward model the critic while its tuner is off."""

    policy: Policy
    critic: Scorer


def load_roles(
    policy_path: str,
    reward_path: str,
    tokenizer: Any,
    *,
    tuner: TunerSettings,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
) -> Roles:
    """Policy and critic as they are loaded, for `tune_roles` once nothing can be refused any more.

    Raises:
        ValueError: the reward model has another vocabulary than the policy, or several criteria; a tuner does not fit.
    """
    if load_tokenizer(reward_path).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"ppo: reward_model {reward_path}: expected the tokenizer of the policy {policy_path},"
            " got another vocabulary; train the reward model from the same base model"
        )
    policy: Any = load_policy(policy_path, dtype=dtype, device=device)
    check_policy(policy, tokenizer, policy_path)
    critic: Any = load_scalar_model(reward_path, dtype=dtype, device=device)
    check_one_criterion(critic, reward_path)
    check_scalar(critic, tokenizer, reward_path)
    for model in (policy, critic):
        check_tuner(model, tuner)
    return Roles(Policy(Full(policy)), Scorer(Full(critic)))


def save_merged_bases(roles: Roles, tokenizer: Any, output: str | Path) -> None:
    """Folders under `output` for the bases that were merged from adapters; call it before `tune_roles`."""
    save_merged_base(roles.policy.model, tokenizer, output)
    save_merged_base(roles.critic.model, tokenizer, Path(output) / "critic")


def tune_roles(roles: Roles, settings: TunerSettings) -> Roles:
    """Policy and critic with their tuners, which can go back to the loaded models.

    In eval mode: dropout stays off, so that old and new log-probs differ by the update alone. Adapters are drawn from
    torch's global generator.
    """
    policy, critic = (tune(model, settings, keep_loaded=True) for model in (roles.policy.model, roles.critic.model))
    roles = Roles(Policy(policy).eval(), Scorer(critic).eval())
    for name, role in zip(Roles._fields, roles, strict=True):
        print(f"{name}: {describe(role, settings)}")
    return roles


@torch.no_grad()
def score_trajectory(
    roles: Roles,
    trajectory: Trajectory,
    *,
    micro_batch_size: int,
    temperature: float = 1.0,
    no_stop_score: float | None = None,
    timer: PhaseTimer | None = None,
) -> ScoredTrajectory:
    """Scores, log-probs of policy and reference, values: forward passes over `micro_batch_size` rows.

    A response that no stop token ended gets `no_stop_score` where that is given.
    """
    timer = timer or PhaseTimer()
    with timer.phase("score"), roles.critic.tuner.off():
        scores = response_scores(roles.critic, trajectory, micro_batch_size)
        if no_stop_score is not None:
            scores = torch.where(trajectory.stopped, scores, no_stop_score)
    with timer.phase("logprobs"):
        logprobs, entropy = sampled_logprobs(roles.policy, trajectory, micro_batch_size, temperature)
        with roles.policy.tuner.off():
            ref_logprobs, _ = sampled_logprobs(roles.policy, trajectory, micro_batch_size, temperature)
        values = response_values(roles.critic, trajectory, micro_batch_size)
    return ScoredTrajectory(scores, logprobs, entropy, ref_logprobs, values)
