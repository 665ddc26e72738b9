"""The four models of PPO: policy and critic are trained; reference and reward model are what these were loaded as.

Each of the two has base weights of its own, or under LoRA all four have the same ones: the reward model is then the
adapter and head of its folder, not merged, and the critic starts as a copy of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.data import Prompt
from fastrl.models import (
    Policy,
    Scorer,
    check_tuner,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    only_criterion,
    score_head,
    tune,
)
from fastrl.models.probe import check_policy, check_scalar
from fastrl.models.saving import save_merged_base
from fastrl.models.sharing import load_scalar_adapter, share_name
from fastrl.models.tuners import Full, TunerSettings
from fastrl.rlhf.rewards import check_weights, parse_weights
from fastrl.rollout import Trajectory
from fastrl.run.metrics import PhaseTimer
from fastrl.train.experience import ScoredTrajectory, response_scores, response_values, sampled_logprobs
from fastrl.train.rewards import Rewards, add_rewards, load_rewards
from fastrl.train.role_memory import describe_roles


class Roles(NamedTuple):
    """The reference is the policy while its tuner is off, the reward model the critic while its tuner is off."""

    policy: Policy
    critic: Scorer
    weights: Mapping[str, float] = {}  # of the reward model's criteria in the score; none: its one criterion
    rewards: Rewards | None = None  # added to it
    one_base: bool = False  # the critic's frozen weights are the policy's


def load_roles(
    policy_path: str,
    reward_path: str,
    tokenizer: Any,
    *,
    tuner: TunerSettings,
    weights: str | Mapping[str, float] = "",
    one_base: bool = False,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
) -> Roles:
    """Policy and critic as they are loaded, for `tune_roles` once nothing can be refused any more.

    Args:
        weights: of the reward model's criteria, as `reward_weights`. The critic's value is the same weighted sum, but
            the plain one where all weights are 0.
        one_base: the reward model is an adapter that goes on the policy's own weights; see `load_scalar_adapter`.
    Raises:
        ValueError: the reward model has another vocabulary than the policy, or other criteria than there are weights
            for; a tuner does not fit; there is no base that both have.
    """
    weights = parse_weights(weights)
    if load_tokenizer(reward_path).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"ppo: reward_model {reward_path}: expected the tokenizer of the policy {policy_path},"
            " got another vocabulary; train the reward model from the same base model"
        )
    policy: Any = load_policy(policy_path, dtype=dtype, device=device)
    check_policy(policy, tokenizer, policy_path)
    check_tuner(policy, tuner)
    critic: Any
    if one_base:
        critic = load_scalar_adapter(reward_path, policy)
    else:
        critic = load_scalar_model(reward_path, dtype=dtype, device=device)
        check_tuner(critic, tuner)
    check_weights(weights, score_head(critic).names, reward_path)
    check_scalar(critic, tokenizer, reward_path)
    of_value = weights if any(weights.values()) else dict.fromkeys(weights, 1.0)
    return Roles(Policy(Full(policy)), Scorer(Full(critic), of_value), weights, one_base=one_base)


def with_rewards(roles: Roles, settings: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> Roles:
    """The roles with what `settings.rewards` names; see `load_rewards`."""
    rewards = load_rewards(
        settings.rewards,
        tokenizer,
        prompts,
        taken=part_names(roles),
        max_new_tokens=settings.max_new_tokens,
        dtype=settings.dtype,
        device=roles.critic.device,
    )
    return roles._replace(rewards=rewards)


def save_merged_bases(roles: Roles, tokenizer: Any, output: str | Path) -> None:
    """Folders under `output` for the bases that were merged from adapters; call it before `tune_roles`."""
    save_merged_base(roles.policy.model, tokenizer, output)
    if roles.one_base:
        share_name(roles.critic.model, roles.policy.model)
    else:
        save_merged_base(roles.critic.model, tokenizer, Path(output) / "critic")


def tune_roles(roles: Roles, settings: TunerSettings) -> Roles:
    """Policy and critic with their tuners, which can go back to the loaded models.

    A critic on the policy's base goes on with the reward model's adapter; `off` exchanges that with a copy of it as it
    was loaded. In eval mode: dropout stays off, so that old and new log-probs differ by the update alone. Adapters are
    drawn from torch's global generator.
    """
    policy = tune(roles.policy.model, settings, keep_loaded=True)
    model = roles.critic.model
    critic = Full(model, keep_loaded=True) if roles.one_base else tune(model, settings, keep_loaded=True)
    roles = roles._replace(policy=Policy(policy).eval(), critic=Scorer(critic, roles.critic.weights).eval())
    print(*describe_roles(roles.policy, roles.critic, settings), sep="\n")
    return roles


@torch.no_grad()
def score_trajectory(
    roles: Roles,
    trajectory: Trajectory,
    *,
    micro_batch_size: int,
    temperature: float = 1.0,
    no_stop_score: float | None = None,
    prompts: Sequence[Prompt] = (),
    timer: PhaseTimer | None = None,
) -> ScoredTrajectory:
    """Scores, log-probs of policy and reference, values: forward passes over `micro_batch_size` rows.

    A response that no stop token ended gets `no_stop_score` where that is given. The prompts are for the rewards that
    are added.
    """
    timer = timer or PhaseTimer()
    with timer.phase("score"):
        scores, parts = reward_scores(roles, trajectory, micro_batch_size)
        if roles.rewards:
            scores, added = add_rewards(scores, roles.rewards, prompts, trajectory, micro_batch_size)
            parts |= added
        if no_stop_score is not None:
            scores = torch.where(trajectory.stopped, scores, no_stop_score)
    with timer.phase("logprobs"):
        logprobs, entropy = sampled_logprobs(roles.policy, trajectory, micro_batch_size, temperature)
        with roles.policy.tuner.off():
            ref_logprobs, _ = sampled_logprobs(roles.policy, trajectory, micro_batch_size, temperature)
        values = response_values(roles.critic, trajectory, micro_batch_size)
    return ScoredTrajectory(scores, logprobs, entropy, ref_logprobs, values, parts if len(parts) > 1 else {})


def reward_scores(roles: Roles, trajectory: Trajectory, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The reward model's score (B,), and what it is summed of, by name."""
    with roles.critic.tuner.off():
        columns = response_scores(roles.critic, trajectory, size)
    head = score_head(roles.critic.model)
    scores = head.combine(columns, roles.weights) if roles.weights else only_criterion(columns)
    return scores, dict(zip(part_names(roles), columns.unbind(-1), strict=True))


def part_names(roles: Roles) -> tuple[str, ...]:
    """As what the parts of the reward model's score are reported: its criteria, or `reward_model` if it has one."""
    names = score_head(roles.critic.model).names
    return names if len(names) > 1 else ("reward_model",)
