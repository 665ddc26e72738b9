import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: one thread is fastest. test_threads.py sets its own numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
