"""Options that all tests share."""

import os

import pytest
import torch

# Triton's decorators decide at import whether a kernel is compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


OWN_JOBS = ("sanitize", "ptxas")  # marks of tests that compile much


def pytest_collection_modifyitems(config, items):
    """Tests with such a mark run only where `-m` asks for it."""
    for mark in OWN_JOBS:
        if mark in config.getoption("-m"):
            continue
        skip = pytest.mark.skip(reason=f"run with -m {mark}")
        for item in items:
            if item.get_closest_marker(mark):
                item.add_marker(skip)
