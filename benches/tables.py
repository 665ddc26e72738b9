"""Writes the tables of README.md and results/README.md from the committed results: `python -m fastrl.benches.tables`.

A table stands between the marks <!-- KIND NAME --> and <!-- /KIND NAME -->, NAME being a file of results/:

    bench cpu.csv             every case, fastrl against the baseline and the fastest other provider
    updates train-cpu.csv     whole updates, all who were timed
    layers patch-cpu.csv      speed-ups of patched layers, a column for each number of rows
    demo demo-cpu.jsonl       runs of the demo
    ops cpu.csv,nvidia-h100.csv   the last columns of a table of ops, one for each file; the other columns are kept
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fastrl.benches import records
from fastrl.constants import OPS

RESULTS = Path(__file__).resolve().parent / "results"
PAGES = (RESULTS.parents[1] / "README.md", RESULTS / "README.md")
MARKERS = re.compile(r"(<!-- (bench|updates|layers|demo|ops) (\S+) -->\n)(.*?)(<!-- /\2 \3 -->)", re.DOTALL)
HEADER = """\
| op | shape | dtype | direction | baseline | ms | fastest other, ms | fastrl ms | speed-up | % of ceiling | extra MiB | fastrl extra MiB |
| --- | --- | --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |"""  # noqa: E501
UPDATES_HEADER = """\
| update | who | s | tokens/s | speed-up | memory beyond the imports, MiB |
| --- | --- | ---: | ---: | ---: | ---: |"""
DEMO_HEADER = """\
| seed | reward model, held-out pairs in order | good answers, SFT | good answers, PPO | KL to SFT, nats per answer | time |
| ---: | ---: | ---: | ---: | ---: | ---: |"""  # noqa: E501
NOT_MEASURED = "not yet measured"


def markdown(rows: list[records.Row]) -> str:
    """fastrl against the baseline and the fastest other provider of each case, wins and losses alike."""
    lines = [HEADER]
    for members in records.by_case(rows).values():
        baseline = {row["provider"]: row for row in members}.get(members[0]["baseline"])
        for row in members:
            if baseline is None or not row["provider"].startswith("fastrl ") or row["provider"] == "fastrl reference":
                continue
            backend, *isa = row["provider"].split()[1:]
            kernel = f" ({isa[0]} only)" if isa else "" if backend in ("cpu", "loop") else f" ({backend})"
            cells = [
                f"`{row['op']}`{kernel}",
                *(row[column] for column in ("shape", "dtype", "direction")),
                baseline["provider"],
                baseline["ms_p50"],
                fastest_other(members),
                row["ms_p50"],
                f"{row['speedup']}x",
                row["percent"],
                baseline["peak_extra_mib"],
                row["peak_extra_mib"],
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fastest_other(members: list[records.Row]) -> str:
    """Name and time of the fastest provider that is neither fastrl nor the baseline nor a floor."""
    others = [
        row
        for row in members
        if row["status"] == "ok" and row["provider"] != row["baseline"] and not row["provider"].startswith("fastrl ")
    ]
    if not others:
        return ""
    best = min(others, key=lambda row: float(row["ms_p50"]))
    return f"{best['provider']} {best['ms_p50']}"


def updates(rows: list[records.Row]) -> str:
    """Whole updates of each trainer that could be timed."""
    lines = [UPDATES_HEADER]
    for row in rows:
        if not row["ms_p50"]:
            continue
        seconds, rate, memory = (float(row[column]) for column in ("ms_p50", "rate", "peak_extra_mib"))
        cells = [row["op"], row["provider"], f"{seconds / 1000:.2f}", f"{rate:.0f}", f"{float(row['speedup']):.2f}x"]
        lines.append("| " + " | ".join([*cells, f"{memory:.0f}"]) + " |")
    return "\n".join(lines)


def layers(rows: list[records.Row]) -> str:
    """PEFT's time over a patched layer's, by width, dtypes and direction."""
    found: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in rows:
        if row["provider"] == "fastrl.patch":
            count, width, _, *adapters = re.split("[x ]", row["shape"], maxsplit=3)
            kind = width, f"{row['dtype']}, {' '.join(adapters)}", row["direction"]
            found.setdefault(kind, {})[int(count)] = f"{float(row['speedup']):.2f}x"
    counts = sorted({count for speedups in found.values() for count in speedups})
    lines = [f"| layer | base, adapters | direction | {' | '.join(map(str, counts))} |"]
    lines.append("| --- | --- | --- |" + " ---: |" * len(counts))
    lines += [f"| {' | '.join([*kind, *(of.get(n, '') for n in counts)])} |" for kind, of in sorted(found.items())]
    return "\n".join(lines)


def demo(path: Path) -> str:
    """Runs of the demo, one a line."""
    lines = [DEMO_HEADER]
    for run in map(json.loads, path.read_text().splitlines()):
        shares = (f"{100 * share:.1f} %" for share in (run["reward_accuracy"], run["SFT"]["good"], run["PPO"]["good"]))
        seconds = sum(run["seconds"].values())
        lines.append("| " + " | ".join([str(run["seed"]), *shares, f"{run['kl']:.2f}", f"{seconds:.0f} s"]) + " |")
    return "\n".join(lines)


def with_speedups(table: str, files: list[Path]) -> str:
    """The table of ops with its last columns, one for each file, made anew."""
    measured = [records.read(file) for file in files]

    def line(text: str) -> str:
        cells = text.strip("| ").split(" | ")
        ops = [op for op in re.findall(r"`(\w+)`", cells[0]) if op in OPS]
        if not ops:  # the header
            return text
        return "| " + " | ".join([*cells[: -len(files)], *(speedups(rows, ops) for rows in measured)]) + " |"

    return "\n".join(map(line, table.splitlines()))


def speedups(rows: list[records.Row], ops: Sequence[str]) -> str:
    """Least and greatest speed-up of an op's cases, and the most memory that one of them saves."""
    pairs = compared(rows, ops)
    if not pairs:
        return NOT_MEASURED
    factors = [float(ours["speedup"]) for ours, _ in pairs]
    memory = [[float(row["peak_extra_mib"] or "nan") for row in pair] for pair in pairs]
    saved = max((theirs - ours for ours, theirs in memory if theirs - ours >= 1), default=0)
    return span(factors) + (f", up to {saved:.0f} MiB less" if saved else "")


