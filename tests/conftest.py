"""Options that all tests share."""

import pytest


def pytest_collection_modifyitems(config, items):
    """Tests marked `sanitize` build their own module, so they run only where `-m` asks for them."""
    if "sanitize" in config.getoption("-m"):
        return
    skip = pytest.mark.skip(reason="run with -m sanitize")
    for item in items:
        if item.get_closest_marker("sanitize"):
            item.add_marker(skip)
