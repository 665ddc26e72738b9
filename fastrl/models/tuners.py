"""Tuners: what of a model is trained. One function each, behind one protocol.

    policy = Policy(tune(model, settings))

`full` trains every weight; `bitfit` the biases and norms that there are; `lora` puts PEFT's adapters, on fastrl's fused
layers, on a frozen model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from difflib import get_close_matches
from typing import Any, NamedTuple, Protocol

import peft
import transformers
from torch import Tensor, nn

from fastrl.models.heads import base_model
from fastrl.models.hidden import final_hidden
from fastrl.models.lora import merged, patch


class TunerSettings(Protocol):
    """What `tune` reads of a loop's settings; also `lora_dropout` and `gradient_checkpointing`, if there."""

    @property
    def tuner(self) -> str: ...  # key of TUNERS
    @property
    def lora_rank(self) -> int: ...  # 0: full fine-tuning
    @property
    def lora_alpha(self) -> int: ...  # 0: twice the rank
    @property
    def lora_targets(self) -> str: ...


class Tuner(Protocol):
    """A model of which some parameters are trained: those that require a gradient."""

    model: Any  # what holds the parameters, samples, and is saved

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T, H) hidden states below the head at the given tokens; those of virtual tokens are taken off."""

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
    ones, which costs their memory.
    """

    def __init__(self, model: Any, keep_loaded: bool = False) -> None:
        self.model = model
        self._others = [p.detach().clone() for p in self._trained()] if keep_loaded else []

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return final_hidden(self.model, input_ids, attention_mask)

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
        if not self._others:
            raise RuntimeError("off: no copy of the loaded weights was kept; tune with keep_loaded=True")
        for i, parameter in enumerate(self._trained()):
            parameter.data, self._others[i] = self._others[i], parameter.data


class Adapter:
    """An adapter of PEFT on a frozen model; `off` switches it off, `merged` folds it into the weights."""

    def __init__(self, model: peft.PeftModel) -> None:
        self.model: Any = model

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return final_hidden(self.model, input_ids, attention_mask)

    def off(self) -> AbstractContextManager[None]:
        return self.model.disable_adapter()

    def merged(self) -> AbstractContextManager[None]:
        return merged(self.model)


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


class Method(NamedTuple):
    """What there is to know of a tuner before it is made."""

    make: Callable[[Any, TunerSettings, bool], Tuner]  # (model, settings, keep_loaded)
    check: Callable[[nn.Module, TunerSettings], None]  # ValueError if the settings do not fit the model
    saves_adapter: bool  # an adapter is saved alone, so that its base must be a folder that it can name


def nothing_to_check(model: nn.Module, settings: TunerSettings) -> None:
    """Any model will do."""


def check_bitfit(model: nn.Module, settings: TunerSettings) -> None:
    """Raise ValueError if the model has neither biases nor norms with weights."""
    if not biases_and_norms(model):
        raise ValueError(
            f"tuner: expected another than bitfit for {type(model).__name__}, which has neither biases nor norms with"
            " weights; take lora or full"
        )


TUNERS = {
    "full": Method(full, nothing_to_check, saves_adapter=False),
    "bitfit": Method(bitfit, check_bitfit, saves_adapter=False),
    "lora": Method(lora, lambda model, settings: check_lora(model, lora_settings(settings)), saves_adapter=True),
}


def tuner_name(settings: TunerSettings) -> str:
    """Key of TUNERS: `settings.tuner`, but full in place of lora where lora_rank is 0.

    Raises:
        ValueError: there is no such tuner.
    """
    name = settings.tuner
    if name not in TUNERS:
        nearest = get_close_matches(name.lower(), TUNERS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"tuner: expected one of {', '.join(TUNERS)}, got {name!r}{hint}")
    return "full" if name == "lora" and settings.lora_rank == 0 else name


def saves_adapter(settings: TunerSettings) -> bool:
    """Whether the tuner saves an adapter alone."""
    return TUNERS[tuner_name(settings)].saves_adapter


def check_tuner(model: nn.Module, settings: TunerSettings) -> None:
    """Raise ValueError if `tune` would: an unknown tuner, or one that does not fit the model or other settings."""
    TUNERS[tuner_name(settings)].check(model, settings)


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
        parameter.requires_grad_(name in names or name.startswith("score."))


def biases_and_norms(model: nn.Module) -> list[str]:
    """Names of all biases, and of all parameters of the layers that are called norms."""
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    places = ((name, *name.rpartition(".")[::2]) for name, _ in model.named_parameters())
    return [name for name, layer, leaf in places if leaf == "bias" or layer in norms]


class LoRASettings(NamedTuple):
    """Adapter shape; `target_modules`: "all-linear", or layer names (a tuple, or comma-separated)."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"


def lora_settings(settings: TunerSettings) -> LoRASettings:
    """The adapters that a loop's settings ask for."""
    alpha, dropout = settings.lora_alpha or 2 * settings.lora_rank, getattr(settings, "lora_dropout", 0.0)
    return LoRASettings(settings.lora_rank, alpha, dropout, settings.lora_targets)


def add_lora(model: transformers.PreTrainedModel, settings: LoRASettings) -> peft.PeftModel:
    """PEFT LoRA on a frozen model, on fastrl's fused layers; the score head of a reward model is trained whole.

    Adapters are drawn from torch's global generator: seed it first.

    Raises:
        ValueError: rank is not positive, or target_modules match no layer.
    """
    if settings.rank <= 0:
        raise ValueError(f"add_lora: rank: expected a positive integer, got {settings.rank}")
    scores = hasattr(model, "score")
    targets = _targets(settings)
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=["score"] if scores else None,
    )
    adapted = peft.get_peft_model(model, config)
    patch(adapted)
    return adapted


def check_lora(model: nn.Module, settings: LoRASettings) -> None:
    """Raise ValueError if a target names no layer of the model; `add_lora` would find out once files are written."""
    targets, names = _targets(settings), [name for name, _ in model.named_modules()]
    for target in () if isinstance(targets, str) else targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            layers = {
                name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
            }
            raise ValueError(
                f"lora_targets: expected all-linear or names of layers of {type(model).__name__}"
                f" ({', '.join(sorted(layers))}), got {target!r}"
            )


def _targets(settings: LoRASettings) -> str | tuple[str, ...]:
    targets = settings.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        return tuple(name.strip() for name in targets.split(","))
    return targets
