"""The four models of PPO: policy and critic are trained, reference and reward model stay as they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

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
from fastrl.train.experience import response_scores, response_values, sampled_logprobs

if TYPE_CHECKING:
    from fastrl.train.ppo import PPOConfig


class Roles(NamedTuple):
    """A frozen model that is None is its trained partner with the adapter switched off."""

    policy: Any
    reference: Any | None
    critic: Any
    reward_model: Any | None


class Assessment(NamedTuple):
    """What the four models say about a trajectory before the update."""

    scores: Tensor  # (B,)
    logprobs: Tensor  # (B, R)
    entropy: Tensor  # (B, R)
    ref_logprobs: Tensor  # (B, R)
    values: Tensor  # (B, R)


def load_roles(cfg: PPOConfig, tokenizer: Any) -> Roles:
    """The models in eval mode: dropout stays off, so that old and new log-probs differ by the update alone.

    Reference and reward model are copies. With LoRA there are none: policy and critic get adapters (`add_adapters`) and
    lend their bases.

    Raises:
        ValueError: the reward model has another vocabulary than the policy.
    """
    if load_tokenizer(cfg.reward_model).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"ppo: reward_model {cfg.reward_model}: expected the tokenizer of the policy {cfg.model},"
            " got another vocabulary; train the reward model from the same base model"
        )
    policy: Any = load_policy(cfg.model, dtype=cfg.dtype, device=cfg.device)
    check_policy(policy, tokenizer, cfg.model)
    critic: Any = load_scalar_model(cfg.reward_model, dtype=cfg.dtype, device=cfg.device)
    check_scalar(critic, tokenizer, cfg.reward_model)
    if cfg.lora_rank > 0:
        for model in (policy, critic):
            check_lora(model, _lora(cfg))
        return Roles(policy, None, critic, None)
    reference, reward_model = (copy.deepcopy(model).requires_grad_(False).eval() for model in (policy, critic))
    return Roles(policy.eval(), reference, critic.eval(), reward_model)


def add_adapters(roles: Roles, tokenizer: Any, cfg: PPOConfig) -> Roles:
    """LoRA on policy and critic, drawn from torch's global generator; bases that were merged get folders in output."""
    save_merged_base(roles.policy, tokenizer, cfg.output)
    save_merged_base(roles.critic, tokenizer, Path(cfg.output) / "critic")
    policy, critic = (add_lora(model, _lora(cfg)).eval() for model in (roles.policy, roles.critic))
    return Roles(policy, None, critic, None)


def _lora(cfg: PPOConfig) -> LoRASettings:
    return LoRASettings(cfg.lora_rank, 2 * cfg.lora_rank, 0.0, cfg.lora_targets)


@contextmanager
def before_training(trained: Any, frozen: Any | None) -> Iterator[Any]:
    """The model as it was loaded: its frozen copy, or the trained model with its adapter switched off."""
    if frozen is not None:
        yield frozen
    else:
        with trained.disable_adapter():
            yield trained


@torch.no_grad()
def assess(roles: Roles, trajectory: Trajectory, cfg: PPOConfig, timer: PhaseTimer) -> Assessment:
    """Scores, log-probs of policy and reference, values: forward passes over `micro_batch_size` rows."""
    size = cfg.micro_batch_size
    with timer.phase("score"), before_training(roles.critic, roles.reward_model) as reward_model:
        scores = response_scores(reward_model, trajectory, size)
        if cfg.no_stop_score is not None:
            scores = torch.where(trajectory.stopped, scores, cfg.no_stop_score)
    with timer.phase("logprobs"):
        logprobs, entropy = sampled_logprobs(roles.policy, trajectory, size, cfg.temperature)
        with before_training(roles.policy, roles.reference) as reference:
            ref_logprobs, _ = sampled_logprobs(reference, trajectory, size, cfg.temperature)
        values = response_values(roles.critic, trajectory, size)
    return Assessment(scores, logprobs, entropy, ref_logprobs, values)
