"""What the four models of PPO are made of, and the memory that they take, for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from fastrl.models import describe
from fastrl.models.forward import Tuned
from fastrl.models.tuners import TunerSettings
from fastrl.run.masters import NARROW

GRADIENT, MOMENTS, MASTER = 4, 8, 4  # bytes for a trained number


class Weights(NamedTuple):
    """Those of a tuned model."""

    trained: list[Tensor]
    frozen: list[Tensor]
    kept: list[Tensor]  # copies of the trained ones as they were loaded


def describe_roles(policy: Tuned, critic: Tuned, settings: TunerSettings) -> Iterator[str]:
    """A line for each of the four roles, and one for the memory of all, in which what two have in common counts once.

    The optimizer's part is that of `make_optimizer`: float32 gradients, two moments, and masters of narrower weights.
    """
    of_policy, of_critic = _weights(policy), _weights(critic)
    known = {id(x) for x in of_policy.frozen}
    common = [x for x in of_critic.frozen if id(x) in known]
    yield f"policy: {describe(policy, settings)}; {_sizes(of_policy)}"
    yield f"reference: the policy with its tuner off; {_kept(of_policy)}"
    of_one_base = ", which are the policy's" if common else ""
    yield f"critic: {describe(critic, settings)}; {_sizes(of_critic)}{of_one_base}"
    yield f"reward model: the critic with its tuner off; {_kept(of_critic)}"
    total = mib(x for weights in (of_policy, of_critic) for tensors in weights for x in tensors)
    serve = f", of which {mib(common):.1f} MiB serve all four" if common else ""
    more = training_mib(of_policy.trained + of_critic.trained)
    yield f"memory of the four: {total:.1f} MiB of weights{serve}; gradients and optimizer take {more:.1f} MiB more"


def mib(tensors: Iterable[Tensor]) -> float:
    """MiB of tensors; one that is there twice counts once."""
    return sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values()) / 2**20


def training_mib(trained: Iterable[Tensor]) -> float:
    """MiB that gradients, moments and masters of trained weights take."""
    return sum(x.numel() * (GRADIENT + MOMENTS + MASTER * (x.dtype in NARROW)) for x in trained) / 2**20


def _weights(role: Tuned) -> Weights:
    kept: Any = getattr(role.tuner, "kept", [])
    parameters = list(role.parameters())
    return Weights([p for p in parameters if p.requires_grad], [p for p in parameters if not p.requires_grad], kept)


def _sizes(weights: Weights) -> str:
    return f"{mib(weights.trained):.1f} MiB, beside {mib(weights.frozen):.1f} MiB of frozen weights"


def _kept(weights: Weights) -> str:
    kept = f"a copy of what is trained, as it was loaded: {mib(weights.kept):.1f} MiB"
    return kept if weights.kept else "no weights of its own"
