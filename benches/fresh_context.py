"""A pytest plugin for workers (`-n`): a test that breaks the GPU's context costs that test alone.

After an illegal access every later call of CUDA fails in that process. So the worker ends, and pytest-xdist starts
another.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    result = yield
    if torch.cuda.is_initialized() and os.environ.get("PYTEST_XDIST_WORKER"):
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{item.nodeid}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return result
