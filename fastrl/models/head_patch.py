"""Puts the fused head into a model: `fastrl.patch(model, head=True)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from fastrl.checks import FLOAT_DTYPES
from fastrl.models.fused_head import IGNORED, FusedCall, Understood
from fastrl.models.heads import lm_head


class HeadPatch:
    """What `patch_head` did to a model; `undo()` takes it back."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        self._model: nn.Module | None = model
        self._before = model.__dict__.get("forward")  # mostly there is none
        self._forward = model.__dict__["forward"] = MethodType(forward, model)

    def undo(self) -> None:
        """Gives the model the forward that it had; a second call does nothing.

        Raises:
            ValueError: something has wrapped the patched forward since, and must be taken off first.
        """
        if self._model is None:
            return
        own = self._model.__dict__
        if own.get("forward") is not self._forward:
            raise ValueError(
                f"undo: {_name(self._model)}.forward: expected fastrl's, got one that was put over it later (as"
                " accelerate's prepare does); take that off first: undo in the reverse order of patching"
            )
        del own["forward"]
        if self._before is not None:
            own["forward"] = self._before
        self._model = None


def patch_head(model: nn.Module, *, eval_logits: bool = True) -> HeadPatch | None:
    """Puts the fused head into the causal LM that `model` is or wraps; None if it is there already.

    Afterwards `model(..., labels=...)` (or `shift_labels=`) in training mode returns the loss of its own forward,

        F.cross_entropy(logits[:, :-1], labels[:, 1:])    or its sum / num_items_in_batch

    from `fastrl.ops.linear_cross_entropy`, with `logits` None. Keywords of a call:

        skip_logits: True or False; None is True in training mode, and in evaluation unless `eval_logits`.
        return_logprobs: the result is a `LogProbOutput`: beside the loss, `logprobs`, float32 in the shape of the
            labels given, each that of its own label, 0 where that is ignored or (the first of `labels`) not predicted.
        return_entropy: also `entropy`, in the same places.
        temperature: divides the logits of the loss, log-probs and entropies.

    Without labels, or where logits are not skipped, the model's own forward runs. Differences from it: a batch in which
    every label is ignored has the loss 0 (transformers: NaN), and on a CPU a label outside the vocabulary is named.

    Args:
        eval_logits: whether calls with labels in evaluation mode return logits, as those of unpatched models do.
    Raises:
        ValueError: the model is no causal LM of transformers, or its head or loss is not understood; nothing is changed
            then.
    """
    base = causal_lm(model)
    if _is_patched(base):
        return None
    _check(base)
    return HeadPatch(base, _patched_forward(base, eval_logits))


