"""The HTML report: one file, pictures inside, text escaped."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from fastrl.run.report import bar_chart, details, line_chart, marked, page, paragraph, preformatted, save_page, table

SVG = "{http://www.w3.org/2000/svg}"


def assert_stands_alone(document: str) -> None:
    """Nothing is fetched from elsewhere: no script, no address but the name of SVG's format."""
    assert "<script" not in document and "http" not in document.replace("http://www.w3.org/2000/svg", "")


def pictures(document: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg .*?</svg>", document)]


def test_charts_are_svg_inside_the_page(tmp_path):
    charts = [
        line_chart("loss", "step", {"train": ([1, 2, 3], [3.0, 2.0, 1.5]), "eval": ([1, 3], [3.1, 1.7])}),
        line_chart("accuracy", "step", {"accuracy": ([1], [0.5])}, percent=True),
        bar_chart("share", ["helpful", "honest"], {"SFT": [0.4, 0.5], "PPO": [0.9, 1.0]}, percent=True),
        bar_chart("seconds", ["sample", "update"], {"seconds": [1.25, 3.5]}),
    ]
    path = save_page(tmp_path / "report.html", page("title", "lead", [("Charts", charts)]))
    document = path.read_text()
    assert_stands_alone(document)
    assert [picture.tag.endswith("svg") for picture in pictures(document)] == [True] * 4
    assert [len(list(picture.iter(f"{SVG}polyline"))) for picture in pictures(document)] == [2, 1, 0, 0]
    assert [len(list(picture.iter(f"{SVG}rect"))) for picture in pictures(document)] == [0, 0, 4, 2]


def test_a_curve_goes_where_its_numbers_say():
    """Higher numbers stand higher, later ones further right; ticks have round numbers; 50 % stands in the middle."""
    (picture,) = pictures(line_chart("x", "step", {"a": ([0, 50, 100], [0.0, 0.5, 1.0])}, percent=True))
    (line,) = picture.iter(f"{SVG}polyline")
    places = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)
    assert places[1][1] == (places[0][1] + places[2][1]) / 2
    texts = [element.text for element in picture.iter(f"{SVG}text")]
    assert {"0%", "20%", "100%", "0", "20", "100"} <= set(texts)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [math.nan],
        [1.0, math.nan, math.inf, 2.0],
        [1e300, -1e300],
        [5.0, 5.0],
        [0.0],
        [1e9, 1e9 + 1e-7],
        [1e-320, 0],
    ],
    ids=str,
)
def test_any_numbers_can_be_drawn(values):
    """NaN and infinity break a curve; a range may be empty, tiny or beyond what can be cut into ticks."""
    steps = list(range(len(values)))
    for chart in (
        line_chart("x", "step", {"a": (steps, values), "b": (steps, values)}),
        line_chart("x", "step", {"a": (steps, values)}, percent=True),
        bar_chart("x", [str(step) for step in steps], {"a": values}),
        bar_chart("x", [str(step) for step in steps], {"a": values, "b": values}, percent=True),
        line_chart("x", "step", {}),
        bar_chart("x", [], {}),
    ):
        assert len(pictures(chart)) == 1 and "nan" not in chart and "inf" not in chart


def test_equal_data_give_an_equal_page():
    charts = [line_chart("loss", "step", {"train": ([1, 2], [1.0, 0.5])}) for _ in range(2)]
    assert charts[0] == charts[1]


def test_text_is_escaped_everywhere():
    evil = "<script>alert(1)</script> & more"
    blocks = [paragraph(evil), preformatted(evil), table([evil], [[evil], [marked(evil, True)]])]
    blocks += [line_chart(evil, evil, {evil: ([1], [1.0]), "b": ([1], [1.0])}), bar_chart(evil, [evil], {evil: [1.0]})]
    blocks += [details(evil, [paragraph(evil)])]
    document = page(evil, evil, [(evil, blocks)])
    assert "<script>" not in document
    assert document.count("&lt;script&gt;") == 9 + 5 + 5 + 2


def test_number_columns_are_aligned_to_the_right():
    rows = table(["name", "count"], [["a", 1]], numbers=(1,))
    assert '<th class="number">count</th>' in rows
    assert '<td>a</td><td class="number">1</td>' in rows
