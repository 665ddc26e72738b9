"""Tensors that are no strided numbers in memory: every op takes them as torch does, or refuses them by name."""

from __future__ import annotations

import pytest
import torch
from conformance.calls import all_calls, evaluate, flatten, label
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrl.ops import gae, linear_cross_entropy, linear_logprobs, lora_linear, ppo_loss, ranking_loss, token_logprobs

CALLS = all_calls(backends=("reference", "cpu"))
NATIVE = [call for call in CALLS if call.backend == "cpu"]
DIFFERENTIABLE = [call for call in CALLS if call.leaves]


class Wrapped(torch.Tensor):
    """A tensor subclass with another tensor's numbers and no memory of its own, as sharded and quantised ones are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(str(function))


class Named(torch.Tensor):
    """A subclass whose numbers are its own."""


def nested(tensor, layout):
    return torch.nested.nested_tensor(list(tensor.unbind()), layout=layout)


UNUSUAL = {
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.to_mkldnn() if t.dtype == torch.float32 else None,
    "nested": lambda t: nested(t, torch.strided) if t.ndim > 1 else None,
    "jagged": lambda t: nested(t, torch.jagged) if t.ndim > 1 else None,
    "negated": lambda t: torch._neg_view(t) if t.is_floating_point() else None,
    "quantised": lambda t: (
        torch.quantize_per_tensor(t, 0.1, 0, torch.qint8) if t.dtype == torch.float32 and t.numel() else None
    ),
    "complex": lambda t: t.to(torch.complex64) if t.is_floating_point() else None,
    "conjugate": lambda t: t.to(torch.complex64).conj() if t.is_floating_point() else None,
    "wrapped": Wrapped,
    "a list": lambda t: t.tolist(),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("call", CALLS, ids=label)
def test_refused_by_name(call, kind):
    """A ValueError that names the op, whichever argument it is; gae_lambda and denominators may be numbers."""
    tensors = {name: tensor for name, tensor in call.tensors.items() if not name.startswith("upstream")}
    for name, tensor in tensors.items():
        unusual = UNUSUAL[kind](tensor)
        if unusual is None:
            continue
        with pytest.raises(ValueError, match=rf"{call.name.split(',')[0]}.*: expected"):
            call.run(**{**tensors, name: unusual}, backend=call.backend)


@pytest.mark.parametrize("call", NATIVE, ids=label)
def test_a_subclass_with_its_own_numbers(call):
    want = evaluate(call)
    tensors = {name: t if name.startswith("upstream") else t.as_subclass(Named) for name, t in call.tensors.items()}
    for name, value in evaluate(call, tensors).items():
        torch.testing.assert_close(value.as_subclass(torch.Tensor), want[name])


@pytest.mark.parametrize("call", NATIVE, ids=label)
def test_no_memory_is_no_crash(call):
    """Zeros without memory, as autograd makes them, are an error where they come as an argument."""
    tensors = {name: tensor for name, tensor in call.tensors.items() if not name.startswith("upstream")}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        zeros = torch._efficientzerotensor(tensor.shape)
        try:
            found = flatten(call.run(**{**tensors, name: zeros}, backend=call.backend))
        except RuntimeError as error:
            assert "memory" in str(error) or "ZeroTensor" in str(error) or "zero" in str(error)
            continue
        want = flatten(call.run(**{**tensors, name: torch.zeros_like(tensor)}, backend=call.backend))
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("upstream", ["zeros without memory", "negated", "sparse"])
@pytest.mark.parametrize("call", [call for call in NATIVE if call.leaves], ids=label)
def test_unusual_upstreams(call, upstream):
    """Backward passes take what autograd hands them: torch.sgn's gradient is zeros without memory."""
    tensors = {name: tensor for name, tensor in call.tensors.items() if not name.startswith("upstream")}
    leaves = {name: tensors[name].clone().requires_grad_() for name in call.leaves}

    def gradients(make):
        outputs = [y for y in flatten(call.run(**{**tensors, **leaves}, backend=call.backend)) if y.requires_grad]
        return torch.autograd.grad(outputs, list(leaves.values()), [make(y) for y in outputs])

    makers = {
        "zeros without memory": (lambda y: torch._efficientzerotensor(y.shape), torch.zeros_like),
        "negated": (lambda y: torch._neg_view(torch.ones_like(y)), lambda y: -torch.ones_like(y)),
        "sparse": (lambda y: torch.ones_like(y).to_sparse() if y.ndim else torch.ones_like(y), torch.ones_like),
    }
    make, same = makers[upstream]
    for found, want in zip(gradients(make), gradients(same), strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("call", CALLS, ids=label)
def test_fake_tensors(call):
    """Shapes and dtypes without memory, forward and backward."""
    want = evaluate(call)
    with FakeTensorMode() as mode:
        tensors = {name: mode.from_tensor(tensor) for name, tensor in call.tensors.items()}
        found = evaluate(call, tensors)
    for name, value in want.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)


def test_fake_tensors_outside_of_their_mode():
    with FakeTensorMode():
        logits, ids = torch.randn(3, 9), torch.tensor([0, 1, 2])
    assert token_logprobs(logits, ids).shape == (3,)


