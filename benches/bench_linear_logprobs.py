"""linear_logprobs with a frozen head against the whole logits, chunked heads, and the two bare GEMMs."""

from __future__ import annotations

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from fastrl.benches.harness import Case, compiled, optional, ours
from fastrl.ops import linear_logprobs

TRL_HEAD = "trl.kernels", "ChunkedLogProbFunction"
LIGER_TRITON = "liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"
CHUNK = {"cpu": 256, "cuda": 1024}  # rows of the chunked peer in plain torch
FULL = {"cpu": (2048, 576, 49152), "cuda": (8192, 4096, 128256)}
SMALL = {"cpu": (256, 576, 49152, torch.float32), "cuda": (2048, 576, 49152, torch.bfloat16)}


def cases(device: str, quick: bool = False) -> list[Case]:
    if quick:
        return [case(128, 64, 8000, torch.bfloat16, wrt, device, quick) for wrt in ((), ("hidden",))]
    full = FULL[device]
    return [
        case(*full, torch.bfloat16, (), device, quick),
        case(*full, torch.bfloat16, ("hidden",), device, quick),
        case(*full, torch.bfloat16, ("hidden",), device, quick, masked=True),
        case(*SMALL[device], ("hidden",), device, quick),
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
            **({} if quick else compiled(eager)),
            **(
                {"torch chunked, checkpoint": lambda i: chunked(i, CHUNK[device])}
                if wrt and dtype == torch.bfloat16 and not masked
                else {}
            ),
            **({} if masked else optional(*TRL_HEAD, trl, "trl chunked head")),
            **({"fastrl reference": lambda i: linear_logprobs(**i, backend="reference")} if quick else {}),
            **(gpu_peers() if device == "cuda" and not masked else {}),
            **ours("linear_logprobs", device, dtype, lambda i, backend: linear_logprobs(**i, backend=backend)),
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


def chunked(i, size):
    """The lean way in plain torch: chunks of rows, each recomputed in backward."""
    parts = zip(i["hidden"].split(size), i["token_ids"].split(size), strict=True)
    return kept(i, torch.cat([checkpoint(logprobs, h, i["weight"], ids, use_reentrant=False) for h, ids in parts]))


def trl(function, i):
    return trl_head(function, i["hidden"], i["weight"], i["token_ids"])


def trl_head(function, hidden, weight, token_ids):
    """TRL's head (1.15 and newer) as its trainers call it: blocks of 32768 columns, log-probs alone."""
    return function.apply(hidden, weight, None, token_ids, 1.0, 32768, None, 1.0, ("log_probs",))[0]


def gpu_peers():
    """Liger's kernels by name: its own choice on Hopper is CuTe, installed or not."""

    def cce(linear_cross_entropy, i):
        return -linear_cross_entropy(i["hidden"], i["weight"], i["token_ids"], reduction="none")

    def triton(function, i):
        return -liger_head(function, i["hidden"], i["weight"], i["token_ids"], "none")

    def cute(function, i):
        return -function.apply(i["hidden"], i["weight"], i["token_ids"])

    return {
        **optional(*LIGER_TRITON, triton, "liger triton"),
        **optional("liger_kernel.ops.cutedsl.ops", "LigerFusedScaledCrossEntropySM90Function", cute, "liger cute"),
        **optional("cut_cross_entropy", "linear_cross_entropy", cce),
    }


def liger_head(function, hidden, weight, token_ids, reduction):
    """No bias, class weights, ignored label, penalty of the log normaliser, label smoothing."""
    return function.apply(hidden, weight, token_ids, None, None, -100, 0.0, 0.0, reduction)[0]


def test_linear_logprobs(benchmark, run):
    benchmark(run)


if __name__ == "__main__":
    from fastrl.commands.bench import main

    main(["--op", "linear_logprobs"])
