import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, arg_max_cases, assert_as_accurate, strided_variants

from fastrl.ops import token_logprobs

NATIVE = "cpu"


def eager(logits, ids, temperature=1.0):
    return (logits.float() / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def case(rows, vocab, dtype=torch.float32, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=g) * scale).to(dtype)
    return logits, torch.randint(0, vocab, (rows,), generator=g), torch.randn(rows, generator=g)


def gradients(logits, ids, dlogprobs, dentropy=None, **options):
    leaf = logits.detach().clone().requires_grad_()
    if dentropy is None:
        logprobs = token_logprobs(leaf, ids, **options)
        (logprobs * dlogprobs.to(logprobs.dtype)).sum().backward()
        return logprobs.detach(), None, leaf.grad
    logprobs, entropy = token_logprobs(leaf, ids, return_entropy=True, **options)
    ((logprobs * dlogprobs.to(logprobs.dtype)).sum() + (entropy * dentropy.to(entropy.dtype)).sum()).backward()
    return logprobs.detach(), entropy.detach(), leaf.grad


# T4, pitfall 23: vocabularies that are no multiple of a vector or a block; 2049 is one past a block.
@pytest.mark.parametrize("vocab", [1, 2, 7, 127, 129, 1000, 2048, 2049, 32001, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(vocab, dtype):
    """T1, T4, T16, T30, pitfalls 23, 31, 35: per-token upstream, any vocabulary, within twice eager's error."""
    logits, ids, dlogprobs = case(5, vocab, dtype)
    dentropy = torch.linspace(-1, 1, 5)
    options = {"temperature": 0.7}
    actual = gradients(logits, ids, dlogprobs, dentropy, backend=NATIVE, **options)
    same = gradients(logits, ids, dlogprobs, dentropy, backend="reference", **options)
    truth = gradients(logits.double(), ids, dlogprobs, dentropy, backend="reference", **options)
    for name, a, e, t in zip(["logprobs", "entropy", "dlogits"], actual, same, truth, strict=True):
        assert_as_accurate(a, e, t, name)
    assert (actual[0] <= 0).all()
    assert actual[2].dtype == dtype


def test_reference_equals_the_torch_line():
    logits, ids, _ = case(6, 37)
    torch.testing.assert_close(token_logprobs(logits, ids, backend="reference"), eager(logits, ids))
    torch.testing.assert_close(token_logprobs(logits, ids, temperature=0.7, backend=NATIVE), eager(logits, ids, 0.7))


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_softcap(backend):
    """T34, T35: softcap before temperature; a banned token (-inf) stays banned."""
    logits, ids, dlogprobs = case(4, 50, scale=30)
    logits[:, 3] = -torch.inf
    ids[:] = 7
    capped = torch.where(logits.isinf(), logits, 20 * torch.tanh(logits / 20))
    logprobs, _, dlogits = gradients(logits, ids, dlogprobs, softcap=20.0, temperature=1.3, backend=backend)
    torch.testing.assert_close(logprobs, eager(capped, ids, 1.3), rtol=1e-5, atol=1e-5)
    truth = gradients(logits.double(), ids, dlogprobs, softcap=20.0, temperature=1.3, backend="reference")
    torch.testing.assert_close(dlogits.double(), truth[2], rtol=1e-5, atol=1e-6)
    assert (dlogits[:, 3] == 0).all()


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_positions_may_hold_anything(backend, poison):
    """T8, T20, pitfalls 9, 10: NaN, inf and id -100 where the mask drops; outputs and gradients are exactly 0."""
    logits, ids, dlogprobs = case(6, 33)
    mask = torch.tensor([True, False, True, False, False, True])
    clean = gradients(logits[mask], ids[mask], dlogprobs[mask], dlogprobs[mask], backend=backend)
    logits[~mask], ids[~mask], dlogprobs[~mask] = poison, -100, float("nan")
    result = gradients(logits, ids, dlogprobs.nan_to_num(2.0), dlogprobs.nan_to_num(2.0), mask=mask, backend=backend)
    for got, want in zip(result, clean, strict=True):
        torch.testing.assert_close(got[mask], want, rtol=1e-6, atol=1e-6)
        assert (got[~mask] == 0).all()
    none_kept = token_logprobs(logits, ids, mask=torch.zeros(6, dtype=torch.bool), backend=backend)
    assert (none_kept == 0).all()


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_very_negative_rows(backend):
    """T5: the running maximum must not start at 0."""
    for value in (-1e4, -3e38):
        logits = torch.full((2, 3000), value)
        logprobs = token_logprobs(logits, torch.tensor([0, 2999]), backend=backend)
        torch.testing.assert_close(logprobs, torch.full((2,), -torch.log(torch.tensor(3000.0)).item()))


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("banned", [slice(0, 2048), slice(2048, 4096), slice(4096, 6000)])
def test_a_whole_block_of_minus_infinity(backend, banned):
    """T6, T18: first, middle and last block of -inf; a target at -inf gives -inf and finite gradients."""
    logits, ids, dlogprobs = case(3, 6000)
    logits[:, banned] = -torch.inf
    ids[:] = torch.tensor([100, 2500, 5500])
    logprobs, entropy, dlogits = gradients(logits, ids, dlogprobs, dlogprobs, backend=backend)
    kept = torch.ones(6000, dtype=torch.bool)
    kept[banned] = False
    for row in range(3):
        if kept[ids[row]]:
            want = eager(logits[row, kept], kept[: ids[row]].sum())
            torch.testing.assert_close(logprobs[row], want, rtol=1e-5, atol=1e-5)
        else:
            assert logprobs[row] == -torch.inf
    assert torch.isfinite(entropy).all() and torch.isfinite(dlogits).all()


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_a_row_of_nothing_but_minus_infinity(backend):
    """T6: log-prob -inf, entropy 0, no gradient; NaN logits still give NaN."""
    logits = torch.full((1, 20), -torch.inf)
    logprobs, entropy, dlogits = gradients(logits, torch.tensor([3]), torch.ones(1), torch.ones(1), backend=backend)
    assert logprobs.item() == -torch.inf and entropy.item() == 0 and (dlogits == 0).all()
    logits = torch.zeros(1, 5000)
    logits[0, 4321] = torch.nan
    assert token_logprobs(logits, torch.tensor([0]), backend=backend).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_target_gradient_near_probability_one(dtype):
    """T3: the target's gradient is -expm1(log p); relative error stays small where p rounds to 1."""
    for gap in (7.0, 11.5):  # p = 0.999 and 0.99999
        logits = torch.zeros(1, 2, dtype=dtype)
        logits[0, 0] = gap
        dlogits = gradients(logits, torch.tensor([0]), torch.ones(1), backend=NATIVE)[2]
        want = torch.sigmoid(-logits.double()[0, 0])
        assert abs(dlogits[0, 0].double() / want - 1) < 0.01


def test_shift_invariance():
    """T7: a common offset of 1e4 changes nothing."""
    logits = (torch.randn(4, 3000).mul(8).round() / 8).clamp(-10, 10)  # exact after adding the offset in fp32
    ids = torch.randint(0, 3000, (4,))
    plain, shifted = logits.clone(), logits + 8192
    a = gradients(plain, ids, torch.ones(4), torch.ones(4), backend=NATIVE)
    b = gradients(shifted, ids, torch.ones(4), torch.ones(4), backend=NATIVE)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    """T10, T21, T24, pitfall 24: slices, transposes and odd row starts give the contiguous result."""
    logits = torch.randn(3, 4, 37).to(dtype)
    ids = torch.randint(0, 37, (3, 4))
    want = gradients(logits, ids, torch.ones(3, 4), backend=NATIVE)
    for name, variant in strided_variants(logits):
        leaf = variant.requires_grad_()
        logprobs = token_logprobs(leaf, ids, backend=NATIVE)
        logprobs.sum().backward()
        assert torch.equal(logprobs, want[0]), name
        assert torch.equal(leaf.grad, want[2]), name
    shifted = token_logprobs(logits[:, :-1], ids[:, 1:], backend=NATIVE)  # the usual shift by one
    assert torch.equal(shifted, token_logprobs(logits[:, :-1].contiguous(), ids[:, 1:].contiguous(), backend=NATIVE))
    expanded = logits[:1].expand(3, 4, 37)
    assert torch.equal(
        token_logprobs(expanded, ids, backend=NATIVE), token_logprobs(expanded.clone(), ids, backend=NATIVE)
    )


def test_expanded_upstream():
    """T1: the upstream of .sum() is an expanded scalar; a per-token upstream is not read as one."""
    logits, ids, _ = case(4, 9)
    a = gradients(logits, ids, torch.ones(4), backend=NATIVE)[2]
    b = gradients(logits, ids, torch.tensor([1.0, 0.0, 0.0, 0.0]), backend=NATIVE)[2]
    assert torch.equal(a[0], b[0]) and (b[1:] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,)])
