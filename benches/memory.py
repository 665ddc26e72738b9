"""Peak memory of one call beyond what was there before it, whoever allocates it: torch, oneDNN or plain malloc.

Measured in a process of its own (`of_cases`), started so that malloc takes every block of 64 KiB or more from the
system and gives it back when freed: memory freed before a call cannot hide what the call takes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

RETURN_FREED_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_TRIM_THRESHOLD_": str(64 << 10)}


def of_cases(ops: list[str], device: str, quick: bool) -> dict[str, dict[str, float]]:
    """Case label -> provider -> MiB, for every provider that works."""
    command = [sys.executable, "-m", "fastrl.benches.memory", "--device", device, "--op", *ops]
    command += ["--quick"] if quick else []
    threads = ["--threads", str(torch.get_num_threads())]
    environment = {**os.environ, **RETURN_FREED_BLOCKS}
    done = subprocess.run(command + threads, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_extra_mib(call: Callable[[], object], device: str = "cpu") -> float:
    """MiB at the highest point of `call()` above the level before it; its results count, its inputs do not.

    CPU: the kernel's high-water mark of resident memory, exact to about half a MiB in a process that returns freed
    blocks. Buffers that a library keeps from an earlier call do not count.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present level
    before = _high_water_kib()
    call()
    return max(_high_water_kib() - before, 0) / 2**10


def _high_water_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    """Prints one line of JSON; see `of_cases`."""
    from fastrl.benches import harness

    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--op", nargs="+", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peaks: dict[str, dict[str, float]] = {}
    for case in harness.cases(args.op, args.device, args.quick):
        harness.forget_compiled(case)
        print(f"memory: {case.label}", file=sys.stderr)
        for name, run in harness.runs_of(case, case.providers, args.device, copies=1).items():
            try:
                run()  # compiles, starts threads
            except Exception as error:  # noqa: BLE001  the check against float64 reports it
                print(f"{case.label}: {name}: {error}", file=sys.stderr)
                continue
            peaks.setdefault(case.label, {})[name] = peak_extra_mib(run, args.device)
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
