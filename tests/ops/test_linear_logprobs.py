import pytest
import torch
from heads import (
    PARAMETERS,
    arg_max_head,
    assert_matches_float64,
    head_case,
    lora_of,
    results,
    small_blocks,
    top1_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, strided_variants
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.ops import linear_head_cpu, linear_logprobs, token_logprobs
from fastrl.ops.cpu_products import is_widened

NATIVE = "cpu"
HEADS = {"plain": {}, "bias": {"bias": True}, "lora": {"lora": True}, "bias and lora": {"bias": True, "lora": True}}


# T4, pitfall 23: vocabularies that are no multiple of a vector; 129 and 2049 are one past a block.
@pytest.mark.parametrize("blocks", ["one block", "small blocks"])
@pytest.mark.parametrize("vocab", [1, 2, 7, 129, 1003, 2049])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(vocab, dtype, blocks, monkeypatch):
    """T1, T2, T4, T16, T17, pitfalls 23, 31, 35: per-token upstream, ragged chunks, within twice eager's error."""
    if blocks == "small blocks":
        small_blocks(monkeypatch)
    assert_matches_float64(NATIVE, head_case(vocab=vocab, dtype=dtype), temperature=0.7)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_lora_and_softcap(dtype, softcap, head, monkeypatch):
    """T34, pitfalls 26, 30: what a head may carry changes log-probs and gradients as in plain torch."""
    small_blocks(monkeypatch)
    case = head_case(dtype=dtype, **HEADS[head])
    assert_matches_float64(NATIVE, case, temperature=1.3, softcap=softcap)
    assert_matches_float64(NATIVE, case, temperature=0.7, softcap=softcap, logit_scale=0.25, entropy=False)
    assert_matches_float64(NATIVE, case, temperature=0.7, softcap=softcap, logit_scale=3.0)


@pytest.mark.parametrize("trained", [(name,) for name in PARAMETERS] + [("hidden", "lora_a", "lora_b")], ids=str)
def test_any_subset_of_trained_parameters(trained):
    """A frozen head, a head alone, an adapter alone: each gradient is that of training everything."""
    case = head_case(bias=True, lora=True)
    everything = results(case, backend=NATIVE)
    for name, value in results(case, trained=trained, backend=NATIVE).items():
        torch.testing.assert_close(value, everything[name], rtol=1e-5, atol=1e-6)


def test_mixed_lora_dtype():
    """T22: a float32 adapter on a bfloat16 head, PEFT's default; its gradients are float32."""
    case = head_case(dtype=torch.bfloat16, lora=True)
    case = case._replace(lora_a=case.lora_a.float(), lora_b=case.lora_b.float())
    assert_matches_float64(NATIVE, case)


def test_reference_equals_the_torch_line():
    case = head_case(bias=True, lora=True)
    merged = case.weight + 0.5 * case.lora_b @ case.lora_a
    want = torch.nn.functional.linear(case.hidden, merged, case.bias).log_softmax(-1)
    want = want.gather(-1, case.token_ids[:, None])[:, 0]
    for backend in ("reference", NATIVE):
        got = linear_logprobs(
            case.hidden, case.weight, case.token_ids, bias=case.bias, lora=lora_of(case), backend=backend
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_positions_may_hold_anything(backend, poison):
    """T8, T20, pitfalls 9, 10: NaN, inf, id -100 and a NaN upstream where the mask drops; 0 and zero gradient there."""
    case = head_case(bias=True, lora=True)
    mask = torch.arange(23) % 3 != 1
    clean = results(case._replace(upstream=case.upstream * mask), mask=mask, backend=backend)
    case.hidden[~mask] = poison
    case.token_ids[~mask] = -100
    dirty = results(case._replace(upstream=case.upstream * mask), mask=mask, backend=backend)
    assert (dirty["logprobs"][~mask] == 0).all() and (dirty["hidden"][~mask] == 0).all()
    for name, value in dirty.items():
        assert torch.equal(value, clean[name]), name
    if backend == NATIVE:
        hidden = case.hidden.clone().requires_grad_()
        logprobs = linear_logprobs(hidden, case.weight, case.token_ids, mask=mask, backend=backend)
        logprobs.backward(torch.where(mask, 1.0, torch.nan))
        assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_kept(backend, rows):
    """T8, pitfall 10: no rows, or all masked: log-prob 0, every gradient exactly 0."""
    case = head_case(rows=rows, bias=True, lora=True)
    found = results(case, mask=torch.zeros(rows, dtype=torch.bool), backend=backend)
    assert all((value == 0).all() for value in found.values())
    assert found["weight"].shape == case.weight.shape


class Shapes(TorchDispatchMode):
    """The shapes (M, K, N) of all products."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket == torch.ops.aten.mm:
            self.seen.append((*args[0].shape, args[1].shape[1]))
        return function(*args, **(kwargs or {}))


def test_masked_rows_are_never_multiplied():
    """Only kept rows reach the head, and no weight gradient is formed for a frozen head."""
    case = head_case(rows=40, vocab=300, width=16)
    mask = torch.arange(40) < 10
    hidden = case.hidden.requires_grad_()
    with Shapes() as shapes:
        linear_logprobs(hidden, case.weight, case.token_ids, mask=mask, backend=NATIVE).sum().backward()
    assert shapes.seen == [(10, 16, 300), (10, 300, 16)]  # the logits and the direction, nothing else
    with Shapes() as shapes, torch.no_grad():
        linear_logprobs(hidden, case.weight, case.token_ids, backend=NATIVE)
    assert shapes.seen == [(40, 16, 300)]


@pytest.mark.parametrize("head", HEADS)
def test_a_detached_entropy_saves_its_product(head, monkeypatch):
    """Same log-probs, entropy and gradients of the log-probs, to the bit; the entropy itself has none."""
    small_blocks(monkeypatch)
    case = head_case(**HEADS[head])
    want = results(case, backend=NATIVE, entropy=False)
    leaves = {
        name: leaf.clone().requires_grad_() for name, leaf in zip(PARAMETERS, case, strict=False) if leaf is not None
    }
    case = case._replace(**leaves)
    arguments = (case.hidden, case.weight, case.token_ids)
    options = {"bias": case.bias, "lora": lora_of(case), "return_entropy": True, "return_top1": True}
    logprobs, entropy, top1 = linear_logprobs(*arguments, **options, detach_entropy=True, backend=NATIVE)
    assert logprobs.requires_grad and not (entropy.requires_grad or top1.requires_grad)
    gradients = torch.autograd.grad(logprobs, list(leaves.values()), case.upstream[0])
    assert torch.equal(logprobs, want["logprobs"])
    assert torch.equal(entropy, linear_logprobs(*arguments, **options, backend=NATIVE)[1])
    assert all(torch.equal(found, want[name]) for name, found in zip(leaves, gradients, strict=True))
    reference = linear_logprobs(*arguments, **options, detach_entropy=True, backend="reference")
    assert [out.requires_grad for out in reference] == [True, False, False]


def test_a_detached_entropy_takes_the_products_of_no_entropy():
    case = head_case(rows=40, vocab=300, width=16)
    hidden = case.hidden.requires_grad_()
    with Shapes() as shapes:
        linear_logprobs(hidden, case.weight, case.token_ids, return_entropy=True, detach_entropy=True, backend=NATIVE)
    assert shapes.seen == [(40, 16, 300), (40, 300, 16)]


def test_tied_weights():
    """T34: hidden states that depend on the weight as well (tied embeddings) get both gradients."""
    case = head_case()
    previous = case.token_ids.roll(1)

    def gradient(backend, dtype):
        weight = case.weight.detach().to(dtype, copy=True).requires_grad_()
        hidden = torch.tanh(weight[previous])
        (linear_logprobs(hidden, weight, case.token_ids, backend=backend) * case.upstream[0]).sum().backward()
        return weight.grad

    torch.testing.assert_close(
        gradient(NATIVE, torch.float32).double(), gradient("reference", torch.float64), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_banned_tokens(backend, monkeypatch):
    """T6, T18, T35: a bias of -inf bans tokens, whole blocks of them; a banned target's gradients are finite."""
    small_blocks(monkeypatch)
    case = head_case(vocab=200, bias=True)
    kept = torch.ones(200, dtype=torch.bool)
    kept[:70] = kept[128:140] = False
    case.bias[~kept] = -torch.inf
    case.token_ids[:] = 100
    case.token_ids[3] = 5
    for softcap in (None, 5.0):
        found = results(case, backend=backend, softcap=softcap, trained=("hidden",))
        assert found["logprobs"][3] == -torch.inf
        assert all(torch.isfinite(found[name]).all() for name in ("entropy", "hidden"))
        ids = kept[: case.token_ids[0]].sum().expand(23)
        want = results(
            case._replace(weight=case.weight[kept], bias=case.bias[kept], token_ids=ids),
            backend="reference",
            softcap=softcap,
            trained=("hidden",),
        )
        others = torch.arange(23) != 3
        for name in found:
            torch.testing.assert_close(found[name][others], want[name][others], rtol=1e-4, atol=1e-5)
    case.bias[:] = -torch.inf
    found = results(case, backend=backend, trained=("hidden",))
    assert (found["logprobs"] == -torch.inf).all() and (found["entropy"] == 0).all() and (found["hidden"] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_near_probability_one(dtype):
    """T3: where p is 0.999 or 0.99999, the gradient 1 - p keeps its relative accuracy, and so does log p."""
    weight = torch.eye(2, dtype=dtype)
    for gap in (7.0, 11.5):
        hidden = torch.tensor([[gap, 0.0]], dtype=dtype, requires_grad=True)
        logprobs = linear_logprobs(hidden, weight, torch.tensor([0]), backend=NATIVE)
        logprobs.sum().backward()
        rest = torch.sigmoid(torch.tensor(-gap, dtype=torch.float64))
        torch.testing.assert_close(hidden.grad[0, 0].double(), rest, rtol=0.01, atol=0)
        torch.testing.assert_close(logprobs.double()[0], torch.log1p(-rest), rtol=1e-5, atol=0)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_common_offset(offset, monkeypatch):
    """T5, T7: logits far from 0 on either side change nothing."""
    small_blocks(monkeypatch)
    case = head_case()
    exact = case._replace(hidden=case.hidden.mul(8).round() / 8, weight=case.weight.mul(8).round() / 8)
    plain = results(exact, backend=NATIVE)
    shifted = results(exact._replace(bias=torch.full((129,), float(round(offset / 8192)) * 8192)), backend=NATIVE)
    for name, value in plain.items():
        torch.testing.assert_close(shifted[name], value, rtol=1e-5, atol=1e-5)


def test_any_strides():
    """T21, pitfalls 24, 25: sliced, transposed and 3-D inputs give the contiguous result, and are left alone."""
    case = head_case(rows=12)
    hidden, ids = case.hidden.view(3, 4, 37), case.token_ids.view(3, 4)

    def run(hidden, weight):
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        logprobs = linear_logprobs(hidden, weight, ids, backend=NATIVE)
        logprobs.sum().backward()
        return logprobs.detach(), hidden.grad, weight.grad

    want = run(hidden.clone(), case.weight.clone())
    for name, variant in strided_variants(hidden):
        for x, y in zip(run(variant, case.weight.clone()), want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(variant.detach(), hidden)
    for name, variant in strided_variants(case.weight):
        for x, y in zip(run(hidden.clone(), variant), want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(variant.detach(), case.weight)
    longer = torch.cat([hidden, hidden[:, :1]], 1)
    shifted = linear_logprobs(longer[:, :-1], case.weight, ids.int(), backend=NATIVE)  # the usual shift by one
    torch.testing.assert_close(shifted, want[0], rtol=1e-5, atol=1e-5)
    every_other = case.token_ids.repeat_interleave(2)[::2].view(3, 4)
    mask = (torch.arange(24) % 3 != 1).view(12, 2)[:, 0].view(3, 4)
    strided = results(case._replace(token_ids=every_other.view(12)), mask=mask.view(12), backend=NATIVE)
    plain = results(case, mask=mask.reshape(12).clone(), backend=NATIVE)
    assert all(torch.equal(strided[name], plain[name]) for name in plain)
    one = linear_logprobs(hidden[1, 2], case.weight, ids[1, 2], backend=NATIVE)
    torch.testing.assert_close(one, want[0][1, 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeatable(dtype):
    """T15, pitfalls 1, 44: same bits on every run, with and without gradients or entropy."""
    case = head_case(rows=600, vocab=700, dtype=dtype)
    first, second = results(case, backend=NATIVE), results(case, backend=NATIVE)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        for entropy in (False, True):
            out = linear_logprobs(case.hidden, case.weight, case.token_ids, return_entropy=entropy, backend=NATIVE)
            assert torch.equal(out[0] if entropy else out, first["logprobs"])


def test_retain_graph_and_double_backward():
    """T13: a second backward repeats the first; a backward of the backward raises."""
    case = head_case(bias=True, lora=True)
    leaves = [tensor.requires_grad_() for tensor in case[:5]]
    out = linear_logprobs(case.hidden, case.weight, case.token_ids, bias=case.bias, lora=lora_of(case), backend=NATIVE)
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (once,) = torch.autograd.grad((out**2).sum(), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        once.sum().backward()


@pytest.mark.parametrize("blocks", [(64, 32), (64, 8)])
def test_weight_gradient_is_summed_in_float32(blocks, monkeypatch):
    """T2: the error of a bfloat16 weight's gradient does not grow with the number of chunks."""
    case = head_case(rows=1024, vocab=40, dtype=torch.bfloat16)
    case = case._replace(upstream=case.upstream.abs())
    truth = results(case.to(torch.float64), trained=("weight",), backend="reference")["weight"]
    one = results(case, trained=("weight",), backend=NATIVE)["weight"]
    small_blocks(monkeypatch, *blocks)
    many = results(case, trained=("weight",), backend=NATIVE)["weight"]
    assert (many - truth).abs().max() <= 1.2 * (one - truth).abs().max()


def test_memory_stays_within_the_blocks():
    """T31, pitfall 42: beyond the saved direction, a frozen head needs a fixed workspace, never the logits."""
    rows, vocab, width = 512, 40000, 64
    case = head_case(rows=rows, vocab=vocab, width=width, dtype=torch.bfloat16)
    hidden = case.hidden.requires_grad_()

    def step():
        linear_logprobs(hidden, case.weight, case.token_ids, backend=NATIVE).sum().backward()
        hidden.grad = None

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    sums = linear_head_cpu.CHUNK_ROWS * width * (4 + 2 + 2 + 2)  # sums, a block's part, targets, direction to store
    saved = 2 * rows * width * 2  # direction, gradient
    if is_widened(torch.bfloat16):  # x, the direction, a block of the weight
        saved += (2 * rows + linear_head_cpu.BLOCK_BYTES // (4 * linear_head_cpu.CHUNK_ROWS)) * width * 4
    assert len(events) > 10 and peak > saved
    assert peak <= linear_head_cpu.BLOCK_BYTES + sums + saved + (1 << 19)
    assert peak <= 0.12 * rows * vocab * 4  # a float32 copy of the logits is far away


def test_saves_no_logits():
    """Pitfalls 28, 42: what the graph keeps is inputs, statistics and an (M, H) direction; nothing of size V but W."""
    case = head_case(rows=30, vocab=500)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        linear_logprobs(case.hidden.requires_grad_(), case.weight, case.token_ids, backend=NATIVE)
    assert sorted(shape for shape in sizes if 500 in shape) == [(500, 37)]
    assert sizes.count((30, 37)) == 2  # hidden and its direction


def test_autocast():
    """T22, pitfall 36: under autocast hidden and weight are taken as nn.Linear takes them."""
    case = head_case(bias=True, lora=True)
    low = case.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = results(case, backend=NATIVE)
    want = results(low, backend=NATIVE)
    assert torch.equal(actual["logprobs"], want["logprobs"])
    assert actual["weight"].dtype == torch.float32
    assert torch.equal(actual["weight"], want["weight"].float())


def test_agrees_with_token_logprobs():
    """Pitfall 26: the two routes to a log-prob agree, at any temperature and scale."""
    case = head_case(dtype=torch.float32)
    for temperature, scale in ((0.7, 1.0), (1.0, 0.0625), (2.0, 3.0)):
        options = {"temperature": temperature, "logit_scale": scale, "softcap": 9.0, "backend": NATIVE}
        a = linear_logprobs(case.hidden, case.weight, case.token_ids, **options)
        b = token_logprobs(case.hidden @ case.weight.T, case.token_ids, **options)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_reference_gradcheck():
    case = head_case(rows=3, vocab=6, width=4, bias=True, lora=True, dtype=torch.float64)
    mask = torch.tensor([True, True, False])

    def run(hidden, weight, bias, lora_a, lora_b):
        return linear_logprobs(
            hidden, weight, case.token_ids, bias=bias, lora=(lora_a, lora_b, 0.5), mask=mask, temperature=0.8,
            logit_scale=1.5, softcap=5.0, return_entropy=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in case[:5]])


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    """T32: fullgraph=True, forward and backward, equal to eager."""
    case = head_case(bias=True, lora=True)
    mask = torch.arange(23) % 3 != 1

    def loss(hidden, weight, bias, lora_a, lora_b):
        logprobs, entropy, top1 = linear_logprobs(
            hidden, weight, case.token_ids, bias=bias, lora=(lora_a, lora_b, 0.5), mask=mask, temperature=0.9,
            logit_scale=0.5, softcap=4.0, return_entropy=True, return_top1=True, backend=NATIVE,
        )  # fmt: skip
        return torch.where(top1, 3.0, 2.0).mul(logprobs).add(entropy).sum()

    eager = [tensor.clone().requires_grad_() for tensor in case[:5]]
    compiled = [tensor.clone().requires_grad_() for tensor in case[:5]]
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.slow
def test_opcheck():
    case = head_case(rows=4, vocab=11, bias=True, lora=True)
    head = (case.hidden, case.weight, case.token_ids, None, case.bias, case.lora_a, case.lora_b, 0.5, 1.0, 0.0)
    logprobs, stats, entropy, directions = torch.empty(4), torch.empty(4, 2), torch.empty(4), torch.empty(2, 4, 41)
    top1 = torch.empty(4, dtype=torch.bool)
    outputs = (logprobs, stats, entropy, top1, directions[0].clone(), directions[1].clone())
    torch.library.opcheck(torch.ops.fastrl.linear_head_fwd.default, ("cpu", *head, *outputs, *[None] * 4))
    results = (stats, logprobs, entropy, case.upstream[0], case.upstream[1].clone())
    gradients = (torch.empty(11, 37), torch.empty(11), torch.empty(11, 4))
    torch.library.opcheck(torch.ops.fastrl.linear_head_bwd_weights.default, ("cpu", *head, *results, *gradients))
    scaled = (*outputs[4:], None, case.upstream[0], case.upstream[1].clone(), torch.empty(4, 41))
    torch.library.opcheck(torch.ops.fastrl.linear_head_bwd_hidden.default, ("cpu", *scaled))


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_bad_input(backend):
    """T9, T33: wrong shape, dtype, id or value raises a ValueError that names op and argument."""
    case = head_case(rows=3, vocab=8, width=5)
    a, b = torch.randn(2, 5), torch.randn(8, 2)
    bad = [
        (dict(token_ids=case.token_ids[:2]), "token_ids"),
        (dict(token_ids=case.token_ids.float()), "token_ids"),
        (dict(token_ids=torch.tensor([0, 8, 1])), "token_ids"),
        (dict(token_ids=torch.tensor([0, -1, 1])), "token_ids"),
        (dict(mask=torch.ones(2, dtype=torch.bool)), "mask"),
        (dict(mask=torch.ones(3)), "mask"),
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(softcap=-1.0), "softcap"),
        (dict(logit_scale=0.0), "logit_scale"),
        (dict(logit_scale=None), "logit_scale"),
        (dict(detach_entropy=1), "detach_entropy"),
        (dict(hidden=case.hidden.long()), "hidden"),
        (dict(weight=torch.randn(8, 4)), "weight"),
        (dict(weight=torch.randn(0)), "weight"),
        (dict(weight=torch.randn(0, 5)), "weight"),
        (dict(weight=case.weight.bfloat16()), "weight"),
        (dict(bias=torch.randn(7)), "bias"),
        (dict(bias=torch.randn(8, dtype=torch.float64)), "bias"),
        (dict(lora=(a, b)), "lora"),
        (dict(lora=(a[:0], b[:, :0], 1.0)), "lora"),
        (dict(lora=(a, b[:7], 1.0)), "lora: lora_b"),
        (dict(lora=(a[:, :4], b, 1.0)), "lora: lora_a"),
    ]
    for change, argument in bad:
        arguments = {"hidden": case.hidden, "weight": case.weight, "token_ids": case.token_ids, **change}
        with pytest.raises(ValueError, match=f"linear_logprobs: {argument}: expected"):
            linear_logprobs(**arguments, backend=backend)
    with pytest.raises(ValueError, match="linear_logprobs: backend"):
        linear_logprobs(case.hidden, case.weight, case.token_ids, backend="cuda")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 300), st.floats(0.3, 3.0), st.integers(0, 10**6))
def test_properties(rows, vocab, temperature, seed):
    """Probabilities sum to one, a constant bias changes nothing, permuted rows permute results, entropy is bounded."""
    case = head_case(rows=rows, vocab=vocab, width=8, seed=seed)
    every = torch.arange(vocab).repeat(rows, 1)
    hidden = case.hidden[:, None].expand(rows, vocab, 8)
    all_logprobs = linear_logprobs(hidden, case.weight, every, temperature=temperature, backend=NATIVE)
    torch.testing.assert_close(all_logprobs.exp().sum(-1), torch.ones(rows), rtol=1e-4, atol=1e-4)
    plain = results(case, temperature=temperature, backend=NATIVE)
    assert (plain["entropy"] >= -1e-5).all() and (plain["entropy"] <= torch.tensor(float(vocab)).log() + 1e-4).all()
    shifted = results(case._replace(bias=torch.full((vocab,), 2.0)), temperature=temperature, backend=NATIVE)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    mixed = case._replace(hidden=case.hidden[order], token_ids=case.token_ids[order], upstream=case.upstream[:, order])
    mixed = results(mixed, temperature=temperature, backend=NATIVE)
    for name, value in plain.items():
        torch.testing.assert_close(shifted[name], value, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mixed[name], value if name == "weight" else value[order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("blocks", ["one block", "small blocks"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_top1_is_torchs_arg_max(dtype, head, blocks, monkeypatch):
    """T6, T34, T35: equals in and across blocks, bans, NaN, adapters; scale, cap and temperature keep the order."""
    if blocks == "small blocks":
        small_blocks(monkeypatch)
    case, expected = arg_max_head(dtype, **HEADS[head])
    assert 0 < expected.sum() < 24
    for backend in ("reference", NATIVE):
        for options in ({}, {"temperature": 0.7, "softcap": 2.0, "logit_scale": 4.0}):
            assert torch.equal(top1_of(case, backend=backend, **options), expected)
    for trained in (("hidden",), ("hidden", "weight")):
        assert torch.equal(top1_of(case, trained, backend=NATIVE), expected)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_top1_is_false_where_the_mask_drops(backend, monkeypatch):
    """T8, T20: NaN and id -100 there; a vocabulary of one block and a column, and none kept."""
    small_blocks(monkeypatch)
    case, expected = arg_max_head(vocab=65)
    mask = torch.arange(24) % 4 != 1
    case.hidden[~mask], case.token_ids[~mask] = torch.nan, -100
    assert torch.equal(top1_of(case, mask=mask, backend=backend), expected & mask)
    assert not top1_of(case, mask=torch.zeros_like(mask), backend=backend).any()


def test_top1_changes_nothing_else():
    """The same bits of log-probs, entropies and gradients as without it."""
    case = head_case(rows=600, vocab=700, bias=True, lora=True)
    want = results(case, backend=NATIVE)
    leaves = [tensor.clone().requires_grad_() for tensor in case[:5]]
    hidden, weight, bias, *adapter = leaves
    logprobs, entropy, top1 = linear_logprobs(
        hidden, weight, case.token_ids, bias=bias, lora=(*adapter, 0.5), return_entropy=True, return_top1=True,
        backend=NATIVE,
    )  # fmt: skip
    gradients = torch.autograd.grad((logprobs, entropy), leaves, tuple(case.upstream))
    found = {"logprobs": logprobs, "entropy": entropy, **dict(zip(PARAMETERS, gradients, strict=True))}
    assert top1.sum() < 600 and all(torch.equal(found[name], want[name]) for name in want)
