"""torchrl: GAE (both of its functions), k3, the adaptive KL coefficient, and ClipPPOLoss around given log-probs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastrl.conformance.adapter import Adapter, NotOffered
from fastrl.conformance.adapters import installed

CONVENTIONS = {"ppo_loss.closed_form": "critic_coeff weighs the squared error itself, without a factor 1/2"}
CAP = "`max_importance_ratio` is meant for such ratios; it is off by default"
SELECTED = "Its source says that masked positions may hold non-finite values; the loss is finite, the gradient is not"
REMARKS = {
    "ppo_loss.padding": SELECTED,
    "ppo_loss.padding_of_values": SELECTED,
    "ppo_loss.extreme_log_ratios": CAP,
    "ppo_loss.extreme_log_ratios_in_padding": CAP,
}
VECTORS = {"gae.reordering": "makes no promise of equal bits: the sums are those of a convolution over the batch"}


def adapters() -> list[Adapter]:
    version = installed("torchrl", "0.14.1")
    from torchrl.objectives.value.functional import generalized_advantage_estimate, vec_generalized_advantage_estimate

    absent = {
        "token_logprobs": "log-probs are inside TransformersWrapper",
        "linear_logprobs": "no head without logits",
        "linear_cross_entropy": "no head without logits",
        "lora_linear": "LoRA layers are PEFT's",
        "kl_reward": "a transform of environments",
        "whiten": "an option of GAE's module",
        "entropy": "a method of distributions",
        "ranking_loss": "no reward model",
        "pooled_scores": "no reward model",
        "sft_labels": "masks of answers need a chat template (`History`)",
        "sequence_logprobs": "inside TransformersWrapper",
        "resume": "loops are scripts of its users",
    }
    parts: dict[str, Any] = {"kl": kl, "kl_controller": kl_controller, "ppo_loss": ppo_loss}
    loop = Adapter("torchrl", version, gae=partial(gae, generalized_advantage_estimate), absent=absent, **parts)
    vectors = Adapter("torchrl vec", version, gae=partial(gae, vec_generalized_advantage_estimate))
    return [
        replace(loop, conventions=CONVENTIONS, remarks=REMARKS),
        replace(
            vectors,
            conventions=VECTORS,
            remarks={"gae.any_length": "It is lambda 0 that fails"},
            absent=absent | dict.fromkeys(parts, "as torchrl"),
        ),
    ]


def gae(function: Any, rewards, values, mask, gamma, gae_lambda) -> tuple[Tensor, Tensor]:
    """One trajectory a row, done at its end."""
    if not mask.all():
        raise NotOffered("trajectories have no mask; `done` parts them")
    done = torch.zeros_like(mask)
    done[:, -1] = True
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    inputs = (x[..., None] for x in (values, following, rewards, done))
    advantages, returns = function(gamma, gae_lambda, *inputs)
    return advantages[..., 0], returns[..., 0]


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    from torchrl.objectives.llm.distillation import k3_kl_token_estimate

    if estimator != "k3":
        raise NotOffered("k3 alone is a function")
    return k3_kl_token_estimate(ref_logprobs, logprobs)


def kl_controller(coef: float, kl: float, target: float, horizon: int, samples: int) -> float:
    """It is fed what the KL took off the rewards, one number for each sample."""
    from torchrl.data.llm.utils import AdaptiveKLController

    controller = AdaptiveKLController(init_kl_coef=coef, target=target, horizon=horizon)
    return controller.update([-coef * kl] * samples)


def ppo_loss(
    logprobs, values, old_logprobs, old_values, advantages, returns, mask, *, clip_coef, vf_clip_coef, vf_coef,
    denominator=None,
) -> Tensor:  # fmt: skip
    """ClipPPOLoss of a policy and a critic that hold the numbers."""
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torchrl.objectives import ClipPPOLoss

    if denominator is not None:
        raise NotOffered("ClipPPOLoss divides by the kept count of its call")

    class Given(torch.distributions.Distribution):
        def __init__(self, scores: Tensor) -> None:
            super().__init__(validate_args=False)
            self.scores = scores

        def log_prob(self, value: Tensor) -> Tensor:
            return self.scores

    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(lambda x: x, in_keys=["logprobs"], out_keys=["scores"]),
        ProbabilisticTensorDictModule(in_keys=["scores"], out_keys=["action"], distribution_class=Given),
    )
    critic = TensorDictModule(lambda x: x, in_keys=["values"], out_keys=["state_value"])
    loss = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=clip_coef,
        clip_value=vf_clip_coef,
        critic_coeff=vf_coef,
        loss_critic_type="l2",
        entropy_bonus=False,
        functional=False,
        reduction="mean",
    )
    loss.set_keys(sample_log_prob="old_logprobs")
    loss.loss_mask_key = "mask"
    data = TensorDict(
        {
            "logprobs": logprobs,
            "values": values[..., None],
            "old_logprobs": old_logprobs,
            "action": torch.zeros_like(logprobs),
            "state_value": old_values[..., None],
            "advantage": advantages[..., None],
            "value_target": returns[..., None],
            "mask": mask,
        },
        batch_size=mask.shape,
    )
    terms = loss(data)
    return terms["loss_objective"] + terms.get("loss_critic", 0.0)
