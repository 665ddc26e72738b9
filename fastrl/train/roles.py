"""The four models of PPO: policy and critic are trained, reference and reward model stay as they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastrl.models import (
    LoRASettings,
    add_lora,
    check_lora,
    load_policy,
    load_scalar_model,
    load_tokenizer,
)
from fastrl.models.probe import check_policy, check_scalar
from fastrl.models.saving import save_merged_base
from fastrl.rollout import Trajectory
from fastrl.run.metrics import PhaseTimer
from fastrl.train.experience import ScoredTrajectory, response_scores, response_values, sampled_logprobs


class Roles(NamedTuple):
    """A frozen model that is None is its trained partner with the adapter switched off."""

    policy: Any
    reference: Any | None
    critic: Any
    reward_model: Any | None


def load_roles(
    policy_path: str,
    reward_path: str,
    tokenizer: Any,
    *,
    lora: LoRASettings | None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
) -> Roles:
    """The models in eval mode: dropout stays off, so that old and new log-probs differ by the update alone.

    Reference and reward model are copies. With LoRA there are none: policy and critic get adapters (`add_adapters`) and
    lend their bases.

    Raises:
        ValueError: the reward model has another vocabulary than the policy.
    """
    if load_tokenizer(reward_path).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"ppo: reward_model {reward_path}: expected the tokenizer of the policy {policy_path},"
            " got another vocabulary; train the reward model from the same base model"
        )
    policy: Any = load_policy(policy_path, dtype=dtype, device=device)
    check_policy(policy, tokenizer, policy_path)
    critic: Any = load_scalar_model(reward_path, dtype=dtype, device=device)
    check_scalar(critic, tokenizer, reward_path)
    if lora:
        for model in (policy, critic):
            check_lora(model, lora)
        return Roles(policy, None, critic, None)
    reference, reward_model = (copy.deepcopy(model).requires_grad_(False).eval() for model in (policy, critic))
    return Roles(policy.eval(), reference, critic.eval(), reward_model)


def save_merged_bases(roles: Roles, tokenizer: Any, output: str | Path) -> None:
    """Folders in output for the bases that were merged from adapters; call it before `add_adapters`."""
    save_merged_base(roles.policy, tokenizer, output)
    save_merged_base(roles.critic, tokenizer, Path(output) / "critic")


def add_adapters(roles: Roles, lora: LoRASettings) -> Roles:
    """LoRA on policy and critic, drawn from torch's global generator."""
    policy, critic = (add_lora(model, lora).eval() for model in (roles.policy, roles.critic))
    return Roles(policy, None, critic, None)


@contextmanager
def before_training(trained: Any, frozen: Any | None) -> Iterator[Any]:
    """The model as it was loaded: its frozen copy, or the trained model with its adapter switched off."""
    if frozen is not None:
        yield frozen
    else:
        with trained.disable_adapter():
            yield trained


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
    with timer.phase("score"), before_training(roles.critic, roles.reward_model) as reward_model:
        scores = response_scores(reward_model, trajectory, micro_batch_size)
        if no_stop_score is not None:
            scores = torch.where(trajectory.stopped, scores, no_stop_score)
    with timer.phase("logprobs"):
        logprobs, entropy = sampled_logprobs(roles.policy, trajectory, micro_batch_size, temperature)
        with before_training(roles.policy, roles.reference) as reference:
            ref_logprobs, _ = sampled_logprobs(reference, trajectory, micro_batch_size, temperature)
        values = response_values(roles.critic, trajectory, micro_batch_size)
    return ScoredTrajectory(scores, logprobs, entropy, ref_logprobs, values)
