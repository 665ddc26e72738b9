"""An HTML report in one file: tables, charts and text, with every picture inside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#8a94a6", "#1f6feb", "#2da44e", "#bf5b04")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d8dee4 } .lead { color: #57606a }
table { border-collapse: collapse; margin: .8rem 0; font-size: .92rem }
th, td { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid #d8dee4; vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
figure { display: inline-block; margin: .4rem .6rem .4rem 0 } img { max-width: 100% }
code, pre { font-size: .88rem; background: #f6f8fa } pre { padding: .6rem; overflow-x: auto }
.good { color: #1a7f37 } .bad { color: #b35900 }
"""


class Html(str):
    """Text that is HTML already and is not escaped again."""


def page(title: str, lead: str, sections: Sequence[tuple[str, Sequence[Html]]]) -> Html:
    """A whole document: a title, one sentence below it, and (heading, blocks) sections."""
    body = "".join(f"<h2>{escape(heading)}</h2>\n{''.join(blocks)}\n" for heading, blocks in sections)
    return Html(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{body}</body></html>\n'
    )


def save_page(path: str | Path, document: Html) -> Path:
    """Write the document and return its path."""
    Path(path).write_text(document, encoding="utf-8")
    return Path(path)


def escape(text: object) -> Html:
    """Text made safe for HTML; `Html` passes through."""
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def paragraph(text: str) -> Html:
    return Html(f"<p>{escape(text)}</p>\n")


def preformatted(text: str) -> Html:
    return Html(f"<pre>{escape(text)}</pre>\n")


def marked(text: str, good: bool) -> Html:
    """Text with a tick or a cross before it."""
    return Html(f'<span class="{"good" if good else "bad"}">{"✓" if good else "✗"}</span> {escape(text)}')


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Sequence[int] = ()) -> Html:
    """A table; the columns in `numbers` are aligned to the right."""

    def line(tag: str, cells: Sequence[object]) -> str:
        kinds = (' class="number"' if column in numbers else "" for column in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{k}>{escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True)) + "</tr>\n"

    return Html(f"<table>\n{line('th', header)}{''.join(line('td', row) for row in rows)}</table>\n")


def line_chart(
    title: str,
    xlabel: str,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    percent: bool = False,
) -> Html:
    """One or more named (x, y) curves over a common axis."""
    figure, axes = _figure(title)
    for colour, (name, (x, y)) in zip(_colours(len(curves)), curves.items(), strict=True):
        axes.plot(x, y, label=name, color=colour, linewidth=1.8)
    axes.set_xlabel(xlabel)
    if percent:
        _percent(axes)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9)
    return _picture(figure, title)


def bar_chart(
    title: str,
    categories: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    percent: bool = False,
    width: float = 4.6,
) -> Html:
    """Bars of each named series side by side in each category, with their values on top."""
    figure, axes = _figure(title, width)
    size = 0.8 / len(series)
    for index, (colour, (name, values)) in enumerate(zip(_colours(len(series)), series.items(), strict=True)):
        places = [place + (index - (len(series) - 1) / 2) * size for place in range(len(categories))]
        bars = axes.bar(places, values, size * 0.92, label=name, color=colour)
        axes.bar_label(bars, [f"{v:.0%}" if percent else f"{v:.3g}" for v in values], fontsize=8, padding=2)
    axes.set_xticks(range(len(categories)), categories)
    axes.margins(y=0.12)
    if percent:
        _percent(axes)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9, ncols=len(series), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return _picture(figure, title)


def _figure(title: str, width: float = 4.6) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(axis="y", color="#d8dee4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    return figure, axes


def _percent(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(0, 1.08)


def _colours(count: int) -> tuple[str, ...]:
    if count == 1:
        return COLOURS[1:2]
    return tuple(COLOURS[index % len(COLOURS)] for index in range(count))


def _picture(figure: Figure, title: str) -> Html:
    """The figure as an SVG image inside the page; no date or random id in it, so that equal data give equal pages."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None}
    with rc_context({"svg.hashsalt": "fastrl"}):
        figure.savefig(buffer, format="svg", metadata=metadata)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Html(f'<figure><img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}"></figure>\n')
