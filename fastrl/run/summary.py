"""`report.html`: curves, times, samples before and after, settings of a run; and several runs side by side.

A metric is whatever number a record of metrics.jsonl holds: they are named here for titles and order alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastrl.run.output import REPORT
from fastrl.run.record import RUN
from fastrl.run.report import Html, bar_chart, details, line_chart, page, paragraph, preformatted, save_page, table
from fastrl.run.runfiles import (
    Curves,
    RunFiles,
    duration,
    evaluations,
    held_out,
    highlights,
    is_error,
    is_percent,
    is_time,
    metric_curves,
    number,
    numbers,
    phases,
    read_run,
    score_change,
    shown,
    state,
)

SHOWN_SAMPLES = 20
TITLES = {
    "loss": "Loss",
    "perplexity": "Perplexity",
    "accuracy": "Pairs in the right order",
    "token_accuracy": "Tokens that are the model's first choice",
    "score": "Score",
    "reward": "Score minus KL penalty",
    "kl_k1": "KL to the reference, nats per answer",
    "response_tokens": "Tokens per answer",
    "ece": "Expected calibration error",
    "length_correlation": "Correlation of score and length",
    "criteria_correlation": "Correlation of the criteria's scores",
    "kl_coef": "Weight of the KL penalty",
    "ptx_loss": "Loss on the data that is mixed in",
    "stopped": "Answers that end by themselves",
    "entropy": "Entropy, nats per token",
    "explained_variance": "Variance of returns that the critic explains",
    "lr": "Learning rate",
    "grad_norm": "Norm of the gradient",
}
FIRST = ("loss", "perplexity", "accuracy", "token_accuracy", "score", "reward", "kl_k1", "kl_k2", "kl_k3", "lr")
SPEED = ("tokens_per_s", "peak_mem_gib")


def save_report(folder: str | Path) -> Path:
    """Write `report.html` into the folder of a run; its path."""
    run = read_run(folder)
    return save_page(run.folder / REPORT, page(run.name, lead(run), sections(run)))


def save_comparison(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Write a page with the runs' curves over each other, their last metrics and what their settings differ in."""
    runs = _named_apart([read_run(folder) for folder in folders])
    blocks = [
        ("Runs", [_overview(runs)]),
        ("Last metrics", [_last_metrics(runs)]),
        ("Settings that differ", [_differences(runs)]),
        ("Curves", _compared_curves(runs)),
    ]
    return save_page(path, page("Comparison", ", ".join(run.name for run in runs), blocks))


def save_pipeline(folder: str | Path, stages: Sequence[str | Path]) -> Path:
    """Write `report.html` of the stages into their pipeline's folder: what came of them first, then each in turn."""
    runs = [read_run(stage) for stage in stages]
    blocks = [("Stages", [_overview(runs), _before_and_after(runs)])]
    for run in runs:
        blocks += [(f"{run.name}: {heading.lower()}", found) for heading, found in sections(run)]
    lines = [f"{run.name}: {', '.join(highlights(run)) or state(run)}" for run in runs]
    Path(folder).mkdir(parents=True, exist_ok=True)
    return save_page(Path(folder) / REPORT, page(Path(folder).resolve().name, "; ".join(lines) + ".", blocks))


def lead(run: RunFiles) -> str:
    """One sentence: what ran, how far it came, and what it did to the held-out data."""
    record, steps = run.record, [r["step"] for r in run.of_kind("train") if isinstance(r.get("step"), int)]
    parts = [f"{record.get('loop', 'run')}, {state(run)}: {max(steps, default=0)} of {record.get('steps', '?')} steps"]
    parts += [duration(record["seconds"])] if record.get("seconds") else []
    parts += [str(record["device"])] if record.get("device") else []
    return ", ".join(parts) + "".join(f"; {line}" for line in highlights(run)) + "."


def sections(run: RunFiles) -> list[tuple[str, list[Html]]]:
    """(heading, blocks) of a run's report; none without content."""
    found = [
        ("Held out", _held_out_table(run)),
        ("By criterion", criteria(run)),
        ("Calibration", calibration(run)),
        ("Samples before and after", samples(run)),
        ("Curves", curves(run)),
        ("Time and memory", times(run)),
        ("Settings", _settings(run)),
        ("Versions", _versions(run)),
    ]
    return [(heading, blocks) for heading, blocks in found if blocks]


def criteria(run: RunFiles) -> list[Html]:
    """Bars of the held-out metrics that are told by criterion, as eval_accuracy/helpful."""
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for name, values in held_out(run).items():
        metric, slash, criterion = name.partition("/")
        if slash:
            groups.setdefault(metric, {})[criterion] = values
    charts = []
    for metric, pairs in groups.items():
        series = {label: [pair[at] for pair in pairs.values()] for at, label in enumerate(("before", "after"))}
        charts.append(bar_chart(f"{title(metric)}, held out", list(pairs), series, percent=is_percent(metric)))
    return charts


