"""What only a GPU shows: streams, graphs, launches in flight, synchronisation. `pytest -m gpu`."""

from __future__ import annotations

import warnings

import pytest
import torch
from conformance.calls import Call, Tensors, all_calls, evaluate, label
from gpu.waits import allowed
from gpus import HAS_GPU
from torch.utils.checkpoint import checkpoint

from fastrl import ops
from fastrl.ops import backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]

NATIVE = tuple(name for name, there in (("cuda", backend.cuda), ("triton", backend.HAS_TRITON)) if there)
CALLS = all_calls(batch=5, tokens=33, vocab=3001, device="cuda", backends=NATIVE) if HAS_GPU else []
SEEDED = "lora_linear, dropout"  # sets the generator's seed, which a graph or a compiled function may not


def reference(call: Call, tensors: Tensors | None = None) -> Tensors:
    return evaluate(call._replace(backend="reference"), tensors)


def assert_close(found: Tensors, expected: Tensors, tolerance: float = 2e-4) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = expected[name].abs().max().clamp(min=1.0).item() if value.numel() else 1.0
        torch.testing.assert_close(
            value.float(), expected[name].float(), rtol=tolerance, atol=tolerance * scale, msg=name, equal_nan=True
        )


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def scaled(tensors: Tensors, factor: float) -> Tensors:
    """Other values of the same shapes."""
    return {name: t * factor if t.is_floating_point() else t for name, t in tensors.items()}


@pytest.fixture(autouse=True)
def full_precision():
    """Products of fp32 in fp32, so that backends agree."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("call", CALLS, ids=label)
def test_agrees_with_the_reference_and_repeats_its_bits(call: Call):
    """T15, pitfall 44."""
    found = evaluate(call)
    assert_close(found, reference(call))
    for _ in range(3):
        assert_same_bits(evaluate(call), found)


@pytest.mark.parametrize("call", CALLS, ids=label)
def test_runs_on_the_current_stream(call: Call):
    """T29: a kernel on another stream would read the inputs before they are written."""
    expected = evaluate(call, scaled(call.tensors, 0.5))
    tensors = {name: t.clone() for name, t in call.tensors.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.mul_(0.5)
        found = evaluate(call, tensors)
    stream.synchronize()
    assert_same_bits(found, expected)


@pytest.mark.parametrize("call", CALLS, ids=label)
def test_two_launches_in_flight(call: Call):
    """Nothing is shared between calls: two streams at once give what each gives alone."""
    inputs = [call.tensors, scaled(call.tensors, 0.5)]
    expected = [evaluate(call, tensors) for tensors in inputs]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], [[], []]
    for _ in range(5):
        for stream, tensors, results in zip(streams, inputs, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(evaluate(call, tensors))
    torch.cuda.synchronize()
    for results, want in zip(found, expected, strict=True):
        for result in results:
            assert_same_bits(result, want)


@pytest.mark.parametrize("call", [c for c in CALLS if c.name != SEEDED], ids=label)
def test_cuda_graph(call: Call):
    """Forward and backward are captured once and replayed on other values."""
    tensors = {name: t.clone() for name, t in call.tensors.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which copies the tensors
    with torch.cuda.stream(side):  # warm up, as torch asks for
        for _ in range(3):
            evaluate(call, tensors)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = evaluate(call, tensors)
    changed = scaled(call.tensors, 0.5)
    for name, tensor in tensors.items():
        tensor.copy_(changed[name])
    graph.replay()
    torch.cuda.synchronize()
    assert_close(found, reference(call, changed))


@pytest.mark.parametrize("name", NATIVE)
def test_a_graph_draws_other_dropout_each_time(name: str):
    x, weight, lora_a, lora_b = (torch.randn(*s, device="cuda") for s in ((64, 48), (40, 48), (8, 48), (40, 8)))

    def layer():
        return ops.lora_linear(x, weight, lora_a, lora_b, 0.5, dropout=0.5, backend=name)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(y.clone())
    assert all(replay.isfinite().all() for replay in replays) and not torch.equal(*replays)


@pytest.mark.parametrize("call", CALLS, ids=label)
def test_the_hot_path_never_waits(call: Call):
    """No .item(), no copy to the host, forward and backward, beyond what waits.py allows."""
    evaluate(call)  # compiles, allocates
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            evaluate(call)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)
    assert waits <= allowed(call)


@pytest.mark.parametrize("call", [c for c in CALLS if c.name != SEEDED], ids=label)
def test_compiled_without_graph_breaks(call: Call):
    """T32: forward alone, and forward with backward; results and gradients are eager's."""
    torch.compiler.reset()
    compiled = call._replace(run=torch.compile(call.run, fullgraph=True))
    for leaves in sorted({(), call.leaves}):
        found = evaluate(compiled._replace(leaves=leaves))
        assert_close(found, evaluate(call._replace(leaves=leaves)), 1e-5)


PRODUCTS = [c for c in CALLS if c.name.startswith(("lora_linear", "linear_")) and c.name != SEEDED]


@pytest.mark.parametrize("call", PRODUCTS, ids=label)
def test_autocast(call: Call):
    """T22: fp32 inputs under bf16 autocast do what the reference does under it."""
    with torch.autocast("cuda", torch.bfloat16):
        found, expected = evaluate(call), reference(call)
    assert_close(found, expected, 3e-2)


@pytest.mark.parametrize("name", NATIVE)
def test_checkpointing_repeats_the_dropout(name: str):
    """T23: the recomputed forward must drop the same elements."""
    x = torch.randn(64, 48, device="cuda", requires_grad=True)
    weight, lora_a, lora_b = (torch.randn(*s, device="cuda") for s in ((40, 48), (8, 48), (40, 8)))
    lora_a.requires_grad_()

    def layer(x):
        return ops.lora_linear(x, weight, lora_a, lora_b, 0.5, dropout=0.3, backend=name)

    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(7)
        gradients.append(torch.autograd.grad(run(x).square().sum(), (x, lora_a)))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors():
    """T29: the current device is another one."""
    for call in all_calls(device="cuda:1", backends=NATIVE):
        with torch.cuda.device(0):
            found = evaluate(call)
        assert all(value.device == torch.device("cuda:1") for value in found.values())
        assert_close(found, reference(call))
