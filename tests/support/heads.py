"""Cases of a language-model head, shared by the tests of linear_logprobs and linear_cross_entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from oracle import GPU_TANH, assert_as_accurate, near_arg_max

from fastrl.ops import linear_head_chunks, linear_head_cpu, linear_logprobs


class HeadCase(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None
    token_ids: torch.Tensor
    upstream: torch.Tensor  # (2, rows): of the log-probs and of the entropies

    def to(self, dtype):
        floats = (None if t is None else t.to(dtype) for t in self[:5])
        return HeadCase(*floats, *self[5:])


PARAMETERS = HeadCase._fields[:5]
SCALING = 0.5


def head_case(rows=23, vocab=129, width=37, dtype=torch.float32, bias=False, lora=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, std):
        return (torch.randn(*shape, generator=g) * std).to(dtype)

    return HeadCase(
        normal(rows, width, std=1.0),
        normal(vocab, width, std=3 / width**0.5),
        normal(vocab, std=1.0) if bias else None,
        normal(4, width, std=1 / width**0.5) if lora else None,
        normal(vocab, 4, std=1.0) if lora else None,
        torch.randint(0, vocab, (rows,), generator=g),
        torch.randn(2, rows, generator=g),
    )


def lora_of(case):
    return None if case.lora_a is None else (case.lora_a, case.lora_b, SCALING)


def results(case, trained=PARAMETERS, entropy=True, **options):
    """{"logprobs", "entropy", gradient of each trained parameter} of linear_logprobs under a per-token upstream."""
    leaves = {
        name: None if tensor is None else tensor.detach().clone().requires_grad_(name in trained)
        for name, tensor in zip(PARAMETERS, case, strict=False)
    }
    case = case._replace(**leaves)
    out = linear_logprobs(
        case.hidden,
        case.weight,
        case.token_ids,
        bias=case.bias,
        lora=lora_of(case),
        return_entropy=entropy,
        **options,
    )
    out = torch.stack(out) if entropy else out[None]
    (out * case.upstream[: len(out)].to(out.dtype)).sum().backward()
    found = dict(zip(("logprobs", "entropy"), out.detach(), strict=False))
    return found | {name: leaf.grad for name, leaf in leaves.items() if leaf is not None and name in trained}


def arg_max_head(dtype=torch.float32, rows=24, vocab=130, bias=False, lora=False):
    """A head of small whole numbers, whose logits are exact in any dtype and often equal; a bias bans tokens. Row 1 is
    NaN. Returns the case, and whether each token is the arg max.
    """
    g = torch.Generator().manual_seed(vocab)

    def whole(*shape):
        return torch.randint(-1, 2, shape, generator=g).double()

    hidden, weight = whole(rows, 5), whole(vocab, 5)
    hidden[0], hidden[1] = 0, torch.nan
    biases, lora_a, lora_b = whole(vocab), whole(2, 5), whole(vocab, 2)
    biases[::7] = -torch.inf
    logits = hidden @ weight.T
    logits += (hidden @ lora_a.T) @ lora_b.T * SCALING if lora else 0
    logits += biases if bias else 0
    ids = near_arg_max(logits)
    adapter = (lora_a, lora_b) if lora else (None, None)
    case = HeadCase(hidden, weight, biases if bias else None, *adapter, ids, torch.ones(2, rows)).to(dtype)
    return case, logits.argmax(-1) == ids


def top1_of(case, trained=(), **options):
    """linear_logprobs' top1 with and without the entropy, which must be the same."""
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in trained}
    case = case._replace(**leaves)
    args, head = (case.hidden, case.weight, case.token_ids), {"bias": case.bias, "lora": lora_of(case)}
    found = [
        linear_logprobs(*args, **head, return_entropy=entropy, return_top1=True, **options) for entropy in (False, True)
    ]
    assert [len(out) for out in found] == [2, 3] and torch.equal(found[0][-1], found[1][-1])
    assert found[0][0].requires_grad == bool(trained) and not found[0][1].requires_grad
    return found[0][1]


def small_blocks(monkeypatch, rows=8, columns=64):
    """Forces many chunks of rows and blocks of the vocabulary, the last of each ragged."""
    monkeypatch.setattr(linear_head_cpu, "CHUNK_ROWS", rows)
    monkeypatch.setattr(linear_head_cpu, "BLOCK_BYTES", rows * columns * 2)


def small_chunks(monkeypatch, rows=8, columns=64):
    """The same on a GPU: chunks of `rows` rows forward; backward also blocks of about `columns` columns."""
    monkeypatch.setattr(linear_head_chunks, "MIN_ROWS", rows)
    monkeypatch.setattr(linear_head_chunks, "BLOCK_ROWS", rows)
    monkeypatch.setattr(linear_head_chunks, "WORKSPACE_BYTES", rows * columns * 4)


def on(case, device):
    return HeadCase(*(None if tensor is None else tensor.to(device) for tensor in case))


def assert_matches_float64(backend, case, **options):
    """linear_logprobs and its gradients: as accurate as eager, log-probs not above 0, gradients in their own dtypes."""
    actual = results(case, backend=backend, **options)
    eager = results(case, backend="reference", **options)
    truth = results(case.to(torch.float64), backend="reference", **options)
    assert actual.keys() == truth.keys()
    slack = 0.0 if backend == "cpu" else GPU_TANH * (options.get("softcap") or 0.0)
    for name, value in actual.items():
        assert_as_accurate(value, eager[name], truth[name], name, slack)
    assert (actual["logprobs"] <= 0).all()
    for name in actual.keys() & set(PARAMETERS):
        assert actual[name].dtype == getattr(case, name).dtype  # T30
