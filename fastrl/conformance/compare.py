"""What the cases share: comparisons with float64 whose failure is one line, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import shorten
from typing import Any, NoReturn

import torch
from torch import Tensor


def fail(given: str, expected: object, got: object) -> NoReturn:
    """Ends a case: the input, what it should give, what it gave."""
    raise AssertionError(f"{given}: expected {expected}, got {got}")


def expect(ok: bool | Tensor, given: str, expected: object, got: object) -> None:
    if not ok:
        fail(given, expected, got)


def close(got: Tensor, truth: Tensor, given: str, *, rtol: float = 0.0, atol: float = 1e-5) -> None:
    """Each element within `atol + rtol * |truth|` of the float64 truth; infinities and shape are equal."""
    expect(got.shape == truth.shape, given, f"shape {tuple(truth.shape)}", f"shape {tuple(got.shape)}")
    got, truth = got.detach().double().reshape(-1), truth.detach().double().reshape(-1)
    error = torch.where(got == truth, 0.0, (got - truth).abs())
    wrong = ~(error <= atol + rtol * truth.abs().clamp(max=1e300))
    if wrong.any():
        worst = int(torch.where(error.isnan(), torch.inf, error).masked_fill(~wrong, -1).argmax())
        fail(f"{given}, element {worst} of {len(truth)}", f"{truth[worst]:.9g}", f"{got[worst]:.9g}")


def close_to_scale(got: Tensor, truth: Tensor, given: str, *, rtol: float) -> None:
    """Each element within `rtol` of the largest |truth|: what sums of products can promise."""
    close(got, truth, given, atol=rtol * float(truth.abs().max()) if truth.numel() else 0.0)


def finite(x: Tensor, given: str) -> None:
    bad = ~torch.isfinite(x.detach())
    if bad.any():
        first = int(bad.reshape(-1).nonzero()[0])
        fail(f"{given}, element {first} of {x.numel()}", "a finite number", float(x[bad][0]))


def same_bits(a: Tensor, b: Tensor, given: str) -> None:
    differ = (a != b) & ~(a.isnan() & b.isnan())
    if differ.any():
        fail(given, f"the same bits, {float(a[differ][0]):.9g}", f"{float(b[differ][0]):.9g}")


def gradients(
    function: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    upstream: Tensor | None,
    *,
    of: tuple[str, ...] | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(output, {name: gradient}) of `function` for the inputs named in `of`, or all that are floats."""
    trained = of or tuple(k for k, v in inputs.items() if v.is_floating_point())
    leaves = {k: v.detach().clone().requires_grad_(k in trained) for k, v in inputs.items()}
    output = function(*leaves.values(), **options)
    wanted = {k: v for k, v in leaves.items() if v.requires_grad}
    total = output if upstream is None else (output * upstream.to(output.dtype)).sum()
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    for name, gradient in zip(wanted, found, strict=True):
        expect(gradient is not None, f"gradient of {name}", "a tensor", None)
    return output.detach(), dict(zip(wanted, found, strict=True))


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def layouts(x: Tensor):
    """(name, the same values) in memory layouts that a caller may hand over."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), 7)
    wide[..., 1:-2] = x
    yield "a slice of wider rows", wide[..., 1:-2]
    if x.ndim > 1:
        yield "a transposed view", x.transpose(0, -1).contiguous().transpose(0, -1)
        yield "every second row", x.repeat_interleave(2, 0)[::2]
    odd = x.new_empty(x.numel() + 1)
    odd[1:] = x.reshape(-1)
    yield "an odd offset", odd[1:].view(x.shape)


def naive_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """log softmax(logits)[token] in plain torch: the truth, given float64 logits."""
    return logits.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]


def second_backward_of(loss: Tensor, leaf: Tensor, before: Tensor, given: str) -> None:
    """The input is as it was `before`; a second backward pass repeats the first's gradient, or raises."""
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    same_bits(before, leaf.detach(), f"{given} after backward")
    kept = first.clone()
    try:
        (second,) = torch.autograd.grad(loss, leaf)
    except RuntimeError:
        return
    same_bits(kept, second, f"{given}: second backward")
    same_bits(kept, first, f"{given}: first gradient after the second backward")


def compiled(function: Callable[..., Tensor], inputs: tuple[Any, ...], given: str) -> None:
    """torch.compile makes one graph of it, whose result is the eager one."""
    torch.compiler.reset()
    eager = function(*inputs)
    try:
        got = torch.compile(function, backend="eager", fullgraph=True)(*inputs)
    except Exception as error:  # noqa: BLE001 - dynamo's own, and those of what it traces
        reason = shorten(str(error).split("Explanation:")[0], 150, placeholder="...")
        raise AssertionError(f"{given}: expected one graph, got {type(error).__name__}: {reason}") from None
    close(got, eager.double(), f"{given}, compiled")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def head_inputs(rows: int, hidden: int, vocab: int) -> dict[str, Tensor]:
    states, weight = torch.randn(rows, hidden), torch.randn(vocab, hidden)
    return {"hidden": states, "weight": weight, "token_ids": torch.randint(vocab, (rows,))}


def naive_head(hidden, weight, token_ids, *, bias=None, softcap=None):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return naive_logprobs(logits, token_ids)


def naive_loss(hidden, weight, labels):
    keep = labels != -100
    return -naive_head(hidden[keep], weight, labels[keep]).mean()


def weight_gradient_over_rows(function, naive, upstream: Tensor) -> None:
    """Rows that all push the same way: a running sum in bfloat16 would stop growing."""
    weight = torch.tensor([[0.5, -0.5], [0.25, 0.125]]).bfloat16()
    inputs = {"hidden": torch.ones(6000, 2).bfloat16(), "weight": weight, "token_ids": torch.ones(6000).long()}
    _, truth = gradients(naive, double(inputs), upstream)
    _, got = gradients(function, inputs, upstream)
    close(got["weight"], truth["weight"], "6000 equal rows bfloat16: gradient of weight", rtol=0.02, atol=0)
