"""The row kernels of linear_logprobs and linear_cross_entropy on chunks of float32 logits."""

from __future__ import annotations

import pytest
import torch
from gpus import HAS_GPU
from oracle import DTYPES, GPU_TANH, arg_max_cases, assert_as_accurate

from fastrl.ops.linear_head_gpu import gradient_kernel, row_kernel
from fastrl.ops.native import ask_cuda
from fastrl.reference.token_logprobs import token_logprobs as reference

NAN = float("nan")


def workspace(rows, vocab, device, dtype=torch.float32):
    """Rows that begin at 16-byte boundaries, as the heads allocate them; NaN shows what was not written."""
    stride = -(-vocab // 64) * 64
    return torch.full((rows, stride), NAN, dtype=dtype, device=device)[:, :vocab]


def case(rows, vocab, device, scale=3.0):
    g = torch.Generator().manual_seed(rows * 1000 + vocab)
    logits = workspace(rows, vocab, device)
    logits.copy_(torch.randn(rows, vocab, generator=g) * scale)
    return logits, torch.randint(0, vocab, (rows,), generator=g).to(device)


def run(backend, logits, ids, dtype=torch.float32, mask=None, temperature=1.0, softcap=0.0, with_entropy=True):
    """logprobs, row_stats, entropy, d logprob / d logit, d entropy / d logit; top1 must be torch's."""
    rows, vocab = logits.shape
    logprobs, entropy = torch.full((2, rows), NAN, device=logits.device)
    row_stats = torch.full((rows, 2), NAN, device=logits.device)
    out = logits if dtype is None else workspace(rows, vocab, logits.device, dtype)
    entropy_out = workspace(rows, vocab, logits.device, out.dtype) if with_entropy else None
    inside = (ids >= 0) & (ids < vocab) if mask is None else mask
    top1, expected = ~inside, inside & (logits.argmax(-1) == ids)  # before `out` takes the place of the logits
    row_kernel(
        backend, logits, ids, mask, temperature, softcap, logprobs, row_stats, entropy if with_entropy else None,
        top1, out, entropy_out,
    )  # fmt: skip
    assert torch.equal(top1, expected)
    return logprobs, row_stats, entropy, out, entropy_out


def truth_of(logits, ids, temperature, softcap, dtype=torch.float64):
    leaf = logits.detach().to(dtype).requires_grad_()
    logprobs, entropy = reference(leaf, ids, None, temperature, 1.0, softcap, True)
    (dlogprobs,) = torch.autograd.grad(logprobs.sum(), leaf, retain_graph=True)
    (dentropy,) = torch.autograd.grad(entropy.sum(), leaf)
    return logprobs.detach(), entropy.detach(), dlogprobs, dentropy


def assert_accurate(results, logits, ids, temperature, softcap):
    logprobs, _, entropy, out, entropy_out = results
    truth = truth_of(logits, ids, temperature, softcap)
    eager = truth_of(logits, ids, temperature, softcap, torch.float32)
    names = ("logprobs", "entropy", "d logprob", "d entropy")
    for name, a, e, t in zip(names, (logprobs, entropy, out, entropy_out), eager, truth, strict=True):
        assert_as_accurate(a, e, t, name, GPU_TANH * softcap)


# How the CUDA kernel works; without a GPU the tests choose by what the device offers: shared memory, clusters.
CLUSTERS, BLOCKS, TWO_PASSES = (227 << 10, True), (227 << 10, False), (0, False)
WAYS = {"triton": None, "cuda": None} if HAS_GPU else {
    "triton": None, "cuda, clusters": CLUSTERS, "cuda, single blocks": BLOCKS, "cuda, two passes": TWO_PASSES
}  # fmt: skip


def each_of(ways):
    return pytest.mark.parametrize(
        ("gpu_backend", "offer"),
        [(name.split(",")[0], offer) for name, offer in ways.items()],
        ids=list(ways),
        indirect=True,
    )


each_way = each_of(WAYS)
each_cuda_way = each_of({name: offer for name, offer in WAYS.items() if name != "triton"})


@pytest.fixture
def offer(request):
    if request.param is None:
        yield
        return
    set_limits = request.getfixturevalue("host_cuda_kernels").device.set_limits
    set_limits(*request.param)
    yield
    set_limits(*CLUSTERS)


# 19001 columns take a cluster of two blocks, 50257 one of four or, without clusters, one large block, 80003 eight.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 127, 129, 1000, 2049, 19001])
@each_way
def test_matches_float64(gpu_backend, offer, device, vocab, dtype):
    """T3, T4, T16: results and directions in any dtype, any vocabulary."""
    logits, ids = case(3, vocab, device)
    before = logits.clone()
    results = run(gpu_backend, logits, ids, dtype, temperature=0.7)
    assert torch.equal(logits, before)
    assert_accurate(results, logits, ids, 0.7, 0.0)
    logprobs, row_stats, _, _, _ = results
    x = (logits.double() - row_stats[:, :1]) / 0.7
    torch.testing.assert_close(
        row_stats[:, 1].double(), x.logsumexp(-1) / torch.tensor(2.0).log(), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 127, 1000, 19001])
