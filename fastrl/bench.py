"""`fastrl bench`: measures the kernels on this machine against torch and whatever peers are installed."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

OPS = (
    "token_logprobs", "linear_logprobs", "linear_cross_entropy", "lora_linear", "gae", "ppo_advantages", "ppo_loss",
)  # fmt: skip
DESCRIPTION = """
Checks each op against float64, then times it beside plain torch, torch.compile and the peers that are installed
(TRL, PEFT), provider by provider in turn. Prints a table and writes bench.csv and bench.png.
Medians with the 20th and 80th percentile; % of ceiling refers to the bandwidth and matrix product rates measured in
the same run; extra MiB is the peak memory of a call beyond its inputs.
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastrl bench", description=DESCRIPTION)
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute for all ops")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
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

    from fastrl.benches import results

    if args.threads:
        torch.set_num_threads(args.threads)
    path = args.csv or args.output / "bench.csv"
    rows = measure(args)
    results.write(path, results.merge(results.read(path), rows))
    if not args.isa:
        rows += measure_lower_isa(args, path)
        print(f"\n{results.table(results.merge([], rows))}\n")
        picture = path.with_suffix(".png")
        results.plot(results.merge([], rows), picture)
        print(f"{path} and {picture} written")
    bad = [row for row in rows if row["status"] not in ("ok", "floor") and row["provider"].startswith("fastrl")]
    if bad:
        sys.exit(
            "\n".join(f"fastrl bench: {row['op']} {row['shape']} {row['provider']}: {row['status']}" for row in bad)
        )


def measure(args: argparse.Namespace) -> list[dict[str, str]]:
    """Rows of all cases asked for; with --isa only fastrl's own rows, named after the level."""
    import torch

    from fastrl.benches import harness, machine, memory

    budget = harness.QUICK if args.quick else harness.Budget()
    cases = harness.cases(args.op, args.device, args.quick)
    if args.isa:
        cases = [for_isa(case) for case in cases if case.bound != "gemm"]
    say(f"{machine.device_name(args.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rates = machine.ceilings(args.device, {case.dtype for case in cases}, seconds=0.1 if args.quick else 0.5)
    say("measured ceilings: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()) + " (GB/s, GFLOP/s)")
    environment = machine.environment(args.device)
    peaks = memory.of_cases(args.op, args.device, args.quick)
    rows = []
    for number, case in enumerate(cases, 1):
        say(f"[{number}/{len(cases)}] {case.label}")
        for row in harness.measure(case, args.device, rates, budget):
            peak = peaks.get(case.label, {}).get(row["provider"])
            rows.append(row | environment | ({} if peak is None else {"peak_extra_mib": harness.number(peak)}))
    if args.isa:
        rows = [row | {"provider": f"{row['provider']} {args.isa}"} for row in rows if row["provider"] == "fastrl cpu"]
    return rows


def for_isa(case):
    """`case` with the baseline and fastrl's kernel only."""
    from dataclasses import replace

    names = [next(iter(case.providers)), "fastrl cpu"]
    return replace(case, providers={name: case.providers[name] for name in names})


def measure_lower_isa(args: argparse.Namespace, path: Path) -> list[dict[str, str]]:
    """The memory-bound cases once more with AVX2 kernels, in a process of their own: the level is read once."""
    from fastrl.benches import results
    from fastrl.ops.backend import _C

    if args.device != "cpu" or args.quick or _C is None or _C.cpu_isa() != "avx512":
        return []
    say("again with AVX2 only:")
    command = [sys.executable, "-m", "fastrl.bench", "--isa", "avx2", "--csv", str(path), "--op", *args.op]
    subprocess.run(command + (["--threads", str(args.threads)] if args.threads else []), check=True)
    return [row for row in results.read(path) if row["provider"] == "fastrl cpu avx2" and row["op"] in args.op]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
