"""token_logprobs' GPU kernels."""

from __future__ import annotations

import inspect

import pytest
import torch
from gpus import HAS_GPU
from oracle import DTYPES, GPU_TANH, arg_max_cases, assert_as_accurate

from fastrl.kernels import token_logprobs as kernels
from fastrl.ops import backend, native, token_logprobs
from fastrl.ops.token_logprobs import _backward, _forward

UNSPECIALISED = ("inner", "pieces")  # do_not_specialize of the kernels
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")


def case(rows, vocab, dtype, device, scale=3.0):
    g = torch.Generator().manual_seed(rows * 1000 + vocab)
    logits = (torch.randn(rows, vocab, generator=g) * scale).to(dtype)
    ids = torch.randint(0, vocab, (rows,), generator=g)
    return logits.to(device), ids.to(device), torch.randn(rows, generator=g).to(device)


def gradients(logits, ids, dlogprobs, dentropy=None, **options):
    leaf = logits.detach().requires_grad_()
    if dentropy is None:
        logprobs = token_logprobs(leaf, ids, **options)
        (dlogits,) = torch.autograd.grad(logprobs, leaf, dlogprobs.to(logprobs.dtype))
        return logprobs.detach(), dlogits
    logprobs, entropy = token_logprobs(leaf, ids, return_entropy=True, **options)
    upstreams = dlogprobs.to(logprobs.dtype), dentropy.to(entropy.dtype)
    (dlogits,) = torch.autograd.grad((logprobs, entropy), leaf, upstreams)
    return logprobs.detach(), entropy.detach(), dlogits


