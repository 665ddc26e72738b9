"""Every Triton kernel compiled ahead of time for sm_80, sm_90 and sm_100, without a GPU: `pytest -m ptxas`; and how
many variants of a kernel there are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gpu import budgets
from gpu.budgets import Usage

pytest.importorskip("triton")
HERE = Path(__file__).parent
KERNELS = [path for path in (HERE.parents[1] / "kernels").glob("*.py") if path.name != "launch.py"]
ARCHS = (80, 90, 100)

# Triton compiles a kernel anew where an integer is 1, a multiple of 16, or neither, and where an address is a multiple
# of 16 or not. Most variants of a kernel that may come of it, over all the sizes of triton_variants.py; else 2.
MOST_VARIANTS = {
    "token_logprobs_fwd_kernel": 5,  # of two pieces, one column in the first
    "token_logprobs_combine_kernel": 3,
    "token_logprobs_bwd_kernel": 8,  # of two pieces; the stride of a single row is 0
    "gae_kernel": 13,  # of four tiles; the second output's address, and one step in the first tile
    "advantage_rows_kernel": 13,
    "whiten_kernel": 3,
    "ppo_blocks_kernel": 3,
    "scale_gradient_kernel": 3,
}


def output_of(script: str, *arguments: str):
    """What the script prints on its last line."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, HERE / script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.ptxas
def test_kernels_keep_their_budgets():
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda arch: output_of("triton_aot.py", str(arch)), ARCHS))
    usages = [Usage(*fields) for of_arch in found for fields in of_arch]
    print(budgets.report(usages))
    seen = {(usage.kernel.split(" ")[0], usage.arch) for usage in usages}
    wanted = {(name, f"sm_{arch}") for name in entry_points() for arch in ARCHS}
    assert not (missing := wanted - seen), f"never launched: {missing}"
    assert not (wrong := budgets.problems(usages)), "\n".join(wrong)


@pytest.mark.slow
def test_no_variant_for_each_length_temperature_or_vocabulary():
    variants = output_of("triton_variants.py")
    assert variants.keys() == entry_points()
    assert not {name: n for name, n in variants.items() if n > MOST_VARIANTS.get(name, 2)}


def entry_points() -> set[str]:
    """The kernels that some launcher names: `launch(NAME, ...)`."""
    import ast

    names = set()
    for path in KERNELS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "launch":
                names.add(ast.unparse(node.args[0]))
    return names