def compared(rows: list[records.Row], ops: Sequence[str]) -> list[tuple[records.Row, records.Row]]:
    """(row of the backend that fastrl takes by itself, row of the baseline) of each case of some ops."""
    pairs = []
    for members in records.by_case([row for row in rows if row["op"] in ops]).values():
        providers = {row["provider"]: row for row in members}
        ours = providers.get("fastrl cuda", providers.get("fastrl cpu"))
        baseline = providers.get(members[0]["baseline"])
        if ours and baseline and ours["speedup"]:
            pairs.append((ours, baseline))
    return pairs


def span(factors: list[float]) -> str:
    """1.3x to 4.9x"""
    return " to ".join(dict.fromkeys(factor(end(factors)) for end in (min, max)))


def factor(value: float) -> str:
    """A speed-up, rounded to what a reader remembers."""
    return f"{value:.{0 if value >= 10 else 1 if value >= 1 else 2}f}x"


def fill(text: str, folder: Path = RESULTS) -> str:
    """`text` with every marked table made anew from its results."""

    def table(match: re.Match[str]) -> str:
        begin, kind, name, old, end = match.groups()
        files = [folder / part for part in name.split(",")]
        if not files[0].exists():
            raise ValueError(f"mark '{kind} {name}': expected measurements in {files[0]}, got none")
        if kind == "ops":
            new = with_speedups(old, files)
        elif kind == "demo":
            new = demo(files[0])
        else:
            new = {"bench": markdown, "updates": updates, "layers": layers}[kind](records.read(files[0]))
        return f"{begin}{new}\n{end}"

    return MARKERS.sub(table, text)


def main(pages: list[Path]) -> None:
    for page in pages:
        page.write_text(fill(page.read_text()))


if __name__ == "__main__":
    main([Path(page) for page in sys.argv[1:]] or list(PAGES))