def test_empty_and_single(shape):
    ids = torch.zeros(shape[:-1], dtype=torch.long)
    logits = torch.randn(shape, requires_grad=True)
    logprobs, entropy = token_logprobs(logits, ids, return_entropy=True, backend=NATIVE)
    assert logprobs.shape == entropy.shape == ids.shape
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad.shape == shape


def test_repeatable_and_batch_invariant():
    """T15, pitfall 44: same bits on every run, alone or in a batch, with any number of threads."""
    logits, ids, dlogprobs = case(64, 5000, torch.bfloat16)
    want = gradients(logits, ids, dlogprobs, backend=NATIVE)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = gradients(logits, ids, dlogprobs, backend=NATIVE)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(want[0], again[0]) and torch.equal(want[2], again[2])
    alone = gradients(logits[13:14], ids[13:14], dlogprobs[13:14], backend=NATIVE)
    assert torch.equal(alone[0], want[0][13:14]) and torch.equal(alone[2], want[2][13:14])


def test_inputs_are_left_alone_and_second_backward_repeats():
    """T13, pitfall 25: nothing is written into the inputs; retain_graph repeats; double backward raises."""
    logits, ids, _ = case(3, 40)
    leaf = logits.clone().requires_grad_()
    logprobs = token_logprobs(leaf, ids, temperature=0.5, backend=NATIVE)
    (first,) = torch.autograd.grad(logprobs.sum(), leaf, retain_graph=True)
    (second,) = torch.autograd.grad(logprobs.sum(), leaf, retain_graph=True)
    assert torch.equal(first, second) and torch.equal(leaf.detach(), logits)
    (once,) = torch.autograd.grad((logprobs**2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        once.sum().backward()


def test_reference_gradcheck():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    ids, mask = torch.tensor([0, 5, 2]), torch.tensor([True, True, False])
    assert torch.autograd.gradcheck(
        lambda x: token_logprobs(x, ids, mask=mask, temperature=0.8, logit_scale=1.5, softcap=5.0, return_entropy=True),
        logits,
    )


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    """T32: fullgraph=True, forward and backward, equal to eager."""

    def loss(logits, ids, mask):
        logprobs, entropy, top1 = token_logprobs(
            logits, ids, mask=mask, return_entropy=True, return_top1=True, temperature=0.9, logit_scale=0.5,
            softcap=4.0, backend=NATIVE,
        )  # fmt: skip
        return torch.where(top1, 3.0, 2.0).mul(logprobs).add(entropy).sum()

    logits, ids, _ = case(5, 61)
    mask = torch.tensor([True, True, False, True, True])
    ids[1] = logits[1].argmax()
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss(a, ids, mask).backward()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(b, ids, mask).backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.slow
def test_opcheck():
    logits, ids, dlogprobs = case(4, 11)
    logprobs, stats = torch.empty(4), torch.empty(4, 2)
    args = ("cpu", logits, ids, None, 1.0, 0.0, logprobs, stats)
    for asked in ((None, None), (torch.empty(4), torch.empty(4, dtype=torch.bool))):
        torch.library.opcheck(torch.ops.fastrl.token_logprobs_fwd.default, (*args, *asked))
    back = ("cpu", logits, ids, None, 1.0, 0.0, stats, logprobs, None, dlogprobs, None, torch.empty(4, 11))
    torch.library.opcheck(torch.ops.fastrl.token_logprobs_bwd.default, back)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_bad_input(backend):
    """T9: wrong shape, dtype, id or value raises a ValueError that names op and argument."""
    logits, ids, _ = case(3, 8)
    bad = [
        (dict(token_ids=ids[:2]), "token_ids"),
        (dict(token_ids=ids.float()), "token_ids"),
        (dict(token_ids=torch.tensor([0, 8, 1])), "token_ids"),
        (dict(token_ids=torch.tensor([0, -1, 1])), "token_ids"),
        (dict(mask=torch.ones(2, dtype=torch.bool)), "mask"),
        (dict(mask=torch.ones(3)), "mask"),
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(softcap=-1.0), "softcap"),
        *[(dict(logit_scale=bad), "logit_scale") for bad in (0.0, -1.0, float("inf"), float("nan"), None, "1")],
        (dict(logits=logits.long()), "logits"),
        (dict(logits=torch.empty(3, 0)), "logits"),
    ]
    for change, argument in bad:
        arguments = {"logits": logits, "token_ids": ids, **change}
        with pytest.raises(ValueError, match=f"token_logprobs: {argument}: expected"):
            token_logprobs(arguments.pop("logits"), arguments.pop("token_ids"), backend=backend, **arguments)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 300), st.floats(0.2, 5.0), st.integers(0, 10**6))
