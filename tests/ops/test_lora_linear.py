import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, assert_as_accurate, strided_variants
from torch.utils.checkpoint import checkpoint

from fastrl.ops import LoRAWeights, lora_linear, lora_linear_group
from fastrl.reference import lora_linear as reference
from fastrl.reference.lora_linear import _philox, dropout_keep

NATIVE = "cpu"
BACKENDS = ["reference", NATIVE]


def layer(features, out, rank, dtype=torch.float32, scaling=0.5, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, features, generator=g) / features**0.5
    lora_a = torch.randn(rank, features, generator=g) / features**0.5
    lora_b = torch.randn(out, rank, generator=g)
    parts = [t.to(dtype) for t in (weight, lora_a, lora_b)]
    return LoRAWeights(*parts, scaling, torch.randn(out, generator=g).to(dtype) if bias else None)


def rows(*shape, dtype=torch.float32, seed=9):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(x, layers, seed=3, **options):
    """Outputs and the gradients of x and of every weight, for an upstream of cosines; leaves keep their strides."""
    x = x.detach().requires_grad_()
    layers = [LoRAWeights(*(leaf(t) for t in one)) for one in layers]
    torch.manual_seed(seed)
    outputs = lora_linear_group(x, layers, **options)
    leaves = [x] + [t for one in layers for t in one if isinstance(t, torch.Tensor)]
    loss = sum((y * torch.arange(y.numel(), dtype=y.dtype).cos().view(y.shape)).sum() for y in outputs)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, leaves)]


def leaf(value):
    return value.detach().requires_grad_() if isinstance(value, torch.Tensor) else value


def double(layers):
    return [LoRAWeights(*(t.double() if isinstance(t, torch.Tensor) else t for t in one)) for one in layers]


def set_widened(monkeypatch, widened):
    """Whether 16-bit matrices are multiplied in float32, whatever this CPU does; several blocks of a weight."""
    for module in ("lora_linear", "lora_linear_cpu"):
        monkeypatch.setattr(sys.modules[f"fastrl.ops.{module}"], "is_widened", lambda dtype: widened)
    monkeypatch.setattr(sys.modules["fastrl.ops.lora_linear_cpu"], "WIDENED_ELEMENTS", 67 * 15)
    monkeypatch.setattr(sys.modules["fastrl.ops.lora_linear"], "WIDENED_WORK", 10 * 24 * 8)


@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(monkeypatch, dtype, dropout, widened):
    """T22, T23, pitfalls 24, 31: outputs and every gradient within twice eager's error, with the same dropout mask."""
    set_widened(monkeypatch, widened)
    layers = [
        layer(67, 33, 5, dtype),
        layer(67, 10, 16, dtype, 2.0, bias=False, seed=1),
        layer(67, 1, 1, dtype, seed=2),
    ]
    x = rows(4, 9, 67, dtype=dtype)
    actual = run(x, layers, dropout=dropout, backend=NATIVE)
    eager = run(x, layers, dropout=dropout, backend="reference")
    truth = run(x.double(), double(layers), dropout=dropout, backend="reference")
    for i, (a, e, t) in enumerate(zip(actual, eager, truth, strict=True)):
        assert a.dtype == dtype
        assert_as_accurate(a, e, t, f"result {i}")


