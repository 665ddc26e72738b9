"""What a run tells about itself: metrics.jsonl, a progress bar, printed lines, phase times, peak
memory.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


class MetricsLog:
    """Writes records to `output/metrics.jsonl`, shows a bar of `total` steps on stderr with the time that is left and
    what is done now, prints every Nth line.

    Use as a context manager. The bar hides itself where stderr is no terminal; the lines are
    printed to stdout. Of an earlier run's records those of its first `done` steps are kept.
    """

    def __init__(self, output: str | Path, *, total: int, title: str, done: int = 0, print_every: int = 10) -> None:
        Path(output).mkdir(parents=True, exist_ok=True)
        self.path = Path(output) / "metrics.jsonl"
        kept = lines_until(self.path, done) if done else []
        self._file = self.path.open("w", encoding="utf-8")
        self._file.writelines(kept)
        self._file.flush()
        self._bar = tqdm(total=total, initial=done, desc=title, unit="step", disable=None, leave=False)
        self._total, self._title, self._print_every = total, title, print_every

    def write(self, step: int, kind: str = "train", **metrics: Any) -> None:
        """One record {"step", "kind", **metrics}; a "train" record moves the bar to `step`. Lists are not printed."""
        self._file.write(json.dumps({"step": step, "kind": kind, **metrics}) + "\n")
        self._file.flush()
        if kind == "train":
            self._bar.update(step - self._bar.n)
        if kind != "train" or step in (1, self._total) or step % self._print_every == 0:
            shown = [f"{name}={_short(value)}" for name, value in metrics.items() if not isinstance(value, list)]
            self.print(f"{self._title} {step}/{self._total} {kind}: {' '.join(shown)}")

    def phase(self, name: str) -> None:
        """Show beside the bar what the run does now."""
        self._bar.set_postfix_str(name)

    def print(self, text: str) -> None:
        """A line on stdout that does not break the bar."""
        tqdm.write(text)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
        self._file.close()


def lines_until(path: Path, step: int) -> list[str]:
    """The lines of a JSONL file whose records are of steps up to that one; a line that was not finished is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]


def keep_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Leave the records of the steps up to that one in a JSONL file; what they are."""
    kept = lines_until(path, step)
    path.write_text("".join(kept), encoding="utf-8")
    return [json.loads(line) for line in kept]


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


class PhaseTimer:
    """Seconds spent per named phase: `with timer.phase("update"): ...`, then `timer.take()`; `show` is told the name of
    each as it begins.
    """

    def __init__(self, device: str | torch.device = "cpu", show: Callable[[str], object] = lambda name: None) -> None:
        self._device, self._show = torch.device(device), show
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; on CUDA the device is synchronised before and after, so that the time is the block's own."""
        self._show(name)
        self._sync()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._sync()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """{"time_<phase>_s": seconds} since the last take."""
        taken = {f"time_{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return taken

    def _sync(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def peak_memory_gib(device: str | torch.device = "cpu") -> float:
    """Peak memory in GiB: allocated on a CUDA device, else the resident set of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # ru_maxrss is in KiB on Linux


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