def assert_accurate(logits, ids, *upstreams, backend, **options):
    """Within twice the error of eager torch, everything against float64."""
    actual = gradients(logits, ids, *upstreams, backend=backend, **options)
    eager = gradients(logits, ids, *upstreams, backend="reference", **options)
    truth = gradients(logits.double(), ids, *upstreams, backend="reference", **options)
    names = ("logprobs", "entropy", "dlogits") if len(actual) == 3 else ("logprobs", "dlogits")
    for name, a, e, t in zip(names, actual, eager, truth, strict=True):
        assert_as_accurate(a, e, t, name, GPU_TANH * (options.get("softcap") or 0.0))
    assert (actual[0] <= 0).all() and actual[-1].dtype == logits.dtype
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 127, 129, 1000, 2049, 4097])
def test_matches_float64(gpu_backend, device, vocab, dtype):
    """T1, T4, T16: per-token upstream, any vocabulary and with it any alignment of a row."""
    logits, ids, dlogprobs = case(3, vocab, dtype, device)
    dentropy = torch.linspace(-1, 1, 3, device=device)
    assert_accurate(logits, ids, dlogprobs, dentropy, backend=gpu_backend, temperature=0.7)
    assert_accurate(logits, ids, dlogprobs, backend=gpu_backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_many_pieces(gpu_backend, device, dtype):
    """Rows that are split over blocks where they are few; target in the first, a middle and the last piece."""
    logits, ids, dlogprobs = case(3, 40001, dtype, device)
    ids[:] = torch.tensor([5, 20000, 40000])
    assert_accurate(logits, ids, dlogprobs, dlogprobs, backend=gpu_backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap(gpu_backend, device, dtype):
    """T34, T35: softcap before temperature; a banned token (-inf) stays banned."""
    logits, ids, dlogprobs = case(4, 300, dtype, device, scale=30)
    logits[:, 3] = -torch.inf
    ids[:] = torch.tensor([0, 7, 8, 299])
    dentropy = torch.linspace(-1, 1, 4, device=device)
    result = assert_accurate(logits, ids, dlogprobs, dentropy, backend=gpu_backend, softcap=20.0, temperature=1.3)
    assert (result[-1][:, 3] == 0).all()
    options = {"softcap": 20.0, "temperature": 1.3, "logit_scale": 0.25}
    result = assert_accurate(logits, ids, dlogprobs, dentropy, backend=gpu_backend, **options)
    assert (result[-1][:, 3] == 0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_positions_may_hold_anything(gpu_backend, device, poison):
    """T8, T20: NaN, inf and id -100 where the mask drops; outputs and gradients are exactly 0."""
    logits, ids, dlogprobs = case(6, 2100, torch.float16, device)
    mask = torch.tensor([True, False, True, False, False, True], device=device)
    clean = gradients(logits[mask], ids[mask], dlogprobs[mask], dlogprobs[mask], backend=gpu_backend)
    logits[~mask], ids[~mask], dlogprobs[~mask] = poison, -100, poison
    result = gradients(logits, ids, dlogprobs, dlogprobs, mask=mask, backend=gpu_backend)
    for got, want in zip(result, clean, strict=True):
        assert torch.equal(got[mask], want)
        assert (got[~mask] == 0).all()


@pytest.mark.parametrize("banned", [slice(0, 2048), slice(2048, 4096), slice(4096, 6000)], ids=str)
def test_tiles_of_minus_infinity(gpu_backend, device, banned):
    """T6, T18: first, middle and last tile; a target at -inf gives -inf and finite gradients elsewhere."""
    logits, ids, dlogprobs = case(3, 6000, torch.float16, device)
    logits[:, banned] = -torch.inf
    ids[:] = torch.tensor([100, 2500, 5500])
    dlogprobs[(ids >= banned.start) & (ids < banned.stop)] = 1.0
    logprobs, entropy, dlogits = gradients(logits, ids, dlogprobs, dlogprobs, backend=gpu_backend)
    truth = gradients(logits.double(), ids, dlogprobs, dlogprobs, backend="reference")
    inside = (ids >= banned.start) & (ids < banned.stop)
    assert (logprobs[inside] == -torch.inf).all() and inside.sum() == 1
    torch.testing.assert_close(logprobs.double(), truth[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), truth[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dlogits[~inside].double(), truth[2][~inside], rtol=1e-3, atol=1e-6)
    assert torch.isfinite(dlogits).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_distribution(gpu_backend, device, dtype):
    """T6: nothing but -inf: log-prob -inf, entropy 0, no gradient. NaN and +inf: NaN. One live token: certain."""
    logits = torch.zeros(5, 4100, dtype=dtype, device=device)
    logits[0] = -torch.inf
    logits[1, 4000] = torch.nan
    logits[2, 4000] = torch.inf
    logits[3, 7] = torch.inf
    logits[4] = -torch.inf
    logits[4, 7] = 2.0
    ids, ones = torch.full((5,), 7, device=device), torch.ones(5, device=device)
    logprobs, entropy, dlogits = gradients(logits, ids, ones, ones, backend=gpu_backend)
    assert logprobs[0] == -torch.inf and entropy[0] == 0 and (dlogits[0] == 0).all()
    assert logprobs[1:4].isnan().all() and entropy[1:4].isnan().all() and dlogits[1:4].isnan().all()
    assert logprobs[4] == 0 and entropy[4] == 0 and (dlogits[4] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_top1_is_torchs_arg_max(gpu_backend, device, dtype):
    """T4, T6, T35: whatever the logits hold, a ragged tile; scale, softcap and temperature keep the order."""
    logits, ids = (tensor[::5].to(device) for tensor in arg_max_cases(601, dtype))  # a kind of row, one of its tokens
    options = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5, "backend": gpu_backend}
    assert torch.equal(token_logprobs(logits, ids, return_top1=True, **options)[1], logits.argmax(-1) == ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_top1_of_many_pieces(gpu_backend, device, dtype):
    """Equals in other pieces than the target's, before it and behind it; masked rows and ids outside are no arg max."""
    logits = torch.zeros(6, 17001, dtype=dtype, device=device)
    logits[:, [300, 9000, 16999]] = 2.0
    logits[5] = torch.nan
    ids = torch.tensor([300, 9000, 16999, -1, 17001, 300], device=device)
    mask = torch.tensor([True] * 5 + [False], device=device)
    options = {"mask": mask, "return_entropy": True, "backend": gpu_backend}
    *results, top1 = token_logprobs(logits, ids, return_top1=True, **options)
    assert top1.tolist() == [True, False, False, False, False, False]
    for with_top1, without in zip(results, token_logprobs(logits, ids, **options), strict=True):
        assert with_top1[3:5].isnan().all()
        torch.testing.assert_close(with_top1, without, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [-3e38, -1e4, 1e4])
def test_large_common_offset(gpu_backend, device, value):
    """T5, T7: the running maximum must not start at 0; a common offset changes nothing."""
    logits, ids, dlogprobs = case(2, 3000, torch.float32, device)
    logits = (logits * 8).round() / 8
    dentropy = torch.ones(2, device=device)
    if value == -3e38:
        logits = torch.zeros_like(logits)
    want = gradients(logits, ids, dlogprobs, dentropy, backend=gpu_backend)
    got = gradients(logits + value, ids, dlogprobs, dentropy, backend=gpu_backend)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_target_gradient_near_probability_one(gpu_backend, device, dtype):
    """T3: log-prob and the target's gradient keep their relative precision where p rounds to 1."""
    for gap in (7.0, 11.5) if dtype == torch.float16 else (7.0, 11.5, 20.0):
        logits = torch.zeros(1, 2, dtype=dtype, device=device)
        logits[0, 0] = gap
        logprobs, dlogits = gradients(
            logits, torch.tensor([0], device=device), torch.ones(1, device=device), backend=gpu_backend
        )
        want = torch.sigmoid(-logits.double()[0, 0])
        assert abs(dlogits[0, 0].double() / want - 1) < 0.01
        assert abs(logprobs[0].double() / torch.log1p(-want) - 1) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("stride", [2624, 2633])
def test_rows_at_any_address(gpu_backend, device, dtype, offset, stride):
    """T10, T15, T21: a row that begins anywhere, in a matrix of any stride, with nothing read or written beside it.

    CUDA's bits do not depend on the address. Triton reads rows that are a multiple of 16 apart in wide pieces if the
    first begins at a multiple of 16 bytes, and adds in another order then.
    """
    vocab = 2608  # a multiple of 16: contiguous rows are read in wide pieces
    logits, ids, dlogprobs = case(2, vocab, dtype, device)
    want = gradients(logits, ids, dlogprobs, dlogprobs, backend=gpu_backend)
    wide = torch.full((2, stride), torch.nan, dtype=dtype, device=device)
    inner = wide[:, offset : offset + vocab]
    inner.copy_(logits)
    got = gradients(inner, ids, dlogprobs, dlogprobs, backend=gpu_backend)
    for a, b in zip(got, want, strict=True):
        if gpu_backend == "cuda":
            assert torch.equal(a, b)
        else:
            rounding = 2 * torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=max(rounding, 1e-5), atol=1e-6)
    assert wide.isnan().sum() == 2 * (stride - vocab)


def test_leading_strides(gpu_backend, device):
    """T21: transposed leading dimensions, and the usual shift by one."""
    logits, ids, _ = case(12, 130, torch.float32, device)
    logits, ids = logits.view(3, 4, 130), ids.view(3, 4)
    want = token_logprobs(logits, ids, backend=gpu_backend)
    transposed = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(token_logprobs(transposed, ids, backend=gpu_backend), want)
    shifted = token_logprobs(logits[:, :-1], ids[:, 1:], backend=gpu_backend)
    assert torch.equal(
        shifted, token_logprobs(logits[:, :-1].contiguous(), ids[:, 1:].contiguous(), backend=gpu_backend)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariance(gpu_backend, device, dtype):
    """T15, pitfall 44: a row's bits are the same alone, among 7, among 64 and on every run; 16500 columns are split
    over blocks where rows are few."""
    for vocab, batches in ((1001, (7, 64)), (1008, (7,)), (16500, (7, 1030) if HAS_GPU else (5,))):
        logits, ids, dlogprobs = case(max(batches), vocab, dtype, device)
        alone = gradients(logits[3:4], ids[3:4], dlogprobs[3:4], dlogprobs[3:4], backend=gpu_backend)
        for size in batches:
            batch = gradients(logits[:size], ids[:size], dlogprobs[:size], dlogprobs[:size], backend=gpu_backend)
            for a, b in zip(batch, alone, strict=True):
                assert torch.equal(a[3:4], b)


@pytest.mark.parametrize("gpu_backend", ["triton"], indirect=True)
@pytest.mark.parametrize("padding", [0, 3, 8, 16])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("vocab", [1001, 1008, 2048, 16500])
def test_triton_adds_in_one_order_in_any_batch(gpu_backend, device, monkeypatch, vocab, offset, padding):
    """T15: its layouts follow which integers are multiples of 16, and if strides are, whether the address is; those of
    a single row are those of a batch.
    """
    launches = []

    def record(kernel, grid, tensor, *args, **options):
        names = list(inspect.signature(kernel.fn).parameters)
        ints = {n: v for n, v in zip(names, args, strict=False) if type(v) is int and n not in UNSPECIALISED}
        aligned = {name: (value == 1, value % 16 == 0) for name, value in ints.items()}
        wide = ints["inner_stride"] % 16 == 0 and args[0].data_ptr() % 16 == 0
        launches.append((aligned, wide))

    monkeypatch.setattr(kernels, "launch", record)
    ids = torch.zeros(8, dtype=torch.long, device=device)
    logits = torch.zeros(8, offset + vocab + padding, device=device)[:, offset : offset + vocab]
    batches = [(logits, ids), (logits[3:5], ids[3:5]), (logits[3:4], ids[3:4])]
    if logits.is_contiguous():
        batches.append((logits[3].clone(), ids[3]))
    for rows, where in batches:
        token_logprobs(rows, where, backend=gpu_backend)
    assert len(launches) == 2 * len(batches)
    assert all(launch == launches[i % 2] for i, launch in enumerate(launches))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_rows_have_the_bits_of_whole_ones(request, monkeypatch, dtype):
    """T15: the two ways of the CUDA forward, chosen by the number of rows, on the same rows."""
    if HAS_GPU:
        pytest.skip("test_batch_invariance does it on the device")
    host_cuda_kernels = request.getfixturevalue("host_cuda_kernels")
    for module in (backend, native):
        monkeypatch.setattr(module, "cuda", host_cuda_kernels)
    monkeypatch.setitem(backend.DEVICES, "cuda", ("cuda", "cpu"))
    logits, ids, _ = case(2, 33000, dtype, "cpu")
    assert host_cuda_kernels.token_logprobs_workspace(2, 33000, native.DTYPE_CODES[dtype]) > 0
    assert host_cuda_kernels.token_logprobs_workspace(1024, 33000, native.DTYPE_CODES[dtype]) == 0
    ids[0] = logits[0].argmax()
    options = {"return_entropy": True, "return_top1": True, "backend": "cuda"}
    split = token_logprobs(logits, ids, **options)
    assert split[2].tolist() == [True, False]

    class NeverSplit:
        token_logprobs_workspace = staticmethod(lambda *args: 0)
        token_logprobs_fwd = staticmethod(host_cuda_kernels.token_logprobs_fwd)

    monkeypatch.setattr(native, "cuda", NeverSplit)
    whole = token_logprobs(logits, ids, **options)
    for a, b in zip(split, whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids_outside_the_vocabulary(gpu_backend, device, dtype, monkeypatch):
    """T9: the row becomes NaN, its neighbours do not; FASTRL_DEBUG=1 raises instead."""
    logits, ids, dlogprobs = case(4, 500, dtype, device)
    ids[1], ids[2] = -1, 500
    logprobs, entropy, dlogits = gradients(logits, ids, dlogprobs, dlogprobs, backend=gpu_backend)
    for result in (logprobs, entropy, dlogits):
        assert result[1:3].isnan().all() and result[[0, 3]].isfinite().all()
    monkeypatch.setenv("FASTRL_DEBUG", "1")
    with pytest.raises(ValueError, match=r"token_logprobs: token_ids: expected ids in \[0, 500\), got -1"):
        token_logprobs(logits, ids, backend=gpu_backend)
    mask = torch.tensor([True, False, False, True], device=device)
    assert token_logprobs(logits, ids, mask=mask, backend=gpu_backend).isfinite().all()


def test_gradient_in_place(gpu_backend, device):
    """The backward may overwrite the logits; what lies between rows stays."""
    wide = torch.full((3, 2117), torch.nan, device=device, dtype=torch.float16)
    logits = wide[:, 3:2104]
    values, ids, dlogprobs = case(3, 2101, torch.float16, device)
    logits.copy_(values)
    mask = torch.tensor([True, False, True], device=device)
    logprobs, entropy = torch.empty(2, 3, device=device)
    row_stats = torch.empty(3, 2, device=device)
    _forward(gpu_backend, logits, ids, mask, 0.8, 0.0, logprobs, row_stats, entropy, None)
    upstream = (0.8, 0.0, row_stats, logprobs, entropy, dlogprobs, dlogprobs)
    apart = torch.empty_like(values)
    _backward(gpu_backend, logits, ids, mask, *upstream, apart)
    assert torch.equal(logits, values)
    _backward(gpu_backend, logits, ids, mask, *upstream, logits)
    assert torch.equal(logits, apart) and wide.isnan().sum() == 3 * 16


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,)], ids=str)
def test_empty_and_single(gpu_backend, device, shape):
    ids = torch.zeros(shape[:-1], dtype=torch.long, device=device)
    logits = torch.randn(shape, device=device, requires_grad=True)
    logprobs, entropy = token_logprobs(logits, ids, return_entropy=True, backend=gpu_backend)
    assert logprobs.shape == entropy.shape == ids.shape
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad.shape == shape


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [32001, 50257, 128256, 128257, 151936])
def test_real_vocabularies(gpu_backend, device, vocab, dtype):
    """T4, T10 at size, few rows and many."""
    for rows in (2, 1100):
        logits, ids, dlogprobs = case(rows, vocab, dtype, device)
        assert_accurate(logits, ids, dlogprobs, dlogprobs, backend=gpu_backend, temperature=0.9)


@pytest.mark.gpu
@needs_gpu
def test_beyond_32_bits(gpu_backend, device):
    """T11, T12: more than 2^31 elements, more than 65,535 rows."""
    for rows, vocab in ((17000, 128257), (2**20 + 1, 2053)):
        logits = torch.randn(rows, vocab, dtype=torch.bfloat16, device=device)
        ids = torch.randint(0, vocab, (rows,), device=device)
        logprobs, dlogits = gradients(logits, ids, torch.ones(rows, device=device), backend=gpu_backend)
        for row in (0, 65536 % rows, rows - 1):
            want = gradients(logits[row : row + 1].clone(), ids[row : row + 1], torch.ones(1, device=device),
                             backend=gpu_backend)  # fmt: skip
            assert torch.equal(logprobs[row], want[0][0]) and torch.equal(dlogits[row], want[1][0])
        del logits, dlogits