def test_widened_products_keep_the_precision_of_the_adapters(monkeypatch):
    """Adapters of float32 beside a bfloat16 base, PEFT's default: their gradients are not rounded on the way."""
    set_widened(monkeypatch, True)
    one = layer(67, 33, 5, torch.bfloat16)._replace(lora_a=rows(5, 67, seed=1), lora_b=rows(33, 5, seed=2))
    x = rows(9, 67, dtype=torch.bfloat16)
    upstream = rows(9, 33, dtype=torch.bfloat16, seed=3)

    def gradients(x, layer, **options):
        leaves = [leaf(t) for t in layer]
        y = lora_linear(x, *leaves[:4], bias=leaves[4], **options)
        return torch.autograd.grad(y, leaves[1:3], upstream.to(y.dtype))

    truth = gradients(x.double(), *double([one]), backend="reference")
    for found, expected in zip(gradients(x, one, backend=NATIVE), truth, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert found.dtype == torch.float32


def test_equals_the_torch_line():
    one = layer(24, 11, 4)
    x = rows(5, 24)
    want = F.linear(x, one.weight, one.bias) + F.linear(F.linear(x, one.lora_a), one.lora_b) * one.scaling
    for backend in BACKENDS:
        torch.testing.assert_close(lora_linear(x, *one[:4], bias=one.bias, backend=backend), want)
        torch.testing.assert_close(lora_linear_group(x, [one, one], backend=backend)[1], want)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (2, 3, 24), (0, 24), (2, 0, 24)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_any_number_of_leading_dimensions(shape, dropout):
    """T24: vector, matrix, batch, no rows, one row; rank 3 is no multiple of 8."""
    layers = [layer(24, 11, 3), layer(24, 5, 3, seed=4)]
    actual = run(rows(*shape), layers, dropout=dropout, backend=NATIVE)
    expected = run(rows(*shape), layers, dropout=dropout, backend="reference")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    """T21: slices, transposes and expanded tensors give the contiguous result, for every argument."""
    layers = [layer(24, 11, 4, dtype)]
    x = rows(3, 4, 24, dtype=dtype)
    want = run(x, layers, dropout=0.2, backend=NATIVE)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for name, variant in strided_variants(x):
        for a, e in zip(run(variant, layers, dropout=0.2, backend=NATIVE), want, strict=True):
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, msg=name)
    for i in range(3):
        for name, variant in strided_variants(layers[0][i]):
            strided = layers[0]._replace(**{LoRAWeights._fields[i]: variant})
            for a, e in zip(run(x, [strided], dropout=0.2, backend=NATIVE), want, strict=True):
                torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, msg=name)
    expanded = x[:1].expand(3, 4, 24)
    a, e = (lora_linear(t, *layers[0][:4], backend=NATIVE) for t in (expanded, expanded.contiguous()))
    torch.testing.assert_close(a, e)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_combinations(x_dtype, weight_dtype, lora_dtype):
    """T22: x and weight agree or autocast is on; adapters may differ, and get gradients in their own dtype."""
    one = layer(24, 11, 4, weight_dtype)
    one = one._replace(lora_a=leaf(one.lora_a.to(lora_dtype)), lora_b=leaf(one.lora_b.to(lora_dtype)))
    x = rows(6, 24, dtype=x_dtype).requires_grad_()

    def check(y, dtype):
        assert y.dtype == dtype
        wide = double([one])[0]
        want = lora_linear(x.double(), *wide[:4], bias=wide.bias)
        torch.testing.assert_close(y.double(), want, rtol=0.05, atol=0.05)
        y.sum().backward()
        assert one.lora_a.grad.dtype == one.lora_b.grad.dtype == lora_dtype and x.grad.dtype == x_dtype
        want_grads = torch.autograd.grad(want.sum(), [x, one.lora_a, one.lora_b])
        for tensor, grad in zip([x, one.lora_a, one.lora_b], want_grads, strict=True):
            torch.testing.assert_close(tensor.grad, grad, rtol=0.05, atol=0.05 * grad.abs().max().item())

    if x_dtype == weight_dtype:
        check(lora_linear(x, *one[:4], bias=one.bias, backend=NATIVE), x_dtype)
    else:
        with pytest.raises(ValueError, match="lora_linear: weight: expected the dtype of x"):
            lora_linear(x, *one[:4], bias=one.bias)
    x.grad = one.lora_a.grad = one.lora_b.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, *one[:4], bias=one.bias, backend=NATIVE)
    check(y, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
def test_dropout_reaches_every_gradient(backend, dropout):
    """T23: the same mask in the output, in the gradient of A and in the gradient of x."""
    one = layer(70, 13, 4, bias=False)
    x = rows(6, 70)
    y, dx, dw, da, db = run(x, [one], seed=5, dropout=dropout, backend=backend)
    torch.manual_seed(5)
    keep = dropout_keep(6, 70, dropout, torch.randint(2**62, (1,))) if dropout else torch.ones(6, 70)
    x2, one2 = leaf(x), LoRAWeights(*map(leaf, one))
    dropped = x2 * keep / (1 - dropout)
    want = x2 @ one2.weight.t() + (dropped @ one2.lora_a.t()) @ one2.lora_b.t() * one2.scaling
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    upstream = torch.arange(want.numel()).float().cos().view(want.shape)
    grads = torch.autograd.grad(want, [x2, one2.weight, one2.lora_a, one2.lora_b], upstream)
    for got, expected in zip([dx, dw, da, db], grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
def test_reference_gradcheck(dropout):
    """T23: finite differences with a fixed seed."""
    one = double([layer(6, 4, 2)])[0]
    x = rows(3, 6).double().requires_grad_()
    leaves = [leaf(t) for t in (one.weight, one.lora_a, one.lora_b, one.bias)]

    def f(x, weight, lora_a, lora_b, bias):
        torch.manual_seed(0)
        return lora_linear(x, weight, lora_a, lora_b, 0.7, bias=bias, dropout=dropout)

    assert torch.autograd.gradcheck(f, (x, *leaves))


def test_philox_known_answers():
    """The vectors published with Random123 for philox4x32-10."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(w) for w in _philox(zero, zero, zero, zero)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("cols", [1, 15, 64, 65, 203])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_mask_equals_reference(cols, dtype):
    """T23: the C++ kernel and plain torch draw the same mask from the same seed, tails of a block included."""
    seed = torch.tensor([2**61 + 12345])
    matrix = torch.full((9, cols), float("nan"), dtype=dtype)
    torch.ops.fastrl.lora_dropout("cpu", matrix, seed, 0.37)
    keep = dropout_keep(9, cols, 0.37, seed)
    assert torch.equal(matrix.isnan(), keep) and (matrix[~keep] == 0).all()


def test_mask_statistics():
    """The kept share is 1 - dropout; neighbours, rows and seeds are uncorrelated."""
    for dropout in (0.1, 0.5):
        keep = dropout_keep(500, 640, dropout, torch.tensor([42])).float()
        other = dropout_keep(500, 640, dropout, torch.tensor([43])).float()
        deviation = (dropout * (1 - dropout)) ** 0.5
        assert abs(keep.mean() - (1 - dropout)) < 5 * deviation / keep.numel() ** 0.5
        centred, other = (keep - keep.mean()) / deviation, (other - other.mean()) / deviation
        pairs = [(centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1]), (centred, other)]
        pairs += [(centred[:, 16:], centred[:, :-16]), (centred[:, 64:], centred[:, :-64])]
        for a, b in pairs:
            assert abs((a * b).mean()) < 5 / a.numel() ** 0.5


def test_dropout_follows_the_torch_generator():
    """Pitfall 46: torch.manual_seed repeats the mask; two calls draw two masks; no dropout draws nothing."""
    one, x = layer(64, 8, 4), rows(5, 64)

    def sample(seed):
        torch.manual_seed(seed)
        return [lora_linear(x, *one[:4], dropout=0.5, backend=NATIVE) for _ in range(2)]

    first, second = sample(1), sample(1)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(1)
    lora_linear(x, *one[:4], backend=NATIVE)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recomputes_the_same(use_reentrant):
    """T23, kernels.md 3.4: gradient checkpointing with dropout gives the same outputs and gradients."""
    one = layer(64, 8, 4)

    def grads(wrap):
        x, parts = rows(5, 64).requires_grad_(), LoRAWeights(*map(leaf, one))
        torch.manual_seed(11)
        y = wrap(lambda x: lora_linear(x, *parts[:4], bias=parts.bias, dropout=0.4, backend=NATIVE).tanh(), x)
        y.sum().backward()
        return [y, x.grad, parts.lora_a.grad, parts.lora_b.grad]

    plain = grads(lambda f, x: f(x))
    recomputed = grads(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant))
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


def test_only_what_is_asked_for_gets_a_gradient():
    """Pitfall 24: requires_grad follows the inputs; a frozen weight forms no gradient; an unused sibling is fine."""
    one, x = layer(24, 11, 4), rows(6, 24)
    assert not lora_linear(x, *one[:4], backend=NATIVE).requires_grad
    lora_a = leaf(one.lora_a)
    y = lora_linear(x, one.weight, lora_a, one.lora_b, 0.5, backend=NATIVE)
    assert y.requires_grad
    y.sum().backward()
    assert lora_a.grad is not None and one.weight.grad is None
    first, _ = lora_linear_group(leaf(x), [one, one._replace(lora_b=leaf(one.lora_b))], backend=NATIVE)
    first.sum().backward()
    a, b = (run(x, [one, layer(24, 7, 2)], backend=backend) for backend in BACKENDS)
    for got, want in zip(a, b, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_inputs_are_left_alone_and_second_backward_repeats():
    """T13: no input is written to; retain_graph gives the same gradient; a weight changed in between is an error."""
    one, x = layer(24, 11, 4), rows(6, 24).requires_grad_()
    copies = [t.clone() for t in (x, *one[:3], one.bias)]
    lora_b = leaf(one.lora_b.clone())
    y = lora_linear(x, one.weight, one.lora_a, lora_b, 0.5, bias=one.bias, dropout=0.2, backend=NATIVE)
    first = torch.autograd.grad(y.sum(), [x, lora_b], retain_graph=True)
    second = torch.autograd.grad(y.sum(), [x, lora_b], retain_graph=True)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(copies, (x, *one[:3], one.bias), strict=True))
    (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward(retain_graph=True)
    with torch.no_grad():
        lora_b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_repeatable():
    """T15, pitfall 44: two runs give the same bits."""
    layers = [layer(200, 100, 16, torch.bfloat16), layer(200, 50, 16, torch.bfloat16, seed=1)]
    x = rows(300, 200, dtype=torch.bfloat16)
    for a, b in zip(*(run(x, layers, dropout=0.1, backend=NATIVE) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_saves_no_copy_of_x():
    """kernels.md 3.3: saved are x itself and the rank-r product, with and without dropout."""
    for dropout in (0.0, 0.5):
        one, x = layer(64, 32, 4), rows(10, 64).requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            lora_linear(x, *map(leaf, one[:3]), 0.5, dropout=dropout, backend=NATIVE)
        known = {x.data_ptr(), *(t.data_ptr() for t in one[:3])}
        extra = sum(t.numel() for t in saved if t.data_ptr() not in known)
        assert extra == 4 * 10 + (dropout > 0)  # (r, M) and the seed


def test_memory_is_flat_over_micro_batches():
    """T36, pitfall 28: no graph, input or output survives its micro-batch while gradients accumulate."""
    one = LoRAWeights(*map(leaf, layer(24, 11, 4)))
    for step in range(20):
        x = rows(6, 24, seed=step)
        y = lora_linear(x, *one[:4], bias=one.bias, dropout=0.1, backend=NATIVE)
        y.sum().backward()
        alive = [weakref.ref(x), weakref.ref(y)]
        del x, y
        assert [ref() for ref in alive] == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_without_graph_breaks(dropout):
    """T32: fullgraph=True, forward and backward, equal to eager; one sibling's adapters are float32."""
    base = [layer(24, 11, 4, torch.bfloat16), layer(24, 5, 3, torch.bfloat16, bias=False)]
    base[1] = base[1]._replace(lora_a=base[1].lora_a.float(), lora_b=base[1].lora_b.float())

    def loss(x, first, second):
        a, b = lora_linear_group(x, [first, second], dropout=dropout, backend=NATIVE)
        return a.float().square().mean() + b.float().sin().sum()

    def grads(f):
        x = rows(6, 24, dtype=torch.bfloat16).requires_grad_()
        layers = [LoRAWeights(*map(leaf, one)) for one in base]
        torch.manual_seed(2)
        f(x, *layers).backward()
        return [x.grad] + [t.grad for one in layers for t in one if isinstance(t, torch.Tensor)]

    for got, want in zip(grads(torch.compile(loss, fullgraph=True, backend="aot_eager")), grads(loss), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_opcheck():
    torch.library.opcheck(torch.ops.fastrl.lora_dropout.default, ("cpu", rows(4, 70), torch.tensor([7]), 0.3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    """Wrong rank, shape, dtype or value raises a ValueError that names op and argument."""
    one, x = layer(8, 6, 2), rows(3, 8)
    good = {"x": x, **one._asdict()}
    bad = [
        (dict(x=torch.tensor(1.0)), "x"),
        (dict(x=x.long()), "x"),
        (dict(weight=one.weight[:, :7]), "weight"),
        (dict(weight=one.weight[0]), "weight"),
        (dict(weight=one.weight.bfloat16()), "weight"),
        (dict(lora_a=one.lora_a[:0]), "lora_a"),
        (dict(lora_a=one.lora_a[:0], lora_b=one.lora_b[:, :0]), "lora_a"),
        (dict(lora_a=one.lora_a[:, :7]), "lora_a"),
        (dict(lora_a=one.lora_a.long()), "lora_a"),
        (dict(lora_b=one.lora_b.t()), "lora_b"),
        (dict(lora_b=one.lora_b.bool()), "lora_b"),
        (dict(bias=torch.zeros(5)), "bias"),
        (dict(bias=torch.zeros(6, dtype=torch.float16)), "bias"),
        (dict(scaling=float("nan")), "scaling"),
        (dict(dropout=1.0), "dropout"),
        (dict(dropout=-0.1), "dropout"),
        (dict(dropout=float("nan")), "dropout"),
    ]
    for change, argument in bad:
        with pytest.raises(ValueError, match=f"lora_linear: {argument}: expected"):
            lora_linear(**{**good, **change}, backend=backend)
    with pytest.raises(ValueError, match="lora_linear_group: layers: expected at least one"):
        lora_linear_group(x, [], backend=backend)
    with pytest.raises(ValueError, match="lora_linear_group: lora_b: expected"):
        lora_linear_group(x, [one, one._replace(lora_b=one.lora_a)], backend=backend)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 6), st.integers(1, 90), st.integers(1, 20), st.integers(1, 9), st.floats(-3, 3), st.integers(0, 99)
)
def test_properties(count, features, out, rank, scaling, seed):
    """Scaling 0 is the base layer; the adapter's part is linear in the scaling; siblings equal single layers."""
    one, x = layer(features, out, rank, scaling=scaling, seed=seed), rows(count, features)
    base = F.linear(x, one.weight, one.bias)

    def adapted(scaling):
        return lora_linear(x, one.weight, one.lora_a, one.lora_b, scaling, bias=one.bias, backend=NATIVE)

    assert torch.equal(adapted(0.0), base)
    torch.testing.assert_close(adapted(2 * scaling) - base, 2 * (adapted(scaling) - base), rtol=1e-4, atol=1e-4)
    other = layer(features, out + 1, rank, scaling=1.5, bias=False, seed=seed + 1)
    both = lora_linear_group(x, [one, other], backend=NATIVE)
    torch.testing.assert_close(both[0], adapted(scaling), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1], lora_linear(x, *other[:4], backend=NATIVE), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "count, training, dropout, adapters, widened, eager",
    [
        (16, False, 0.0, torch.bfloat16, False, True),
        (64, False, 0.0, torch.bfloat16, False, False),
        (64, True, 0.0, torch.bfloat16, False, True),
        (128, True, 0.0, torch.bfloat16, False, False),
        (16, True, 0.1, torch.bfloat16, False, False),
        (16, True, 0.0, torch.float32, False, False),
        (8, False, 0.0, torch.bfloat16, True, True),
        (16, False, 0.0, torch.bfloat16, True, False),
        (9, True, 0.0, torch.bfloat16, True, True),
        (10, True, 0.0, torch.bfloat16, True, False),
    ],
)
def test_small_batches_run_eagerly(monkeypatch, count, training, dropout, adapters, widened, eager):
    """Where calls cost more than fused products save; an explicit backend is still obeyed."""
    set_widened(monkeypatch, widened)
    module, calls = "fastrl.reference.lora_linear.lora_linear_group", []
    original = reference.lora_linear_group
    monkeypatch.setattr(module, lambda *args: calls.append(args) or original(*args))
    one = layer(24, 8, 4, torch.bfloat16, bias=False)
    one = one._replace(lora_a=one.lora_a.to(adapters), lora_b=one.lora_b.to(adapters))
    x = rows(count, 24, dtype=torch.bfloat16)
    with torch.set_grad_enabled(training):
        lora_linear(x, *one[:4], dropout=dropout)
        assert bool(calls) == eager
        calls.clear()
        lora_linear(x, *one[:4], dropout=dropout, backend=NATIVE)
        assert not calls
