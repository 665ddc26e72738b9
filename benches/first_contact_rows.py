"""Measures the cases of first_contact_cases.py, one provider after the other, each on disk before the next begins.

A row stands in the CSV as `begun` until its numbers are there. It is measured in a process that may die or hang of it:
the row then says so, and another process goes on with the next one. Rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fastrl.benches import harness, machine, records
from fastrl.benches.first_contact_cases import BF16, DRY, FULL, cases
from fastrl.benches.harness import Case

BUDGET = harness.Budget(seconds=0.25, warmup=0.05)  # of a row
QUICK = harness.Budget(seconds=0.01, warmup=0.0, min_rounds=2)
START_SECONDS = 120  # until the first row begins
ROW_SECONDS = 45  # after which a row counts as hung, compilation included
BEGUN = "begun"


def supervise(path: Path, command: list[str]) -> int:
    """Runs `command`, which measures rows into `path`, again after each row that ended or hung it; its exit status."""
    known = -1
    while True:
        process = subprocess.Popen(command)
        hung = wait(process, path)
        rows = records.read(path)
        for row in rows:
            if row["status"] == BEGUN:
                row["status"] = f"failed: {hung or f'exit status {process.returncode}'}"
                print(f"{label(row)}: {row['status']}", flush=True)
                records.write(path, rows)
        if process.returncode == 0 or len(rows) in (0, known):  # it is done, or comes to no row
            return process.returncode
        known = len(rows)


def wait(process: subprocess.Popen, path: Path) -> str:
    """Waits for the process, which is ended if `path` stays the same for too long: says so then."""
    start = time.time()
    while process.poll() is None:
        time.sleep(0.2)
        written = path.stat().st_mtime if path.exists() else 0
        if time.time() > (written + ROW_SECONDS if written > start else start + START_SECONDS):
            process.kill()
            process.wait()
            return f"hung for {ROW_SECONDS} s"
    return ""


def measure_all(path: Path, device: str, dry: bool) -> None:
    rows = [row for row in records.read(path) if row["status"] != BEGUN]
    environment = machine.environment(device)
    found = {records.key(row): row for row in rows}
    todo = list(units(device, dry))
    rates = machine.ceilings(device, {BF16}, seconds=0.02 if dry else 0.3, size=128 if dry else None)
    print("ceilings: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()) + " (GB/s, GFLOP/s)")
    for number, (case, provider) in enumerate(todo, 1):
        begun = harness.identity(case, provider) | environment | {"status": BEGUN}
        if records.key(begun) in found:
            continue
        records.write(path, [*rows, begun])
        first = next(iter({**case.providers, **case.floors}))
        row = measure(case, provider, device, rates, QUICK if dry else BUDGET) | environment
        row = harness.compared(row, found.get(records.key(row | {"provider": first}), row))
        rows.append(row)
        found[records.key(row)] = row
        records.write(path, rows)
        print(f"[{number}/{len(todo)}] {label(row)}: {row.get('ms_p50', '')} ms, {row['status']}", flush=True)
        if device != "cpu":
            torch.cuda.synchronize()  # ends the process if the row has broken the GPU's context
            torch.cuda.empty_cache()
    wrong = [row for row in rows if row["status"] not in ("ok", "floor")]
    print(f"{len(rows)} of {len(todo)} rows, {len(wrong)} of them without numbers")


def units(device: str, dry: bool) -> Iterator[tuple[Case, str]]:
    for case in cases(device, DRY if dry else FULL):
        yield from ((case, provider) for provider in (*case.providers, *case.floors))


def measure(case: Case, provider: str, device: str, rates: dict[str, float], budget: harness.Budget) -> records.Row:
    alone = replace(
        case,
        providers={n: p for n, p in case.providers.items() if n == provider},
        floors={n: p for n, p in case.floors.items() if n == provider},
    )
    try:
        (row,) = harness.measure(alone, device, rates, budget)
    except Exception as failure:  # noqa: BLE001  the inputs may be too large for this GPU, or its context broken
        row = harness.identity(case, provider) | {"status": harness.describe(failure)}
    return row


def label(row: records.Row) -> str:
    return " ".join(row[column] for column in ("op", "shape", "dtype", "direction", "provider"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="small, on a CPU")
    parser.add_argument("--worker", action="store_true", help="measure in this process")
    args = parser.parse_args(argv)
    if args.worker:
        measure_all(args.csv, "cpu" if args.dry else "cuda", args.dry)
        return 0
    options = ["--csv", str(args.csv), "--worker", *(["--dry"] if args.dry else [])]
    return supervise(args.csv, [sys.executable, "-m", "fastrl.benches.first_contact_rows", *options])


if __name__ == "__main__":
    sys.exit(main())