def samples(run: RunFiles) -> list[Html]:
    """Answers to the same held-out prompts at the first and the last evaluation; of a reward model its scores of the
    same answers.
    """
    steps = [record.get("step") for record in run.samples]
    if not steps:
        return []
    first, last = (
        [record for record in run.samples if record.get("step") == step][:SHOWN_SAMPLES]
        for step in (steps[0], steps[-1])
    )
    if steps[0] == steps[-1]:
        return [table(["prompt", "answer"], [[new.get("prompt", ""), _answer(new)] for new in last])]
    pairs = list(zip(first, last, strict=False))
    if all("rank" in new for new in last):
        ranked = [[new.get("prompt", ""), _ranked(new), _scores(old), _scores(new)] for old, new in pairs]
        return [table(["prompt", "answer (rank)", "score before", "score after"], ranked, numbers=(2, 3))]
    answers = [[new.get("prompt", ""), _answer(old), _answer(new)] for old, new in pairs]
    return [paragraph("Not chosen: the first held-out prompts."), table(["prompt", "before", "after"], answers)]


def calibration(run: RunFiles) -> list[Html]:
    """The reliability curve of the last evaluation: the share of pairs in the right order by the model's confidence."""
    bins = (run.of_kind("eval") or [{}])[-1].get("eval_reliability")
    try:
        points = sorted((float(confidence), float(share)) for confidence, share, _ in bins or ())
    except (TypeError, ValueError):
        return []
    if not points:
        return []
    x, y = map(list, zip(*points, strict=True))
    curves = {"calibrated": ([0.5, 1.0], [0.5, 1.0]), "this model": (x, y)}
    return [line_chart("Pairs in the right order, by confidence", "confidence", curves, percent=True)]


def curves(run: RunFiles) -> list[Html]:
    """Charts of all metrics; what is held out over what is trained on where both are told. The less telling ones are
    folded away.
    """
    charts: dict[str, Curves] = {}
    for label, kind in (("training", "train"), ("held out", "eval")):
        for name, curve in metric_curves(run.of_kind(kind)).items():
            metric, slash, criterion = name.removeprefix("eval_").partition("/")
            line = f"{criterion}, {label}" if slash else label
            charts.setdefault(metric + slash, {})[line] = curve
    drawn = {metric: _chart(metric, "step", charts[metric]) for metric in _ordered(charts)}
    telling = [chart for metric, chart in drawn.items() if metric.rstrip("/") in TITLES]
    others = [chart for metric, chart in drawn.items() if metric.rstrip("/") not in TITLES]
    return telling + ([details(f"{len(others)} more metrics", others)] if others else []) + _not_numbers(run)


def times(run: RunFiles) -> list[Html]:
    """Seconds by phase, speed and memory. What a step takes beside its named phases is `other steps`."""
    seconds = phases(run)
    blocks = []
    if seconds:
        blocks.append(bar_chart("Seconds by phase", list(seconds), {"seconds": list(seconds.values())}))
    found = metric_curves(run.of_kind("train"))
    names = {"tokens_per_s": "Tokens per second", "peak_mem_gib": "Peak memory, GiB"}
    blocks += [line_chart(label, "step", {name: found[name]}) for name, label in names.items() if name in found]
    peaks = [r["peak_mem_gib"] for r in map(numbers, run.metrics) if "peak_mem_gib" in r]
    if peaks:
        blocks.append(paragraph(f"Peak memory: {max(peaks):.2f} GiB."))
    return blocks


def title(metric: str) -> str:
    return TITLES.get(metric.removeprefix("eval_"), metric)


def _held_out_table(run: RunFiles) -> list[Html]:
    first, last = evaluations(run)
    rows = [[name, shown(first, name), shown(last, name)] for name in held_out(run) if name not in SPEED]
    return [table(["metric", "first evaluation", "last"], rows, numbers=(1, 2))] if rows else []


def _chart(metric: str, xlabel: str, found: Curves) -> Html:
    name = metric.rstrip("/")
    what = ", by criterion" if metric.endswith("/") else ""
    return line_chart(title(name) + what, xlabel, found, percent=is_percent(name))


def _ordered(metrics: Iterable[str]) -> list[str]:
    """Metrics without speed and times, the telling ones first."""
    kept = [m for m in metrics if m not in SPEED and not is_time(m) and not is_error(m)]
    order = {name: place for place, name in enumerate((*FIRST, *TITLES))}
    return sorted(kept, key=lambda metric: order.get(metric.rstrip("/"), len(order)))


