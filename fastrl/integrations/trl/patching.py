"""Puts fastrl's functions in the place of those of `trl.trainer.utils`, everywhere that TRL's are known by name."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastrl.integrations.trl.functions import (
    compacting,
    entropy_from_logits,
    fused_lm_head,
    head_function,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)
from fastrl.versions import package_version

UTILS = "trl.trainer.utils"
TESTED = ("1.12", "1.16")
INSTALL = "pip install 'trl>=1.12,<1.17'"


class Slot(NamedTuple):
    """A name of `trl.trainer.utils`: what makes fastrl's function of TRL's, and the parameters that TRL's may have."""

    replace: Any
    parameters: tuple[str, ...]
    optional: bool = False  # not every version has it
    local: bool = False  # other modules that have it mean another thing with it


HEAD = "temperature chunk_size final_logit_softcapping logit_scale"
OUTPUTS = "outputs=entropy,log_sum_sq_probs,mean_logits,is_top1"  # also the order of the results
SLOTS = {
    "selective_log_softmax": Slot(selective_log_softmax, ("logits index", "logits index temperature row_mask")),
    "entropy_from_logits": Slot(entropy_from_logits, ("logits chunk_size",)),
    "selective_log_softmax_and_entropy": Slot(
        selective_log_softmax_and_entropy, ("logits index entropy_requires_grad temperature row_mask",), optional=True
    ),
    "_ChunkedLogProbFunction": Slot(
        head_function, (f"ctx last_hidden weight targets {HEAD}", f"ctx hidden weight bias targets {HEAD} {OUTPUTS}")
    ),
    "add_fused_lm_head": Slot(
        fused_lm_head, ("model temperature cast_lm_head_to_fp32 outputs=log_probs",), optional=True
    ),
    "_use_triton": Slot(compacting, ("device",), optional=True, local=True),  # its kernels ask it, too
}

_replaced: dict[str, tuple[Any, Any]] = {}  # name -> (TRL's, fastrl's), while patched


def patch() -> None:
    """Computes the log-probs of TRL's trainers with `fastrl.ops`, until `unpatch()`.

    `fastrl.ops.linear_logprobs` takes the place of the chunked head of SFT, DPO, KTO, GRPO and RLOO
    (`trl.trainer.utils._ChunkedLogProbFunction`), which is also used on models that got their head before: 2 products
    with a frozen head in place of 3, ignored positions never multiplied on a CPU either, a LoRA adapter on `lm_head`
    applied. `fastrl.ops.token_logprobs` takes that of `selective_log_softmax`, `entropy_from_logits` and
    `selective_log_softmax_and_entropy`. What they cannot do (log_sum_sq_probs, mean logits of a soft-capped head,
    several tokens a position, ZeRO-3, devices and dtypes without a kernel) runs TRL's own functions.

    Modules that hold one of these by its name get the new one, now or when they are imported. A second call does
    nothing.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this version of TRL has other functions; nothing was changed.
    """
    if _replaced:
        return
    utils = _trl_utils()
    originals = _probe(utils)
    replaced = {name: (original, SLOTS[name].replace(original)) for name, original in originals.items()}
    _warn_if_untested()
    _swap(replaced)
    _replaced.update(replaced)


def unpatch() -> None:
    """Gives every module TRL's own functions back; without a `patch()` before it does nothing.

    What something else has put over fastrl's functions since then stays, with a warning.
    """
    if not _replaced:
        return
    utils = vars(_trl_utils())
    covered = [name for name, (_, ours) in _replaced.items() if utils.get(name) is not ours]
    _swap({name: (ours, original) for name, (original, ours) in _replaced.items()})
    _replaced.clear()
    if covered:
        warnings.warn(
            f"fastrl.integrations.trl: unpatch: {', '.join(covered)} of trl.trainer.utils was replaced after patch() by"
            " something else, which stays; undo in the reverse order",
            stacklevel=2,
        )


def _trl_utils() -> Any:
    try:
        import trl.trainer.utils as utils
    except ImportError as error:
        raise ImportError(f"fastrl.integrations.trl: TRL cannot be imported ({error}); {INSTALL}") from error
    return utils


def _probe(utils: Any) -> dict[str, Any]:
    """{name: TRL's function}, all of them as they are known."""
    found = {}
    for name, slot in SLOTS.items():
        original = getattr(utils, name, None)
        if original is None and slot.optional:
            continue
        parameters = _parameters(original)
        if parameters not in slot.parameters:
            expected = " or ".join(f"({', '.join(known.split())})" for known in slot.parameters)
            got = "none" if parameters is None else f"({', '.join(parameters.split())})"
            raise RuntimeError(
                f"fastrl.integrations.trl: trl {package_version('trl')}: {name}: expected parameters {expected},"
                f" got {got}; nothing was patched, TRL runs as without fastrl. {INSTALL}"
            )
        found[name] = original
    return found


def _parameters(function: Any) -> str | None:
    """Names of the parameters, of an autograd function those of its forward, and defaults that are tuples; None if
    there is no function.
    """
    function = getattr(function, "forward", function)
    if not callable(function):
        return None
    parameters = inspect.signature(function).parameters.values()
    return " ".join(f"{p.name}={','.join(p.default)}" if isinstance(p.default, tuple) else p.name for p in parameters)


def _warn_if_untested() -> None:
    version = package_version("trl")
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    oldest, newest = (tuple(map(int, tested.split("."))) for tested in TESTED)
    if not oldest <= release <= newest:
        warnings.warn(
            f"fastrl.integrations.trl: tested with TRL {TESTED[0]} to {TESTED[1]}, got {version}, whose functions have"
            " the same parameters",
            stacklevel=3,
        )


def _swap(changes: Mapping[str, tuple[Any, Any]]) -> None:
    """In every module that is loaded, what is bound to a name and is the first of its pair becomes the second."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)  # asked for by getattr, lazy modules would import
        if not isinstance(names, dict):
            continue
        for name, (old, new) in changes.items():
            if names.get(name) is old and (names.get("__name__") == UTILS or not SLOTS[name].local):
                names[name] = new