def causal_lm(model: nn.Module) -> transformers.PreTrainedModel:
    """The outermost transformers model with an output layer in whatever wraps it (PEFT, DDP, FSDP, torch.compile).

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise ValueError(
        f"patch: head: expected a causal language model of transformers (or PEFT around one), got {_name(model)}, which"
        " has no output layer"
    )


def _patched_forward(base: nn.Module, eval_logits: bool) -> Callable[..., Any]:
    """A function of the module, so that a copy of the model calls its own parts."""
    own, understood = _own_forward(base), Understood()

    def forward(
        self: Any,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        skip_logits: bool | None = None,
        return_logprobs: bool = False,
        return_entropy: bool = False,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        targets, per_token = labels if shift_labels is None else shift_labels, return_logprobs or return_entropy
        if per_token and targets is None:
            raise ValueError(f"{_name(self)}: return_logprobs: expected labels or shift_labels with it, got none")
        if skip_logits is None:
            skip_logits = self.training or not eval_logits
        if shift_labels is not None:
            kwargs["shift_labels"] = shift_labels
        if targets is None or not (skip_logits or per_token) or kwargs.get("fused_lm_head"):  # TRL asks for its own
            return own(self, *args, **kwargs) if labels is None else own(self, *args, labels=labels, **kwargs)
        as_dict = kwargs.pop("return_dict", None)
        call = FusedCall(
            self,
            understood,
            targets,
            shifted=shift_labels is not None,
            ignore_index=kwargs.get("ignore_index", IGNORED),
            denominator=kwargs.get("num_items_in_batch"),
            per_token=per_token,
            return_entropy=return_entropy,
            temperature=temperature,
        )
        with call.in_place():
            output = own(self, *args, labels=targets, return_dict=True, **kwargs)
        output = call.result(output)
        return output if (self.config.return_dict if as_dict is None else as_dict) else output.to_tuple()

    forward.is_fused_head = True  # type: ignore[attr-defined]
    forward.__doc__ = type(base).forward.__doc__
    # Trainer and generate read the arguments. No __wrapped__: accelerate would unwrap the patch along with its own.
    forward.__signature__ = inspect.signature(type(base).forward)  # type: ignore[attr-defined]
    return forward


def _own_forward(base: nn.Module) -> Callable[..., Any]:
    """The forward before the patch, as a function of the module."""
    before = base.__dict__.get("forward")
    if before is None:
        return type(base).forward
    if getattr(before, "__self__", None) is base:
        return before.__func__
    return lambda _, *args, **kwargs: before(*args, **kwargs)


def _is_patched(base: nn.Module) -> bool:
    forward: Any = base.__dict__.get("forward")
    while forward is not None and not hasattr(forward, "is_fused_head"):
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None


def _check(base: transformers.PreTrainedModel) -> None:
    """Raise ValueError where the fused head cannot take the place of the model's own."""
    layer = base.get_output_embeddings()
    try:
        weight = lm_head(base).weight
    except ValueError as error:
        raise ValueError(f"patch: {_name(base)}: {error}; leave head=True out") from error
    for part in layer.modules():
        if isinstance(part, nn.Linear) and not isinstance(part, LoraLayer):
            if type(part).forward is not nn.Linear.forward:
                raise _refusal(base, "output head", "nn.Linear's own product", type(part).__name__)
    if weight.dtype not in FLOAT_DTYPES:
        raise _refusal(base, "output head", "floating-point weights", f"{weight.dtype} (quantised?)")
    if hasattr(weight, "ds_id"):
        raise _refusal(base, "output head", "whole weights (ZeRO-2, DDP, FSDP2)", "those that DeepSpeed ZeRO-3 shards")
    if isinstance(layer, LoraLayer) and any(getattr(d, "p", 0.0) > 0 for d in layer.lora_dropout.values()):
        raise _refusal(base, "lora_dropout", "0 on an adapted output head", "a positive one")
    rows = getattr(base.config.get_text_config(), "unpadded_vocab_size", None) or len(weight)  # Inkling
    if rows < len(weight):
        raise _refusal(base, "unpadded_vocab_size", f"{len(weight)}, one for each row of the output head", rows)
    if base.config.is_encoder_decoder or base.loss_function is not ForCausalLMLoss:
        loss = getattr(base.loss_function, "__name__", base.loss_function)
        raise _refusal(base, "loss_function", "ForCausalLMLoss of a decoder", loss)
    if not _asks_for_its_loss(type(base)):
        raise _refusal(base, "forward", "a call of self.loss_function in it", "none")


def _asks_for_its_loss(kind: type) -> bool:
    """Whether the text of forward, or of one that it calls by super(), has `loss_function`: others use the logits."""
    for forward in (inspect.unwrap(base.__dict__["forward"]) for base in kind.__mro__ if "forward" in base.__dict__):
        names = forward.__code__.co_names if hasattr(forward, "__code__") else ()
        if "loss_function" in names or "super" not in names:
            return "loss_function" in names
    return False


def _refusal(base: nn.Module, what: str, expected: str, got: object) -> ValueError:
    return ValueError(f"patch: {_name(base)}: {what}: expected {expected}, got {got}; leave head=True out")


def _name(module: nn.Module) -> str:
    return type(module).__name__
