"""What a GPU kernel may take of a multiprocessor, and the table that says so (budgets.csv).

The first row whose compiler, kernel pattern and architecture fit decides. Nothing may spill, or use more of the stack
than its row says, by default nothing, or more shared memory. Registers change with every compiler: more than the row
says is a warning, more than SLACK times as many is an error.
"""

from __future__ import annotations

import csv
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("budgets.csv")
SLACK = 1.25


class Usage(NamedTuple):
    """Of one compiled kernel."""

    compiler: str  # nvcc or triton
    kernel: str  # name with its template arguments, or with its launch configuration
    arch: str
    registers: int
    stack: int  # bytes
    spills: int  # bytes stored and loaded
    shared: int  # bytes


def problems(usages: list[Usage], table: Path = TABLE) -> list[str]:
    """One line for each kernel that spills, exceeds its budget or has none (then: the line to add)."""
    with table.open(newline="") as file:
        budgets = list(csv.DictReader(file))
    found, unknown = [], []
    for usage in usages:
        where = f"{usage.compiler} {usage.kernel} {usage.arch}"
        budget = next((b for b in budgets if _fits(usage, b)), None)
        if usage.stack > int((budget or {}).get("stack") or 0) or usage.spills:
            found.append(f"{where}: {usage.stack} bytes of stack, {usage.spills} bytes spilled")
        if budget is None:
            unknown.append(usage)
            continue
        registers, shared = int(budget["registers"]), int(budget["shared"])
        over = (
            f"{where}: {usage.registers} registers and {usage.shared} bytes of shared memory, "
            f"budget {registers} and {shared}"
        )
        if usage.registers > SLACK * registers or usage.shared > shared:
            found.append(over)
        elif usage.registers > registers:
            warnings.warn(over, stacklevel=2)
    return found + lines_to_add(unknown)


def lines_to_add(usages: list[Usage]) -> list[str]:
    """For each kernel the most that any of its variants takes, registers rounded up to 8."""
    most: dict[tuple[str, str], tuple[int, int]] = {}
    for usage in usages:
        key = usage.compiler, usage.kernel.split("<")[0].split(" ")[0]
        registers, shared = most.get(key, (0, 0))
        most[key] = max(registers, usage.registers), max(shared, usage.shared)
    return [
        f"no budget, line to add: {compiler},{kernel}*,*,{-(-registers // 8) * 8},{shared},"
        for (compiler, kernel), (registers, shared) in most.items()
    ]


def _fits(usage: Usage, budget: dict[str, str]) -> bool:
    return (
        budget["compiler"] == usage.compiler
        and fnmatchcase(usage.kernel, budget["kernel"])
        and fnmatchcase(usage.arch, budget["arch"])
    )


def report(usages: list[Usage]) -> str:
    """The usages as a table, worst first."""
    rows = sorted(set(usages), key=lambda u: (-u.registers, u))
    return "\n".join(f"{u.registers:4} registers {u.shared:6} B shared  {u.arch:8} {u.kernel}" for u in rows)
