"""Line and bar charts as SVG text, which stands in an HTML page without any other file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

COLOURS = ("#8a94a6", "#1f6feb", "#2da44e", "#bf5b04", "#8250df", "#cf222e", "#0f766e", "#a16207")
LARGEST = 1e100  # numbers beyond count as infinite
HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 260, 56, 14, 34, 40  # of a picture, and the margins of its axes
DOTS = 60  # points of a curve that are few enough to be marked

Curve = tuple[Sequence[float], Sequence[float]]


class Scale(NamedTuple):
    """Numbers from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def line_chart(title: str, xlabel: str, curves: Mapping[str, Curve], *, percent: bool = False, width: int = 440) -> str:
    """Named (x, y) curves over common axes; a point that is not finite breaks its curve."""
    points = {name: list(zip(*curve, strict=True)) for name, curve in curves.items()}
    finite = [point for curve in points.values() for point in curve if all(map(_drawable, point))]
    low, high = _range([y for _, y in finite])
    low, high = (min(0.0, low), max(1.0, high)) if percent else (low, high)
    xscale = Scale(*_range([x for x, _ in finite], margin=0.0), LEFT, width - RIGHT)
    yscale = Scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = _axes(title, xlabel, yscale, width, percent)
    for tick in _ticks(xscale.low, xscale.high):
        parts.append(_text(xscale.place(tick), HEIGHT - BOTTOM + 16, _number(tick), "middle"))
    for colour, (name, curve) in zip(_colours(len(points)), points.items(), strict=True):
        for run in _runs(curve):
            places = [(xscale.place(x), yscale.place(y)) for x, y in run]
            line = " ".join(f"{x},{y}" for x, y in places)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
            if len(curve) <= DOTS:
                parts += [
                    f'<circle cx="{px}" cy="{py}" r="2.2" fill="{colour}">{_hint(f"{name}, {_number(x)}", y)}</circle>'
                    for (px, py), (x, y) in zip(places, run, strict=True)
                ]
    return _figure(parts, title, width, list(curves) if len(curves) > 1 else [])


def bar_chart(
    title: str,
    categories: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    percent: bool = False,
    width: int = 440,
) -> str:
    """Bars of each named series side by side in each category, with their values on top; none where a value is not
    finite.
    """
    values = [value for numbers in series.values() for value in numbers if _drawable(value)]
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    low, high = (low, max(1.0, high)) if percent else _range([low, high])
    yscale = Scale(min(low, 0.0), high, HEIGHT - BOTTOM, TOP)
    room = (width - LEFT - RIGHT) / max(1, len(categories))
    size = 0.8 * room / max(1, len(series))
    parts = _axes(title, "", yscale, width, percent)
    for place, category in enumerate(categories):
        left = LEFT + (place + 0.1) * room
        parts.append(_text(left + 0.4 * room, HEIGHT - BOTTOM + 16, category, "middle"))
        for number, (name, numbers) in enumerate(series.items()):
            value, colour = numbers[place], _colours(len(series))[number]
            if not _drawable(value):
                continue
            top, bottom = sorted((yscale.place(value), yscale.place(0.0)))
            x = round(left + number * size, 1)
            bar = f'x="{x}" y="{top}" width="{0.92 * size:.1f}" height="{max(0.5, bottom - top):.1f}" fill="{colour}"'
            parts.append(f"<rect {bar}>{_hint(f'{category}, {name}', value)}</rect>")
            shown = f"{value:.0%}" if percent else f"{value:.3g}"
            parts.append(_text(x + 0.46 * size, top - 4, shown, "middle", 10))
    return _figure(parts, title, width, list(series) if len(series) > 1 else [])


def _axes(title: str, xlabel: str, yscale: Scale, width: int, percent: bool) -> list[str]:
    """Title, horizontal grid with its numbers, and the name of the horizontal axis."""
    parts = [_text(LEFT, 16, title, "start", 13)]
    for tick in _ticks(yscale.low, yscale.high):
        y = yscale.place(tick)
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}" stroke="#d8dee4"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{tick:.0%}" if percent else _number(tick), "end"))
    return [*parts, _text((LEFT + width - RIGHT) / 2, HEIGHT - 6, xlabel, "middle")]


def _figure(parts: Sequence[str], title: str, width: int, legend: Sequence[str]) -> str:
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title)}" width="{width}"'
        f' height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" font-family="system-ui, sans-serif" fill="#1f2328">'
        f"{''.join(parts)}</svg>"
    )
    marks = (
        f'<span style="color:{colour}">&#9632;</span> {escape(name)}'
        for colour, name in zip(_colours(len(legend)), legend, strict=True)
    )
    caption = f'<figcaption style="max-width:{width}px">{" &nbsp; ".join(marks)}</figcaption>' if legend else ""
    return f"<figure>{svg}{caption}</figure>\n"


def _text(x: float, y: float, text: str, anchor: str, size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _colours(count: int) -> list[str]:
    return [COLOURS[1]] if count == 1 else [COLOURS[number % len(COLOURS)] for number in range(count)]


def _drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) < LARGEST


def _hint(name: str, value: float) -> str:
    """What a browser shows under the pointer."""
    return f"<title>{escape(name)}: {value:.6g}</title>"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The stretches of a curve between points that are not finite."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if all(map(_drawable, point)):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _range(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    """Lowest and highest value with some room; never an empty range, nor one that floats cannot cut."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = margin * (high - low)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        room = 0.5 * abs(low) or 0.5
    return low - room, high + room


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, a step of 1, 2 or 5 times a power of ten apart."""
    exact = (high - low) / most
    power = 10.0 ** math.floor(math.log10(exact))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= exact * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [
        round(number * step, 12 - int(math.log10(power))) for number in range(first, math.floor(high / step + 1e-9) + 1)
    ]
