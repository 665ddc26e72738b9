"""Every op on the GPU backends against tests/conformance: agreement, poison, layouts, far rows."""

from __future__ import annotations

import pytest
import torch
from conformance import test_addressing, test_poison, test_strides
from conformance.calls import Call, all_calls, assert_same, evaluate, label
from gpus import HAS_GPU
from oracle import DTYPES, ROUNDING, assert_as_accurate

DEVICE = "cuda" if HAS_GPU else "cpu"
CALLS = all_calls(device=DEVICE, backends=("reference",))
MASKED = [call for call in CALLS if "mask" in call.tensors]
every_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


def on(gpu_backend: str, call: Call) -> Call:
    """`call` on that backend; its bits depend on no layout where it is all fastrl's own arithmetic."""
    native = {c.name: c.exact for c in all_calls(backends=(gpu_backend,))}
    if call.name not in native:
        pytest.skip(f"{call.name} has no {gpu_backend} kernel")
    return call._replace(backend=gpu_backend, exact=native[call.name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_call
def test_as_accurate_as_torch(gpu_backend, call, dtype):
    """Against float64: results and gradients err at most twice as much as plain torch does in the same dtype."""
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in call.tensors.items()}
    doubles = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    found, eager, truth = evaluate(on(gpu_backend, call), tensors), evaluate(call, tensors), evaluate(call, doubles)
    for name, value in found.items():
        slack = ROUNDING[dtype] / 8 if value.ndim == 0 else 0.0
        assert_as_accurate(value, eager[name], truth[name], f"{label(call)}: {name}", slack)


@every_call
def test_every_output_is_written(gpu_backend, call):
    """T20, pitfall 9."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        found = evaluate(on(gpu_backend, call))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("call", MASKED, ids=lambda call: call.name)
def test_dropped_slots_may_hold_anything(gpu_backend, call, poison):
    """T8, T20, pitfalls 9, 10, 38."""
    test_poison.test_dropped_slots_may_hold_anything(on(gpu_backend, call), poison)


@pytest.mark.parametrize("call", MASKED, ids=lambda call: call.name)
def test_nothing_kept(gpu_backend, call):
    """T8, T25, pitfalls 10, 13."""
    test_poison.test_nothing_kept(on(gpu_backend, call))


@every_call
def test_layouts(gpu_backend, call):
    """T10, T21, pitfall 24: every argument in the last of its layouts, alone and with all others."""
    call = on(gpu_backend, call)
    expected = evaluate(call)
    with torch.device(DEVICE):
        strided = {name: list(test_strides.layouts(tensor))[-1][1] for name, tensor in call.tensors.items()}
        shifted = {name: next(test_strides.layouts(tensor))[1] for name, tensor in call.tensors.items()}
    for tensors in (strided, shifted):
        assert_same(call, evaluate(call, tensors), expected, 1e-5, "layouts")


@pytest.mark.skipif(HAS_GPU, reason="memory that takes no pages is the host's")
@every_call
def test_rows_beyond_two_to_the_31(gpu_backend, call):
    """T11, T28, pitfall 45."""
    test_addressing.test_rows_beyond_two_to_the_31(on(gpu_backend, call))
