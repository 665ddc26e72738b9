"""One call of a causal LM's own forward in which loss or log-probs of the labels are computed without logits.

The model's forward runs as it is. Where it calls its output layer, the op computes what the labels ask for; where it
calls its loss function, it gets that. In between it holds a stand-in of the logits, a column or a few wide, so that all
else that the model does (auxiliary losses of experts, caches, its class of outputs) stays its own. In the first such
call of a model the stand-in shows what the model does with its logits: a scale or cap that the config does not tell, or
another use of them, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from fastrl.checks import has_values, is_plain
from fastrl.models.heads import Head, lm_head
from fastrl.ops import linear_cross_entropy, linear_logprobs

IGNORED = -100  # the ignore_index of transformers' losses
PROBES = (-4.0, -1.0, 0.0, 1.0, 4.0, math.nan)  # stand-in logits of the first call; what else uses them becomes NaN
SCALED_BELOW = ("inkling_text", "minicpm3")  # model types that scale the hidden states in place of the logits
ADVICE = "call undo() of what fastrl.patch returned, and leave head=True out"


@dataclass
class LogProbOutput(ModelOutput):
    """What a model gives for `return_logprobs=True`; log-probs and entropies have the shape of the labels given."""

    loss: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Understood:
    """Whether a call of the model has shown that its head is what `Head` says."""

    yes = False


class FusedCall:
    """What takes the place of the output layer and of the loss function of `model` in one call of its forward."""

    def __init__(
        self,
        model: Any,
        understood: Understood,
        labels: Tensor,
        *,
        shifted: bool,  # labels[..., t] is predicted at t, not at t - 1
        ignore_index: int = IGNORED,
        denominator: float | Tensor | None = None,
        per_token: bool = False,
        return_entropy: bool = False,
        temperature: float = 1.0,
    ) -> None:
        self.model, self.understood, self.labels, self.shifted = model, understood, labels, shifted
        self.ignore_index, self.denominator, self.temperature = ignore_index, denominator, temperature
        self.per_token, self.return_entropy = per_token, return_entropy
        self.loss: Tensor | None = None
        self.logprobs: Tensor | None = None
        self.entropy: Tensor | None = None
        self.expected: Tensor | None = None  # the stand-in at the loss; None in all but the first call
        self.taken = False  # whether the model has asked for its loss

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with replaced(self.model.get_output_embeddings(), "forward", self.project):
            with replaced(self.model, "_loss_function", self.loss_function):
                yield

    def project(self, hidden: Tensor) -> Tensor:
        """Computes the results from the hidden states (..., H) below the head; returns the stand-in (..., columns)."""
        if self.loss is not None:
            raise self.refusal("output head: expected one call of it in a forward pass, got a second")
        head = lm_head(self.model)
        if self.model.config.get_text_config().model_type in SCALED_BELOW:
            head = head._replace(logit_scale=1.0)
        if not is_plain(head.weight):
            raise self.refusal(
                f"output head: expected whole weights, got a {type(head.weight).__name__}; shard the head with FSDP2 as"
                " a unit or with the root, which gather it for the forward pass, and do not split it (tensor parallel)"
            )
        self.compute(hidden.to(head.weight.device), head)
        if self.understood.yes or not has_values(hidden):
            return hidden.new_full((*hidden.shape[:-1], 1), math.nan)
        self.expected = as_logits(head, hidden.new_tensor(PROBES[:-1]))
        return hidden.new_tensor(PROBES).repeat(*hidden.shape[:-1], 1)

    def compute(self, hidden: Tensor, head: Head) -> None:
        targets = self.labels.to(hidden.device)
        if not self.shifted:
            targets = nn.functional.pad(targets[..., 1:], (0, 1), value=self.ignore_index)
        kept, count = targets != self.ignore_index, self.denominator
        if isinstance(count, Tensor):
            count = count.to(hidden.device)
        options = {"mask": kept, "temperature": self.temperature, **head.options()}
        if not self.per_token:
            self.loss = linear_cross_entropy(hidden, head.weight, targets, denominator=count, **options)
            return
        found = linear_logprobs(hidden, head.weight, targets, return_entropy=self.return_entropy, **options)
        self.logprobs, self.entropy = found if isinstance(found, tuple) else (found, None)
        self.loss = -self.logprobs.sum() / (kept.sum().clamp(min=1) if count is None else count)

    def loss_function(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the model's forward calls for its loss."""
        if self.loss is None:
            raise self.refusal("output head: expected a call of it before the loss, got none")
        self.taken = True
        if self.expected is not None:
            self.check_stand_in(logits)
            if labels.shape != self.labels.shape or not torch.equal(labels.to(self.labels.device), self.labels):
                raise self.refusal("labels: expected those of the call at the loss, got others")
        return self.loss.clone()  # which the model may add to in place

    def check_stand_in(self, logits: Tensor) -> None:
        if logits.shape[-1] != len(PROBES) or not bool(logits[..., -1].isnan().all()):
            raise self.refusal("logits: expected them whole at the loss, got them cut or replaced")
        exact = logits.dtype == self.model.dtype == torch.float32
        got, want = logits[..., :-1].float(), self.expected.to(logits.device)  # type: ignore[union-attr]
        if not torch.allclose(got, want.expand_as(got), rtol=1e-4 if exact else 0.05, atol=1e-4 if exact else 0.05):
            shown = [[round(value, 4) for value in row.tolist()] for row in (want, got.flatten(0, -2)[0])]
            raise self.refusal(
                f"logits: expected {list(PROBES[:-1])} to be {shown[0]} at the loss, by the config's scale and cap, got"
                f" {shown[1]}"
            )

    def result(self, output: Any) -> Any:
        """The model's output without the stand-in, or a `LogProbOutput`."""
        if not self.taken:
            raise self.refusal("loss_function: expected a call of it, got none")
        if self.expected is not None:
            if bool(output.loss.isnan()) and not bool(self.loss.isnan()):  # type: ignore[union-attr]
                raise self.refusal("loss: expected no other use of the logits in it, got one (a z-loss?)")
            self.understood.yes = True
        if not self.per_token:
            return type(output)(**{name: value for name, value in output.items() if name != "logits"})
        kept = {name: output.get(name) for name in ("aux_loss", "past_key_values", "hidden_states", "attentions")}
        return LogProbOutput(output.loss, self.beside_labels(self.logprobs), self.beside_labels(self.entropy), **kept)

    def beside_labels(self, values: Tensor | None) -> Tensor | None:
        """Values of targets in the places of the labels given."""
        return values if values is None or self.shifted else nn.functional.pad(values[..., :-1], (1, 0))

    def refusal(self, reason: str) -> ValueError:
        return ValueError(f"fused head: {type(self.model).__name__}: {reason}; {ADVICE}")


def as_logits(head: Head, products: Tensor) -> Tensor:
    """fp32 logits that the head makes of products of hidden states and weight."""
    logits = products.float() * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@contextmanager
def replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of one module; afterwards it is as it was."""
    own = module.__dict__
    was_there, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if was_there:
            own[name] = before
        else:
            del own[name]
