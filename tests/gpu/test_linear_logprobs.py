"""linear_logprobs on the row kernels of a GPU."""

from __future__ import annotations

import weakref

import pytest
import torch
from gpu.waits import Waits
from gpus import HAS_GPU
from heads import (
    PARAMETERS,
    SCALING,
    arg_max_head,
    assert_matches_float64,
    head_case,
    lora_of,
    on,
    results,
    small_chunks,
    top1_of,
)
from oracle import DTYPES, assert_as_accurate, strided_variants
from torch.utils.checkpoint import checkpoint

from fastrl import checks
from fastrl.ops import linear_head_chunks, linear_head_gpu, linear_logprobs

HEADS = {"plain": {}, "bias": {"bias": True}, "lora": {"lora": True}, "bias and lora": {"bias": True, "lora": True}}


@pytest.fixture
def small_pieces(monkeypatch):
    """Rows of several pieces and tiles, the last of each ragged."""
    kernels = pytest.importorskip("fastrl.kernels.token_logprobs")
    for name in ("SMALL", "LARGE", "GRADIENT_SMALL", "GRADIENT_LARGE"):
        monkeypatch.setattr(kernels, name, (64, 1))


@pytest.mark.parametrize("vocab", [1, 2, 7, 129, 1030])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(gpu_backend, device, vocab, dtype):
    """T1, T4, T16, pitfalls 23, 31, 35: per-token upstream, within twice eager's error."""
    assert_matches_float64(gpu_backend, on(head_case(rows=9, vocab=vocab, dtype=dtype), device), temperature=0.7)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "options", [{"softcap": 3.0, "logit_scale": 0.5}, {"temperature": 1.3, "entropy": False}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_pieces_and_heads(gpu_backend, device, small_pieces, monkeypatch, dtype, options, head):
    """T2, T17, T34, pitfalls 26, 30: ragged chunks, blocks and pieces; whatever a head may carry."""
    small_chunks(monkeypatch, rows=4, columns=64)
    assert_matches_float64(gpu_backend, on(head_case(rows=7, dtype=dtype, **HEADS[head]), device), **options)


@pytest.mark.parametrize("trained", [(name,) for name in PARAMETERS] + [("hidden", "lora_a", "lora_b")], ids=str)
def test_any_subset_of_trained_parameters(gpu_backend, device, trained):
    """A frozen head, a head alone, an adapter alone: each gradient is that of training everything."""
    case = on(head_case(rows=7, bias=True, lora=True), device)
    everything = results(case, backend=gpu_backend)
    for name, value in results(case, trained=trained, backend=gpu_backend).items():
        torch.testing.assert_close(value, everything[name], rtol=1e-5, atol=1e-6)


def test_a_detached_entropy_changes_nothing_else(gpu_backend, device, monkeypatch):
    """The bits of the log-probs, the entropy, and the gradient that the log-probs have without one."""
    small_chunks(monkeypatch, rows=4, columns=64)
    case = on(head_case(rows=7), device)
    want = results(case, trained=("hidden",), entropy=False, backend=gpu_backend)
    hidden = case.hidden.clone().requires_grad_()
    options = {"return_entropy": True, "backend": gpu_backend}
    logprobs, entropy = linear_logprobs(hidden, case.weight, case.token_ids, **options, detach_entropy=True)
    assert not entropy.requires_grad
    (gradient,) = torch.autograd.grad(logprobs, hidden, case.upstream[0])
    assert torch.equal(entropy, linear_logprobs(case.hidden, case.weight, case.token_ids, **options)[1])
    assert torch.equal(logprobs, want["logprobs"]) and torch.equal(gradient, want["hidden"])


def test_mixed_lora_dtype(gpu_backend, device):
    """T22: a float32 adapter on a 16-bit head, PEFT's default; its gradients are float32."""
    case = on(head_case(rows=7, dtype=torch.float16, lora=True), device)
    assert_matches_float64(gpu_backend, case._replace(lora_a=case.lora_a.float(), lora_b=case.lora_b.float()))


def test_logprobs_come_from_float32_sums(gpu_backend, device):
    """T16: logits near 60 in float16 or bfloat16 would quantise log-probs at 0.03 or 0.25."""
    case = head_case(rows=9, vocab=300, width=64, dtype=DTYPES[-1])
    case = on(case._replace(weight=case.weight * 8), device)
    truth = results(case.to(torch.float64), backend="reference")
    found = results(case, backend=gpu_backend)
    for name in ("logprobs", "entropy"):
        assert (found[name] - truth[name]).abs().max() < 5e-5


@pytest.mark.parametrize("captured", [False, True], ids=["selected", "captured"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_positions_may_hold_anything(gpu_backend, device, monkeypatch, poison, captured):
    """T8, T20, pitfalls 9, 10: NaN, inf, id -100 and a NaN upstream where the mask drops; while capturing, too."""
    small_chunks(monkeypatch, rows=4, columns=128)
    case = on(head_case(rows=9, bias=True, lora=True), device)
    mask = torch.arange(9, device=device) % 3 != 1
    case = case._replace(upstream=case.upstream * mask)
    want = results(case, mask=mask, backend="reference")
    case.hidden[~mask] = poison
    case.token_ids[~mask] = -100
    monkeypatch.setattr(linear_head_gpu, "capturing", lambda tensor: captured)
    found = results(case, mask=mask, backend=gpu_backend)
    assert (found["logprobs"][~mask] == 0).all() and (found["hidden"][~mask] == 0).all()
    for name, value in found.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5)
    hidden = case.hidden.clone().requires_grad_()
    logprobs = linear_logprobs(hidden, case.weight, case.token_ids, mask=mask, backend=gpu_backend)
    logprobs.backward(torch.where(mask, 1.0, torch.nan))
    assert torch.isfinite(hidden.grad).all()


class Calls(Waits):
    """The products' shapes, too."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if function.overloadpacket in (aten.mm, aten.addmm):
            a, b = args[1:3] if function.overloadpacket == aten.addmm else args[:2]
            self.products.append((*a.shape, b.shape[1]))
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.mark.parametrize("captured", [False, True], ids=["selected", "captured"])
def test_products_and_waits(gpu_backend, device, monkeypatch, captured):
    """Only kept rows reach the head, no weight gradient is formed for a frozen one, and the host waits for nothing but
    the number of kept rows; in a graph capture not even for that.
    """
    monkeypatch.setattr(linear_head_gpu, "capturing", lambda tensor: captured)
    case = on(head_case(rows=40, vocab=300, width=16), device)
    mask = torch.arange(40, device=device) < 10
    hidden, rows = case.hidden.requires_grad_(), 40 if captured else 10
    with Calls() as calls:
        linear_logprobs(hidden, case.weight, case.token_ids, mask=mask, backend=gpu_backend).sum().backward()
    assert calls.products == [(rows, 16, 300), (rows, 300, 16)]
    assert calls.count == (0 if captured else 1)
    with Calls() as calls, torch.no_grad():
        linear_logprobs(hidden, case.weight, case.token_ids, backend=gpu_backend)
    assert calls.products == [(40, 16, 300)] and calls.count == 0
    weight = case.weight.requires_grad_()
    with Calls() as calls:
        linear_logprobs(hidden, weight, case.token_ids, backend=gpu_backend).sum().backward()
    assert calls.products == [(40, 16, 300), (40, 300, 16), (40, 16, 300), (300, 40, 16)] and calls.count == 0


def test_debugging_asks_for_no_value_in_a_capture(gpu_backend, device, monkeypatch):
    """FASTRL_DEBUG=1 while a graph is captured: a bad id makes its row NaN, as without it."""
    monkeypatch.setenv("FASTRL_DEBUG", "1")
    for module in (linear_head_gpu, checks):
        monkeypatch.setattr(module, "capturing", lambda tensor: True)
    case = on(head_case(rows=4), device)
    case.token_ids[1] = 129
    with Calls() as calls, torch.no_grad():
        logprobs = linear_logprobs(case.hidden, case.weight, case.token_ids, backend=gpu_backend)
    assert logprobs.isnan().tolist() == [False, True, False, False] and calls.count == 0


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_kept(gpu_backend, device, rows):
    """T8, pitfall 10: no rows, or all masked: log-prob 0, every gradient exactly 0."""
    case = on(head_case(rows=rows, bias=True, lora=True), device)
    found = results(case, mask=torch.zeros(rows, dtype=torch.bool, device=device), backend=gpu_backend)
    assert all((value == 0).all() for value in found.values())
    assert found["weight"].shape == case.weight.shape


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_banned_tokens(gpu_backend, device, small_pieces, monkeypatch, softcap):
    """T6, T18, T35: a bias of -inf bans tokens, whole pieces of them; a banned target's gradients are finite."""
    small_chunks(monkeypatch)
    case = on(head_case(rows=9, vocab=200, bias=True), device)
    case.bias[:70] = case.bias[128:140] = -torch.inf
    case.token_ids[:] = 100
    case.token_ids[3] = 5
    found = results(case, backend=gpu_backend, softcap=softcap, trained=("hidden",))
    want = results(case, backend="reference", softcap=softcap, trained=("hidden",))
    assert found["logprobs"][3] == -torch.inf and torch.isfinite(found["hidden"]).all()
    others = torch.arange(9, device=device) != 3
    for name in found:
        torch.testing.assert_close(found[name][others], want[name][others], rtol=1e-4, atol=1e-5)
    case.bias[:] = -torch.inf
    found = results(case, backend=gpu_backend, softcap=softcap, trained=("hidden",))
    assert (found["logprobs"] == -torch.inf).all() and (found["entropy"] == 0).all() and (found["hidden"] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_near_probability_one(gpu_backend, device, dtype):
    """T3: where p is 0.999 or 0.99999, the gradient 1 - p keeps its relative accuracy, and so does log p."""
    weight = torch.eye(2, dtype=dtype, device=device)
    for gap in (7.0, 11.5):
        hidden = torch.tensor([[gap, 0.0]], dtype=dtype, device=device, requires_grad=True)
        logprobs = linear_logprobs(hidden, weight, torch.tensor([0], device=device), backend=gpu_backend)
        logprobs.sum().backward()
        rest = torch.sigmoid(torch.tensor(-gap, dtype=torch.float64, device=device))
        torch.testing.assert_close(hidden.grad[0, 0].double(), rest, rtol=0.01, atol=0)
        torch.testing.assert_close(logprobs.double()[0], torch.log1p(-rest), rtol=1e-5, atol=0)


@pytest.mark.parametrize("offset", [-8192.0, 8192.0])
def test_common_offset(gpu_backend, device, small_pieces, offset):
    """T5, T7: logits far from 0 on either side change nothing."""
    case = on(head_case(rows=9), device)
    exact = case._replace(hidden=case.hidden.mul(8).round() / 8, weight=case.weight.mul(8).round() / 8)
    plain = results(exact, backend=gpu_backend)
    shifted = results(exact._replace(bias=torch.full((129,), offset, device=device)), backend=gpu_backend)
    for name, value in plain.items():
        torch.testing.assert_close(shifted[name], value, rtol=1e-5, atol=1e-5)


def test_any_strides(gpu_backend, device):
    """T21, pitfalls 24, 25: sliced, transposed and 3-D inputs give the contiguous result, and are left alone."""
    case = on(head_case(rows=6), device)
    hidden, ids = case.hidden.view(2, 3, 37), case.token_ids.view(2, 3)

    def run(hidden, weight):
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        logprobs = linear_logprobs(hidden, weight, ids, backend=gpu_backend)
        logprobs.sum().backward()
        return logprobs.detach(), hidden.grad, weight.grad

    want = run(hidden.clone(), case.weight.clone())
    for name, variant in strided_variants(hidden.cpu()):
        for x, y in zip(run(variant.to(device), case.weight.clone()), want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=name)
    for name, variant in strided_variants(case.weight.cpu()):
        for x, y in zip(run(hidden.clone(), variant.to(device)), want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=name)


def test_token_ids_out_of_range(gpu_backend, device, monkeypatch):
    """T9: the row becomes NaN, also in its gradient, and no other row changes; FASTRL_DEBUG=1 raises."""
    case = on(head_case(rows=6), device)
    good = results(case, backend=gpu_backend, trained=("hidden",))
    case.token_ids[1:4] = torch.tensor([129, -1, 10**12], device=device)
    found = results(case, backend=gpu_backend, trained=("hidden",))
    bad = torch.tensor([False, True, True, True, False, False], device=device)
    for name, value in found.items():
        assert value[bad].isnan().all(), name
        assert torch.equal(value[~bad], good[name][~bad]), name
    monkeypatch.setenv("FASTRL_DEBUG", "1")
    with pytest.raises(ValueError, match="linear_logprobs: token_ids: expected ids in"):
        linear_logprobs(case.hidden, case.weight, case.token_ids, backend=gpu_backend)
    kept = linear_logprobs(case.hidden, case.weight, case.token_ids, mask=~bad, backend=gpu_backend)
    assert torch.equal(kept[bad], torch.zeros(3, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariance(gpu_backend, device, monkeypatch, dtype):
    """T15: with FASTRL_BATCH_INVARIANT=1 a row has the same bits in any call, with or without gradients."""
    rows, vocab, width, counts = (4096, 32000, 1024, (1, 7, 64)) if HAS_GPU else (22, 129, 1024, (1, 7, 8, 9))
    if not HAS_GPU:
        small_chunks(monkeypatch, rows=8)
    monkeypatch.setenv("FASTRL_BATCH_INVARIANT", "1")
    case = on(head_case(rows=rows, vocab=vocab, width=width, dtype=dtype, bias=True, lora=True), device)
    whole = results(case, backend=gpu_backend, trained=("hidden",))
    for count in counts:
        part = case._replace(**{name: getattr(case, name)[3 : 3 + count] for name in ("hidden", "token_ids")})
        part = part._replace(upstream=case.upstream[:, 3 : 3 + count])
        for name, value in results(part, backend=gpu_backend, trained=("hidden",)).items():
            assert torch.equal(value, whole[name][3 : 3 + count]), (name, count)
        with torch.no_grad():
            scored = linear_logprobs(
                part.hidden, part.weight, part.token_ids, bias=part.bias, lora=lora_of(part), backend=gpu_backend
            )
        assert torch.equal(scored, whole["logprobs"][3 : 3 + count])


def test_short_memory_shrinks_the_chunks(gpu_backend, device, monkeypatch):
    """The workspace that memory has no room for is halved; at the least number of rows the error says what to do."""
    monkeypatch.setattr(linear_head_chunks, "MIN_ROWS", 8)
    case = on(head_case(rows=40), device)
    want = results(case, backend=gpu_backend)
    at_most, empty, asked = 16, torch.empty, []

    def limited(*shape, **options):
        if len(shape) == 2 and shape[1] == 192:  # a workspace: 129 columns, padded
            asked.append(shape[0])
            if shape[0] > at_most:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*shape, **options)

    monkeypatch.setattr(linear_head_chunks.torch, "empty", limited)
    found = results(case, backend=gpu_backend)
    assert asked[:3] == [40, 20, 10] and set(asked) == {40, 20, 10}
    for name, value in found.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5)
    at_most = 4
    with pytest.raises(
        torch.OutOfMemoryError, match="workspace: expected .* for 8 rows of 129 logits, .* smaller batch"
    ):
        results(case, backend=gpu_backend)


def test_a_smaller_chunk_finds_all_memory_free(monkeypatch):
    """Where the logits fit and their gradient does not, the logits are given back before half of both is asked for."""
    held, empty = [], torch.empty

    def limited(*shape, **options):
        used = sum(buffer().nbytes for buffer in held if buffer() is not None)
        if used + shape[0] * shape[1] * options["dtype"].itemsize > 560 << 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        buffer = empty(*shape, **{**options, "device": "meta"})
        held.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(linear_head_chunks.torch, "empty", limited)
    like = empty(0, dtype=torch.bfloat16)
    logits, gradient = linear_head_chunks._buffers(1024, 128256, 1, like, may_shrink=True)
    assert logits.shape == gradient.shape == (512, 128256)


def test_repeatable_and_second_backward(gpu_backend, device):
    """T13, T15: same bits on every run; a second backward repeats the first; a backward of the backward raises."""
    case = on(head_case(rows=9, bias=True, lora=True, dtype=DTYPES[-1]), device)
    first, second = results(case, backend=gpu_backend), results(case, backend=gpu_backend)
    assert all(torch.equal(first[name], second[name]) for name in first)
    leaves = [tensor.requires_grad_() for tensor in case[:5]]
    out = linear_logprobs(
        case.hidden, case.weight, case.token_ids, bias=case.bias, lora=lora_of(case), backend=gpu_backend
    )
    once = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    twice = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    (gradient,) = torch.autograd.grad((out**2).sum(), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_autocast_and_checkpoint(gpu_backend, device):
    """T22, T23: float32 parameters under autocast; activation checkpointing recomputes the same bits."""
    case = on(head_case(rows=7, lora=True), device)
    options = dict(backend=gpu_backend, temperature=0.8)
    with torch.autocast(device.type, torch.float16):
        found = results(case, **options)
    want = results(case.to(torch.float16), **options)
    for name in found:
        assert torch.equal(found[name].to(want[name].dtype), want[name]), name
    assert found["weight"].dtype == torch.float32
    leaves = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]

    def run(hidden, weight):
        return linear_logprobs(hidden, weight, case.token_ids, **options)

    plain = torch.autograd.grad(run(*leaves).sum(), leaves)
    recomputed = torch.autograd.grad(checkpoint(run, *leaves, use_reentrant=False).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize(
    "head, captured, trained", [("plain", True, ()), ("bias and lora", False, ("hidden",))], ids=str
)
def test_top1_is_torchs_arg_max(gpu_backend, device, monkeypatch, head, captured, trained):
    """T6, T34, T35: equals, bans, NaN, adapters; chunks of rows, without and with directions; masked rows."""
    small_chunks(monkeypatch, rows=4, columns=256)
    monkeypatch.setattr(linear_head_gpu, "capturing", lambda tensor: captured)
    case, expected = arg_max_head(DTYPES[-1], rows=6, **HEADS[head])
    case, expected = on(case, device), expected.to(device)
    mask = torch.arange(6, device=device) != 4
    case.hidden[~mask], case.token_ids[~mask] = torch.nan, -100
    found = top1_of(case, trained, mask=mask, softcap=2.0, backend=gpu_backend)
    assert torch.equal(found, expected & mask) and found.any()


@pytest.mark.slow
def test_compiles_without_graph_breaks(gpu_backend, device):
    """T32: fullgraph=True, forward and backward, equal to eager."""
    case = on(head_case(rows=6, lora=True), device)
    mask = torch.arange(6, device=device) % 3 != 1

    def loss(hidden, weight, lora_a, lora_b):
        logprobs, entropy = linear_logprobs(
            hidden, weight, case.token_ids, lora=(lora_a, lora_b, SCALING), mask=mask, return_entropy=True,
            backend=gpu_backend,
        )  # fmt: skip
        return (logprobs * 2 + entropy).sum()

    leaves = [case.hidden, case.weight, case.lora_a, case.lora_b]
    eager = [leaf.clone().requires_grad_() for leaf in leaves]
    compiled = [leaf.clone().requires_grad_() for leaf in leaves]
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("rows, vocab, width", [(2500, 128257, 512), (70000, 1003, 64)])
def test_large(gpu_backend, device, rows, vocab, width):
    """T4, T11, T12: several chunks, a vocabulary that is no multiple of anything, more rows than a grid's y."""
    case = on(head_case(rows=rows, vocab=vocab, width=width, dtype=torch.bfloat16), device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = results(case, backend=gpu_backend, trained=("hidden",))
    beside = case.weight.nbytes + 8 * case.hidden.nbytes + rows * 64 + (64 << 20)  # copies, directions, the library's
    assert torch.cuda.max_memory_allocated() - before <= linear_head_chunks.WORKSPACE_BYTES + beside  # T31
    some = torch.arange(0, rows, rows // 50, device=device)
    part = case._replace(hidden=case.hidden[some], token_ids=case.token_ids[some], upstream=case.upstream[:, some])
    eager = results(part, backend="reference", trained=("hidden",))
    truth = results(part.to(torch.float64), backend="reference", trained=("hidden",))
    for name, value in found.items():
        assert_as_accurate(value[some], eager[name], truth[name], name)
