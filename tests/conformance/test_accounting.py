"""README.md accounts for every case once, and the tests that it names exist and name the case."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CASES = {f"T{i}" for i in range(1, 39)} | {f"pitfall {i}" for i in range(1, 49)}


def tables() -> dict[str, list[list[str]]]:
    """The cells of the README's tables by heading, without their two header lines."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in (Path(__file__).parent / "README.md").read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("| ").split(" | ")])
    return {heading: rows[2:] for heading, rows in found.items()}


@cache
def functions(path: str) -> dict[str, str]:
    """Test function -> its source."""
    source = (ROOT / path).read_text()
    tree = ast.parse(source)
    return {
        node.name: ast.get_source_segment(source, node) or ""
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def sources(tests: str) -> list[str]:
    found = []
    for test in tests.split(", "):
        path, _, name = test.partition("::")
        assert name in functions(path), f"{test} does not exist"
        found.append(functions(path)[name])
    return found


def named_cases(source: str) -> set[str]:
    """`T8`, `pitfall 16`, `pitfalls 9, 10 and 38`."""
    found = set(re.findall(r"\bT\d+\b", source))
    for numbers in re.findall(r"[Pp]itfalls? (\d+(?:(?:, | and )\d+)*)", source):
        found |= {f"pitfall {number}" for number in re.findall(r"\d+", numbers)}
    return found


def test_every_case_is_listed_once():
    listed = [row[0] for heading in ("Tested", "Not yet") for row in tables()[heading]]
    assert sorted(listed) == sorted(CASES)


def test_named_tests_exist_and_name_their_case():
    for case, _, tests in tables()["Tested"]:
        for test, source in zip(tests.split(", "), sources(tests), strict=True):
            assert case in named_cases(source), f"{test} does not name {case}"


def test_release_blockers_have_tests():
    rows = tables()["Release blockers"]
    assert len(rows) == 10
    for _, tests in rows:
        assert sources(tests)


def test_what_is_not_yet_has_a_reason():
    assert all(len(row) == 3 and len(row[2]) > 10 for row in tables()["Not yet"])
