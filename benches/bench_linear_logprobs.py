"""linear_logprobs with a frozen head against the whole logits, chunked checkpointing, and the two bare GEMMs."""

from __future__ import annotations

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from fastrl.benches.harness import Case, compiled
from fastrl.ops import linear_logprobs

CHUNK = 256  # rows of the chunked peer


def cases(device: str, quick: bool = False) -> list[Case]:
    if quick:
        return [case(128, 64, 8000, torch.bfloat16, wrt, device, quick) for wrt in ((), ("hidden",))]
    full = (2048, 576, 49152)
    return [
        case(*full, torch.bfloat16, (), device, quick),
        case(*full, torch.bfloat16, ("hidden",), device, quick),
        case(*full, torch.bfloat16, ("hidden",), device, quick, masked=True),
        case(256, 576, 49152, torch.float32, ("hidden",), device, quick),
    ]


def case(rows, hidden_size, vocab, dtype, wrt, device, quick, masked=False) -> Case:
    def make(rows: int):
        inputs = {
            "hidden": torch.randn(rows, hidden_size).to(dtype),
            "weight": (torch.randn(vocab, hidden_size) / hidden_size**0.5).to(dtype),
            "token_ids": torch.randint(vocab, (rows,)),
        }
        return inputs | ({"mask": torch.rand(rows) < 0.5} if masked else {})

    # forward: logits; backward: the hidden's gradient (the weight is frozen); only of kept rows
    products = (2 if wrt else 1) * (0.5 if masked else 1)
    return Case(
        op="linear_logprobs",
        shape=f"{rows}x{hidden_size}x{vocab}" + (" half masked" if masked else ""),
        dtype=dtype,
        make=make,
        rows=rows,
        gate_rows=64,
        wrt=wrt,
        truth=lambda i: linear_logprobs(**i, backend="reference"),
        providers={
            "torch eager": eager,
            **(compiled(eager) if dtype == torch.bfloat16 and not (quick or masked) else {}),
            **({"torch chunked, checkpoint": chunked} if wrt and dtype == torch.bfloat16 and not masked else {}),
            **({"fastrl reference": lambda i: linear_logprobs(**i, backend="reference")} if quick else {}),
            f"fastrl {device}": lambda i: linear_logprobs(**i, backend=device),
        },
        floors={} if masked else {"bare GEMMs": lambda i: linear(i["hidden"], i["weight"])},
        flops=int(products * 2 * rows * hidden_size * vocab),
    )


def eager(i):
    return kept(i, logprobs(i["hidden"], i["weight"], i["token_ids"]))


def kept(i, result):
    return result.masked_fill(~i["mask"], 0) if "mask" in i else result


def logprobs(hidden, weight, token_ids):
    return linear(hidden, weight).float().log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]


def chunked(i):
    """The lean way in plain torch: chunks of rows, each recomputed in backward."""
    parts = zip(i["hidden"].split(CHUNK), i["token_ids"].split(CHUNK), strict=True)
    return kept(i, torch.cat([checkpoint(logprobs, h, i["weight"], ids, use_reentrant=False) for h, ids in parts]))


def test_linear_logprobs(benchmark, run):
    benchmark(run)


if __name__ == "__main__":
    from fastrl.bench import main

    main(["--op", "linear_logprobs"])
