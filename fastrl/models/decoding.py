"""One step of decoding, with a model's key-value cache or without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastrl.models.heads import base_model, lm_head
from fastrl.models.hidden import arguments, final_hidden, position_ids
from fastrl.models.virtual import with_virtual_tokens

NO_CACHE = "fastrl_samples_without_cache"  # attribute of models whose cache is not usable


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode; on leaving, each module gets back the training flag that it had."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in was_training:
            module.training = True


def next_logits(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """(b, V) logits of the token after each left-padded row of `ids` (b, T), and the cache for the next call.

    With a cache from the call before, which holds the model's virtual tokens too, it reads the last column alone. A
    model that is marked as one that samples without a cache (`fastrl.models.probe` does it) gets none and reads the
    whole rows every time.
    """
    base: Any = base_model(model)
    if getattr(base, NO_CACHE, False):
        return lm_head(model).logits(final_hidden(model, ids, mask)[:, -1]), None
    new = ids.shape[1] if cache is None else 1
    accepted = arguments(type(base).forward)
    inputs = {"input_ids": ids[:, -new:], "attention_mask": mask.long(), "past_key_values": cache}
    options = {"position_ids": position_ids(mask)[:, -new:], "logits_to_keep": 1}
    inputs |= {name: value for name, value in options.items() if name in accepted}
    output = base(**with_virtual_tokens(model, inputs), use_cache=True)
    return output.logits[:, -1], output.past_key_values
