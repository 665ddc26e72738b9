"""Every op on every GPU backend once, forward and backward, small: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python tests/gpu/every_op.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "support"), str(TESTS.parent)]

from conformance.calls import Call, all_calls, evaluate, label  # noqa: E402

BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}  # of a device
SHAPES = [
    {"batch": 3, "tokens": 5},
    {"batch": 3, "tokens": 40, "rank": 16, "outputs": 64},  # which the kernels of lora_linear take
    {"batch": 3, "tokens": 5, "dtype": torch.float32},
    {"batch": 2, "tokens": 1100, "vocab": 131},
    {"batch": 2, "tokens": 3, "vocab": 40001},
    # Rows of a head on clusters of eight blocks, each with more shared memory than it has unasked; gradients in place.
    {"batch": 2, "tokens": 2, "vocab": 128257, "dtype": torch.float32},
]


def calls(device: str) -> Iterator[tuple[Call, dict]]:
    """One backend after the other: those of Triton take a while to compile."""
    for backend in BACKENDS[device]:
        for shape in SHAPES:
            for call in all_calls(**{"dtype": torch.bfloat16, **shape}, device=device, backends=(backend,)):
                yield call, shape


def problem(call: Call) -> str:
    """What is wrong with the results of a call; empty if nothing."""
    try:
        found = evaluate(call)
        return ", ".join(f"{name} is not finite" for name, value in found.items() if not value.isfinite().all())
    except Exception as error:  # noqa: BLE001  the other calls have something to say too
        return f"{type(error).__name__}: {error}"


def main(device: str = "cuda", seconds: float = float("inf")) -> int:
    """The number of calls that went wrong; none is begun after so many seconds."""
    end, done, wrong, left = time.monotonic() + seconds, 0, 0, 0
    for call, shape in calls(device):
        if time.monotonic() > end:
            left += 1
            continue
        print(label(call), shape, flush=True)
        done += 1
        if found := problem(call):
            wrong += 1
            print(f"wrong: {found}", flush=True)
    print(f"{done} calls, {wrong} of them wrong" + (f"; {left} more not made: out of time" if left else ""))
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=list(BACKENDS), default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no call later than this")
    args = parser.parse_args()
    sys.exit(int(main(args.device, args.seconds) > 0))