def _not_numbers(run: RunFiles) -> list[Html]:
    """What the last evaluation says in lists and texts."""
    last = (run.of_kind("eval") or [{}])[-1]
    known = {"kind", *numbers(last), *(["eval_reliability"] if calibration(run) else [])}
    others = {name: value for name, value in last.items() if name not in known and value}
    lines = [f"{name}: {json.dumps(value)}" for name, value in others.items() if name != "step"]
    return [preformatted("\n".join(line[:2000] for line in lines))] if lines else []


def _settings(run: RunFiles) -> list[Html]:
    rows = [[name, _value(value)] for name, value in run.mapping("settings").items()]
    return [details(f"{len(rows)} settings", [table(["setting", "value"], rows)])] if rows else []


def _versions(run: RunFiles) -> list[Html]:
    rows = [[name, found] for name, found in run.mapping("versions").items()]
    rows += [[name, run.record[name]] for name in ("device", "processes", "begun", "ended") if name in run.record]
    return [table(["", ""], rows)] if rows else []


def _overview(runs: Sequence[RunFiles]) -> Html:
    rows = [
        [run.name, run.record.get("loop", ""), state(run), duration(run.record.get("seconds") or 0.0), run.folder]
        for run in runs
    ]
    return table(["run", "loop", "state", "time", "folder"], rows)


def _before_and_after(runs: Sequence[RunFiles]) -> Html:
    """The held-out metrics that say whether a stage did what it is for, and the scores of its samples."""
    rows: list[list[str]] = []
    for run in runs:
        first, last = evaluations(run)
        for name in held_out(run):
            if title(name.partition("/")[0]) != name.partition("/")[0]:
                rows.append([run.name, name.removeprefix("eval_"), shown(first, name), shown(last, name)])
        if change := score_change(run):
            label = f"score of {change.answers} answers to the same prompts, ± its standard error"
            rows.append([run.name, label, change.text(change.before), change.text(change.after)])
            label = f"change of the score ({change.risen:.0%} of the prompts have a higher one)"
            rows.append([run.name, label, "", change.text(change.change)])
    return table(["stage", "held out", "before", "after"], rows, numbers=(2, 3)) if rows else Html("")


def _last_metrics(runs: Sequence[RunFiles]) -> Html:
    """A row for each metric, a column for each run; of an evaluation where there is one."""
    last = [_last(run.of_kind("train")) | _last(run.of_kind("eval")) for run in runs]
    names = [
        name for name in dict.fromkeys(n for values in last for n in values) if not is_time(name) and name != "step"
    ]
    rows = [[name, *(number(values[name], name) if name in values else "" for values in last)] for name in names]
    return table(["metric", *(run.name for run in runs)], rows, numbers=range(1, len(runs) + 1))


def _differences(runs: Sequence[RunFiles]) -> Html:
    settings, versions = ([run.mapping(name) for run in runs] for name in ("settings", "versions"))
    rows = []
    for groups in (settings, versions):
        for name in dict.fromkeys(n for group in groups for n in group):
            values = [_value(group[name]) if name in group else "" for group in groups]
            if len(set(values)) > 1:
                rows.append([name, *values])
    if not all(settings):
        return paragraph(f"Not all of the runs have a {RUN}: their settings are not known.")
    return table(["", *(run.name for run in runs)], rows) if rows else paragraph("None.")


def _compared_curves(runs: Sequence[RunFiles]) -> list[Html]:
    charts: dict[str, Curves] = {}
    for run in runs:
        for kind in ("train", "eval"):
            for name, curve in metric_curves(run.of_kind(kind)).items():
                metric = name if kind == "train" or name.startswith("eval_") else f"eval_{name}"
                charts.setdefault(metric, {})[run.name] = curve
    metrics = [m for m in _ordered(charts) if not is_time(m.removeprefix("eval_"))]
    drawn = []
    for metric in metrics:
        label = title(metric) + (", held out" if metric.startswith("eval_") else "")
        drawn.append(line_chart(label, "step", charts[metric], percent=is_percent(metric)))
    return drawn


def _last(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    return numbers(records[-1]) if records else {}


def _answer(record: dict[str, Any]) -> str:
    scores = _scores(record)
    return str(record.get("response", "")) + (f"\n(score {scores})" if scores else "")


def _ranked(record: dict[str, Any]) -> str:
    return f"{record.get('response', '')}\n(rank {record['rank']})"


def _scores(record: dict[str, Any]) -> str:
    """The score, or one for each criterion in a line of its own."""
    scores = {name: value for name, value in numbers(record).items() if name not in ("step", "rank")}
    if list(scores) == ["score"]:
        return f"{scores['score']:.2f}"
    return "\n".join(f"{name} {score:.2f}" for name, score in scores.items())


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _named_apart(runs: Sequence[RunFiles]) -> list[RunFiles]:
    """Runs of equal folder names get their paths as names."""
    names = [run.name for run in runs]
    return [run._replace(name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]
