"""Every Triton kernel compiled ahead of time for sm_80, sm_90 and sm_100, without a GPU: `pytest -m ptxas`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import budgets
from gpu.budgets import Usage

pytest.importorskip("triton")
HERE = Path(__file__).parent
KERNELS = [path for path in (HERE.parents[1] / "kernels").glob("*.py") if path.name != "launch.py"]


def compile_all(arch: int) -> list[Usage]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "triton_aot.py"), str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Usage(*fields) for fields in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.ptxas
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_keep_their_budgets(arch):
    usages = compile_all(arch)
    print(budgets.report(usages))
    seen = {usage.kernel.split(" ")[0] for usage in usages}
    assert not (missing := entry_points() - seen), f"never launched: {missing}"
    assert not (wrong := budgets.problems(usages)), "\n".join(wrong)


def entry_points() -> set[str]:
    """The kernels that some launcher names: `launch(NAME, ...)`."""
    import ast

    names = set()
    for path in KERNELS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "launch":
                names.add(ast.unparse(node.args[0]))
    return names
