"""What a run writes and shows of itself, on rank 0: metrics, samples, run.json, trackers, and at its end a report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fastrl.run.metrics import MetricsLog, append_lines, keep_lines
from fastrl.run.output import SAMPLES, writing
from fastrl.run.record import write_begun, write_ended
from fastrl.run.resume import plain
from fastrl.run.summary import save_report
from fastrl.run.trackers import Trackers


class RunLog:
    """The files of a run in its folder, and the trackers; use it as a context manager. Of the records of an earlier run
    those of its first `done` steps are kept.

    Args:
        began: `time.perf_counter()` when the run began.
    Raises:
        OSError: from any method, the disk is full or read-only.
        ValueError: a tracker does not start.
    """

    def __init__(self, settings: Any, title: str, *, total: int, done: int, device: str, began: float) -> None:
        self._output, self._began = Path(settings.output), began
        with writing(self._output), ExitStack() as undo:
            self._metrics = undo.enter_context(MetricsLog(self._output, total=total, title=title, done=done))
            if (self._output / SAMPLES).exists():
                keep_lines(self._output / SAMPLES, done or -1)
            write_begun(settings, title, steps=total, done=done, device=device)
            self._trackers = Trackers(settings.tracker, self._output, plain(settings))
            self._stack = undo.pop_all()
        self._stack.callback(self._trackers.finish)

    def write(self, step: int, kind: str, metrics: Mapping[str, Any]) -> None:
        """One record of metrics."""
        with writing(self._output):
            self._metrics.write(step, kind, **metrics)
        self._trackers.log(step, kind, metrics)

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Answers to held-out prompts."""
        with writing(self._output):
            append_lines(self._output / SAMPLES, [{"step": step, **record} for record in records])

    def phase(self, name: str) -> None:
        """What the progress bar says is done now."""
        self._metrics.phase(name)

    def print(self, text: str) -> None:
        """A line that does not break the progress bar."""
        self._metrics.print(text)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Say how the run ended. One that failed since nothing can be written fails with its own error; one that is
        whole stays so without its report.
        """
        with self._stack:
            with suppress(OSError) if error is not None else writing(self._output):
                write_ended(self._output, seconds=time.perf_counter() - self._began, error=error)
            if error is None:
                self._report()

    def _report(self) -> None:
        try:
            save_report(self._output)
        except Exception as error:  # noqa: BLE001
            self.print(f"report.html is not written: {error}; `fastrl report {self._output}` tries again")
