"""Tuners: what of a model is trained. One function each, behind one protocol.

    policy = Policy(tune(model, settings))

`full` trains every weight; `bitfit` the biases and norms that there are; `lora` puts PEFT's adapters, on fastrl's fused
layers, on a frozen model; `adapter` puts bottleneck adapters into its layers; `prompt`, `p-tuning` and `prefix` put
virtual tokens before every sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from difflib import get_close_matches
from typing import Any, NamedTuple, Protocol

import peft
import transformers
from torch import Tensor, nn

from fastrl.models.bottleneck import add_bottlenecks, bottleneck_names, layer_parts
from fastrl.models.heads import SCORE, base_model
from fastrl.models.hidden import final_hidden
from fastrl.models.lora import merged
from fastrl.models.lora_adapters import add_lora, check_lora, lora_settings
from fastrl.models.virtual import virtual_tokens
from fastrl.models.virtual_tuning import (
    GOES_ON,
    add_virtual_tokens,
    train_virtual_tokens,
    try_virtual_tokens,
    without_virtual_tokens,
)


class TunerSettings(Protocol):
    """What `tune` reads of a loop's settings; also `lora_dropout`, `gradient_checkpointing` and
    `merge_adapter`, if there. An option of another tuner than the one that is named is ignored.
    """

    @property
    def tuner(self) -> str: ...  # key of TUNERS
    @property
    def lora_rank(self) -> int: ...  # 0: full fine-tuning
    @property
    def lora_alpha(self) -> int: ...  # 0: twice the rank
    @property
    def lora_targets(self) -> str: ...
    @property
    def virtual_tokens(self) -> int: ...  # of prompt, p-tuning and prefix
    @property
    def adapter_size(self) -> int: ...  # width of bottleneck adapters
    @property
    def adapter_places(self) -> str: ...  # key of bottleneck.PLACES


class Tuner(Protocol):
    """A model of which some parameters are trained: those that require a gradient."""

    model: Any  # what holds the parameters, samples, and is saved

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, packed_positions: Tensor | None = None) -> Tensor:
        """(B, T, H) hidden states below the head at the given tokens; those of virtual tokens are taken off. With
        `packed_positions` (B, T) a row holds several sequences, each counted from 0; see `final_hidden`."""

    def off(self) -> AbstractContextManager[None]:
        """Within, the model is the one that was loaded, to the bit, as PPO's reference and reward model are. For passes
        without gradients; whether dropout is on is the caller's affair.

        Raises:
            RuntimeError: the tuner needs a copy of the loaded weights and was made without `keep_loaded`.
        """

    def merged(self) -> AbstractContextManager[None]:
        """Within, the model samples faster, where there is a way; its outputs differ by rounding at most."""


class Full:
    """The model's own weights are trained: all that require a gradient. `off` exchanges them with a copy of the loaded
    ones (`kept`), which costs their memory.
    """

    def __init__(self, model: Any, keep_loaded: bool = False) -> None:
        self.model = model
        self.kept = [p.detach().clone() for p in self._trained()] if keep_loaded else []

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, packed_positions: Tensor | None = None) -> Tensor:
        return final_hidden(self.model, input_ids, attention_mask, packed_positions)

    @contextmanager
    def off(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def merged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _exchange(self) -> None:
        """The parameters, which optimizers and hooks hold, stay; what they point at is exchanged: nothing is copied."""
        if not self.kept:
            raise RuntimeError("off: no copy of the loaded weights was kept; tune with keep_loaded=True")
        for i, parameter in enumerate(self._trained()):
            parameter.data, self.kept[i] = self.kept[i], parameter.data


class Adapter:
    """An adapter of PEFT on a frozen model; `off` switches it off, `merged` folds it into the weights."""

    def __init__(self, model: peft.PeftModel) -> None:
        self.model: Any = model

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, packed_positions: Tensor | None = None) -> Tensor:
        return final_hidden(self.model, input_ids, attention_mask, packed_positions)

    def off(self) -> AbstractContextManager[None]:
        return self.model.disable_adapter()

    def merged(self) -> AbstractContextManager[None]:
        return merged(self.model)


class Virtual(Adapter):
    """Virtual tokens before every sequence of a frozen model. They cannot be merged, and are not there while off."""

    def off(self) -> AbstractContextManager[None]:
        return without_virtual_tokens(self.model)

    def merged(self) -> AbstractContextManager[None]:
        return nullcontext()


def full(model: transformers.PreTrainedModel, settings: TunerSettings, keep_loaded: bool) -> Tuner:
    """Every weight is trained."""
    return Full(model, keep_loaded)


def lora(model: transformers.PreTrainedModel, settings: TunerSettings, keep_loaded: bool) -> Tuner:
    """Low-rank adapters on linear layers; the score head of a reward model is trained whole."""
    return Adapter(add_lora(model, lora_settings(settings)))


def bitfit(model: transformers.PreTrainedModel, settings: TunerSettings, keep_loaded: bool) -> Tuner:
    """The biases and norms that the model has are trained, after Ben Zaken et al. 2022; none are added, so that an
    ordinary model is saved. A Llama has no biases: its norms alone are trained, as in Zhao et al. 2023.
    """
    train_only(model, biases_and_norms(model))
    return Full(model, keep_loaded)


def adapter(model: transformers.PreTrainedModel, settings: TunerSettings, keep_loaded: bool) -> Tuner:
    """Bottleneck adapters are trained, those that the model was loaded with or new ones, which change nothing: `off`
    gives back the first weights.
    """
    if not bottleneck_names(model):
        add_bottlenecks(model, settings.adapter_size, settings.adapter_places)
    train_only(model, bottleneck_names(model))
    return Full(model, keep_loaded)


def virtual(model: transformers.PreTrainedModel, settings: TunerSettings, keep_loaded: bool) -> Tuner:
    """Virtual tokens are trained, those that the model was loaded with or new ones, which change the model from the
    start.
    """
    if virtual_tokens(model):
        train_virtual_tokens(model)
        return Full(model, keep_loaded)
    return Virtual(add_virtual_tokens(model, tuner_name(settings), settings.virtual_tokens))


class Method(NamedTuple):
    """What there is to know of a tuner before it is made."""

    make: Callable[[Any, TunerSettings, bool], Tuner]  # (model, settings, keep_loaded)
    check: Callable[[nn.Module, TunerSettings], None]  # ValueError if the settings do not fit the model
    saves_adapter: bool  # an adapter is saved alone, so that its base must be a folder that it can name
    merges: bool = True  # what it saves is an ordinary model, or can be merged into one


def nothing_to_check(model: nn.Module, settings: TunerSettings) -> None:
    """Any model will do."""


def check_bitfit(model: nn.Module, settings: TunerSettings) -> None:
    """Raise ValueError if the model has neither biases nor norms with weights."""
    if not biases_and_norms(model):
        raise ValueError(
            f"tuner: expected another than bitfit for {type(model).__name__}, which has neither biases nor norms with"
            " weights; take lora or full"
        )


def check_adapter(model: nn.Module, settings: TunerSettings) -> None:
    """Raise ValueError if the model's layers have no place for bottleneck adapters."""
    layer_parts(model)


