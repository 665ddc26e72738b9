"""lora_linear and lora_linear_group against PEFT's LoRA layer and the bare GEMMs."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from fastrl.benches.harness import Case, compiled, ours
from fastrl.ops import LoRAWeights, lora_linear, lora_linear_group
from fastrl.ops.lora_linear import plain

RANK, SCALING = 16, 2.0
LAYER = {"cpu": (2048, 576, (1536,)), "cuda": (8192, 4096, (4096,))}
SIBLINGS = {"cpu": (2048, 576, (576, 192, 192)), "cuda": (8192, 4096, (4096, 1024, 1024))}  # query, key, value
SMALL = {"cpu": [], "cuda": [(64, 4096, (4096,)), (2048, 576, (1536,))]}


def cases(device: str, quick: bool = False) -> list[Case]:
    if quick:
        return [case(128, 64, (96,), wrt, device, quick) for wrt in ((), ("x",))]
    return [
        case(*LAYER[device], (), device, quick),
        case(*LAYER[device], ("x",), device, quick),
        case(*SIBLINGS[device], ("x",), device, quick),
        *(case(*shape, ("x",), device, quick) for shape in SMALL[device]),
    ]


def case(rows: int, k: int, outs: tuple[int, ...], wrt: tuple[str, ...], device: str, quick: bool) -> Case:
    """One LoRA layer (lora_linear) or siblings that share x (lora_linear_group)."""
    dtype = torch.bfloat16
    numbers = range(len(outs))

    def make(rows: int):
        inputs = {"x": torch.randn(rows, k).to(dtype)}
        for n, out in enumerate(outs):
            inputs[f"weight{n}"] = (torch.randn(out, k) / k**0.5).to(dtype)
            inputs[f"lora_a{n}"] = (torch.randn(RANK, k) / k**0.5).to(dtype)
            inputs[f"lora_b{n}"] = (torch.randn(out, RANK) / RANK**0.5).to(dtype)
        return inputs

    def eager(i):
        return tuple(
            linear(i["x"], w) + linear(linear(i["x"], a), b) * SCALING for w, a, b in (layer(i, n)[:3] for n in numbers)
        )

    def small(i):  # what dispatch takes below a size
        return tuple(plain(i["x"], *layer(i, n)) for n in numbers)

    thin = rows * RANK * (len(outs) * k + sum(outs))  # multiply-adds of an adapter product on each side
    products = rows * k * sum(outs) * (2 if wrt else 1) + thin * (3 if wrt else 1)
    return Case(
        op="lora_linear" if len(outs) == 1 else "lora_linear_group",
        shape=f"{rows}x{k}->{','.join(map(str, outs))} r={RANK}",
        dtype=dtype,
        make=make,
        rows=rows,
        gate_rows=256,
        wrt=wrt and ("x", *(f"lora_{side}{n}" for n in numbers for side in "ab")),
        truth=lambda i: fused(i, numbers, "reference"),
        providers={
            "torch eager": eager,
            **({} if quick else compiled(eager)),
            **({"peft lora.Linear": peft_layers(k, outs)} if find_spec("peft") else {}),
            **({"fastrl, small": small} if device == "cuda" else {}),
            "fastrl reference": lambda i: fused(i, numbers, "reference"),
            **ours("lora_linear", device, dtype, lambda i, backend: fused(i, numbers, backend)),
        },
        floors={"bare GEMMs": lambda i: tuple(linear(i["x"], i[f"weight{n}"]) for n in numbers)},
        # a GPU reads the weights more slowly than it multiplies few rows with them
        bound="read" if device == "cuda" and rows < 256 else "gemm",
        bytes=2 * (rows * k + (k + rows) * sum(outs)) * (2 if wrt else 1),
        flops=2 * products,
    )


def layer(i, n: int) -> LoRAWeights:
    return LoRAWeights(i[f"weight{n}"], i[f"lora_a{n}"], i[f"lora_b{n}"], SCALING)


def fused(i, numbers, backend):
    layers = [layer(i, n) for n in numbers]
    if len(layers) == 1:
        only = layers[0]
        return lora_linear(i["x"], *only[:3], only.scaling, backend=backend)
    return tuple(lora_linear_group(i["x"], layers, backend=backend))


def peft_layers(k: int, outs: tuple[int, ...]):
    """PEFT's own modules, given the weights of the inputs; adapters in the dtype of x, which is PEFT's faster mode."""
    from peft import LoraConfig, get_peft_model

    @functools.cache
    def modules(device: torch.device):
        base = nn.ModuleList(nn.Linear(k, out, bias=False) for out in outs).to(device, torch.bfloat16)
        config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=[str(n) for n in range(len(outs))])
        adapted: Any = get_peft_model(base, config, autocast_adapter_dtype=False).base_model
        return list(adapted.model)

    def run(i):
        layers = modules(i["x"].device)
        for n, module in enumerate(layers):
            holders = module.base_layer, module.lora_A["default"], module.lora_B["default"]
            for holder, tensor in zip(holders, layer(i, n)[:3], strict=True):
                holder._parameters["weight"] = tensor
        return tuple(module(i["x"]) for module in layers)

    return run


def test_lora_linear(benchmark, run):
    benchmark(run)


if __name__ == "__main__":
    from fastrl.commands.bench import main

    main(["--op", "lora_linear"])
