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
sys.path[:0] = [str(TESTS), str(TESTS / "support"), str(TESTS.parent)]

from conformance.calls import Call, all_calls, evaluate, flatten  # noqa: E402
from gpu.budgets import Usage  # noqa: E402

from fastrl import ops  # noqa: E402
from fastrl.kernels import launch as launching  # noqa: E402
from fastrl.ops import backend  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")

# Every size class of the launchers: small and real vocabularies, few and many rows, every block of ranks; odd sizes and
# multiples of 16, as models have them.
SHAPES = [
    {"batch": 4, "tokens": 5},
    {"batch": 2, "tokens": 2, "vocab": 128257, "rank": 20},
    {"batch": 2, "tokens": 16, "vocab": 128256, "width": 64, "rank": 16, "outputs": 64},
    {"batch": 300, "tokens": 20, "width": 64, "rank": 64, "outputs": 64},
]
# Those of the ops that compute in float32 whatever their inputs are.
LENGTHS = [{"batch": 2, "tokens": tokens} for tokens in (100, 512, 2048, 5001)]


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


def calls(arch: int) -> list[Call]:
    """Every shape in every dtype; but float16, whose code is bfloat16's but for conversions, on one device alone."""
    shapes = {torch.float32: SHAPES + LENGTHS, torch.bfloat16: SHAPES, torch.float16: SHAPES if arch == 90 else []}
    return [
        call
        for dtype, those in shapes.items()
        for shape in those
        for call in all_calls(**shape, dtype=dtype, backends=("triton",))
    ]


def run_other_options() -> None:
    """What `calls` leaves out: flags of the kernels that its arguments do not reach."""
    ids, mask, row = torch.zeros(6, dtype=torch.long), torch.ones(2, 300, dtype=torch.bool), torch.randn(2, 300)
    weight = torch.randn(5000, 64, dtype=torch.bfloat16)
    for softcap, asked in itertools.product((None, 30.0), ({}, {"return_entropy": True}, {"return_top1": True})):
        options = {"softcap": softcap, **asked, "backend": "triton"}
        hidden = torch.randn(6, 64, dtype=torch.bfloat16, requires_grad=True)
        heads = [
            ops.linear_logprobs(hidden, weight, ids, **options),
            ops.token_logprobs(hidden @ weight.T, ids, **options),
        ]
        torch.autograd.backward([part.sum() for part in flatten(heads) if part.requires_grad])
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
    for call in calls(arch):
        evaluate(call)
        if "mask" in call.tensors and not call.name.startswith("ppo_"):  # elsewhere it may be left out
            evaluate(call, {**call.tensors, "mask": None})  # type: ignore[dict-item]
    run_other_options()
    usages = [usage_of(name, kernel, f"sm_{arch}") for name, kernel in compiled.values()]
    print(json.dumps(usages))


if __name__ == "__main__":
    main(int(sys.argv[1]))
