"""What PPO's iterations hand on beside the models, and how advantages and metrics are made with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastrl.ops import Advantages, AdvantageStats, ppo_advantages
from fastrl.rlhf.kl import adapted
from fastrl.rlhf.shaping import add_scores, no_scores, shape_scores
from fastrl.rollout import Trajectory
from fastrl.train.experience import ScoredTrajectory


@dataclass
class PPOState:
    """Numbers and tensors alone: checkpoints keep it."""

    kl_scale: float = 1.0  # what kl_target has made of kl_coef so far
    scores: Tensor = field(default_factory=no_scores)  # moments of all scores of the run
    best_score: float = -math.inf  # of the evaluations so far
    best_step: int = 0
    warned: bool = False  # that no response ends


def compute_advantages(scored: ScoredTrajectory, mask: Tensor, cfg: Any, state: PPOState) -> Advantages:
    """Scores shaped (`rlhf/shaping.py`), KL penalty, rewards, advantages and returns.

    Args:
        cfg: `ppo_settings.KLSettings`, `ScoreSettings` and `AdvantageSettings`.
    """
    scores = shape_scores(
        scored.scores,
        mask.sum(1),
        moments=state.scores if cfg.score_norm else None,
        length_penalty=cfg.length_penalty,
        length_free=cfg.length_free,
    )
    return ppo_advantages(
        scored.logprobs,
        scored.ref_logprobs,
        scored.values,
        scores,
        mask,
        kl_coef=kl_coef(cfg, state) if cfg.kl_in == "reward" else 0.0,
        kl_estimator=cfg.kl_estimator,
        kl_clip=cfg.kl_clip,
        score_clip=cfg.score_clip,
        gamma=cfg.gamma,
        gae_lambda=cfg.gae_lambda,
        center=cfg.center_advantages,
        scale=cfg.scale_advantages,
    )


def kl_coef(cfg: Any, state: PPOState) -> float:
    """The weight of the KL in this iteration; a run that goes on with another `kl_coef` scales that."""
    return cfg.kl_coef * state.kl_scale


def see_scores(state: PPOState, scores: Tensor, cfg: Any) -> None:
    """The iteration's scores are among those that `score_norm` normalises by."""
    if cfg.score_norm:
        state.scores = add_scores(state.scores, scores)


def adapt(state: PPOState, stats: AdvantageStats, cfg: Any) -> dict[str, float]:
    """With `kl_target`, the next iteration's coefficient from the KL that this one reports; its own as a metric."""
    if cfg.kl_target is None:
        return {}
    used, kl = kl_coef(cfg, state), float(stats.kl_sum_mean)
    state.kl_scale = adapted(state.kl_scale, kl, target=cfg.kl_target, horizon=cfg.kl_horizon, samples=cfg.batch_size)
    return {"kl_coef": used}


def summarise(trajectory: Trajectory, scores: Tensor, stats: AdvantageStats, estimator: str) -> dict[str, Any]:
    """Means over responses: score as it was given, reward = shaped score - KL penalty, KL by the named estimator,
    length, share stopped.
    """
    return {
        "score": float(scores.double().mean().float()),
        "reward": float(stats.reward_sum_mean),
        f"kl_{estimator}": float(stats.kl_sum_mean),
        f"kl_{estimator}_per_token": float(stats.kl_mean),
        "response_tokens": float(stats.tokens / stats.sequences),
        "stopped": float(trajectory.stopped.float().mean()),
    }


def unended(state: PPOState, trajectory: Trajectory, cfg: Any) -> str:
    """What to tell, once in a run, where no stop token ended any response; else nothing."""
    if state.warned or trajectory.stopped.any():
        return ""
    state.warned = True
    return (
        f"warning: all {len(trajectory.stopped)} responses reached max_new_tokens {cfg.max_new_tokens} without a stop"
        " token, and are scored as they are cut; raise max_new_tokens, check stop_tokens, or set no_stop_score"
    )
