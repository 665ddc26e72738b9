import pytest
import torch
from heads import HeadCase, head_case, lora_of, small_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, assert_as_accurate

from fastrl.ops import linear_cross_entropy, linear_logprobs

NATIVE = "cpu"
IGNORED = -100


def results(case: HeadCase, upstream=1.0, **options):
    """{"loss", gradient of each parameter}."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in case[:5]]
    leaf = HeadCase(*leaves, *case[5:])
    loss = linear_cross_entropy(leaf.hidden, leaf.weight, leaf.token_ids, bias=leaf.bias, lora=lora_of(leaf), **options)
    assert loss.shape == ()
    (loss * upstream).backward()
    return {"loss": loss.detach()} | {
        name: tensor.grad for name, tensor in zip(HeadCase._fields[:5], leaves, strict=True) if tensor is not None
    }


def with_ignored(case, every=4):
    labels = case.token_ids.clone()
    labels[::every] = IGNORED
    return case._replace(token_ids=labels)


@pytest.mark.parametrize("head", [{}, {"bias": True, "lora": True}], ids=["plain", "bias and lora"])
@pytest.mark.parametrize("vocab", [1, 2, 7, 129, 1003, 2049])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(vocab, dtype, head, monkeypatch):
    """T2, T4, T17, T34, pitfalls 23, 30, 31, 35: ragged chunks, ignored labels, within twice eager's error."""
    small_blocks(monkeypatch)
    case = with_ignored(head_case(vocab=vocab, dtype=dtype, **head))
    options = {"temperature": 0.8, "logit_scale": 0.7, "softcap": 10.0, "upstream": 1.7}
    actual = results(case, backend=NATIVE, **options)
    eager = results(case, backend="reference", **options)
    truth = results(case.to(torch.float64), backend="reference", **options)
    for name, value in actual.items():
        assert_as_accurate(value, eager[name], truth[name], name)
    assert actual["loss"].dtype == torch.float32 and actual["hidden"].dtype == dtype  # T30


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_equals_torch(backend):
    """T8, pitfall 17: F.cross_entropy of the logits, its mean over labels that are not -100, 0 and V - 1 among them."""
    case = with_ignored(head_case())
    case.token_ids[1:3] = torch.tensor([0, 128])
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    want = torch.nn.functional.cross_entropy(hidden @ weight.T, case.token_ids)
    want.backward()
    found = results(case, backend=backend)
    torch.testing.assert_close(found["loss"], want.detach())
    torch.testing.assert_close(found["hidden"], hidden.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["weight"], weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_is_the_sum_of_log_probs(backend):
    """T38, pitfall 32: one definition: -sum of linear_logprobs over kept tokens / denominator."""
    case = head_case()
    mask = torch.arange(23) % 3 != 1
    logprobs = linear_logprobs(
        case.hidden, case.weight, case.token_ids, mask=mask, temperature=0.7, logit_scale=0.5, backend=backend
    )
    for denominator in (None, 7, 2.5, torch.tensor(11)):
        loss = linear_cross_entropy(
            case.hidden,
            case.weight,
            case.token_ids,
            mask=mask,
            temperature=0.7,
            logit_scale=0.5,
            denominator=denominator,
            backend=backend,
        )
        torch.testing.assert_close(loss, -logprobs.sum() / (mask.sum() if denominator is None else denominator))


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_gradient_accumulation(backend):
    """Pitfalls 11, 16: with the whole batch's count, ragged micro-batches add up to the whole batch."""
    case = head_case()
    mask = torch.rand(23, generator=torch.Generator().manual_seed(1)) > 0.4
    whole = results(case, mask=mask, backend=backend)
    parts = [slice(0, 2), slice(2, 13), slice(13, 23)]
    loss, weight = 0.0, 0.0
    for part in parts:
        piece = case._replace(hidden=case.hidden[part], token_ids=case.token_ids[part])
        found = results(piece, mask=mask[part], denominator=int(mask.sum()), backend=backend)
        loss, weight = loss + found["loss"], weight + found["weight"]
    torch.testing.assert_close(loss, whole["loss"])
    torch.testing.assert_close(weight, whole["weight"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_dropped_positions_may_hold_anything(backend):
    """T8, T20, pitfall 9: NaN in hidden where the mask or label -100 drops; zero gradient there."""
    case = with_ignored(head_case(bias=True, lora=True))
    mask = torch.arange(23) % 3 != 1
    clean = results(case, mask=mask, backend=backend)
    dropped = ~mask | (case.token_ids == IGNORED)
    case.hidden[dropped] = torch.nan
    case.token_ids[~mask] = 10**6
    dirty = results(case, mask=mask, backend=backend)
    assert (dirty["hidden"][dropped] == 0).all()
    assert all(torch.equal(dirty[name], clean[name]) for name in clean)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_kept(rows, backend):
    """T8, pitfall 10: all labels ignored, or no rows: loss 0 and zero gradients, not 0 / 0."""
    case = head_case(rows=rows)
    case.token_ids[:] = IGNORED
    found = results(case, backend=backend)
    assert found["loss"] == 0 and (found["hidden"] == 0).all() and (found["weight"] == 0).all()


def test_shapes_and_upstream():
    """T1, T21, pitfall 29: (B, T, H) and flattened inputs agree; the upstream scales every gradient; sliced views."""
    case = head_case(rows=24)
    flat = results(case, backend=NATIVE)
    shaped = results(
        case._replace(hidden=case.hidden.view(4, 6, 37), token_ids=case.token_ids.view(4, 6)),
        backend=NATIVE,
        upstream=3.0,
    )
    assert torch.equal(shaped["loss"], flat["loss"])
    torch.testing.assert_close(shaped["hidden"].view(24, 37), flat["hidden"] * 3)
    torch.testing.assert_close(shaped["weight"], flat["weight"] * 3)
    hidden, labels = case.hidden.view(4, 6, 37), case.token_ids.view(4, 6)
    shifted = linear_cross_entropy(hidden[:, :-1], case.weight, labels[:, 1:], backend=NATIVE)
    same = linear_cross_entropy(hidden[:, :-1].clone(), case.weight, labels[:, 1:].clone(), backend=NATIVE)
    assert torch.equal(shifted, same)


def test_repeatable_and_second_backward():
    """T13, T15, pitfall 44: same bits on every run; a second backward repeats the first; double backward raises."""
    case = with_ignored(head_case(rows=600, vocab=300, dtype=torch.bfloat16))
    first, second = results(case, backend=NATIVE), results(case, backend=NATIVE)
    assert all(torch.equal(first[name], second[name]) for name in first)
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    loss = linear_cross_entropy(case.hidden, case.weight, case.token_ids, backend=NATIVE)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    (gradient,) = torch.autograd.grad(loss**2, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_reference_gradcheck():
    case = with_ignored(head_case(rows=4, vocab=6, width=4, bias=True, lora=True, dtype=torch.float64))

    def run(hidden, weight, bias, lora_a, lora_b):
        return linear_cross_entropy(
            hidden,
            weight,
            case.token_ids,
            bias=bias,
            lora=(lora_a, lora_b, 0.5),
            temperature=0.8,
            logit_scale=1.5,
            softcap=5.0,
        )

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in case[:5]])


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    """T32: fullgraph=True, forward and backward, equal to eager."""
    case = with_ignored(head_case())

    def loss(hidden, weight, denominator):
        return linear_cross_entropy(hidden, weight, case.token_ids, denominator=denominator, backend=NATIVE)

    for denominator in (None, torch.tensor(5.0)):
        eager = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
        compiled = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
        loss(*eager, denominator).backward()
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled, denominator).backward()
        for a, b in zip(eager, compiled, strict=True):
            assert torch.equal(a.grad, b.grad)


@pytest.mark.slow
def test_opcheck():
    case = head_case(rows=4, vocab=11, bias=True, lora=True)
    head = (case.hidden, case.weight, case.token_ids, None, case.bias, case.lora_a, case.lora_b, 0.5, 1.0, 0.0)
    gradients = (torch.empty(11, 37), torch.empty(11), torch.empty(11, 4))
    outputs = (torch.empty(4), torch.empty(4, 2), None, None, torch.empty(4, 41), None)
    arguments = ("cpu", *head, *outputs, torch.tensor(-0.25), *gradients)
    torch.library.opcheck(torch.ops.fastrl.linear_head_fwd.default, arguments)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_bad_input(backend):
    """T9: wrong shape, dtype, label or denominator raises a ValueError that names op and argument."""
    case = head_case(rows=3, vocab=8, width=5)
    bad = [
        (dict(labels=case.token_ids[:2]), "labels"),
        (dict(labels=case.token_ids.float()), "labels"),
        (dict(labels=torch.tensor([0, 8, 1])), "labels"),
        (dict(labels=torch.tensor([0, -1, 1])), "labels"),
        (dict(mask=torch.ones(3)), "mask"),
        (dict(temperature=-1.0), "temperature"),
        (dict(softcap=0.0), "softcap"),
        (dict(weight=torch.randn(8, 4)), "weight"),
        (dict(weight=case.weight.bfloat16()), "weight"),
        (dict(denominator=0), "denominator"),
        (dict(denominator=float("nan")), "denominator"),
        (dict(denominator=torch.ones(2)), "denominator"),
        (dict(denominator=torch.ones((), device="meta")), "denominator"),
    ]
    for change, argument in bad:
        arguments = {"hidden": case.hidden, "weight": case.weight, "labels": case.token_ids, **change}
        with pytest.raises(ValueError, match=f"linear_cross_entropy: {argument}: expected"):
            linear_cross_entropy(**arguments, backend=backend)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 200), st.integers(0, 10**6))
def test_properties(rows, vocab, seed):
    """Loss is never negative, gradients of a bias sum to zero, a larger denominator divides everything."""
    case = head_case(rows=rows, vocab=vocab, width=8, bias=True, seed=seed)
    found = results(case, backend=NATIVE)
    halved = results(case, denominator=2 * rows, backend=NATIVE)
    assert found["loss"] >= 0
    assert found["bias"].sum().abs() < 1e-4
    for name, value in found.items():
        torch.testing.assert_close(halved[name], value / 2, rtol=1e-4, atol=1e-6)
