"""token_logprobs against log_softmax + gather, torch.compile and TRL's selective_log_softmax."""

from __future__ import annotations

import torch

from fastrl.benches.harness import Case, Overwriting, compiled, optional, ours
from fastrl.ops import token_logprobs

SHAPES = {
    "cpu": [(512, 128256, torch.bfloat16), (1024, 49152, torch.float32)],
    "cuda": [(4096, 128256, torch.bfloat16), (8192, 49152, torch.float32), (32, 128256, torch.bfloat16)],
}


def cases(device: str, quick: bool = False) -> list[Case]:
    if quick:
        return [case(64, 32000, torch.bfloat16, wrt, device, quick) for wrt in ((), ("logits",))]
    return [case(*shape, wrt, device, quick) for shape in SHAPES[device] for wrt in ((), ("logits",))]


def case(rows: int, vocab: int, dtype: torch.dtype, wrt: tuple[str, ...], device: str, quick: bool) -> Case:
    def make(rows: int):
        logits = 3 * torch.randn(rows, vocab)
        return {"logits": logits.to(dtype), "token_ids": torch.randint(vocab, (rows,))}

    size = rows * vocab * dtype.itemsize
    return Case(
        op="token_logprobs",
        shape=f"{rows}x{vocab}",
        dtype=dtype,
        make=make,
        rows=rows,
        wrt=wrt,
        truth=lambda i: token_logprobs(**i, backend="reference"),
        providers={
            "torch eager": eager,
            **({"torch eager, fp32 copy": eager_float} if dtype != torch.float32 else {}),
            **(compiled(eager_float) if dtype == torch.bfloat16 and not quick else {}),
            **optional("trl.trainer.utils", "selective_log_softmax", trl),
            **({"fastrl reference": lambda i: token_logprobs(**i, backend="reference")} if quick else {}),
            **(gpu_peers() if device == "cuda" else {}),
            **ours("token_logprobs", device, dtype, lambda i, backend: token_logprobs(**i, backend=backend)),
        },
        bound="copy" if wrt else "read",
        bytes=3 * size if wrt else size,  # backward reads the logits again and writes their gradient
    )


def eager(i):
    return i["logits"].log_softmax(-1).gather(-1, i["token_ids"][:, None])[:, 0]


def eager_float(i):
    return i["logits"].float().log_softmax(-1).gather(-1, i["token_ids"][:, None])[:, 0]


def gpu_peers():
    """Cross entropies without reduction are negative log-probs; Liger's writes the gradient over its logits.

    (Its fused heads, cut-cross-entropy and quack's without inplace_backward write to buffers of their own.)
    """

    def negated(cross_entropy, i):
        return -cross_entropy(i["logits"], i["token_ids"], reduction="none")

    liger = optional("liger_kernel.transformers.functional", "liger_cross_entropy", negated)
    liger = {name: Overwriting(provider) for name, provider in liger.items()}
    return {**liger, **optional("quack.cross_entropy", "cross_entropy", negated)}


def trl(selective_log_softmax, i):
    return selective_log_softmax(i["logits"], i["token_ids"])


def test_token_logprobs(benchmark, run):
    benchmark(run)


if __name__ == "__main__":
    from fastrl.bench import main

    main(["--op", "token_logprobs"])
