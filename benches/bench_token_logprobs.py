"""token_logprobs, alone and with the entropy, against log_softmax + gather, torch.compile and TRL's functions."""

from __future__ import annotations

import torch

from fastrl.benches.harness import Case, Overwriting, compiled, optional, ours
from fastrl.ops import token_logprobs

SHAPES = {
    "cpu": [(512, 128256, torch.bfloat16), (1024, 49152, torch.float32)],
    "cuda": [(4096, 128256, torch.bfloat16), (8192, 49152, torch.float32), (32, 128256, torch.bfloat16)],
}
DIRECTIONS = (), ("logits",)


def cases(device: str, quick: bool = False) -> list[Case]:
    shapes = [(64, 32000, torch.bfloat16)] if quick else SHAPES[device]
    return [
        *(case(*shape, wrt, device, quick) for shape in shapes for wrt in DIRECTIONS),
        *(case(*shapes[0], wrt, device, quick, entropy=True) for wrt in DIRECTIONS),
    ]


def case(rows, vocab, dtype, wrt, device, quick, entropy=False) -> Case:
    def make(rows: int):
        logits = 3 * torch.randn(rows, vocab)
        return {"logits": logits.to(dtype), "token_ids": torch.randint(vocab, (rows,))}

    def run(i, backend):
        return token_logprobs(**i, return_entropy=entropy, backend=backend)

    eager = with_entropy if entropy else alone

    def eager_float(i):
        return eager({**i, "logits": i["logits"].float()})

    size = rows * vocab * dtype.itemsize
    return Case(
        op="token_logprobs",
        shape=f"{rows}x{vocab}" + (" entropy" if entropy else ""),
        dtype=dtype,
        make=make,
        rows=rows,
        wrt=wrt,
        truth=lambda i: run(i, "reference"),
        providers={
            "torch eager": eager,
            **({"torch eager, fp32 copy": eager_float} if dtype != torch.float32 else {}),
            **({} if quick else compiled(eager_float)),
            **optional("trl.trainer.utils", "selective_log_softmax" + ("_and_entropy" if entropy else ""), trl),
            **({"fastrl reference": lambda i: run(i, "reference")} if quick else {}),
            **(gpu_peers() if device == "cuda" and not entropy else {}),
            **ours("token_logprobs", device, dtype, run),
        },
        bound="copy" if wrt else "read",
        bytes=3 * size if wrt else size,  # backward reads the logits again and writes their gradient
    )


def alone(i):
    return i["logits"].log_softmax(-1).gather(-1, i["token_ids"][:, None])[:, 0]


def with_entropy(i):
    logprobs = i["logits"].log_softmax(-1)
    return logprobs.gather(-1, i["token_ids"][:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def gpu_peers():
    """Cross entropies without reduction are negative log-probs; Liger's write the gradient over their logits.

    (Its fused heads, cut-cross-entropy and quack's without inplace_backward write to buffers of their own.)
    """

    def liger(function, i):  # no class weights, ignored label, penalty of the log normaliser, label smoothing
        return -function.apply(i["logits"], i["token_ids"], None, -100, 0.0, 0.0, "none")[0]

    def quack(cross_entropy, i):
        return -cross_entropy(i["logits"], i["token_ids"], reduction="none")

    ligers = {
        **optional("liger_kernel.ops.cross_entropy", "LigerCrossEntropyFunction", liger, "liger triton"),
        **optional("liger_kernel.ops.cutedsl.ops", "LigerCrossEntropyFunction", liger, "liger cute"),
    }
    ligers = {name: Overwriting(provider) for name, provider in ligers.items()}
    return {**ligers, **optional("quack.cross_entropy", "cross_entropy", quack)}


def trl(function, i):
    """The one with the entropy is in TRL 1.14 and newer."""
    return function(i["logits"], i["token_ids"])


def test_token_logprobs(benchmark, run):
    benchmark(run)


if __name__ == "__main__":
    from fastrl.commands.bench import main

    main(["--op", "token_logprobs"])
