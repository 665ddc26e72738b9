"""The cases in pytest: `pytest -p fastrl.conformance.plugin --pyargs fastrl.conformance --impl module:adapter`."""

from __future__ import annotations

import pytest

from fastrl.conformance.run import implementations


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--impl",
        action="append",
        default=[],
        metavar="IMPL",
        help=f"implementation that fastrl.conformance tests: {', '.join(implementations())}, or module:adapter",
    )