def test_properties(rows, vocab, temperature, seed):
    """Log-probs of all tokens sum to one; the gradient of a row sums to zero; entropy is in [0, log V]."""
    logits, ids, dlogprobs = case(rows, vocab, seed=seed)
    every = torch.arange(vocab).repeat(rows, 1)
    all_logprobs = token_logprobs(
        logits[:, None].expand(rows, vocab, vocab), every, temperature=temperature, backend=NATIVE
    )
    torch.testing.assert_close(all_logprobs.exp().sum(-1), torch.ones(rows), rtol=1e-5, atol=1e-5)
    _, entropy, dlogits = gradients(logits, ids, dlogprobs, dlogprobs, temperature=temperature, backend=NATIVE)
    assert dlogits.sum(-1).abs().max() < 1e-4 * (1 + dlogprobs.abs().max()) / temperature
    assert (entropy >= -1e-5).all() and (entropy <= torch.log(torch.tensor(float(vocab))) + 1e-5).all()


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_logit_scale(backend, softcap):
    """T34: logits x scale, then softcap, then / temperature, as plain torch lines; a banned token stays banned."""
    logits, ids, dlogprobs = case(4, 50, scale=30)
    logits[:, 3], ids[:] = -torch.inf, 7
    for scale in (0.0625, 3.0):
        leaf = logits.double().requires_grad_()
        scaled = leaf * scale
        x = (scaled if softcap is None else softcap * torch.tanh(scaled / softcap)).where(~leaf.isinf(), -torch.inf)
        every = (x / 1.3).log_softmax(-1)
        logprobs, entropy = every[:, 7], -(every.exp() * every.where(~every.isinf(), 0)).sum(-1)
        ((logprobs + 2 * entropy) * dlogprobs).sum().backward()
        options = {"temperature": 1.3, "logit_scale": scale, "softcap": softcap, "backend": backend}
        found = gradients(logits, ids, dlogprobs, 2 * dlogprobs, **options)
        for got, want in zip(found, (logprobs.detach(), entropy.detach(), leaf.grad), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
        assert (found[2][:, 3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1 / 16, 0.25, 8.0])
def test_logit_scale_matches_float64(dtype, scale):
    """T16, T34: the error is within twice eager's for scales on either side of 1, with a softcap."""
    logits, ids, dlogprobs = case(5, 1000, dtype, scale=3 / scale)
    options = {"temperature": 0.7, "softcap": 5.0, "logit_scale": scale}
    dentropy = torch.linspace(-1, 1, 5)
    actual = gradients(logits, ids, dlogprobs, dentropy, backend=NATIVE, **options)
    eager_ = gradients(logits, ids, dlogprobs, dentropy, backend="reference", **options)
    truth = gradients(logits.double(), ids, dlogprobs, dentropy, backend="reference", **options)
    for name, a, e, t in zip(["logprobs", "entropy", "dlogits"], actual, eager_, truth, strict=True):
        assert_as_accurate(a, e, t, name)


def test_top1_by_hand():
    """The largest logit, the first of equals; NaN is above all numbers, as in torch's arg max."""
    nan, inf = torch.nan, torch.inf
    rows = [
        ([1.0, 3.0, 2.0], [False, True, False]),
        ([3.0, 3.0, 3.0], [True, False, False]),
        ([1.0, 3.0, 3.0], [False, True, False]),
        ([-inf, -inf, -inf], [True, False, False]),
        ([-inf, -4.0, -inf], [False, True, False]),
        ([0.0, inf, inf], [False, True, False]),
        ([inf, nan, nan], [False, True, False]),
    ]
    logits, expected = (torch.tensor(part) for part in zip(*rows, strict=True))
    every = torch.arange(3).expand(len(rows), 3)
    for backend in ("reference", NATIVE):
        top1 = token_logprobs(logits[:, None].expand(-1, 3, 3), every, return_top1=True, backend=backend)[1]
        assert torch.equal(top1, expected), backend


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("vocab", [1, 2, 7, 129, 2049, 5003])  # 5003 is prime; a block has 2048
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_top1_is_torchs_arg_max(dtype, vocab, backend):
    """T4, T6, T35: whatever the logits hold; scale, softcap and temperature keep the order."""
    logits, ids = arg_max_cases(vocab, dtype)
    for options in ({}, {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5}):
        _, top1 = token_logprobs(logits, ids, return_top1=True, backend=backend, **options)
        assert torch.equal(top1, logits.argmax(-1) == ids)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_top1_comes_last_and_changes_nothing_else(backend):
    """The same bits of log-probs, entropy and gradients; it has no gradient of its own."""
    logits, ids, dlogprobs = case(5, 2100)
    ids[:3] = logits[:3].argmax(-1)
    for entropy in (False, True):
        found = []
        for options in ({}, {"return_top1": True}):
            leaf = logits.clone().requires_grad_()
            out = token_logprobs(leaf, ids, return_entropy=entropy, backend=backend, **options)
            out = [out] if isinstance(out, torch.Tensor) else list(out)
            (gradient,) = torch.autograd.grad(out[: 1 + entropy], leaf, [dlogprobs] * (1 + entropy))
            found.append([*out, gradient])
        top1 = found[1].pop(1 + entropy)
        assert top1.tolist() == [True, True, True, False, False] and not top1.requires_grad
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_top1_is_false_where_the_mask_drops(backend, poison):
    """T8, T20: NaN, inf and id -100 there."""
    logits, ids = torch.full((2, 3, 40), poison), torch.full((2, 3), -100)
    mask = torch.tensor([[True, False, False], [False, False, True]])
    logits[mask], ids[mask] = torch.arange(40.0), torch.tensor([39, 38])
    _, top1 = token_logprobs(logits, ids, mask=mask, return_top1=True, backend=backend)
    assert top1.tolist() == [[True, False, False], [False, False, False]]


def test_top1_of_any_strides():
    """T10, T21: slices, transposes and odd row starts; no rows."""
    logits = torch.randint(-2, 3, (3, 4, 37)).float()
    ids = torch.randint(0, 37, (3, 4))
    ids[1] = logits[1].argmax(-1)
    for name, variant in strided_variants(logits):
        assert torch.equal(
            token_logprobs(variant, ids, return_top1=True, backend=NATIVE)[1], logits.argmax(-1) == ids
        ), name
    nothing = token_logprobs(logits[:0], ids[:0], return_top1=True, backend=NATIVE)[1]
    assert nothing.shape == (0, 4) and nothing.dtype == torch.bool
