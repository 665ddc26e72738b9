"""Every op on every GPU backend once, forward and backward, small: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python tests/gpu/every_op.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from conformance.calls import all_calls, evaluate, label  # noqa: E402

SHAPES = [
    {"batch": 3, "tokens": 5},
    {"batch": 2, "tokens": 1100, "vocab": 131},
    {"batch": 2, "tokens": 3, "vocab": 40001},
    {"batch": 3, "tokens": 40, "rank": 16, "outputs": 64},  # which the kernels of lora_linear take
    {"batch": 3, "tokens": 5, "dtype": torch.float32},
    # Rows of a head on clusters of eight blocks, each with more shared memory than it has unasked; gradients in place.
    {"batch": 2, "tokens": 2, "vocab": 128257, "dtype": torch.float32},
]


def main(device: str = "cuda", backends: tuple[str, ...] = ("cuda", "triton")) -> None:
    for shape in SHAPES:
        for call in all_calls(**{"dtype": torch.bfloat16, **shape}, device=device, backends=backends):
            print(label(call), shape, flush=True)
            found = evaluate(call)
            assert all(bool(value.isfinite().all()) for value in found.values()), label(call)


if __name__ == "__main__":
    main()
