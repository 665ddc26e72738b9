"""Writes the README's speed tables from the committed CSV: `python -m fastrl.benches.tables`.

A table stands between the markers <!-- bench NAME --> and <!-- /bench NAME -->, NAME being a file of results/.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from fastrl.benches import records

RESULTS = Path(__file__).resolve().parent / "results"
MARKERS = re.compile(r"(<!-- bench (\S+) -->\n).*?(<!-- /bench \2 -->)", re.DOTALL)
HEADER = """\
| op | shape | dtype | direction | baseline | ms | fastest other, ms | fastrl ms | speed-up | % of ceiling | extra MiB | fastrl extra MiB |
| --- | --- | --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |"""  # noqa: E501


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


def fill(text: str, folder: Path = RESULTS) -> str:
    """`text` with every marked table made anew from its CSV."""

    def table(match: re.Match[str]) -> str:
        rows = records.read(folder / match[2])
        if not rows:
            raise ValueError(
                f"README marker 'bench {match[2]}': expected measurements in {folder / match[2]}, got none"
            )
        return match[1] + markdown(rows) + "\n" + match[3]

    return MARKERS.sub(table, text)


def main(readme: Path) -> None:
    readme.write_text(fill(readme.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else RESULTS.parents[1] / "README.md"))
