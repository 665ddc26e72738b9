"""`fastrl bench`: measures the kernels on this machine against torch and whatever peers are installed."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

OPS = (
    "token_logprobs", "linear_logprobs", "linear_cross_entropy", "lora_linear", "gae", "ppo_advantages", "ppo_loss",
    "ranking_loss",
)  # fmt: skip
DESCRIPTION = """
Checks each op against float64, then times it beside plain torch, torch.compile and the peers that are installed
(TRL, PEFT; on a GPU also Liger, cut-cross-entropy and quack), provider by provider in turn. Prints a table and writes
bench.csv and bench.png.
Medians with the 20th and 80th percentile; % of ceiling refers to the bandwidth and matrix product rates measured in
the same run; extra MiB is the peak memory of a call beyond its inputs.
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastrl bench", description=DESCRIPTION)
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute for all ops")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, help="default: what torch takes, one per core")
    parser.add_argument("--isa", choices=("avx512", "avx2", "baseline"), help="force fastrl's kernels to one level")
    parser.add_argument("--output", type=Path, default=Path("fastrl-bench"), help="folder of bench.csv and bench.png")
    parser.add_argument(
        "--csv", type=Path, help="CSV to update instead; rows of the same case and provider are replaced"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.isa:
        os.environ["FASTRL_CPU_ISA"] = args.isa  # read when the native module is first used
    import torch

    from fastrl.benches import records

    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = args.csv or args.output / "bench.csv"
    rows = []
    for case_rows in measure(args):  # kept case by case: an interrupted run loses one case
        rows += case_rows
        records.write(path, records.merge(records.read(path), case_rows))
    if not args.isa:
        rows += measure_lower_isa(args, path)
    rows = records.merge([], rows)
    print(f"\n{records.table(rows)}\n")
    records.plot(rows, path.with_suffix(".png"))
    print(f"{path} and {path.with_suffix('.png')} written")
    bad = [row for row in rows if row["status"] not in ("ok", "floor") and row["provider"].startswith("fastrl")]
    if bad:
        lines = [f"{row['op']} {row['shape']} {row['provider']}: {row['status']}" for row in bad]
        sys.exit("\n".join(["fastrl bench: not all of fastrl's results are right:", *lines]))


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, str]]]:
    """Rows of one case after the other; with --isa only fastrl's own rows, named after the level, without memory."""
    import torch

    from fastrl.benches import harness, machine, memory

    budget = harness.QUICK if args.quick else harness.Budget() if args.device == "cpu" else harness.GPU
    cases = harness.cases(args.op, args.device, args.quick)
    if args.isa:
        cases = [for_isa(case) for case in cases if case.bound != "gemm"]
    threads = f"{torch.get_num_threads()} threads, " if args.device == "cpu" else ""
    say(f"{machine.device_name(args.device)}, {threads}torch {torch.__version__}")
    products = {case.dtype for case in cases if case.bound == "gemm"}  # a minute a product where bfloat16 is emulated
    rates = machine.ceilings(args.device, products, seconds=0.1 if args.quick else 0.5)
    say("ceilings: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()) + " (GB/s, GFLOP/s)")
    environment = machine.environment(args.device)
    peaks = {} if args.isa or args.device != "cpu" else memory.of_cases(args.op, args.device, args.quick)
    for number, case in enumerate(cases, 1):
        say(f"[{number}/{len(cases)}] {case.label}")
        rows = [row | environment for row in harness.measure(case, args.device, rates, budget)]
        for row in rows:
            if row["provider"] in peaks.get(case.label, {}):
                row["peak_extra_mib"] = harness.number(peaks[case.label][row["provider"]])
        if args.isa:
            rows = [row | {"provider": f"fastrl cpu {args.isa}"} for row in rows if row["provider"] == "fastrl cpu"]
        yield rows


def for_isa(case):
    """`case` with the baseline and fastrl's kernel only."""
    from dataclasses import replace

    names = [next(iter(case.providers)), "fastrl cpu"]
    return replace(case, providers={name: case.providers[name] for name in names})


def measure_lower_isa(args: argparse.Namespace, path: Path) -> list[dict[str, str]]:
    """The memory-bound cases once more with AVX2 kernels, in a process of their own: the level is read once."""
    from fastrl.benches import records
    from fastrl.ops.backend import _C

    if args.device != "cpu" or args.quick or _C is None or _C.cpu_isa() != "avx512":
        return []
    say("again with AVX2 only:")
    command = [sys.executable, "-m", "fastrl.commands.bench", "--isa", "avx2", "--csv", str(path), "--op", *args.op]
    threads = ["--threads", str(args.threads)] if args.threads else []
    subprocess.run(command + threads, stdout=subprocess.DEVNULL, check=True)
    return [row for row in records.read(path) if row["provider"] == "fastrl cpu avx2" and row["op"] in args.op]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
