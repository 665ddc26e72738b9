"""Options that all tests share."""

import os

import pytest
import torch

# Triton's decorators decide at import whether a kernel is compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config, items):
    """Tests marked `sanitize` build their own module, so they run only where `-m` asks for them."""
    if "sanitize" in config.getoption("-m"):
        return
    skip = pytest.mark.skip(reason="run with -m sanitize")
    for item in items:
        if item.get_closest_marker("sanitize"):
            item.add_marker(skip)