@each_cuda_way
def test_gradients_in_the_memory_of_their_logits(gpu_backend, offer, device, vocab, dtype):
    """Of 16 bits, where the device keeps whole rows on chip; elsewhere they are refused, and nothing is written."""
    logits, ids = case(5, vocab, device)
    mask = torch.tensor([True, False, True, True, True], device=device)
    apart = run(gpu_backend, logits, ids, dtype, mask)
    stride = logits.stride(0)
    whole = logits.as_strided((5, stride), (stride, 1))
    kept = whole.clone()
    out, entropy_out = (part[:, :vocab] for part in whole.view(dtype).split(stride, 1))
    logprobs, entropy = torch.full((2, 5), NAN, device=device)
    row_stats = torch.full((5, 2), NAN, device=device)
    arguments = (gpu_backend, logits, ids, mask, 1.0, 0.0, logprobs, row_stats, entropy, None, out, entropy_out)
    if not ask_cuda("linear_head_on_chip", logits, vocab):
        with pytest.raises(ValueError, match="on_chip"):
            row_kernel(*arguments)
        torch.testing.assert_close(whole, kept, rtol=0, atol=0, equal_nan=True)
        return
    row_kernel(*arguments)
    for a, b in zip((logprobs, row_stats, entropy, out, entropy_out), apart, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("vocab", [50257, 80003])
@each_way
def test_long_rows(gpu_backend, offer, device, vocab):
    """A cluster of four or eight blocks; targets in the first, a middle and the last block."""
    logits, ids = case(3, vocab, device)
    ids[:] = torch.tensor([0, vocab // 2, vocab - 1])
    assert_accurate(run(gpu_backend, logits, ids), logits, ids, 1.0, 0.0)


@each_way
def test_softcap(gpu_backend, offer, device):
    """T34, T35."""
    logits, ids = case(3, 700, device, scale=30)
    logits[:, 5] = -torch.inf
    ids[:] = torch.tensor([0, 300, 699])
    results = run(gpu_backend, logits, ids, temperature=1.3, softcap=20.0)
    assert_accurate(results, logits, ids, 1.3, 20.0)
    assert (results[3][:, 5] == 0).all() and (results[4][:, 5] == 0).all()


@each_way
def test_top1_of_equals(gpu_backend, offer, device):
    """In the target's tile and in others, before it and behind it; NaN and nothing but -inf, too; `run` compares."""
    logits, ids = (tensor.to(device) for tensor in arg_max_cases(1103, torch.float32))
    logits, ids = logits[::5], ids[::5].contiguous()  # of each kind of row another of its tokens
    rows = workspace(11, 1103, device)
    rows.copy_(logits)
    run(gpu_backend, rows, ids, torch.float16, with_entropy=False)


@each_way
def test_in_place(gpu_backend, offer, device):
    """The direction may take the place of the logits; what pads a row stays."""
    logits, ids = case(3, 2050, device)
    want = run(gpu_backend, logits, ids)
    beside = logits.as_strided((3, 62), (2112, 1), 2050)
    beside.fill_(7.0)
    got = run(gpu_backend, logits, ids, None)
    assert got[3] is logits and (beside == 7.0).all()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(HAS_GPU, reason="a device has one way")
@pytest.mark.parametrize("gpu_backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("vocab", [1000, 13001])
def test_bits_do_not_depend_on_the_way(gpu_backend, device, vocab, request):
    """T15: clusters, single blocks, two passes and the pass without gradients give the same bits."""
    set_limits = request.getfixturevalue("host_cuda_kernels").device.set_limits
    logits, ids = case(2, vocab, device)
    results = []
    for offer in (TWO_PASSES, BLOCKS, CLUSTERS):
        set_limits(*offer)
        results.append(run(gpu_backend, logits, ids))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)
    logprobs, entropy = torch.empty(2, 2)
    row_kernel(gpu_backend, logits, ids, None, 1.0, 0.0, logprobs, None, entropy, None, None, None)
    assert torch.equal(logprobs, results[0][0]) and torch.equal(entropy, results[0][2])


@each_way
def test_batch_invariance(gpu_backend, offer, device):
    """T15, pitfall 44: alone, among 7, again, and among more rows than the host machine's grid has blocks."""
    logits, ids = case(64, 1001, device)
    alone = run(gpu_backend, logits[5:6], ids[5:6], torch.float16)
    for size in (7, 7, 64):
        for a, b in zip(run(gpu_backend, logits[:size], ids[:size], torch.float16), alone, strict=True):
            assert torch.equal(a[5:6], b)


@each_way
def test_masked_rows_are_not_read(gpu_backend, offer, device):
    """T8, T20."""
    logits, ids = case(4, 1500, device)
    mask = torch.tensor([True, False, False, True], device=device)
    clean = run(gpu_backend, logits, ids)
    logits[~mask], ids[~mask] = NAN, -100
    results = run(gpu_backend, logits, ids, mask=mask)
    for got, want in zip(results, clean, strict=True):
        assert torch.equal(got[mask], want[mask]) and (got[~mask] == 0).all()


@each_way
def test_rows_without_a_distribution(gpu_backend, offer, device):
    """T6, T9: dead rows, NaN, ids outside the vocabulary, a banned target, whole tiles of -inf."""
    logits, ids = case(7, 2600, device)
    logits[0] = -torch.inf
    logits[1, 2000] = NAN
    logits[2, 2000] = torch.inf
    ids[3], ids[4] = -1, 2600
    logits[5, :1100] = -torch.inf
    ids[5] = 40
    logits[6, 512:] = -torch.inf
    ids[6] = 100
    logprobs, row_stats, entropy, out, entropy_out = run(gpu_backend, logits, ids)
    assert logprobs[0] == -torch.inf and entropy[0] == 0 and row_stats[0].tolist() == [-torch.inf, 0]
    assert (out[0] == 0).all() and (entropy_out[0] == 0).all()
    for result in (logprobs, entropy, row_stats[:, 1], out, entropy_out):
        assert result[1:5].isnan().all()
    assert logprobs[5] == -torch.inf
    assert out[5:].isfinite().all() and entropy_out[5:].isfinite().all()
    want = truth_of(logits[6:], ids[6:], 1.0, 0.0)
    torch.testing.assert_close(logprobs[6:].double(), want[0])
    torch.testing.assert_close(out[6:].double(), want[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_entropy", [False, True], ids=["logprob", "entropy too"])
def test_gradient_by_blocks_of_the_vocabulary(gpu_backend, device, dtype, with_entropy):
    """T1: the trained head's backward, a block of columns at a time; the target lies in one of them."""
    logits, ids = case(4, 1300, device)
    ids[:] = torch.tensor([0, 449, 450, 1299])
    mask = torch.tensor([True, True, True, False], device=device)
    logprobs, row_stats, entropy, _, _ = run(gpu_backend, logits, ids, temperature=0.8, softcap=9.0)
    upstream = torch.tensor([0.5, -2.0, 1.5, NAN], device=device)
    dentropy = torch.tensor([1.0, 0.3, -0.7, NAN], device=device) if with_entropy else None
    blocks = []
    for begin, end in ((0, 450), (450, 1300)):
        block, out = workspace(4, end - begin, device), workspace(4, end - begin, device, dtype)
        block.copy_(logits[:, begin:end])
        block[~mask] = NAN
        gradient_kernel(
            gpu_backend, block, ids, mask, begin, row_stats, logprobs, entropy, upstream, dentropy, 0.8, 9.0, out
        )
        blocks.append(out)
    _, _, by_logprob, by_entropy = truth_of(logits, ids, 0.8, 9.0)
    want = upstream[:, None] * by_logprob + (0 if dentropy is None else dentropy[:, None] * by_entropy)
    found = torch.cat(blocks, 1)
    assert (found[~mask] == 0).all()
    assert_as_accurate(found[mask], want[mask].float(), want[mask], "dlogits")


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [32001, 50257, 128256, 151936, 262144, 524288])
def test_real_vocabularies(gpu_backend, device, vocab, dtype):
    """One block to eight, and rows that fit on no chip; more rows than run at once, in place where that may be."""
    logits, ids = case(600, vocab, device)
    want = truth_of(logits[:4], ids[:4], 0.9, 0.0)
    eager = truth_of(logits[:4], ids[:4], 0.9, 0.0, torch.float32)
    alone = run(gpu_backend, logits[599:].clone(), ids[599:], dtype, temperature=0.9)
    found = run(gpu_backend, logits, ids, None if dtype == torch.float32 else dtype, temperature=0.9)
    for a, b in zip(found, alone, strict=True):
        assert torch.equal(a[599:], b)
    logprobs, _, entropy, out, entropy_out = (result[:4] for result in found)
    for a, e, t in zip((logprobs, entropy, out, entropy_out), eager, want, strict=True):
        assert_as_accurate(a, e, t)
