"""transformers' Trainer, and TRL's trainers, which derive from it: a callback and a loss function.

trainer = transformers.Trainer(model=model, ..., callbacks=[FastRLCallback()])
"""

from __future__ import annotations

import resource
import time
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import fastrl
from fastrl.ops import token_logprobs

IGNORED = -100  # label of what is not learned, transformers' ignore_index


def causal_lm_loss(outputs: Any, labels: Tensor, num_items_in_batch: float | Tensor | None = None) -> Tensor:
    """`compute_loss_func` of a Trainer for a causal LM, from whole logits; for models whose head cannot be patched.

        F.cross_entropy(logits[:, :-1], labels[:, 1:])    or its sum / num_items_in_batch

    `fastrl.ops.token_logprobs` makes neither a float32 copy of the logits nor their log-softmax. Trainer keeps the
    labels from the model then, so that auxiliary losses of experts are not part of it.

    Args:
        outputs: what the model gave, with `logits` (B, T, V).
        labels: (B, T) token ids; -100 is not learned.
        num_items_in_batch: labels of all micro-batches of the step (and processes); None: of this one.
    Raises:
        ValueError: there are no labels, or shapes differ.
    """
    if labels is None:
        raise ValueError("causal_lm_loss: labels: expected (B, T) token ids in the batch, got none")
    logits = outputs["logits"]
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).to(logits.device)
    kept = targets != IGNORED
    count = kept.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return -token_logprobs(logits, targets, mask=kept).sum() / count


class FastRLCallback(transformers.TrainerCallback):
    """Patches the model when training begins (LoRA layers and head), measures it, and undoes the patch at the end.

    Trainer tells callbacks nothing when training raises. As a context manager the callback undoes then too:

        with FastRLCallback() as callback:
            Trainer(..., callbacks=[callback]).train()

    Every log with a loss gets, as means of the optimizer steps since the last one,

        tokens_per_second: attended tokens of this process over the seconds of its steps, without loading data
        forward_seconds, backward_seconds, optimizer_seconds: of a step; backward is the rest of the micro-batches
        peak_memory_mib: allocated by torch on a GPU, else resident, since the process began

    in `state.log_history` and for callbacks that come later (what is printed has them, trackers of `report_to` have
    not). On a GPU the times are between events of its stream; nothing waits for it but a log. Where the Trainer
    compiles the model, only the optimizer and the rest are told apart, and tokens are not counted.

    Args:
        head: False leaves the head alone. One that cannot be patched is left alone with a warning that says why, and
            under TRL's trainers, which have one of their own: `fastrl.integrations.trl.patch` computes that.
        eval_logits: whether evaluation gives logits, which `compute_metrics` needs; without it False saves memory.
    """

    def __init__(self, *, head: bool = True, eval_logits: bool = True) -> None:
        self.head, self.eval_logits = head, eval_logits
        self.patch: Any = None  # what `fastrl.patch` returned, while training
        self._meter: Meter | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.undo()
        if model is None:
            raise ValueError(
                f"FastRLCallback: on_train_begin: expected a model from the Trainer of transformers"
                f" {transformers.__version__}, got none; tested with transformers 5.0 and later"
            )
        self.patch = self._patched(model, args)
        self._meter = Meter(model, args.device, hooks=not args.torch_compile)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark("begin")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark("end")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self._meter is None or not logs or "loss" not in logs:
            return
        found = self._meter.report()
        logs.update(found)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.undo()

    def undo(self) -> None:
        """Gives the model back what it was; a second call does nothing."""
        meter, patch, self._meter, self.patch = self._meter, self.patch, None, None
        if meter is not None:
            meter.close()
        if patch is not None:
            patch.undo()

    def __enter__(self) -> FastRLCallback:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def _patched(self, model: nn.Module, args: Any) -> Any:
        if not self.head or any(kind.__module__.startswith("trl.") for kind in type(args).__mro__):
            return fastrl.patch(model, expect_layers=False)
        if args.n_gpu > 1:
            reason = "nn.DataParallel copies the forward of the first GPU; start one process a GPU with torchrun"
        elif args.use_liger_kernel:
            reason = "use_liger_kernel has put Liger's head there"
        else:
            try:
                return fastrl.patch(model, head=True, eval_logits=self.eval_logits)
            except ValueError as error:
                reason = str(error)
        warnings.warn(f"FastRLCallback: the head stays the model's own: {reason}", stacklevel=2)
        return fastrl.patch(model, expect_layers=False)

    def _mark(self, name: str) -> None:
        if self._meter is not None:
            self._meter.mark(name)


class Meter:
    """Seconds and tokens of the optimizer steps since the last report."""

    def __init__(self, model: nn.Module, device: torch.device, hooks: bool) -> None:
        self.on_gpu = device.type == "cuda"
        self.device = device
        self.clear()
        self.hooks = []
        if hooks:
            before, after = self._before_forward, self._after_forward
            # Plain functions: a copy of the model in training calls the same meter.
            self.hooks = [
                model.register_forward_pre_hook(lambda *call: before(*call), with_kwargs=True),
                model.register_forward_hook(lambda *call: after(*call)),
            ]

    def clear(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.forwards: list[tuple[Any, Any]] = []
        self.tokens: int | Tensor = 0
        self.started: Any = None

    def mark(self, name: str) -> None:
        if name == "begin":
            self.steps.append({})
        if self.steps:
            self.steps[-1][name] = self._now()

    def report(self) -> dict[str, float]:
        """The numbers of a log; forgets the steps."""
        steps = [step for step in self.steps if len(step) == 3]
        found = {"peak_memory_mib": self._peak_mib()}
        if steps:
            seconds, count = self._seconds, len(steps)
            optimizer = sum(seconds(step["optimizer"], step["end"]) for step in steps)
            gradients = sum(seconds(step["begin"], step["optimizer"]) for step in steps)
            found["optimizer_seconds"] = optimizer / count
            if self.hooks:
                forward = sum(seconds(*span) for span in self.forwards)
                found["forward_seconds"] = forward / count
                found["backward_seconds"] = (gradients - forward) / count
                found["tokens_per_second"] = float(self.tokens) / (gradients + optimizer)
            else:
                found["gradient_seconds"] = gradients / count
        self.clear()
        return {name: round(value, 4) for name, value in found.items()}

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():  # neither an evaluation nor a reference
            self.tokens = self.tokens + _attended(args, kwargs)
            self.started = self._now()

    def _after_forward(self, *_: Any) -> None:
        if self.started is not None:
            self.forwards.append((self.started, self._now()))
            self.started = None

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        if not self.on_gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _peak_mib(self) -> float:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _attended(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | Tensor:
    """Tokens of a batch that are no padding."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.detach().sum()
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids.numel() if isinstance(ids, Tensor) else 0
