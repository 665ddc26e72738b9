"""One test for each case and implementation; see `plugin.py`. A difference of convention is an expected failure."""

from __future__ import annotations

import pytest

from fastrl.conformance.cases import cases
from fastrl.conformance.run import DIFFERS, FAIL, NOT_OFFERED, check, load


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.config.getoption("--impl", default=[])
    if not names:
        raise pytest.UsageError("fastrl.conformance: needs -p fastrl.conformance.plugin and --impl IMPL")
    found = [adapter for name in names for adapter in load(name)]
    metafunc.parametrize("adapter", found, ids=lambda adapter: adapter.title)
    metafunc.parametrize("case", cases(), ids=str)


def test_conformance(case, adapter):
    verdict = check(case, adapter)
    if verdict.outcome == NOT_OFFERED:
        pytest.skip(verdict.detail)
    if verdict.outcome == DIFFERS:
        pytest.xfail(verdict.detail)
    if verdict.outcome == FAIL:
        pytest.fail(f"{', '.join(case.numbers)}: {case.sentence}\n{verdict.detail}", pytrace=False)
