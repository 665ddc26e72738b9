"""lora_linear's GPU kernels against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from gpus import HAS_GPU
from oracle import DTYPES, assert_as_accurate

from fastrl.ops import LoRAWeights, lora_linear, lora_linear_group
from fastrl.ops import lora_linear_gpu as steps
from fastrl.reference.lora_linear import dropout_keep

Layers = list[LoRAWeights]


def case(device, dtype, rows, features, sizes, seed=0) -> tuple[torch.Tensor, Layers]:
    """x, and one layer for each (outputs, rank); every second one has a bias."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=g) * std).to(dtype).to(device)

    layers = []
    for i, (out, rank) in enumerate(sizes):
        parts = normal(out, features, std=features**-0.5), normal(rank, features, std=features**-0.5), normal(out, rank)
        layers.append(LoRAWeights(*parts, 0.5 + i, normal(out) if i % 2 else None))
    return normal(rows, features), layers


def leaf(value, wanted=True):
    return value.detach().requires_grad_(wanted) if isinstance(value, torch.Tensor) else value


def run(x, layers, wanted=("x", "weight", "lora_a", "lora_b", "bias"), **options):
    """Outputs and the wanted gradients by name, for an upstream of cosines and the same draw of the dropout mask."""
    leaves = {"x": leaf(x, "x" in wanted)}
    ours = []
    for i, layer in enumerate(layers):
        tensors = {name: leaf(value, name in wanted) for name, value in layer._asdict().items()}
        ours.append(LoRAWeights(**tensors))
        leaves |= {f"{name} {i}": tensors[name] for name in wanted if name != "x" and tensors[name] is not None}
    torch.manual_seed(3)
    outputs = lora_linear_group(leaves["x"], ours, **options)
    found = {f"y {i}": y.detach() for i, y in enumerate(outputs)}
    if leaves := {name: t for name, t in leaves.items() if t.requires_grad}:
        upstreams = [torch.arange(y.numel(), device=y.device).double().cos().view(y.shape).to(y.dtype) for y in outputs]
        found |= zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), upstreams), strict=True)
    return found


def check(backend, x, layers, dropout):
    actual = run(x, layers, dropout=dropout, backend=backend)
    eager = run(x, layers, dropout=dropout, backend="reference")
    wide = [LoRAWeights(*(t.double() if isinstance(t, torch.Tensor) else t for t in layer)) for layer in layers]
    truth = run(x.double(), wide, dropout=dropout, backend="reference")
    assert actual.keys() == truth.keys()
    for name, value in actual.items():
        assert value.dtype == x.dtype
        assert_as_accurate(value, eager[name], truth[name], name)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(gpu_backend, device, dtype, dropout):
    """T22, T23: outputs and every gradient of three siblings of other sizes and ranks, none a multiple of a tile."""
    for features in (100, 35):  # the kernels of `cuda` take multiples of 4
        x, layers = case(device, dtype, 37, features, [(33, 5), (10, 16), (70, 9)])
        check(gpu_backend, x, layers, dropout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [*((1, dtype) for dtype in DTYPES), (530, torch.bfloat16)],
    ids=str,
)
def test_sums_in_several_parts(gpu_backend, device, dtype, rows):
    """One row; more rows and outputs than one program sums over; a rank that takes two tiles."""
    x, layers = case(device, dtype, rows, 40, [(530, 20 if dtype == torch.float32 else 67)])
    check(gpu_backend, x, layers, 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (5, 130), (0, 8)], ids=str)
