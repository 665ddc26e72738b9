"""The files that a run leaves, and the figures in them; of runs that are at work or were killed too."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastrl.run.lock import LOCK
from fastrl.run.output import LOG, SAMPLES
from fastrl.run.record import read_record

POINTS = 150  # of a curve
PERCENT = ("accuracy", "token_accuracy", "stopped", "clip_frac", "vf_clip_frac")
Curves = dict[str, tuple[list[float], list[float]]]  # {name: (steps, values)}


class RunFiles(NamedTuple):
    """The files of one run; `metrics` and `samples` are their records in order."""

    name: str
    folder: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.metrics if record.get("kind") == kind]

    def mapping(self, name: str) -> dict[str, Any]:
        """A part of run.json that holds names and values; {} where there is none."""
        found = self.record.get(name)
        return found if isinstance(found, dict) else {}


class ScoreChange(NamedTuple):
    """(mean, its standard error) of scores, of their paired changes, and the share of prompts with a higher one."""

    answers: int
    before: tuple[float, float]
    after: tuple[float, float]
    change: tuple[float, float]
    risen: float

    @staticmethod
    def text(value: tuple[float, float]) -> str:
        return f"{value[0]:.3f} ± {value[1]:.3f}"


def read_run(folder: str | Path) -> RunFiles:
    """The files of the run in a folder.

    Raises:
        ValueError: no run wrote there.
    """
    folder = Path(folder).expanduser()
    if not (folder / LOG).is_file():
        raise ValueError(f"report: {folder}: expected the output folder of a run, got one without {LOG}")
    name = folder.resolve().name
    return RunFiles(name, folder, read_record(folder), _records(folder / LOG), _records(folder / SAMPLES))


def state(run: RunFiles) -> str:
    """running or not finished, stopped (and why), finished; of a run without run.json nothing is known."""
    found = str(run.record.get("state") or "state unknown")
    if found == "running" and not (run.folder / LOCK).exists():
        return "not finished"
    return f"stopped ({run.record['why']})" if found == "stopped" and run.record.get("why") else found


def evaluations(run: RunFiles) -> tuple[dict[str, float], dict[str, float]]:
    """The numbers of the first and of the last evaluation, without step and times; {} where there was none."""
    found = [numbers(record) for record in run.of_kind("eval")] or [{}]
    first, last = (
        {k: v for k, v in values.items() if k != "step" and not is_time(k)} for values in (found[0], found[-1])
    )
    return first, last


def held_out(run: RunFiles) -> dict[str, tuple[float, float]]:
    """{metric: (at the first evaluation, at the last)}, without standard errors."""
    first, last = evaluations(run)
    return {name: (first[name], last[name]) for name in last if name in first and not is_error(name)}


def shown(values: Mapping[str, float], name: str) -> str:
    """A metric as text, with its standard error where the record has it: eval_accuracy_se/helpful and its like."""
    metric, slash, criterion = name.partition("/")
    error = values.get(f"{metric}_se{slash}{criterion}")
    return number(values[name], name) + ("" if error is None else f" ± {number(error, name)}")


def phases(run: RunFiles) -> dict[str, float]:
    """Seconds of a run's phases, summed over its records."""
    sums: dict[str, float] = {}
    for record in map(numbers, run.metrics):
        own = {name[5:-2]: value for name, value in record.items() if is_time(name)}
        if "step" in own:
            step = own.pop("step")
            own["other steps" if own else "steps"] = max(0.0, step - sum(own.values()))
        for name, value in own.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def metric_curves(records: Sequence[dict[str, Any]]) -> Curves:
    """{metric: (steps, values)}, averaged over neighbours so that at most POINTS are left."""
    found: Curves = {}
    for record in records:
        values = numbers(record)
        if "step" not in values:
            continue
        step = values.pop("step")
        for name, value in values.items():
            steps, curve = found.setdefault(name, ([], []))
            steps.append(step)
            curve.append(value)
    return {name: averaged(*curve) for name, curve in found.items()}


def averaged(steps: Sequence[float], values: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """A curve whose neighbours are averaged so that at most `points` are left, each at the last step of its group."""
    width = max(1, -(-len(values) // points))
    groups = [slice(start, start + width) for start in range(0, len(values), width)]
    return [steps[g][-1] for g in groups], [sum(values[g]) / len(values[g]) for g in groups]


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The entries of a record that are numbers, NaN included; True is none."""
    kept = {k: v for k, v in record.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {name: float(value) if abs(value) < 1e300 or value != value else math.inf for name, value in kept.items()}


def is_time(name: str) -> bool:
    return name.startswith("time_") and name.endswith("_s")


def highlights(run: RunFiles) -> list[str]:
    """Held-out loss, accuracy or score, from the first to the last evaluation."""
    first, last = evaluations(run)
    labels = {"eval_accuracy": "held-out accuracy", "score": "score of held-out answers", "eval_loss": "held-out loss"}
    names = [name for name in labels if name in first and name in last]
    return [f"{labels[name]} {shown(first, name)} → {shown(last, name)}" for name in names[:2]]


def score_change(run: RunFiles) -> ScoreChange | None:
    """How the scores of answers to the same held-out prompts changed from the first evaluation to the last; None where
    fewer than two were scored, or the answers themselves are given (a reward model's).
    """
    steps = [record.get("step") for record in run.samples]
    first, last = (
        [r for r in run.samples if steps and r.get("step") == step] for step in (steps[:1] + steps[-1:]) or (0, 0)
    )
    pairs = [(numbers(a), numbers(b)) for a, b in zip(first, last, strict=False) if "rank" not in b]
    scores = [(a["score"], b["score"]) for a, b in pairs if "score" in a and "score" in b]
    if len(scores) < 2 or steps[0] == steps[-1]:
        return None
    before, after = zip(*scores, strict=True)
    changes = [b - a for a, b in scores]
    risen = sum(change > 0 for change in changes) / len(changes)
    return ScoreChange(len(scores), _mean(before), _mean(after), _mean(changes), risen)


def is_error(name: str) -> bool:
    """Whether a metric is the standard error of another."""
    return name.partition("/")[0].endswith("_se")


def is_percent(metric: str) -> bool:
    return metric.removeprefix("eval_").partition("/")[0] in PERCENT


def number(value: float, name: str = "") -> str:
    """A metric as text: shares in percent, four digits else."""
    return f"{value:.1%}" if is_percent(name) else f"{value:.4g}"


def duration(seconds: float) -> str:
    """1 h 3 min, 4 min 10 s, 12.3 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _mean(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file that are whole; a run that is at work or was killed may end in half a line."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
