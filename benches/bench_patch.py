"""PEFT's LoRA layers as they are beside the same ones after `fastrl.patch`, from one token on, host time included.

    python -m fastrl.benches.bench_patch --csv benches/results/patch-cpu.csv

A patched layer is never to be slower: it computes PEFT's line where the kernels do not pay (`_line_is_faster` in
fastrl/models/fused_linear.py). Forward rows are without gradients, as in decoding.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastrl
from fastrl.benches import harness, machine, records
from fastrl.benches.bench_lora_linear import RANK, SCALING
from fastrl.benches.harness import Case, Inputs, Provider
from fastrl.ops import lora_linear
from fastrl.ops.cpu_products import is_widened

WIDTHS = ((576, 1536), (4096, 4096))  # SmolLM2-135M's MLP, the attention of a 7 B model
ROWS = (1, 16, 32, 64, 128, 256, 512, 2048)
FLOATS, BF16 = torch.float32, torch.bfloat16
DTYPES = ((FLOATS, FLOATS), (BF16, BF16), (BF16, FLOATS))  # of the base, of the adapters; the last is PEFT's default
PATIENCE = 1 << 31  # multiply-adds of a product of 16 bits in torch's own loops that are waited for: seconds a call
SLOWER = 0.97  # a speed-up below which a row is named: medians of two equal layers differ by as much


def cases(quick: bool = False) -> list[Case]:
    widths, rows = (((64, 96),), (1, 256)) if quick else (WIDTHS, ROWS)
    return [
        case(count, *width, *dtypes, training)
        for width, dtypes, training, count in itertools.product(widths, DTYPES, (False, True), rows)
        if not (training and is_widened(dtypes[0]) and count * width[0] * width[1] >= PATIENCE)
    ]


def case(rows: int, k: int, out: int, dtype: torch.dtype, adapter_dtype: torch.dtype, training: bool) -> Case:
    def make(rows: int) -> Inputs:
        return {
            "x": torch.randn(rows, k).to(dtype),
            "weight": (torch.randn(out, k) / k**0.5).to(dtype),
            "lora_a": (torch.randn(RANK, k) / k**0.5).to(adapter_dtype),
            "lora_b": (torch.randn(out, RANK) / RANK**0.5).to(adapter_dtype),
        }

    return Case(
        op="patch",
        shape=f"{rows}x{k}->{out} r={RANK} {machine.short(adapter_dtype)} adapters",
        dtype=dtype,
        make=make,
        rows=rows,
        wrt=("x", "lora_a", "lora_b") if training else (),
        truth=lambda i: lora_linear(i["x"], i["weight"], i["lora_a"], i["lora_b"], SCALING, backend="reference"),
        providers={"peft lora.Linear": on_layer(k, out, False), "fastrl.patch": on_layer(k, out, True)},
    )


def on_layer(k: int, out: int, patched: bool) -> Provider:
    """A LoRA layer of its own that takes the weights of the inputs when it sees new ones."""

    @functools.cache
    def layer() -> Any:
        config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["0"])
        model = get_peft_model(nn.Sequential(nn.Linear(k, out, bias=False)), config)
        if patched:
            fastrl.patch(model)
        return model.base_model.model[0]  # type: ignore[union-attr,index]

    last: list[Inputs] = [{}]

    def run(i: Inputs) -> torch.Tensor:
        if last[0] is not i:
            parts = layer().base_layer, layer().lora_A["default"], layer().lora_B["default"]
            for part, name in zip(parts, ("weight", "lora_a", "lora_b"), strict=True):
                part._parameters["weight"] = i[name]
            last[0] = i
        return layer()(i["x"])

    return run


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastrl.benches.bench_patch", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, seconds")
    parser.add_argument("--threads", type=int, help="default: what torch takes, one per core")
    parser.add_argument("--csv", type=Path, default=Path("fastrl-bench/patch.csv"), help="CSV to update")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    environment = machine.environment("cpu")
    budget = harness.QUICK if args.quick else harness.Budget(seconds=2.0)
    rows: list[records.Row] = []
    todo = cases(args.quick)
    for number, each in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {each.label}", file=sys.stderr, flush=True)
        new = [row | environment for row in harness.measure(each, "cpu", {}, budget)]
        records.write(args.csv, records.merge(records.read(args.csv), new))
        rows += new
    print(f"{records.table(rows)}\n\n{args.csv} written")
    ours = [row for row in rows if row["provider"] == "fastrl.patch"]
    wrong = [row for row in ours if row["status"] != "ok"]
    slower = [row for row in ours if row["status"] == "ok" and float(row["speedup"]) < SLOWER]
    for row in wrong + slower:
        print(f"{row['shape']} {row['dtype']} {row['direction']}: {row.get('speedup', '')} {row['status']}")
    if wrong:
        sys.exit("fastrl.patch: not all results are right")
    print(f"{len(slower)} of {len(ours)} rows slower than PEFT's layer by more than {1 - SLOWER:.0%}")


if __name__ == "__main__":
    main()
