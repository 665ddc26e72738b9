"""Results depend neither on the run nor on the number of threads."""

from __future__ import annotations

import pytest
import torch
from conformance.calls import Call, all_calls, assert_same, evaluate, label

from fastrl.ops import native

# Large enough that every kernel shares its work among threads.
PRODUCTS = [call for call in all_calls(batch=16, tokens=65, vocab=61, width=16) if not call.exact]
ROWS = [call for call in all_calls(batch=64, tokens=401, vocab=61) if call.exact]
CALLS = [call for call in PRODUCTS + ROWS if call.backend != "reference"]


@pytest.mark.parametrize("call", CALLS, ids=label)
def test_same_result_for_any_number_of_threads(call: Call, monkeypatch: pytest.MonkeyPatch):
    """T15, pitfall 44: two runs give the same bits; so do 1, 2 and 3 threads, library products to rounding."""
    monkeypatch.setattr(native, "ELEMENTS_PER_THREAD", 1)
    expected = evaluate(call)
    for count in (2, 3):
        torch.set_num_threads(count)
        found, again = evaluate(call), evaluate(call)
        assert all(torch.equal(found[name], again[name]) for name in found), f"{label(call)}: {count} threads"
        assert_same(call, found, expected, 1e-5, f"{count} threads")
