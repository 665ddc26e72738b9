"""The HTML report: one file, pictures inside, text escaped."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastrl import cli
from fastrl.run.report import bar_chart, details, line_chart, marked, page, paragraph, preformatted, save_page, table
from fastrl.run.runfiles import held_out, phases, read_run, score_change
from fastrl.run.summary import lead, save_comparison, save_report

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


# --- reports of runs


def write_run(folder: Path, metrics: Sequence[object], samples: Sequence[object] = (), **record: object) -> Path:
    folder.mkdir(parents=True)
    for name, records in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        (folder / name).write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    if record:
        (folder / "run.json").write_text(json.dumps(record))
    return folder


def trained(step: int, **metrics: object) -> dict[str, object]:
    return {"step": step, "kind": "train", **metrics}


def evaluated(step: int, **metrics: object) -> dict[str, object]:
    return {"step": step, "kind": "eval", **metrics}


EVIL = "<script>alert(1)</script>"
METRICS = [
    evaluated(0, eval_loss=2.0, **{"eval_accuracy/helpful": 0.5, "eval_accuracy/honest": 0.25}),
    trained(1, loss=2.5, lr=1e-3, tokens_per_s=10, peak_mem_gib=1.5, time_step_s=3.0, time_sample_s=1.0),
    trained(2, loss=2.25, lr=5e-4, tokens_per_s=11, peak_mem_gib=1.75, time_step_s=2.0, time_sample_s=1.0),
    evaluated(2, eval_loss=1.5, time_eval_s=0.5, **{"eval_accuracy/helpful": 0.75, "eval_accuracy/honest": 0.5}),
]
RECORD = {"loop": "sft", "state": "finished", "steps": 2, "seconds": 75.0, "device": "a machine"}


def test_a_runs_report_tells_what_its_files_tell(tmp_path):
    samples = [{"step": step, "prompt": f"p {EVIL}", "response": f"answer {step}"} for step in (0, 2)]
    settings = {"learning_rate": 1e-3, "data": ["a", "b"], "columns": EVIL}
    folder = write_run(tmp_path / "r", METRICS, samples, **RECORD, settings=settings, versions={"torch": "2.x"})
    document = save_report(folder).read_text()
    assert_stands_alone(document)
    assert "sft, finished: 2 of 2 steps, 1 min 15 s, a machine; held-out loss 2 → 1.5." in document
    for text in ("answer 0", "answer 2", "2.x", "Peak memory: 1.75 GiB", "other steps", "learning_rate", "75.0%"):
        assert text in document, text
    assert EVIL not in document and document.count("&lt;script&gt;") == 2
    assert phases(read_run(folder)) == {"sample": 2.0, "other steps": 3.0, "eval": 0.5}
    assert held_out(read_run(folder)) == {
        "eval_loss": (2.0, 1.5),
        "eval_accuracy/helpful": (0.5, 0.75),
        "eval_accuracy/honest": (0.25, 0.5),
    }


def test_any_metrics_and_broken_files_make_a_report(tmp_path):
    """Lists, texts, NaN, numbers without bound, names with HTML, lines cut short; run.json that is none, or missing."""
    odd = {"curve": [1, [2, None]], "text": EVIL, EVIL: 1.0, "huge": 10**400, "flag": True, "none": None, "a": {"b": 1}}
    metrics = [trained(1, loss=math.nan, **odd), evaluated(1, **odd, eval_bins=[0.1, 0.2]), [3]]
    metrics += [trained(2, loss=math.inf)]
    metrics += [{"kind": "train"}, {"step": "x", "kind": "train", "loss": 1.0}, '{"step": 3, "ki']
    folder = write_run(tmp_path / "r", metrics, [{"step": 1, "prompt": None}, {}, 5, '{"st'])
    for content in ("", "[]", '{"state": "running"}', '{"settings": 3, "versions": [], "seconds": null}'):
        (folder / "run.json").write_text(content)
        document = save_report(folder).read_text()
        assert_stands_alone(document)
        assert EVIL not in document and "eval_bins: [0.1, 0.2]" in document
    save_comparison([folder, folder], tmp_path / "c.html")
    assert save_report(write_run(tmp_path / "empty", [])).exists()


def test_a_killed_run_is_told_from_one_at_work(tmp_path):
    folder = write_run(tmp_path / "r", METRICS, **{**RECORD, "state": "running", "steps": 9})
    assert "sft, not finished: 2 of 9 steps" in lead(read_run(folder))
    (folder / "run.lock").write_text("{}")
    assert "sft, running: 2 of 9 steps" in lead(read_run(folder))


def test_reward_samples_show_scores_of_the_same_answers(tmp_path):
    samples = [
        {"step": step, "prompt": "p", "response": text, "rank": rank, "score": step + rank / 2}
        for step in (0, 4)
        for rank, text in enumerate(("good", "bad"))
    ]
    document = save_report(write_run(tmp_path / "r", METRICS, samples)).read_text()
    assert '<td>bad\n(rank 1)</td><td class="number">0.50</td><td class="number">4.50</td>' in document
    assert score_change(read_run(tmp_path / "r")) is None


def test_a_reward_models_report_has_criteria_calibration_and_standard_errors(tmp_path):
    measured = {"eval_accuracy": 0.5, "eval_accuracy_se": 0.125, "eval_accuracy/helpful": 0.75}
    measured |= {"eval_accuracy_se/helpful": 0.0625, "criteria_correlation/helpful/honest": -0.5}
    metrics = [evaluated(0, **measured), evaluated(4, **measured, eval_reliability=[[0.55, 0.5, 8], [0.8, 1.0, 2]])]
    samples = [
        {"step": step, "prompt": "p", "response": "r", "rank": 0, "helpful": step / 2, "honest": 0.0} for step in (0, 4)
    ]
    document = save_report(write_run(tmp_path / "r", metrics, samples, loop="reward")).read_text()
    for text in (
        '<td class="number">75.0% ± 6.2%</td>',
        "helpful 2.00\nhonest 0.00",
        "held-out accuracy 50.0% ± 12.5%",
    ):
        assert text in document, text
    shapes = {picture.get("aria-label"): picture for picture in pictures(document)}
    assert len(list(shapes["Pairs in the right order, by confidence"].iter(f"{SVG}polyline"))) == 2
    assert "eval_reliability" not in document and not [label for label in shapes if "_se" in label]
    write_run(tmp_path / "odd", [evaluated(1, eval_reliability=[[1], "x"]), evaluated(1, eval_reliability={"a": 1})])
    assert "eval_reliability: {" in save_report(tmp_path / "odd").read_text()


def test_scores_of_samples_have_their_standard_error(tmp_path):
    """By hand: changes 1, 2, 3 have the mean 2 and the standard error 1 / sqrt(3)."""
    scores = {0: [0.0, 1.0, 2.0], 5: [9.0, 9.0, 9.0], 8: [1.0, 3.0, 5.0]}
    samples = [{"step": step, "prompt": "p", "response": "r", "score": s} for step, row in scores.items() for s in row]
    change = score_change(read_run(write_run(tmp_path / "r", METRICS, samples)))
    assert (change.answers, change.before[0], change.after[0], change.change[0], change.risen) == (
        3,
        1.0,
        3.0,
        2.0,
        1.0,
    )
    assert change.change[1] == pytest.approx(1 / math.sqrt(3))


def test_the_command_compares_runs(tmp_path, capsys):
    """Curves over each other, last metrics, and the settings that differ, those alone."""
    settings = {"learning_rate": 1e-3, "seed": 7}
    one = write_run(tmp_path / "one/sft", METRICS, **RECORD, settings=settings)
    two = write_run(tmp_path / "two/sft", METRICS[:3], **RECORD, settings=settings | {"learning_rate": 0.5})
    assert cli.main(["report", str(one), str(two), "--output", str(tmp_path / "c.html")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'c.html'}\n"
    document = (tmp_path / "c.html").read_text()
    assert_stands_alone(document)
    assert "<td>learning_rate</td><td>0.001</td><td>0.5</td>" in document and "<td>seed</td>" not in document
    loss = next(picture for picture in pictures(document) if picture.get("aria-label") == "Loss")
    assert len(list(loss.iter(f"{SVG}polyline"))) == 2 and f"{one}</figcaption>" not in document


def test_the_command_takes_runs_pipelines_and_nothing_else(tmp_path, capsys):
    run = write_run(tmp_path / "p/sft", METRICS, **RECORD)
    assert cli.main(["report", str(run)]) == cli.main(["report", str(tmp_path / "p")]) == 0
    assert (run / "report.html").exists() and "sft: curves" in (tmp_path / "p/report.html").read_text()
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "none: expected the output folder of a run, got one without metrics.jsonl" in capsys.readouterr().err
