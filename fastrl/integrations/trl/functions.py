"""fastrl's functions with the arguments and results of TRL's, each made of the one that it takes the place of.

The one of TRL computes what fastrl's has no kernel for.
"""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from fastrl.checks import is_plain
from fastrl.integrations.trl.entropy import with_gradient
from fastrl.models.heads import lm_head
from fastrl.ops import LoRAHead, linear_logprobs, token_logprobs
from fastrl.ops.backend import choose
from fastrl.ops.native import autocast_dtype

OUTPUTS = {"log_probs", "entropy", "mean_logits", "is_top1"}  # that are fastrl's

# The adapter on the head whose log-probs are being computed; TRL hands the weight below it on, and nothing else.
_adapter: ContextVar[LoRAHead | None] = ContextVar("adapter", default=None)


def selective_log_softmax(original):
    @functools.wraps(original)
    def log_probs(logits, index, temperature=1.0, row_mask=None):
        if not _has_kernel("token_logprobs", logits) or index.shape != logits.shape[:-1]:
            return original(logits, index, *_given(temperature, row_mask))
        return token_logprobs(logits, index, temperature=temperature, mask=_mask(row_mask))

    return log_probs


def entropy_from_logits(original):
    @functools.wraps(original)
    def entropy(logits, chunk_size=128):
        if not _has_kernel("token_logprobs", logits):
            return original(logits, chunk_size)
        index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        return token_logprobs(logits, index, return_entropy=True)[1]

    return entropy


def selective_log_softmax_and_entropy(original):
    @functools.wraps(original)
    def log_probs_and_entropy(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
        if not _has_kernel("token_logprobs", logits) or index.shape != logits.shape[:-1]:
            return original(logits, index, entropy_requires_grad, temperature, row_mask)
        options = {"temperature": temperature, "mask": _mask(row_mask), "return_entropy": True}
        log_probs, entropy = token_logprobs(logits, index, **options)
        return log_probs, entropy if entropy_requires_grad else entropy.detach()

    return log_probs_and_entropy


def head_function(original):
    """A subclass of TRL's autograd function, of which callers use `apply` alone."""
    apply = _apply if "outputs" in inspect.signature(original.forward).parameters else _apply_before_1_15
    return type(original.__name__, (original,), {"apply": staticmethod(functools.partial(apply, original.apply))})


def _apply(
    original, hidden, weight, bias, targets, temperature, chunk_size, softcap=None, logit_scale=1.0,
    outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
):  # fmt: skip
    """(log-probs (N,), entropy, None, mean logits, is_top1), each None unless it is among `outputs`."""
    lora = _adapter.get()
    foreign = not OUTPUTS.issuperset(outputs) or (softcap is not None and "mean_logits" in outputs)
    if foreign or not _has_kernel("linear_logprobs", hidden) or not _is_whole(weight):
        if lora is not None:
            raise ValueError(
                f"fastrl.integrations.trl: adapter on lm_head: expected outputs among {', '.join(sorted(OUTPUTS))} (no"
                f" mean_logits with a softcap) of a weight in one piece, got {', '.join(outputs)} of"
                f" {type(weight).__name__} {tuple(weight.shape)}; TRL's own head leaves the adapter out"
            )
        return original(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs)
    hidden, weight, bias = _cast(hidden, weight, bias)
    options = {"bias": bias, "lora": lora, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
    asked = {"return_entropy": "entropy" in outputs, "return_top1": "is_top1" in outputs}
    found = linear_logprobs(hidden, weight, targets, **options, **asked, detach_entropy=True)
    log_probs, *others = found if isinstance(found, tuple) else (found,)
    entropy = means = None
    if "entropy" in outputs:
        entropy = with_gradient(others.pop(0), hidden, weight, targets, options)
    if "mean_logits" in outputs:
        means = _mean_logits(hidden, weight, bias, lora) * (logit_scale / temperature)
    return log_probs, entropy, None, means, others[0] if others else None


def _apply_before_1_15(original, hidden, weight, targets, temperature, chunk_size, softcap=None, logit_scale=1.0):
    """(log-probs (N,), entropy (N,)); the entropy has no gradient there."""
    if not _has_kernel("linear_logprobs", hidden) or not _is_whole(weight):
        return original(hidden, weight, targets, temperature, chunk_size, softcap, logit_scale)
    hidden, weight, _ = _cast(hidden, weight, None)
    options = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    return linear_logprobs(hidden, weight, targets, **options, return_entropy=True, detach_entropy=True)


def fused_lm_head(original):
    @functools.wraps(original)
    def add_fused_lm_head(model, *args, **kwargs):
        original(model, *args, **kwargs)
        fused = model.forward

        @functools.wraps(fused.__func__)
        def forward(self, *args, fused_lm_head=False, **kwargs):
            """TRL's forward, which finds the adapter of a head that has one."""
            if not fused_lm_head or not isinstance(self.get_output_embeddings(), LoraLayer):
                return fused(*args, fused_lm_head=fused_lm_head, **kwargs)
            token = _adapter.set(lm_head(self).lora)
            try:
                return fused(*args, fused_lm_head=True, **kwargs)
            finally:
                _adapter.reset(token)

        model.forward = MethodType(forward, model)

    return add_fused_lm_head


def compacting(original):
    """TRL leaves out ignored positions where Triton runs; on a CPU, too, the sizes of products cost nothing."""

    @functools.wraps(original)
    def use_triton(device):
        return device.type == "cpu" or original(device)

    return use_triton


def _has_kernel(op, tensor) -> bool:
    """The reference would hold what TRL's own functions do not."""
    return is_plain(tensor) and choose(op, tensor) != "reference"


def _is_whole(weight) -> bool:
    """No shard, and none of ZeRO-3's parameters, whose numbers are there during the forward pass alone."""
    return is_plain(weight) and not hasattr(weight, "ds_id")


def _cast(hidden, weight, bias):
    """In the dtype that TRL multiplies in: autocast's, else that of the hidden states."""
    dtype = autocast_dtype(hidden) or hidden.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _mask(row_mask):
    return None if row_mask is None else row_mask != 0


def _given(temperature, row_mask) -> tuple[Any, ...]:
    """The arguments that TRL before 1.14 does not have, if they are wanted."""
    return () if temperature == 1.0 and row_mask is None else (temperature, row_mask)


@torch.no_grad()
def _mean_logits(hidden, weight, bias, lora):
    """(N,) mean of the logits over the vocabulary: that of the products is the product with the mean row."""
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden.float()
        means = torch.mv(hidden, weight.mean(0, dtype=torch.float32))
        if bias is not None:
            means += bias.float().mean()
        if lora is not None:
            means += torch.mv(hidden @ lora.lora_a.float().t(), lora.lora_b.float().mean(0)) * lora.scaling
    return means
