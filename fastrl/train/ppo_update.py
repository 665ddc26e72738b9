"""PPO's update: the optimizers, and minibatch epochs of policy and critic on the experience of an iteration."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastrl.data import Example
from fastrl.ops import PPOStats, ppo_loss
from fastrl.rlhf.kl import kl_penalty
from fastrl.run.distributed import share, sum_over_ranks
from fastrl.run.optim import Learner, make_optimizer, make_schedule
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
from fastrl.train.ptx import ptx_gradients
from fastrl.train.roles import Roles


def make_learners(roles: Roles, cfg: Any) -> list[Learner]:
    """Optimizer and schedule of policy and critic; a step of a schedule is an iteration."""
    learners = []
    for model, rate in ((roles.policy, cfg.learning_rate), (roles.critic, cfg.critic_learning_rate)):
        optimizer = make_optimizer(model, learning_rate=rate, weight_decay=cfg.weight_decay, eps=cfg.adam_eps)
        schedule = make_schedule(
            optimizer, kind=cfg.schedule, warmup_steps=cfg.warmup_steps, total_steps=cfg.iterations
        )
        learners.append(Learner(model, optimizer, schedule))
    return learners


def update(
    run: Run,
    roles: Roles,
    learners: Sequence[Learner],
    experience: Experience,
    cfg: Any,
    *,
    kl_coef: float,
    ptx: Sequence[Sequence[Example]] = (),
    pad_id: int = 0,
) -> dict[str, float]:
    """Minibatch epochs of PPO on policy and critic; statistics over all of them, weighted by tokens.

    Args:
        cfg: `ppo_settings.UpdateSettings`, `LossSettings`, `KLSettings`, `PTXSettings`, and `temperature`.
        kl_coef: weight of the KL to the reference, where it is in the loss.
        ptx: for each optimizer step the examples whose SFT loss is added, padded with `pad_id`; empty: none.
    """
    history: list[PPOStats] = []
    norms: list[list[float]] = []
    ptx_losses: list[Tensor] = []
    rows_of_epochs = minibatches(
        len(experience.returns),
        cfg.minibatch_size,
        epochs=cfg.epochs,
        seed=run.settings.seed,
        iteration=run.step,
    )
    for step, rows in enumerate(rows_of_epochs):
        parts: list[PPOStats] = []
        loss_of = partial(
            minibatch_loss,
            roles=roles,
            experience=experience,
            cfg=cfg,
            kl_coef=kl_coef,
            kept=int(experience.response_mask[rows].sum()),  # of all micro-batches, so that they add up
            parts=parts,
        )
        loss = accumulate(share(by_length(experience, rows)), cfg.micro_batch_size, loss_of)
        if ptx:
            ptx_losses.append(ptx_gradients(roles.policy, ptx[step], cfg, pad_id))
            loss = loss + ptx_losses[-1]
        norms.append(run.update(loss, *learners)[1])
        history.append(merge_stats(gather_stats(parts)))
        if cfg.target_kl is not None and exceeds(history[-1], cfg.target_kl):
            break
    means = {name: float(value) for name, value in merge_stats(history)._asdict().items()}
    means["ppo_kl"] = means.pop("kl")  # verl's name; kl_k1 and its like are of the reference
    for unused in ("tokens", "entropy", "explained_variance"):  # of the rollout, reported by the caller
        del means[unused]
    if ptx:
        means["ptx_loss"] = float(sum_over_ranks(torch.stack(ptx_losses).mean())) / cfg.ptx_coef
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
    cfg: Any,
    kl_coef: float,
    kept: int,
    parts: list[PPOStats],
) -> Tensor:
    """Loss of policy and critic on rows of a minibatch that keeps `kept` tokens; its statistics go to `parts`."""
    batch = select_rows(experience, rows)
    mask = batch.response_mask
    with_entropy = cfg.ent_coef > 0  # of this pass: the bonus has to reach the policy's weights
    passed = roles.policy(
        batch.input_ids, batch.attention_mask, mask, temperature=cfg.temperature, return_entropy=with_entropy
    )
    logprobs, entropy = passed if with_entropy else (passed, None)
    loss, stats = ppo_loss(
        logprobs,
        batch_values(roles.critic, batch),
        batch.old_logprobs,
        batch.old_values,
        batch.advantages,
        batch.returns,
        mask,
        entropy=entropy,
        clip_coef=cfg.clip_coef,
        vf_clip_coef=cfg.vf_clip_coef,
        vf_coef=cfg.vf_coef,
        ent_coef=cfg.ent_coef,
        dual_clip=cfg.dual_clip,
        denominator=kept,
    )
    parts.append(stats)
    if cfg.kl_in == "loss":
        estimator = cfg.kl_estimator
        loss = loss + kl_coef * kl_penalty(logprobs, batch.ref_logprobs, mask, estimator=estimator, denominator=kept)
    return loss


def exceeds(stats: PPOStats, target_kl: float) -> bool:
    """Whether both estimates of the KL are above the target, the k1 estimate in size.

    One token with a ratio of e^20 lifts approx_kl alone; of the k1 estimate, a mean of -log r, it is a small part.
    """
    return float(stats.approx_kl) > target_kl and abs(float(stats.kl)) > target_kl
