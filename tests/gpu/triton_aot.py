"""Compiles every Triton kernel for one GPU architecture, as its launcher configures it, on a machine without a GPU.

    python tests/gpu/triton_aot.py ARCH        # 80, 90, 100; without TRITON_INTERPRET

The public ops run on CPU tensors; where a launcher would start a kernel, the kernel is compiled for those arguments and
nothing runs. Prints one JSON list on the last line: the fields of gpu.budgets.Usage.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from conformance.calls import Call, all_calls, evaluate, flatten  # noqa: E402
from gpu.budgets import Usage  # noqa: E402

from fastrl import ops  # noqa: E402
from fastrl.kernels import launch as launching  # noqa: E402
from fastrl.ops import backend  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")

# Every size class of the launchers: the small shapes of the tests, long and many rows, large vocabularies.
SHAPES = [
    {"batch": 3, "tokens": 5},
    {"batch": 2, "tokens": 1500, "vocab": 2000},
    {"batch": 2, "tokens": 5000},
    {"batch": 2, "tokens": 100},
    {"batch": 2, "tokens": 400},
    {"batch": 300, "tokens": 20, "width": 64},
    {"batch": 3, "tokens": 5, "rank": 20},
    {"batch": 3, "tokens": 5, "rank": 40},
    {"batch": 2, "tokens": 3, "vocab": 128257},
    {"batch": 2, "tokens": 1, "vocab": 262144},
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class NoDriver:
    """Answers what Triton asks of the GPU's driver before it compiles a kernel."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


compiled: dict[str, tuple[str, object]] = {}  # hash of a kernel -> (its name and configuration, itself)


def compile_only(kernel, grid, tensor, *args, **options) -> None:
    """In place of fastrl.kernels.launch.launch."""
    done = kernel.warmup(*args, grid=grid, **options)
    shown = " ".join(f"{key}={value}" for key, value in options.items())
    compiled.setdefault(done.hash, (f"{done.name} {shown}", done))


def usage_of(name: str, kernel, arch: str) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, RESOURCES.search(text).groups())  # type: ignore[union-attr]
    return Usage("triton", name, arch, registers, stack, local, kernel.metadata.shared)


def calls() -> list[Call]:
    return [
        call
        for dtype in DTYPES
        for shape in (SHAPES if dtype == torch.bfloat16 else SHAPES[:1])
        for call in all_calls(**shape, dtype=dtype, backends=("triton",))
    ]


def run_other_options() -> None:
    """What `calls` leaves out: flags of the kernels that its arguments do not reach."""
    ids, mask, row = torch.zeros(6, dtype=torch.long), torch.ones(2, 300, dtype=torch.bool), torch.randn(2, 300)
    weight = torch.randn(5000, 64, dtype=torch.bfloat16)
    for softcap, entropy in itertools.product((None, 30.0), (False, True)):
        options = {"softcap": softcap, "return_entropy": entropy, "backend": "triton"}
        hidden = torch.randn(6, 64, dtype=torch.bfloat16, requires_grad=True)
        heads = [
            ops.linear_logprobs(hidden, weight, ids, **options),
            ops.token_logprobs(hidden @ weight.T, ids, **options),
        ]
        torch.autograd.backward([part.sum() for part in flatten(heads)])
    ops.gae(row, row, backend="triton")
    for estimator, whiten in itertools.product(("k1", "k2", "k3"), (False, True)):
        options = {"kl_estimator": estimator, "center": whiten, "scale": whiten, "backend": "triton"}
        ops.ppo_advantages(row, row, row, row[:, 0], mask, **options)
    loss, _ = ops.ppo_loss(row.clone().requires_grad_(), row, row, row, row, row, mask, backend="triton")
    loss.backward()


def main(arch: int) -> None:
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(NoDriver(arch))
    launching.launch = compile_only  # before any module of kernels takes it
    backend.DEVICES["triton"] = ("cuda", "cpu")
    for call in calls():
        evaluate(call)
        if "mask" in call.tensors and not call.name.startswith("ppo_"):  # elsewhere it may be left out
            evaluate(call, {**call.tensors, "mask": None})  # type: ignore[dict-item]
    run_other_options()
    usages = [usage_of(name, kernel, f"sm_{arch}") for name, kernel in compiled.values()]
    print(json.dumps(usages))


if __name__ == "__main__":
    main(int(sys.argv[1]))
