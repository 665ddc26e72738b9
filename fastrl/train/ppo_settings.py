"""PPO's settings, in groups as those of `fastrl.run.settings`, and which of them contradict each other."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from fastrl.data.templates import TEMPLATES
from fastrl.models.tuners import tuner_name
from fastrl.rlhf.kl import LOSS_ESTIMATORS
from fastrl.rlhf.rewards import FORMS, parse_rewards, parse_weights
from fastrl.run.config import option


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Rewards and critic"""

    critic: str = option(
        "separate",
        "separate: policy and critic have base weights of their own; shared: one set for policy, reference, critic and"
        " reward model, which must be a LoRA adapter on the policy (the critic then goes on with it)",
        choices=("separate", "shared"),
    )
    reward_weights: dict[str, float] | str = option(
        "", "weights of the criteria of reward_model, as helpful=1,harmless=0.5; needed if it has several"
    )
    rewards: list[str] | str = option("", f"added to the score: {FORMS}, or a list of them; WEIGHT* may be left out: 1")


@dataclass(frozen=True, kw_only=True)
class KLSettings:
    """KL to the reference"""

    kl_coef: float = option(0.05, "weight of the KL penalty; with kl_target, where it starts", at_least=0)
    kl_estimator: str = option("k1", "estimator of the KL penalty and of the reported KL", choices=("k1", "k2", "k3"))
    kl_in: str = option("reward", "where the penalty is: reward, or loss (k2 or k3)", choices=("reward", "loss"))
    kl_clip: float | None = option(None, "clip the KL of a token to +- this in the reward", above=0)
    kl_target: float | None = option(
        None,
        "adapt kl_coef to this KL, in nats per response; null: fixed (target_kl ends updates)",
        above=0,
    )
    kl_horizon: int = option(10_000, "responses in which kl_coef can grow by a fifth", at_least=1)


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Scores"""

    score_norm: bool = option(False, "normalise scores by mean and deviation of all scores of the run so far")
    length_penalty: float = option(0.0, "subtract this from the score for each token beyond length_free", at_least=0)
    length_free: int = option(0, "tokens of a response that cost no length_penalty", at_least=0)
    score_clip: float | None = option(None, "clip scores to +- this, after all of the above", above=0)


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings:
    """Advantages"""

    gamma: float = option(1.0, "discount from token to token", at_least=0, at_most=1)
    gae_lambda: float = option(0.95, "lambda of generalized advantage estimation", at_least=0, at_most=1)
    center_advantages: bool = option(True, "subtract their mean over all kept tokens")
    scale_advantages: bool = option(True, "divide them by their standard deviation over all kept tokens")


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Loss"""

    clip_coef: float = option(0.2, "clip the probability ratio to 1 +- this", above=0)
    dual_clip: float | None = option(None, "bound the loss of tokens with negative advantage A at -this * A", above=1)
    vf_coef: float = option(0.1, "weight of the value loss", at_least=0)
    vf_clip_coef: float | None = option(0.2, "clip values to +- this around the old ones; null: no clipping", above=0)
    ent_coef: float = option(0.0, "weight of the entropy bonus", at_least=0)


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """Updates"""

    minibatch_size: int = option(32, "responses per optimizer step", at_least=1)
    micro_batch_size: int = option(8, "responses per forward pass; does not change the result", at_least=1)
    epochs: int = option(4, "passes over the responses of an iteration", at_least=1)
    target_kl: float | None = option(
        None, "end an iteration's updates once approx_kl and |ppo_kl| exceed this", above=0
    )


@dataclass(frozen=True, kw_only=True)
class PTXSettings:
    """Mix of pretraining data (PTX)"""

    ptx_data: list[str] | str = option("", "SFT data whose loss is added in every step, in the formats of fastrl sft")
    ptx_columns: dict[str, str] | str = option("", "names of ptx_data's columns, as prompt=question,completion=answer")
    ptx_template: str = option(
        "auto", "of ptx_data: auto (the policy's), chat, alpaca, or none (plain texts)", choices=TEMPLATES
    )
    ptx_coef: float = option(1.0, "weight of the SFT loss, a mean over tokens (InstructGPT: 27.8)", above=0)
    ptx_batch_size: int = option(16, "examples of ptx_data per optimizer step", at_least=1)
    ptx_max_length: int = option(512, "longest prompt + response of ptx_data in tokens", at_least=2)


NEEDS = {
    "kl_horizon": "kl_target",
    "length_free": "length_penalty",
    **{name: "ptx_data" for name in ("ptx_columns", "ptx_template", "ptx_coef", "ptx_batch_size", "ptx_max_length")},
}


def check_contradictions(cfg: Any) -> None:
    """Refuse settings of PPO that do not fit each other.

    Raises:
        ValueError: an option is set that others leave without effect, or rewards are written in another form.
    """
    parse_weights(cfg.reward_weights)
    parse_rewards(cfg.rewards)
    defaults = {item.name: item.default for item in fields(cfg)}
    for name, needed in NEEDS.items():
        value = getattr(cfg, name)
        if value != defaults[name] and not getattr(cfg, needed):
            _refuse(name, f"{needed} beside it", f"{value!r} alone, which changes nothing")
    if cfg.critic == "shared" and (tuner := tuner_name(cfg)) != "lora":
        _refuse("critic", f"separate with tuner {tuner}: adapters of LoRA alone can share their base", "shared")
    if cfg.kl_in == "loss" and cfg.kl_estimator not in LOSS_ESTIMATORS:
        _refuse("kl_estimator", "k2 or k3 with kl_in loss", "k1, whose gradient is 0 in expectation: no penalty at all")
    if cfg.kl_in == "loss" and cfg.kl_clip is not None:
        _refuse("kl_clip", "kl_in reward, where it clips", f"{cfg.kl_clip} with kl_in loss")
    if cfg.kl_target is not None and cfg.kl_coef == 0:
        _refuse("kl_coef", "a number above 0 with kl_target, which multiplies it", "0")
    if cfg.kl_target is not None and cfg.kl_horizon < cfg.batch_size:
        _refuse("kl_horizon", f"at least batch_size {cfg.batch_size}", str(cfg.kl_horizon))
    if cfg.length_penalty and cfg.length_free >= cfg.max_new_tokens:
        _refuse("length_free", f"less than max_new_tokens {cfg.max_new_tokens}", f"{cfg.length_free}: no penalty")


def _refuse(name: str, expected: str, got: str) -> None:
    raise ValueError(f"{name}: expected {expected}, got {got}")
