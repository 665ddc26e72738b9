"""What a loop does beside learning, on one rank or many: folder, log, seeds, checkpoints, resume, signals."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from torch import Tensor

from fastrl.run import distributed
from fastrl.run.checkpoint import last_checkpoint, save_checkpoint
from fastrl.run.lock import release_lock, take_lock
from fastrl.run.log import RunLog
from fastrl.run.masters import trained
from fastrl.run.metrics import peak_memory_gib
from fastrl.run.optim import Learner, check_finite, optimizer_step
from fastrl.run.output import check_output, claim_output, writing
from fastrl.run.resume import load_state, newest_state, save_state, step_seed
from fastrl.run.signals import Interrupted, StopSignals
from fastrl.run.trackers import check_trackers

T = TypeVar("T")


class Record(NamedTuple):
    """One record of a run, as it stands in metrics.jsonl and as a sink gets it."""

    title: str
    step: int
    total: int
    kind: str
    metrics: dict[str, Any]


Sink = Callable[[Record], None]


class Run:
    """A run in its folder, which no other run can use meanwhile. A loop uses it in this order:

        with Run(settings, "sft") as run:          # ranks, lock, seed
            ...                                    # models and data, on run.device: what can be refused
            run.claim()                            # the folder is this run's
            run.begin(total, [learner], save)      # log, signals; with `resume`, the newest checkpoint
            for step in run.steps():
                ...                                # gradients
                loss, norms = run.update(loss, learner)
                run.report({"loss": loss})
            run.write(...)                         # the result

    Of several ranks each goes through the same steps, rank 0 alone prints and writes. Ctrl-C and SIGTERM end the loop
    at its next step, with a checkpoint and `Interrupted`.

    Args:
        settings: `run.settings.RunSettings`, with `max_grad_norm`, and `save_every` where `update` keeps checkpoints.
        sink: called on rank 0 with each record that is reported.
    """

    def __init__(self, settings: Any, title: str, sink: Sink | None = None) -> None:
        self.settings, self.title = settings, title
        self.output = Path(settings.output)
        self.device = "cpu"
        self.step = self.done = self.total = 0  # done: the steps of the run that this one goes on with
        self._sink = sink
        self._stack = ExitStack()
        self._signals = StopSignals()
        self._log: RunLog | None = None
        self._learners: Sequence[Learner] = ()
        self._own: Any = None
        self._save: Callable[[Path], object] = lambda folder: None
        self._entered = self._began = self._reported = time.perf_counter()

    def __enter__(self) -> Run:
        check_trackers(self.settings.tracker)
        self.device = distributed.join(self.settings.device)
        with ExitStack() as undo:
            undo.push(self._stack.__exit__)
            if not distributed.is_main():  # what all ranks say, rank 0 says
                self._stack.enter_context(redirect_stdout(self._stack.enter_context(open(os.devnull, "w"))))
                self._stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            distributed.on_main(self._lock)
            transformers.set_seed(self.settings.seed)
            undo.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            distributed.announce(error)
        self._stack.__exit__(kind, error, trace)

    def claim(self) -> None:
        """Make the folder this run's, once nothing can be refused any more; see `claim_output`."""
        self.write(lambda: claim_output(self.settings))

    def begin(self, total: int, learners: Sequence[Learner], save: Callable[[Path], object], own: Any = None) -> None:
        """Start the log and, with `resume`, take the learners to the newest checkpoint; `done` says how far that is.

        Args:
            save: writes the models into the folder of a checkpoint.
            own: an object whose attributes, numbers and tensors, the loop's steps change beside the learners; it is
                kept in checkpoints and brought to the newest one's state.
        """
        self.total, self._learners, self._save, self._own = total, learners, save, own
        if self.settings.resume:
            newest = distributed.on_main(lambda: newest_state(self.output))
            if newest is None:
                print(f"resume: no checkpoint under {self.output / 'checkpoints'} yet: starting from the beginning")
            else:
                self.step = self.done = load_state(newest, self.settings, learners, own)
                print(f"resume: going on after step {self.done} from {newest.parent}")
        if distributed.is_main():
            log = RunLog(
                self.settings, self.title, total=total, done=self.done, device=self.device, began=self._entered
            )
            self._log = self._stack.enter_context(log)
        self._signals.watch()
        self._stack.callback(self._signals.restore)
        self._reported = time.perf_counter()

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to make, each with random numbers of its own.

        Raises:
            Interrupted: a signal came; the run so far is saved.
        """
        for step in range(self.done + 1, self.total + 1):
            self._stop_if_asked()
            self.step = step
            self.phase("train")
            self._began = self._reported = time.perf_counter()
            torch.manual_seed(step_seed(self.settings.seed, step, distributed.rank()))
            yield step
        self._stop_if_asked()

    def update(self, loss: Tensor, *learners: Learner) -> tuple[float, list[float]]:
        """One step of each learner on its gradients; the loss and the gradients' norms, of all ranks together.

        Every rank passes the sum over its own rows, divided by what the whole batch counts. Before the update the
        weights that gave this finite loss are kept, if a checkpoint is due.

        Raises:
            NonFiniteError: loss or norm is not finite, on every rank; the weights are left as they were.
        """
        total = self.check_finite(float(distributed.sum_over_ranks(loss)))
        every = getattr(self.settings, "save_every", 0)
        if every and self.step > 1 and (self.step - 1) % every == 0:
            self.save(self.step - 1)
        norms = []
        for model, optimizer, _ in learners:
            distributed.sum_gradients(tensor for _, tensor in trained(model))
            limit = self.settings.max_grad_norm
            norms.append(optimizer_step(model, optimizer, None, max_grad_norm=limit, step=self.step))
        return total, norms

    def check_finite(self, loss: float) -> float:
        """The loss.

        Raises:
            NonFiniteError: it is not finite.
        """
        check_finite(loss, self.step, last_checkpoint(self.output))
        return loss

    def due(self, every: int) -> bool:
        """Whether this step is one of every so many; 0: none is."""
        return every > 0 and self.step % every == 0

    def report(self, metrics: Mapping[str, Any], kind: str = "train", *, tokens: int = 0) -> None:
        """One record of metrics that are the same on every rank, with its seconds: of a step, or since the last record;
        of `tokens`, how many a second in this step.
        """
        metrics, now = dict(metrics), time.perf_counter()
        if tokens:
            seconds = now - self._began
            metrics |= {"tokens_per_s": tokens / seconds, "peak_mem_gib": peak_memory_gib(self.device)}
        metrics[f"time_{'step' if kind == 'train' else kind}_s"] = now - self._reported
        self._reported = now
        if self._log is not None:
            self._log.write(self.step, kind, metrics)
            if self._sink:
                self._sink(Record(self.title, self.step, self.total, kind, metrics))

    def samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add answers to held-out prompts to samples.jsonl: {"prompt", "response", ...} of this step."""
        if self._log is not None:
            self._log.samples(self.step, records)

    def phase(self, name: str) -> None:
        """Show beside the progress bar what the run does now: "evaluate", "sample", ..."""
        if self._log is not None:
            self._log.phase(name)

    def print(self, text: str) -> None:
        """A line that does not break the progress bar."""
        if self._log is not None:
            self._log.print(text)

    def save(self, step: int) -> None:
        """A checkpoint of the weights after `step` steps, unless it is there already."""

        def write(folder: Path) -> None:
            self._save(folder)
            save_state(folder, step, self.settings, self._learners, self._own)

        def keep() -> None:
            newest = newest_state(self.output)
            if newest is None or newest.parent.name != f"step-{step:06d}":
                self.phase("save")
                save_checkpoint(write, self.output, step)

        self.write(keep)

    def write(self, function: Callable[[], T]) -> T:
        """What a function returns that writes into the folder; it runs on rank 0 alone.

        Raises:
            OSError: the disk is full or read-only, on every rank.
        """

        def guarded() -> T:
            with writing(self.output):
                return function()

        return distributed.on_main(guarded)

    def _lock(self) -> None:
        check_output(self.settings)
        folder = self.output.resolve()
        with writing(self.output):
            made = take_lock(folder)
        self._stack.callback(release_lock, folder, made)

    def _stop_if_asked(self) -> None:
        number = distributed.max_over_ranks(self._signals.received)
        if number:
            if self.step > 0:
                self.save(self.step)
            raise Interrupted(
                number,
                f"stopped after step {self.step} of {self.total}, which is saved: go on with --resume true"
                if self.step > 0
                else "stopped before the first step: nothing to save",
            )
