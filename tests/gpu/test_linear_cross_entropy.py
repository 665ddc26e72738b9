"""linear_cross_entropy on the row kernels of a GPU."""

from __future__ import annotations

import pytest
import torch
from heads import HeadCase, head_case, lora_of, on, small_chunks
from oracle import DTYPES, GPU_TANH, assert_as_accurate

from fastrl.ops import linear_cross_entropy, linear_head_gpu

IGNORED = -100


def results(case: HeadCase, upstream=1.0, trained=HeadCase._fields[:5], **options):
    """{"loss", gradient of each trained parameter}."""
    leaves = {
        name: tensor.detach().clone().requires_grad_(name in trained)
        for name, tensor in zip(HeadCase._fields[:5], case, strict=False)
        if tensor is not None
    }
    leaf = case._replace(**leaves)
    loss = linear_cross_entropy(leaf.hidden, leaf.weight, leaf.token_ids, bias=leaf.bias, lora=lora_of(leaf), **options)
    assert loss.shape == ()
    (loss * upstream).backward()
    return {"loss": loss.detach()} | {name: t.grad for name, t in leaves.items() if name in trained}


def case_with_ignored(device, rows=9, **options):
    case = on(head_case(rows=rows, **options), device)
    case.token_ids[::4] = IGNORED
    return case


HEADS = {
    "frozen": (("hidden",), {}),
    "trained": (("hidden", "weight"), {}),
    "only the head": (("weight", "bias"), {"bias": True}),
    "adapter": (("hidden", "lora_a", "lora_b"), {"bias": True, "lora": True}),
    "everything": (HeadCase._fields[:5], {"bias": True, "lora": True}),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunks", ["one chunk", "small chunks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(gpu_backend, device, monkeypatch, dtype, chunks, head):
    """T2, T4, T17, T34, pitfalls 23, 30, 31, 35: ragged chunks, ignored labels, within twice eager's error."""
    if chunks == "small chunks":
        small_chunks(monkeypatch, rows=2, columns=64)
    trained, carries = HEADS[head]
    case = case_with_ignored(device, dtype=dtype, **carries)
    options = {"temperature": 0.8, "logit_scale": 0.7, "softcap": 10.0, "upstream": 1.7, "trained": trained}
    actual = results(case, backend=gpu_backend, **options)
    eager = results(case, backend="reference", **options)
    truth = results(case.to(torch.float64), backend="reference", **options)
    for name, value in actual.items():
        assert_as_accurate(value, eager[name], truth[name], name, GPU_TANH * options["softcap"])
    assert actual["loss"].dtype == torch.float32
    assert all(actual[name].dtype == dtype for name in actual if name != "loss")  # T30


def test_weight_gradient_is_summed_in_float32(gpu_backend, device, monkeypatch):
    """T2: the error of a 16-bit weight's gradient does not grow with the number of chunks."""
    case = on(head_case(rows=48, vocab=40, dtype=DTYPES[-1]), device)
    options = {"trained": ("weight",), "denominator": 1.0}
    truth = results(case.to(torch.float64), backend="reference", **options)["weight"]
    one = results(case, backend=gpu_backend, **options)["weight"]
    small_chunks(monkeypatch, rows=4)
    many = results(case, backend=gpu_backend, **options)["weight"]
    assert (many - truth).abs().max() <= 1.2 * (one - truth).abs().max()


def test_equals_torch(gpu_backend, device):
    """T8, pitfall 17: F.cross_entropy of the logits, its mean over labels that are not -100, 0 and V - 1 among them."""
    case = case_with_ignored(device)
    case.token_ids[1:3] = torch.tensor([0, 128], device=device)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    want = torch.nn.functional.cross_entropy(hidden @ weight.T, case.token_ids)
    want.backward()
    found = results(case, backend=gpu_backend)
    torch.testing.assert_close(found["loss"], want.detach())
    torch.testing.assert_close(found["hidden"], hidden.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["weight"], weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("captured", [False, True], ids=["selected", "captured"])
def test_dropped_positions_may_hold_anything(gpu_backend, device, monkeypatch, captured):
    """T8, T20, pitfall 9: NaN in hidden where the mask or label -100 drops; zero gradient there."""
    small_chunks(monkeypatch, rows=4, columns=64)
    monkeypatch.setattr(linear_head_gpu, "capturing", lambda tensor: captured)
    case = case_with_ignored(device, bias=True, lora=True)
    case.bias[7] = -torch.inf
    mask = torch.arange(9, device=device) % 3 != 1
    want = results(case, mask=mask, backend="reference")
    dropped = ~mask | (case.token_ids == IGNORED)
    case.hidden[dropped] = torch.nan
    case.token_ids[~mask] = 10**6
    found = results(case, mask=mask, backend=gpu_backend)
    assert (found["hidden"][dropped] == 0).all()
    for name, value in found.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_kept(gpu_backend, device, rows):
    """T8, pitfall 10: all labels ignored, or no rows: loss 0 and zero gradients, not 0 / 0."""
    case = on(head_case(rows=rows), device)
    case.token_ids[:] = IGNORED
    found = results(case, backend=gpu_backend)
    assert found["loss"] == 0 and (found["hidden"] == 0).all() and (found["weight"] == 0).all()


@pytest.mark.parametrize("denominator", [7, 2.5, "tensor"])
def test_denominator(gpu_backend, device, denominator):
    """Pitfalls 11, 16: a number, or a count that stays on the device."""
    case = case_with_ignored(device)
    kept = (case.token_ids != IGNORED).sum()
    given = kept + 3 if denominator == "tensor" else denominator
    plain, divided = results(case, backend=gpu_backend), results(case, denominator=given, backend=gpu_backend)
    for name, value in plain.items():
        torch.testing.assert_close(divided[name], value * (kept / given), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")], ids=str)
def test_labels_out_of_range(gpu_backend, device, monkeypatch, trained):
    """T9: the loss becomes NaN without a wait; FASTRL_DEBUG=1 raises."""
    case = on(head_case(rows=4), device)
    case.token_ids[1] = 129
    found = results(case, trained=trained, backend=gpu_backend)
    assert found["loss"].isnan() and found["hidden"][1].isnan().all()
    assert torch.isfinite(found["hidden"][[0, 2, 3]]).all()
    monkeypatch.setenv("FASTRL_DEBUG", "1")
    with pytest.raises(ValueError, match=r"linear_cross_entropy: labels: expected ids in \[0, 129\), got 129"):
        results(case, trained=trained, backend=gpu_backend)


def test_repeatable_and_second_backward(gpu_backend, device):
    """T13, T15, pitfall 44: same bits on every run; a second backward repeats the first; double backward raises."""
    case = case_with_ignored(device, dtype=DTYPES[-1])
    first, second = results(case, backend=gpu_backend), results(case, backend=gpu_backend)
    assert all(torch.equal(first[name], second[name]) for name in first)
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    loss = linear_cross_entropy(case.hidden, case.weight, case.token_ids, backend=gpu_backend)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    (gradient,) = torch.autograd.grad(loss**2, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_compiles_without_graph_breaks(gpu_backend, device):
    """T32: fullgraph=True, forward and backward, equal to eager."""
    case = case_with_ignored(device)

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, case.token_ids, denominator=5, backend=gpu_backend)

    eager = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
    compiled = [case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a.grad, b.grad)
