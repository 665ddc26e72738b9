"""Offsets beyond 2^31 elements, and very many rows. Only the pages in use take memory."""

from __future__ import annotations

import mmap

import pytest
import torch
from conformance.calls import Call, Tensors, all_calls, assert_same, evaluate, label
from torch import Tensor

from fastrl.ops import linear_logprobs, token_logprobs

FAR = 2**31 + 8192  # elements
CALLS = [call for call in all_calls() if call.backend != "reference" and call.name != "ranking_loss"]


def sparse(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
    pages = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)


def spread(tensors: Tensors) -> Tensors:
    """The same tensors, those of two or more dimensions with their last row more than 2^31 elements after the first."""
    far = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            far[name] = tensor
            continue
        rows = len(tensor)
        step = FAR if rows <= 4 else FAR // (rows - 1)  # with few rows one stride alone is too long for an int32
        view = sparse((rows - 1) * step + tensor[0].numel(), tensor.dtype).as_strided(
            tensor.shape, (step, *tensor[0].contiguous().stride())
        )
        assert (rows - 1) * step > 2**31
        far[name] = view.copy_(tensor)
    return far


@pytest.mark.parametrize("call", CALLS, ids=label)
def test_rows_beyond_two_to_the_31(call: Call):
    """T11, T28, pitfall 45: every argument of two or more dimensions ends more than 2^31 elements after it begins."""
    assert_same(call, evaluate(call, spread(call.tensors)), evaluate(call), 1e-5, "far rows")


def test_logits_of_more_than_two_to_the_31_elements():
    """T11: 20,000 x 128,256 contiguous logits, of which the mask keeps the first and the last rows."""
    rows, vocab = 20_000, 128_256
    logits = sparse(rows * vocab, torch.bfloat16).view(rows, vocab)
    mask = torch.zeros(rows, dtype=torch.bool)
    kept = torch.tensor([0, 16_743, 16_744, rows - 2, rows - 1])  # rows 16,743 and 16,744 lie around 2^31
    mask[kept] = True
    logits[kept] = torch.randn(len(kept), vocab, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(1))
    found = token_logprobs(logits, ids, mask=mask, backend="cpu")
    want = logits[kept].float().log_softmax(-1).gather(1, ids[kept, None])[:, 0]
    torch.testing.assert_close(found[kept], want)
    assert found.count_nonzero() == len(kept)


@pytest.mark.slow
def test_a_million_rows():
    """Pitfall 45: 2^20 rows, forward and backward, equal to the plain torch line."""
    rows, vocab = 2**20, 3
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (rows,), generator=g)
    logits = torch.randn(rows, vocab, generator=g, requires_grad=True)
    weight = torch.eye(vocab)
    want = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(want.sum(), logits)
    for found in (
        token_logprobs(logits, ids, backend="cpu"),
        linear_logprobs(logits, weight, ids, backend="cpu"),
    ):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), logits)[0], gradient, rtol=1e-5, atol=1e-5)
