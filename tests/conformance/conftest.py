import pytest


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """test_threads.py sets its own numbers."""
