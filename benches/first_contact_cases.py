"""What first contact with a GPU measures, most decisive first; first_contact.md says what each case decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from fastrl.benches import (
    bench_gae,
    bench_linear_cross_entropy,
    bench_linear_logprobs,
    bench_lora_linear,
    bench_ppo_advantages,
    bench_ppo_loss,
    bench_token_logprobs,
)
from fastrl.benches.harness import Case, Inputs, Overwriting
from fastrl.ops import backend
from fastrl.ops.linear_head_chunks import add_product, multiply
from fastrl.ops.linear_head_gpu import row_kernel

BF16 = torch.bfloat16
# Slow to compile or to run, or of no consequence here; `fastrl bench` has them.
LEFT_OUT = "torch.compile", "torch chunked", "torch loop", "trl chain", "fastrl reference"


class Sizes(NamedTuple):
    products: list[tuple[int, int, int]]  # rows of a chunk, hidden size, vocabulary
    row_kernels: tuple[int, list[int]]  # rows, vocabularies
    token_logprobs: list[tuple[int, int, torch.dtype]]
    heads: list[tuple[int, int, int]]
    lora: list[tuple[int, int, int]]  # rows, inputs, outputs
    advantages: list[tuple[int, int]]  # rows, steps
    losses: list[tuple[int, int]]


FULL = Sizes(
    products=[(rows, 4096, 128256) for rows in (1024, 2048, 4096)],
    row_kernels=(1024, [128256, 151936, 49152, 32000, 262144]),
    token_logprobs=[(4096, 128256, BF16), (8192, 49152, torch.float32), (32, 128256, BF16)],
    heads=[(8192, 4096, 128256), (8192, 2048, 128256), (8192, 576, 49152)],
    lora=[(8192, 4096, 4096), (2048, 576, 1536), (64, 4096, 4096)],
    advantages=[(512, 2048), (8192, 4096)],
    losses=[(512, 2048), (8192, 2048)],
)
DRY = Sizes(
    products=[(64, 64, 1000)],
    row_kernels=(16, [1000]),
    token_logprobs=[(16, 1000, BF16)],
    heads=[(64, 64, 1000)],
    lora=[(64, 64, 96)],
    advantages=[(8, 64)],
    losses=[(8, 64)],
)


def cases(device: str, sizes: Sizes) -> Iterator[Case]:
    for case in (*products(sizes), *heads(device, sizes), *layers(device, sizes), *updates(device, sizes)):
        yield replace(case, providers={n: p for n, p in case.providers.items() if not n.startswith(LEFT_OUT)})


def products(sizes: Sizes) -> Iterator[Case]:
    """What all heads hang on: are products of bf16 with float32 results right, and as fast as those with bf16 ones."""
    for shape in sizes.products:
        yield product("logits", shape, logits_inputs, {"fp32 out": to_float32}, {"bf16 out": in_bf16})
        added = {"fp32, added to": Overwriting(add_to_float32)}
        yield product("weight gradient", shape, gradient_inputs, added, {"bf16 out, then added": Overwriting(then_add)})
        ways = {"bf16 out": in_bf16, "bf16 out, rows apart": in_bf16_apart}
        yield product("direction", shape, direction_inputs, ways)


def product(
    name: str, shape: tuple[int, int, int], make: Callable, providers: dict, floors: dict | None = None
) -> Case:
    """The check is of all rows, since the library picks a kernel by the shape; bf16 results would be out by 2e-3."""
    rows, hidden_size, vocab = shape
    return Case(
        op="head product",
        shape=f"{name} {rows}x{hidden_size}x{vocab}",
        dtype=BF16,
        make=lambda rows: make(rows, hidden_size, vocab),
        rows=rows,
        gate_rows=rows,
        truth=lambda i: i["total"] + i["a"] @ i["b"] if "total" in i else i["a"] @ i["b"],
        providers=providers,
        floors=floors or {},
        tolerance=2e-4 if floors else None,
        flops=2 * rows * hidden_size * vocab,
    )


def logits_inputs(rows: int, hidden_size: int, vocab: int) -> Inputs:
    weight = (torch.randn(vocab, hidden_size) / hidden_size**0.5).to(BF16)
    return {"a": torch.randn(rows, hidden_size).to(BF16), "b": weight.t()}


def gradient_inputs(rows: int, hidden_size: int, vocab: int) -> Inputs:
    gradient = torch.randn(rows, vocab).to(BF16)
    return {"a": gradient.t(), "b": torch.randn(rows, hidden_size).to(BF16), "total": torch.randn(vocab, hidden_size)}


def direction_inputs(rows: int, hidden_size: int, vocab: int) -> Inputs:
    wide = torch.randn(rows, 2 * vocab).to(BF16)
    weight = (torch.randn(vocab, hidden_size) / vocab**0.5).to(BF16)
    return {"a": wide[:, :vocab].contiguous(), "wide": wide, "b": weight}


def in_bf16(i: Inputs) -> torch.Tensor:
    return torch.mm(i["a"], i["b"])


def in_bf16_apart(i: Inputs) -> torch.Tensor:
    """As where gradients lie in the memory of their float32 logits."""
    return torch.mm(i["wide"][:, : i["a"].shape[1]], i["b"])


def to_float32(i: Inputs) -> torch.Tensor:
    out = torch.empty(len(i["a"]), i["b"].shape[1], device=i["a"].device)
    multiply(i["a"], i["b"], out)
    return out


def add_to_float32(i: Inputs) -> torch.Tensor:
    add_product(i["a"], i["b"], i["total"])
    return i["total"]


def then_add(i: Inputs) -> torch.Tensor:
    i["total"] += torch.mm(i["a"], i["b"])
    return i["total"]


def heads(device: str, sizes: Sizes) -> Iterator[Case]:
    rows, vocabularies = sizes.row_kernels
    for vocab in vocabularies:
        for with_gradient in (True, False):
            yield row_kernels(rows, vocab, with_gradient, device)
    for shape in sizes.token_logprobs:
        for wrt in ((), ("logits",)):
            yield bench_token_logprobs.case(*shape, wrt, device, quick=False)
    for head in sizes.heads:
        for wrt in ((), ("hidden",)):  # the second under an upstream of its own for each token
            yield bench_linear_logprobs.case(*head, BF16, wrt, device, quick=False)
        yield bench_linear_cross_entropy.case(*head, BF16, bench_linear_cross_entropy.TRAINED, device, quick=False)


def row_kernels(rows: int, vocab: int, with_gradient: bool, device: str) -> Case:
    """What a head does between its products."""

    def run(name: str) -> Callable[[Inputs], tuple[torch.Tensor, ...]]:
        return lambda i: rows_by(name, i["logits"], i["token_ids"], with_gradient)

    def truth(i: Inputs) -> tuple[torch.Tensor, ...]:
        logprobs = i["logits"].log_softmax(-1)
        chosen = torch.nn.functional.one_hot(i["token_ids"], vocab)
        return logprobs.gather(-1, i["token_ids"][:, None])[:, 0], *[chosen - logprobs.exp()] * with_gradient

    return Case(
        op="head rows",
        shape=f"{rows}x{vocab}" + (" with gradient" if with_gradient else ""),
        dtype=BF16,
        make=lambda rows: {"logits": 3 * torch.randn(rows, vocab), "token_ids": torch.randint(vocab, (rows,))},
        rows=rows,
        truth=truth,
        providers={f"fastrl {name}": run(name) for name in row_backends(device)},
        bound="copy" if with_gradient else "read",
        bytes=rows * vocab * (6 if with_gradient else 4),
    )


def row_backends(device: str) -> list[str]:
    if device == "cpu":
        return []
    on = torch.device(device), torch.float32
    return [name for name in ("cuda", "triton") if not backend.why_not(name, "linear_logprobs", *on)]


def rows_by(name: str, logits: torch.Tensor, token_ids: torch.Tensor, with_gradient: bool) -> tuple[torch.Tensor, ...]:
    logprobs, stats = logits.new_empty(len(logits)), logits.new_empty(len(logits), 2)
    gradient = torch.empty_like(logits, dtype=BF16) if with_gradient else None
    row_kernel(name, logits, token_ids, None, 1.0, 0.0, logprobs, stats, None, None, gradient, None)
    return (logprobs,) if gradient is None else (logprobs, gradient)


def layers(device: str, sizes: Sizes) -> Iterator[Case]:
    for rows, inputs, outputs in sizes.lora:
        for wrt in ((), ("x",)):
            yield from both_ways(bench_lora_linear.case(rows, inputs, (outputs,), wrt, device, quick=False))


def updates(device: str, sizes: Sizes) -> Iterator[Case]:
    """The float32 ops of PPO."""
    for rows, length in sizes.advantages:
        yield from both_ways(bench_ppo_advantages.case(rows, length, device))
        yield from both_ways(bench_gae.case(rows, length, True, device))
    for rows, length in sizes.losses:
        loss = bench_ppo_loss.case(rows, length, device, quick=False)
        yield from both_ways(replace(loss, wrt=(), bytes=rows * length * 25))  # the gradients are not written
        yield from both_ways(loss)


def both_ways(case: Case) -> tuple[Case, Case]:
    """Calls, which show the slower of host and device, and replays of a CUDA graph: the device's time alone."""
    return case, replace(case, captured=True)
