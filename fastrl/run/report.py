"""The parts of an HTML report in one file: tables, charts and text, with every picture inside it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastrl.run import charts

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d8dee4 } .lead { color: #57606a }
table { border-collapse: collapse; margin: .8rem 0; font-size: .92rem }
th, td { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid #d8dee4; vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
figure { display: inline-block; margin: .4rem .6rem .4rem 0; vertical-align: top } svg { max-width: 100% }
figcaption { font-size: .85rem; padding-left: 3.5rem } summary { cursor: pointer }
td { white-space: pre-wrap; overflow-wrap: anywhere }
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


def details(title: str, blocks: Sequence[Html]) -> Html:
    """Blocks that a click unfolds."""
    return Html(f"<details><summary>{escape(title)}</summary>\n{''.join(blocks)}</details>\n")


def line_chart(title: str, xlabel: str, curves: Mapping[str, charts.Curve], *, percent: bool = False) -> Html:
    """One or more named (x, y) curves over a common axis."""
    return Html(charts.line_chart(title, xlabel, curves, percent=percent))


def bar_chart(
    title: str,
    categories: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    percent: bool = False,
) -> Html:
    """Bars of each named series side by side in each category, with their values on top."""
    return Html(charts.bar_chart(title, categories, series, percent=percent, width=max(440, 110 * len(categories))))