def check_virtual(model: nn.Module, settings: TunerSettings) -> None:
    """Raise ValueError if virtual tokens fit neither the model nor the other settings."""
    name = tuner_name(settings)
    if name == "prefix" and getattr(settings, "gradient_checkpointing", False):
        raise ValueError(
            "gradient_checkpointing: expected false with tuner prefix, got true: under it transformers drops the cache,"
            " in which the prefix stands; take prompt or p-tuning"
        )
    try_virtual_tokens(model, name, settings.virtual_tokens)


VIRTUAL = ("prompt", "p-tuning", "prefix")
TUNERS = {
    "full": Method(full, nothing_to_check, saves_adapter=False),
    "bitfit": Method(bitfit, check_bitfit, saves_adapter=False),
    "lora": Method(lora, lambda model, settings: check_lora(model, lora_settings(settings)), saves_adapter=True),
    "adapter": Method(adapter, check_adapter, saves_adapter=True, merges=False),
    **{name: Method(virtual, check_virtual, saves_adapter=True, merges=False) for name in VIRTUAL},
}


def tuner_name(settings: TunerSettings) -> str:
    """Key of TUNERS: `settings.tuner`, but full in place of lora where lora_rank is 0.

    Raises:
        ValueError: there is no such tuner.
    """
    name = settings.tuner
    if name not in TUNERS:
        nearest = get_close_matches(name.lower(), TUNERS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"tuner: expected one of {', '.join(TUNERS)}, got {name!r}{hint}")
    return "full" if name == "lora" and settings.lora_rank == 0 else name


