"""The HTML report: one file, pictures inside, text escaped."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree

from fastrl.run.report import bar_chart, line_chart, marked, page, paragraph, preformatted, save_page, table


def pictures(document: str) -> list[str]:
    return [base64.b64decode(data).decode() for data in re.findall(r"svg\+xml;base64,([^\"]+)", document)]


def test_charts_are_svg_pictures_inside_the_page(tmp_path):
    charts = [
        line_chart("loss", "step", {"train": ([1, 2, 3], [3.0, 2.0, 1.5]), "eval": ([1, 3], [3.1, 1.7])}),
        line_chart("accuracy", "step", {"accuracy": ([1], [0.5])}, percent=True),
        bar_chart("share", ["helpful", "honest"], {"SFT": [0.4, 0.5], "PPO": [0.9, 1.0]}, percent=True),
        bar_chart("seconds", ["sample", "update"], {"seconds": [1.25, 3.5]}),
    ]
    path = save_page(tmp_path / "report.html", page("title", "lead", [("Charts", charts)]))
    document = path.read_text()
    assert "http" not in re.sub(r"base64,[^\"]+", "", document)
    assert len(pictures(document)) == 4
    for picture in pictures(document):
        assert ElementTree.fromstring(picture).tag.endswith("svg")


def test_equal_data_give_an_equal_page():
    charts = [line_chart("loss", "step", {"train": ([1, 2], [1.0, 0.5])}) for _ in range(2)]
    assert charts[0] == charts[1]


def test_text_is_escaped_everywhere():
    evil = "<script>alert(1)</script> & more"
    blocks = [paragraph(evil), preformatted(evil), table([evil], [[evil], [marked(evil, True)]])]
    document = page(evil, evil, [(evil, blocks)])
    assert "<script>" not in document
    assert document.count("&lt;script&gt;") == 9


def test_number_columns_are_aligned_to_the_right():
    rows = table(["name", "count"], [["a", 1]], numbers=(1,))
    assert '<th class="number">count</th>' in rows
    assert '<td>a</td><td class="number">1</td>' in rows
