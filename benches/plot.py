"""The plot of a table of results, as SVG: `python -m fastrl.benches.plot [results/cpu.csv ...]`.

One dot for each case of an op, at its speed-up over the baseline. The file beside the CSV is committed, has the same
bytes for the same rows, and is light or dark as its reader's screen is.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from fastrl.benches import records, tables
from fastrl.constants import OPS

WIDTH, LEFT, RIGHT, TOP, LINE = 760, 170, 130, 64, 30
STYLE = """\
<style>
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.small { font-size: 11px; fill: #59636e }
.paper { fill: #ffffff }
.grid { stroke: #d1d9e0 }
.one { stroke: #59636e; stroke-width: 1.5 }
.faster { fill: #0969da; fill-opacity: 0.8 }
.slower { fill: #d1242f; fill-opacity: 0.8 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc }
.small { fill: #9198a1 }
.paper { fill: #0d1117 }
.grid { stroke: #3d444d }
.one { stroke: #9198a1 }
.faster { fill: #4493f8 }
.slower { fill: #f85149 }
}
</style>"""


def svg(rows: list[records.Row]) -> str:
    """The drawing: a line for each op that was measured, the speed-up on a logarithmic scale."""
    found = {op: [ours for ours, _ in tables.compared(rows, [op])] for op in OPS}
    found = {op: cases for op, cases in found.items() if cases}
    every = [float(row["speedup"]) for cases in found.values() for row in cases]
    low, high = math.floor(math.log10(min([*every, 1]))), math.ceil(math.log10(max([*every, 10])))

    def x(value: float) -> str:
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(value) - low) / (high - low):.1f}"

    bottom = TOP + LINE * len(found)
    height = bottom + 34
    first = rows[0]
    threads = f", {first['threads']} threads" if first["threads"] else ""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"<title>Speed-up of each op over plain torch, {first['device']}</title>",
        STYLE,
        f'<rect class="paper" width="{WIDTH}" height="{height}" rx="6"/>',
        '<text x="16" y="26">Speed-up over plain torch (ppo_advantages: over TRL\'s lines), each shape a dot</text>',
        f'<text class="small" x="16" y="44">{first["device"]}{threads}, torch {first["torch"]}; log scale</text>',
    ]
    for power in range(low, high + 1):
        at, kind = x(10**power), "one" if power == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{at}" x2="{at}" y1="{TOP}" y2="{bottom}"/>')
        label = f"{10**power:g}x" + (" (as fast)" if power == 0 else "")
        parts.append(f'<text class="small" x="{at}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    for line, (op, cases) in enumerate(found.items()):
        y = TOP + LINE * line + LINE / 2
        parts.append(f'<text x="16" y="{y + 4:.1f}">{op}</text>')
        values = [float(row["speedup"]) for row in cases]
        for row, value in zip(cases, values, strict=True):
            kind = "slower" if value < 1 else "faster"
            label = f"{row['shape']} {row['dtype']} {row['direction']}: {tables.factor(value)}"
            parts.append(f'<circle class="{kind}" cx="{x(value)}" cy="{y:.1f}" r="5"><title>{label}</title></circle>')
        parts.append(f'<text class="small" x="{WIDTH - RIGHT + 16}" y="{y + 4:.1f}">{tables.span(values)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main(files: list[Path]) -> None:
    for file in files:
        file.with_suffix(".svg").write_text(svg(records.read(file)))


if __name__ == "__main__":
    main([Path(file) for file in sys.argv[1:]] or [tables.RESULTS / "cpu.csv"])