def test_fake_mode_over_real_tensors():
    """A mode that makes every new tensor fake, over inputs that are not."""
    logits, ids = torch.randn(3, 9), torch.tensor([0, 1, 2])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert token_logprobs(logits, ids).shape == (3,)
        assert gae(torch.zeros(2, 3), torch.zeros(2, 3))[0].shape == (2, 3)


@pytest.mark.parametrize("call", [call for call in CALLS if call.backend == "reference"], ids=label)
def test_meta_tensors(call):
    """What a meta device is for: shapes and dtypes, forward and backward."""
    want = evaluate(call)
    found = evaluate(call._replace(backend=None), {name: t.to("meta") for name, t in call.tensors.items()})
    for name, value in want.items():
        assert (found[name].shape, found[name].dtype, found[name].device.type) == (value.shape, value.dtype, "meta")


def test_graphs_that_make_fx_records_hold_the_ops():
    from torch.fx.experimental.proxy_tensor import make_fx

    logits, ids = torch.randn(3, 9), torch.tensor([0, 1, 2])
    graph = make_fx(lambda x: token_logprobs(x, ids))(logits)
    other = torch.randn(3, 9)
    torch.testing.assert_close(graph(other), token_logprobs(other, ids))


# ---- second derivatives, torch.func, forward mode ----


@pytest.mark.parametrize("call", DIFFERENTIABLE, ids=label)
def test_second_derivatives_are_right_or_raise(call):
    """Of a plain sum: the gradient of a native op has a graph that raises, also where unused inputs are allowed."""
    tensors = {name: tensor for name, tensor in call.tensors.items() if not name.startswith("upstream")}
    for name in call.leaves:
        leaf = tensors[name].clone().requires_grad_()
        outputs = flatten(call.run(**{**tensors, name: leaf}, backend=call.backend))
        total = sum(y.sum() for y in outputs if y.requires_grad)
        (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
        if call.backend == "reference":
            continue
        with pytest.raises(RuntimeError, match="differentiable once.*backend='reference'"):
            torch.autograd.grad(gradient.sum(), leaf, allow_unused=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            (gradient.square().sum()).backward()


def test_gradients_with_a_graph_are_the_gradients():
    logits, ids = torch.randn(3, 9, requires_grad=True), torch.tensor([0, 1, 2])
    loss = -token_logprobs(logits, ids, backend="cpu").mean()
    plain = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, logits, create_graph=True)[0], plain)


LOSSES = {
    "token_logprobs": lambda x, backend: token_logprobs(x, torch.arange(12) % 5, backend=backend).sum(),
    "linear_logprobs": lambda x, backend: linear_logprobs(
        x, torch.linspace(-1, 1, 45).view(9, 5), torch.arange(12) % 9, backend=backend
    ).sum(),
    "linear_cross_entropy": lambda x, backend: linear_cross_entropy(
        x, torch.linspace(-1, 1, 45).view(9, 5), torch.arange(12) % 9, backend=backend
    ),
    "lora_linear": lambda x, backend: lora_linear(
        x, torch.ones(3, 5), torch.ones(2, 5), torch.linspace(0, 1, 6).view(3, 2), 0.5, backend=backend
    ).square().sum(),
    "ppo_loss": lambda x, backend: ppo_loss(
        x, x, x.detach() + 0.1, *[torch.ones(12, 5)] * 3, torch.ones(12, 5, dtype=torch.bool), backend=backend
    )[0],
    "ranking_loss": lambda x, backend: ranking_loss(
        x.flatten(), torch.arange(60) // 4, torch.arange(60) % 4, backend=backend
    )[0],
}  # fmt: skip


@pytest.mark.parametrize("op", LOSSES)
def test_functional_transforms(op):
    """torch.func and forward mode get the plain line, at every size; a native backend is refused by name."""
    x = torch.linspace(-1, 1, 60).view(12, 5)
    v = torch.linspace(0, 1, 60).view(12, 5)
    leaf = x.clone().requires_grad_()
    LOSSES[op](leaf, None).backward()
    torch.testing.assert_close(torch.func.grad(LOSSES[op])(x, None), leaf.grad)
    (_, tangent) = torch.func.jvp(lambda x: LOSSES[op](x, None), (x,), (v,))
    torch.testing.assert_close(tangent, (leaf.grad * v).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = LOSSES[op](torch.autograd.forward_ad.make_dual(x, v), None)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, (leaf.grad * v).sum())
    rows = torch.func.vmap(lambda x: LOSSES[op](x, None))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(rows, torch.stack([LOSSES[op](x, None), LOSSES[op](2 * x, None)]))
    with pytest.raises(ValueError, match=f"{op}: backend='cpu' is not possible under torch.func"):
        torch.func.grad(LOSSES[op])(x, "cpu")


def test_advantages_are_data_to_every_mode():
    rewards, tangent = torch.randn(2, 3), torch.ones(2, 3)
    values = torch.randn(2, 3)
    (plain, _), (derivative, _) = torch.func.jvp(lambda r: gae(r, values), (rewards,), (tangent,))
    torch.testing.assert_close(plain, gae(rewards, values)[0])
    assert (derivative == 0).all()
    batched, _ = torch.func.vmap(lambda r: gae(r, values))(torch.stack([rewards, rewards + 1]))
    torch.testing.assert_close(batched[1], gae(rewards + 1, values)[0])
