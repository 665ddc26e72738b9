"""PPO's update: minibatch epochs of policy and critic on the experience of an iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fastrl.ops import PPOStats, ppo_loss
from fastrl.run.config import option
from fastrl.run.distributed import share
from fastrl.run.optim import Learner
from fastrl.run.run import Run
from fastrl.train.epochs import accumulate
from fastrl.train.experience import (
    Experience,
    batch_values,
    by_length,
    gather_stats,
    merge_stats,
    minibatches,
    select_rows,
)
from fastrl.train.roles import Roles


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """Updates"""

    minibatch_size: int = option(32, "responses per optimizer step", at_least=1)
    micro_batch_size: int = option(8, "responses per forward pass; does not change the result", at_least=1)
    epochs: int = option(4, "passes over the responses of an iteration", at_least=1)
    clip_coef: float = option(0.2, "the probability ratio is clipped to 1 +- this", above=0)
    target_kl: float | None = option(
        None, "ends the updates of an iteration once approx_kl and the size of ppo_kl are above it", above=0
    )


def update(
    run: Run,
    roles: Roles,
    learners: Sequence[Learner],
    experience: Experience,
    settings: UpdateSettings,
    *,
    temperature: float,
) -> dict[str, float]:
    """Minibatch epochs of PPO on policy and critic; statistics over all of them, weighted by tokens."""
    history: list[PPOStats] = []
    norms: list[list[float]] = []
    rows_of_epochs = minibatches(
        len(experience.returns),
        settings.minibatch_size,
        epochs=settings.epochs,
        seed=run.settings.seed,
        iteration=run.step,
    )
    for rows in rows_of_epochs:
        parts: list[PPOStats] = []
        loss_of = partial(
            minibatch_loss,
            roles=roles,
            experience=experience,
            temperature=temperature,
            clip_coef=settings.clip_coef,
            kept=int(experience.response_mask[rows].sum()),  # of all micro-batches, so that they add up
            parts=parts,
        )
        loss = accumulate(share(by_length(experience, rows)), settings.micro_batch_size, loss_of)
        norms.append(run.update(loss, *learners)[1])
        history.append(merge_stats(gather_stats(parts)))
        if settings.target_kl is not None and exceeds(history[-1], settings.target_kl):
            break
    means = {name: float(value) for name, value in merge_stats(history)._asdict().items()}
    means["ppo_kl"] = means.pop("kl")  # verl's name; kl_k1 and its like are of the reference
    for unused in ("tokens", "entropy", "explained_variance"):  # of the rollout, reported by the caller
        del means[unused]
    return {
        **means,
        "first_approx_kl": float(history[0].approx_kl),
        "grad_norm": sum(norm for norm, _ in norms) / len(norms),
        "critic_grad_norm": sum(norm for _, norm in norms) / len(norms),
        "updates": len(history),
    }


def minibatch_loss(
    rows: Tensor,
    *,
    roles: Roles,
    experience: Experience,
    temperature: float,
    clip_coef: float,
    kept: int,
    parts: list[PPOStats],
) -> Tensor:
    """Loss of policy and critic on rows of a minibatch that keeps `kept` tokens; its statistics go to `parts`."""
    batch = select_rows(experience, rows)
    logprobs = roles.policy(batch.input_ids, batch.attention_mask, batch.response_mask, temperature=temperature)
    loss, stats = ppo_loss(
        logprobs,
        batch_values(roles.critic, batch),
        batch.old_logprobs,
        batch.old_values,
        batch.advantages,
        batch.returns,
        batch.response_mask,
        clip_coef=clip_coef,
        denominator=kept,
    )
    parts.append(stats)
    return loss


def exceeds(stats: PPOStats, target_kl: float) -> bool:
    """Whether both estimates of the KL are above the target, the k1 estimate in size.

    One token with a ratio of e^20 lifts approx_kl alone; of the k1 estimate, a mean of -log r, it is a small part.
    """
    return float(stats.approx_kl) > target_kl and abs(float(stats.kl)) > target_kl
