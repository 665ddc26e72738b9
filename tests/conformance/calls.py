"""One call of every op with every tensor argument, in a form that a test can run on changed tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl import ops
from fastrl.ops.backend import DEVICES, NATIVE_BACKENDS

Tensors = dict[str, Tensor]


class Call(NamedTuple):
    name: str
    backend: str
    tensors: Tensors
    run: Callable[..., object]  # takes the tensors by name and `backend`
    leaves: tuple[str, ...] = ()  # get a gradient
    per_token: tuple[str, ...] = ()  # float arguments that may hold anything where the mask drops
    per_row: tuple[str, ...] = ()  # likewise in rows that keep nothing
    # No library product: same bits in every layout and with any number of threads. Those of Triton's token_logprobs
    # follow the layout where rows are a multiple of 16 apart, which these are not.
    exact: bool = False


def evaluate(call: Call, tensors: Tensors | None = None) -> Tensors:
    """Every output, and the gradient of every leaf under the tensors "upstream 0", ... (1 for outputs without one)."""
    tensors = dict(call.tensors if tensors is None else tensors)
    upstreams = {key: tensors.pop(key) for key in list(tensors) if key.startswith("upstream")}
    leaves = {name: tensors[name].detach().requires_grad_() for name in call.leaves}
    outputs = flatten(call.run(**{**tensors, **leaves}, backend=call.backend))
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    differentiable = {f"upstream {i}": output for i, output in enumerate(outputs) if output.requires_grad}
    if leaves:
        given = [upstreams.get(name, torch.ones_like(output)) for name, output in differentiable.items()]
        gradients = torch.autograd.grad(list(differentiable.values()), list(leaves.values()), given)
        found |= {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return found


def flatten(outputs: object) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    assert isinstance(outputs, (tuple, list))
    return [tensor for part in outputs for tensor in flatten(part)]


def all_calls(
    batch: int = 3,
    tokens: int = 5,
    vocab: int = 37,
    width: int = 24,
    rank: int = 3,
    outputs: int = 7,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backends: tuple[str, ...] | None = None,
) -> list[Call]:
    """Every op on each of `backends` that it has; by default those for tensors on `device`, `reference` included.

    width, rank, outputs: of the head and of the LoRA layer, which has so many columns of outputs.
    The mask drops slots inside rows and the whole of row 1.
    """
    if backends is None:
        backends = ("reference", *(name for name, devices in DEVICES.items() if torch.device(device).type in devices))
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * std).to(dtype)

    mask = torch.rand(batch, tokens, generator=g) < 0.6
    mask[0, -1], mask[1] = True, False
    shape = (batch, tokens)
    ids = torch.randint(0, vocab, shape, generator=g)
    upstreams = {f"upstream {i}": torch.randn(shape, generator=g) for i in range(2)}
    head: Tensors = {"hidden": normal(*shape, width), "weight": normal(vocab, width, std=0.5)}
    adapter: Tensors = {
        "bias": normal(vocab),
        "lora_a": normal(rank, width, std=0.3),
        "lora_b": normal(vocab, rank, std=0.3),
    }
    layer: Tensors = {"x": normal(*shape, width), "weight": normal(outputs, width, std=0.3), "bias": normal(outputs)}
    layer |= {"lora_a": normal(rank, width, std=0.3), "lora_b": normal(outputs, rank)}
    sibling: Tensors = {"weight2": normal(5, width, std=0.3), "lora_a2": normal(2, width), "lora_b2": normal(5, 2)}
    of_layer: Tensors = {"upstream 0": normal(*shape, outputs), "upstream 1": normal(*shape, 5)}
    rollout: Tensors = {name: -normal(*shape).abs() for name in ("logprobs", "ref_logprobs")}
    rollout |= {"values": normal(*shape), "scores": normal(batch), "mask": mask}
    update: Tensors = {"logprobs": rollout["logprobs"], "values": rollout["values"]}
    update["old_logprobs"] = update["logprobs"] + normal(*shape, std=0.3)
    update["old_values"] = update["values"] + normal(*shape, std=0.3)
    update |= {"advantages": normal(*shape), "returns": normal(*shape), "entropy": normal(*shape).abs(), "mask": mask}
    count = max(12, batch * tokens // 40)
    groups: Tensors = {
        "scores": normal(count),
        "group_ids": torch.randint(0, count // 4, (count,), generator=g),
        "ranks": torch.randint(0, 3, (count,), generator=g),
        "margins": normal(count).abs(),
    }

    def of_head(op: Callable[..., object], **options: object) -> Callable[..., object]:
        def run(hidden, weight, ids, mask, backend, bias=None, lora_a=None, lora_b=None):
            lora = None if lora_a is None else (lora_a, lora_b, 0.5)
            return op(hidden, weight, ids, bias=bias, lora=lora, mask=mask, backend=backend, **options)

        return run

    def token_logprobs(logits, ids, mask, backend):
        asked = {"return_entropy": True, "return_top1": True}
        return ops.token_logprobs(logits, ids, mask=mask, temperature=0.7, **asked, backend=backend)

    def lora_linear(dropout: float) -> Callable[..., object]:
        def run(x, weight, lora_a, lora_b, bias, backend):
            if dropout:
                torch.manual_seed(0)
            return ops.lora_linear(x, weight, lora_a, lora_b, 0.5, bias=bias, dropout=dropout, backend=backend)

        return run

    def lora_linear_group(x, weight, lora_a, lora_b, bias, weight2, lora_a2, lora_b2, backend):
        layers = [
            ops.LoRAWeights(weight, lora_a, lora_b, 0.5, bias),
            ops.LoRAWeights(weight2, lora_a2, lora_b2, 2.0),
        ]
        return ops.lora_linear_group(x, layers, backend=backend)

    logprobs = of_head(ops.linear_logprobs, temperature=0.7, return_entropy=True, return_top1=True)
    cross_entropy = of_head(ops.linear_cross_entropy, logit_scale=0.5, softcap=9.0)
    targets: Tensors = {"ids": ids, "mask": mask}
    one = {"upstream 0": of_layer["upstream 0"]}
    pairs = ("logprobs", "ref_logprobs", "values")
    returned: Tensors = {"rewards": normal(*shape), "values": normal(*shape), "mask": mask}
    returned |= {"gae_lambda": torch.rand(batch, generator=g), "bootstrap_value": normal(batch)}
    returned["dones"] = torch.rand(shape, generator=g) < 0.2
    everything = (*head, *adapter)

    # (name, tensors, run, leaves, per token, per row, exact)
    table = [
        ("token_logprobs", {"logits": normal(*shape, vocab, std=3), **targets, **upstreams}, token_logprobs,
         ("logits",), ("logits",), (), True),
        ("linear_logprobs", {**head, **targets, **upstreams}, logprobs, ("hidden",), ("hidden",), (), False),
        ("linear_logprobs, trained", {**head, **adapter, **targets, **upstreams}, logprobs, everything,
         ("hidden",), (), False),
        ("linear_cross_entropy", {**head, **targets}, cross_entropy, ("hidden",), ("hidden",), (), False),
        ("linear_cross_entropy, trained", {**head, **adapter, **targets}, cross_entropy, everything,
         ("hidden",), (), False),
        ("lora_linear", {**layer, **one}, lora_linear(0.0), tuple(layer), (), (), False),
        ("lora_linear, dropout", {**layer, **one}, lora_linear(0.3), tuple(layer), (), (), False),
        ("lora_linear_group", {**layer, **sibling, **of_layer}, lora_linear_group, (*layer, *sibling), (), (), False),
        ("gae", returned, ops.gae, (), ("rewards", "values"), ("bootstrap_value",), True),
        ("ppo_advantages", rollout, ops.ppo_advantages, (), pairs, ("scores",), True),
        ("ppo_advantages, k3", rollout, with_options(ops.ppo_advantages, kl_estimator="k3", kl_clip=1.0, gamma=0.9),
         (), pairs, ("scores",), True),
        ("ppo_loss", update, with_options(ops.ppo_loss, ent_coef=0.1, dual_clip=3.0),
         ("logprobs", "values", "entropy"), tuple(name for name in update if name != "mask"), (), True),
        ("ranking_loss", groups, with_options(ops.ranking_loss, center_coef=0.1), ("scores",), (), (), True),
    ]  # fmt: skip
    return [
        Call(name, backend, moved(tensors, device), *fields, exact=exact and backend != "reference")
        for name, tensors, *fields, exact in table
        for backend in ("reference", *NATIVE_BACKENDS[name.split(",")[0]])
        if backend in backends
    ]


def moved(tensors: Tensors, device: torch.device | str) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def with_options(op: Callable[..., object], **options: object) -> Callable[..., object]:
    def run(backend, **tensors):
        return op(**tensors, **options, backend=backend)

    return run


def label(call: Call) -> str:
    return f"{call.name} ({call.backend})"


def assert_same(call: Call, found: Tensors, expected: Tensors, tolerance: float, what: str) -> None:
    """Equal bit for bit where the call is exact, and flags; else within `tolerance` of the largest entry."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        want = expected[name]
        if call.exact or value.dtype == torch.bool:
            assert torch.equal(value, want), f"{label(call)}: {what}: {name} differs"
            continue
        scale = want.abs().max().clamp(min=1.0).item() if want.numel() else 1.0
        message = f"{label(call)}: {what}: {name}"
        torch.testing.assert_close(value, want, rtol=tolerance, atol=tolerance * scale, msg=message)
