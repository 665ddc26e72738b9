"""Rows of measurements: the CSV that keeps them, the table on the screen, the plot.

`python -m fastrl.benches.records TABLE.csv NEW.csv ...` takes the rows of other tables into one.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

KEY = ("op", "shape", "dtype", "direction", "provider", "device", "threads")
COLUMNS = (
    *KEY, "status", "ms_p20", "ms_p50", "ms_p80", "baseline", "speedup", "rate", "unit", "ceiling", "percent",
    "percent_of_datasheet", "host_us", "peak_extra_mib", "peak_mib", "error", "grad_error", "isa", "fastrl", "torch",
    "triton", "python", "commit", "dirty", "date", "cuda", "peers",
)  # fmt: skip
SHOWN = {
    "provider": "provider", "ms_p50": "ms", "ms_p20": "p20", "ms_p80": "p80", "speedup": "speed-up", "rate": "rate",
    "unit": "", "percent": "% of ceiling", "percent_of_datasheet": "% of datasheet", "host_us": "host us",
    "peak_extra_mib": "extra MiB", "error": "error", "grad_error": "grad error", "status": "status",
}  # fmt: skip

Row = dict[str, str]


def key(row: Row) -> tuple[str, ...]:
    return tuple(row.get(column, "") for column in KEY)


def case_key(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY if column != "provider")


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def merge(old: list[Row], new: list[Row]) -> list[Row]:
    """Old rows whose key is not measured anew, and the new ones, sorted by op and case; order within a case is kept."""
    fresh = {key(row) for row in new}
    rows = [row for row in old if key(row) not in fresh] + new
    return sorted(rows, key=case_key)


def write(path: Path, rows: list[Row]) -> None:
    """Replaces the file in one step: whenever the process may be killed, all the rows are there or all of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def by_case(rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(case_key(row), []).append(row)
    return cases


def table(rows: list[Row]) -> str:
    """Plain text for a terminal: one block per case, one line per provider."""
    blocks = []
    for case, members in by_case(rows).items():
        lines = [list(SHOWN.values())] + [[row.get(column, "") for column in SHOWN] for row in members]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(width) if n in (0, 6, 13) else cell.rjust(width)
                for n, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        blocks.append("\n".join([" ".join(case[:4]), *text]))
    return "\n\n".join(blocks)


def plot(rows: list[Row], path: Path) -> None:
    """Bar chart: speed-up over the baseline, one group per case, one bar per provider."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [(case, [row for row in members if row.get("speedup")]) for case, members in by_case(rows).items()]
    groups = [(case, members) for case, members in groups if members]
    providers = list(dict.fromkeys(row["provider"] for _, members in groups for row in members))
    colors = {name: plt.get_cmap("tab20")(n % 20) for n, name in enumerate(providers)}
    bars = sum(len(members) + 1 for _, members in groups)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.2 * bars), layout="constrained")
    at, ticks = 0, []
    for case, members in groups:
        ticks.append((at + (len(members) - 1) / 2, f"{case[0]}\n{' '.join(case[1:4])}"))
        for row in members:
            axes.barh(at, float(row["speedup"]), color=colors[row["provider"]])
            axes.text(float(row["speedup"]), at, f" {float(row['speedup']):.3g}x", va="center", fontsize=7)
            at += 1
        at += 1
    axes.set_yticks([position for position, _ in ticks], [text for _, text in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("speed-up over the baseline of the case (log scale)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[name]) for name in providers]
    figure.legend(handles, providers, loc="outside lower center", ncols=3, fontsize=7)
    axes.set_title(f"{rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}", fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def main(paths: list[str]) -> None:
    table, *others = map(Path, paths)
    for other in others:
        write(table, merge(read(table), read(other)))


if __name__ == "__main__":
    main(sys.argv[1:])