def saves_adapter(settings: TunerSettings) -> bool:
    """Whether the tuner saves an adapter alone."""
    return TUNERS[tuner_name(settings)].saves_adapter


def check_tuner(model: nn.Module, settings: TunerSettings) -> None:
    """Raise ValueError if `tune` would: an unknown tuner, or one that does not fit the model or other settings."""
    name = tuner_name(settings)
    if getattr(settings, "merge_adapter", False) and not TUNERS[name].merges:
        raise ValueError(f"merge_adapter: expected false with tuner {name}, which cannot be merged, got true")
    kept = kept_tuner(model)
    if kept and kept != name:
        raise ValueError(
            f"tuner: expected {kept}, which goes on with the adapter that {type(model).__name__} was loaded with, got"
            f" {name}: the adapter cannot be merged; start from its base, or take --tuner {kept}"
        )
    TUNERS[name].check(model, settings)


def kept_tuner(model: nn.Module) -> str:
    """The tuner that goes on with an adapter that could not be merged when the model was loaded; "": there is none."""
    if virtual_tokens(model):
        config: Any = model.active_peft_config
        return GOES_ON[config.peft_type.value]
    return "adapter" if bottleneck_names(model) else ""


def coming_tokens(model: nn.Module, settings: TunerSettings) -> int:
    """How many virtual tokens `tune` will put before every sequence of a model that has none yet."""
    return settings.virtual_tokens if tuner_name(settings) in VIRTUAL and not virtual_tokens(model) else 0


def tune(model: transformers.PreTrainedModel, settings: TunerSettings, *, keep_loaded: bool = False) -> Tuner:
    """The tuner that the settings name, on a model, which is changed in place.

    Adapters are drawn from torch's global generator: seed it first. With `keep_loaded`, `off()` gives the model as it
    is now; a tuner that changes the weights themselves then keeps a copy of them.

    Raises:
        ValueError: the settings name no tuner that there is, or no layers.
    """
    tuner = TUNERS[tuner_name(settings)].make(model, settings, keep_loaded)
    if getattr(settings, "gradient_checkpointing", False):
        base_model(tuner.model).gradient_checkpointing_enable({"use_reentrant": False})
    return tuner


def describe(model: nn.Module, settings: TunerSettings) -> str:
    """What is trained of a tuned model, for people."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"tuner {tuner_name(settings)}: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})"


def train_only(model: nn.Module, names: Collection[str]) -> None:
    """Train the parameters of these names, and the score head of a reward model, and freeze the others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names or name.startswith(f"{SCORE}."))


def biases_and_norms(model: nn.Module) -> list[str]:
    """Names of all biases, and of all parameters of the layers that are called norms."""
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    places = ((name, *name.rpartition(".")[::2]) for name, _ in model.named_parameters())
    return [name for name, layer, leaf in places if leaf == "bias" or layer in norms]
