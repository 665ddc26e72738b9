"""Counts the variants of Triton kernels that calls of many sizes ask for. Compiles nothing and needs no GPU.

    python tests/gpu/triton_variants.py        # without TRITON_INTERPRET

Prints one JSON object on the last line: kernel -> number of distinct keys under which Triton would compile it.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
import triton

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "support"), str(TESTS.parent)]

from gpu.triton_aot import NoDriver  # noqa: E402

from fastrl import ops  # noqa: E402
from fastrl.kernels import launch as launching  # noqa: E402
from fastrl.ops import backend  # noqa: E402

VOCABULARIES = [1, 1000, 1001, 1003, 1008, 1024, 32000, 50257, 128256, 128257]
LENGTHS = [1, 5, 16, 31, 33, 48, 127, 500, 512, 1000, 1024, 1025, 4096, 5001]
TEMPERATURES = [0.7, 1, 2.5]

keys: dict[str, set[str]] = defaultdict(set)


def record(*, key, fn, **_) -> bool:
    """Triton's hook for a kernel that it has not compiled yet; True: it shall not."""
    keys[fn.name].add(str(key))
    return True


def logprobs() -> None:
    """Per vocabulary, sequence length and temperature."""
    for vocab, temperature in itertools.product(VOCABULARIES, TEMPERATURES):
        for batch, tokens in ((1, 1), (2, 7), (4, 16)):
            ids, options = torch.zeros(batch, tokens, dtype=torch.long), {"temperature": temperature}
            options |= {"return_entropy": True, "return_top1": True, "backend": "triton"}
            logits = torch.empty(batch, tokens, vocab, dtype=torch.bfloat16, requires_grad=True)
            logprobs, entropy, _ = ops.token_logprobs(logits, ids, **options)
            (logprobs + entropy).sum().backward()


def rows() -> None:
    """Per number of rows and sequence length, of what works on float32 rows; per number of tokens."""
    x, weight, lora_a, lora_b = (torch.empty(*shape) for shape in ((6000, 32), (32, 32), (16, 32), (32, 16)))
    for batch, tokens in itertools.product((1, 3, 16), LENGTHS):
        row, mask = torch.empty(batch, tokens, requires_grad=True), torch.ones(batch, tokens, dtype=torch.bool)
        data = row.detach()
        ops.gae(data, data, mask, backend="triton")
        ops.ppo_advantages(data, data, data, data[:, 0], mask, backend="triton")
        ops.ppo_loss(row, row, data, data, data, data, mask, backend="triton")[0].backward()
    for count in LENGTHS:
        leaves = x[:count].requires_grad_(), weight, lora_a.requires_grad_(), lora_b.requires_grad_()
        ops.lora_linear(*leaves, 0.5, dropout=0.1, backend="triton").sum().backward()


def main() -> None:
    triton.runtime.driver.set_active(NoDriver(90))
    triton.knobs.runtime.jit_cache_hook = record
    launching.launch = lambda kernel, grid, tensor, *args, **options: kernel.warmup(*args, grid=grid, **options)
    backend.DEVICES["triton"] = ("cuda", "cpu")
    logprobs()
    rows()
    print(json.dumps({name: len(found) for name, found in keys.items()}))


if __name__ == "__main__":
    main()