def test_every_step_drops_the_references_elements(gpu_backend, device, dtype, shape):
    """T23: products with the identity and with ones show the mask of the forward and of both gradients."""
    (rows, cols), seed, p = shape, torch.tensor([0x1234567890ABCDE], device=device), 0.3
    options = dict(dtype=dtype, device=device)
    keep = dropout_keep(rows, cols, p, seed)
    down = torch.full((rows, cols), torch.nan, **options)
    steps._down(gpu_backend, torch.ones(rows, cols, **options), torch.eye(cols, **options), seed, p, down)
    assert torch.equal(down, keep.to(dtype))
    dlora_a = torch.full((rows, cols), torch.nan, **options)
    if rows > 0:
        x = torch.ones(rows, cols, **options)
        steps._down_backward(gpu_backend, torch.eye(rows, **options), x, seed, p, dlora_a)
        assert torch.equal(dlora_a, keep.to(dtype))
    dx = torch.full((rows, cols), torch.nan, **options)
    steps._input_gradient(gpu_backend, torch.ones(rows, 1, **options), torch.ones(1, cols, **options), seed, p, dx)
    assert torch.equal(dx, keep.to(dtype))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_dropped_element_may_hold_anything(gpu_backend, device, poison):
    """The adapter's parts select by the mask; they never multiply by it."""
    seed, p = torch.tensor([5], device=device), 0.5
    keep = dropout_keep(6, 70, p, seed)
    x = torch.where(keep, 1.0, poison)
    down = torch.empty(6, 3, device=device)
    steps._down(gpu_backend, x, torch.ones(3, 70, device=device), seed, p, down)
    assert torch.equal(down, keep.sum(1, keepdim=True).expand(6, 3).float())
    dlora_a = torch.empty(3, 70, device=device)
    steps._down_backward(gpu_backend, torch.ones(6, 3, device=device), x, seed, p, dlora_a)
    assert torch.equal(dlora_a, keep.sum(0).expand(3, 70).float())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    "wanted",
    [(), ("x",), ("lora_a",), ("lora_b",), ("weight",), ("bias",), ("x", "lora_b"), ("lora_a", "lora_b")],
    ids=str,
)
def test_only_what_is_asked_for_gets_a_gradient(gpu_backend, device, wanted, dropout):
    """Pitfall 24: any subset of gradients is the same as from a backward that forms all."""
    x, layers = case(device, torch.float32, 9, 70, [(12, 3), (20, 4)])
    everything = run(x, layers, dropout=dropout, backend=gpu_backend)
    found = run(x, layers, wanted=wanted, dropout=dropout, backend=gpu_backend)
    assert len(found) == 2 + sum({"x": 1, "bias": 1}.get(name, 2) for name in wanted)
    for name, value in found.items():
        torch.testing.assert_close(value, everything[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_any_strides_and_dimensions(gpu_backend, device, dropout):
    """T21, T24: slices, transposes and expanded tensors, of x, the weights and the upstream."""
    x, (layer,) = case(device, torch.float32, 12, 70, [(11, 4)])
    want = run(x, [layer], dropout=dropout, backend=gpu_backend)
    wide = torch.full((12, 75), torch.nan, device=device)
    wide[:, 2:72] = x
    strided = [t.t().contiguous().t() for t in layer[:3]]
    for other in (wide[:, 2:72], x.t().contiguous().t()):
        got = run(other, [LoRAWeights(*strided, layer.scaling)], dropout=dropout, backend=gpu_backend)
        for name, value in got.items():
            torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5, msg=name)
    gradients = []
    for upstream in (torch.ones(1, device=device).expand(3, 4, 11), torch.ones(3, 4, 11, device=device)):
        leaves = [leaf(x), leaf(layer.lora_a), leaf(layer.lora_b)]
        torch.manual_seed(1)
        options = dict(dropout=dropout, backend=gpu_backend)
        y = lora_linear(leaves[0].view(3, 4, 70), layer.weight, *leaves[1:], layer.scaling, **options)
        gradients.append(torch.autograd.grad(y, leaves, upstream))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_rows(gpu_backend, device, dropout):
    """T24: no row gives empty outputs and gradients of zero."""
    x, layers = case(device, torch.float32, 0, 70, [(11, 4)])
    found = run(x, layers, dropout=dropout, backend=gpu_backend)
    assert found["y 0"].shape == (0, 11) and found["x"].shape == (0, 70)
    assert all((value == 0).all() for value in found.values())


def test_repeatable(gpu_backend, device):
    """T15, pitfall 44: same bits on every run."""
    x, layers = case(device, DTYPES[-1], 300, 70, [(40, 16), (530, 3)])
    first, second = (run(x, layers, dropout=0.2, backend=gpu_backend) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_without_graph_breaks(gpu_backend, device, dropout):
    """T32: fullgraph=True, forward and backward, equal to eager."""
    x, layers = case(device, torch.float32, 6, 70, [(11, 4), (5, 3)])

    def gradients(compiled):
        leaves = [leaf(x)] + [leaf(t) for layer in layers for t in layer[:3]]

        def loss(x, *parts):
            siblings = [LoRAWeights(*parts[:3], 0.5), LoRAWeights(*parts[3:], 2.0)]
            first, second = lora_linear_group(x, siblings, dropout=dropout, backend=gpu_backend)
            return first.square().mean() + second.sin().sum()

        torch.manual_seed(2)
        run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        return torch.autograd.grad(run(*leaves), leaves)

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_opcheck(gpu_backend, device):
    x, (layer,) = case(device, torch.float32, 5, 68, [(11, 4)])
    seed, down, dy = (
        torch.tensor([7], device=device),
        torch.randn(5, 4, device=device),
        torch.randn(5, 11, device=device),
    )
    checks = [
        ("lora_down", (x, layer.lora_a, seed, 0.3, torch.empty(5, 4, device=device))),
        ("lora_up_backward", (dy, down, layer.lora_b, 0.5, torch.empty_like(down), torch.empty_like(layer.lora_b))),
        ("lora_up_backward", (dy, down, layer.lora_b, 0.5, None, torch.empty_like(layer.lora_b))),
        ("lora_down_backward", (down, x, seed, 0.3, torch.empty_like(layer.lora_a))),
        ("lora_down_backward", (down, x, None, 0.0, torch.empty_like(layer.lora_a))),
        ("lora_input_gradient", (down, layer.lora_a, seed, 0.3, torch.empty_like(x))),
    ]
    for name, arguments in checks:
        torch.library.opcheck(getattr(torch.ops.fastrl, name).default, (gpu_backend, *arguments))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "rank"), [(4096, 16), (8192, 64), (70_001, 8)])
def test_large(gpu_backend, device, rows, rank, dropout):
    """T12: the shapes of language models in bfloat16, and more rows than a grid's second dimension allows."""
    x, layers = case(device, torch.bfloat16, rows, 2048, [(2048, rank), (1024, rank)])
    check(gpu_backend, x, layers, dropout)
