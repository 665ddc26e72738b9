"""token_logprobs, alone, with the entropy or the arg max, against log_softmax + gather, torch.compile and TRL."""

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
        *(case(*shapes[0], wrt, device, quick, extra="entropy") for wrt in DIRECTIONS),
        case(*shapes[0], (), device, quick, extra="top1"),
    ]


def case(rows, vocab, dtype, wrt, device, quick, extra="") -> Case:
    """`extra`: what is asked for beside the log-probs, "entropy" or "top1"."""

    def make(rows: int):
        logits = (3 * torch.randn(rows, vocab)).to(dtype)
        # Of a sure model for top1: a target that is beaten early would spare the kernels work.
        return {"logits": logits, "token_ids": logits.argmax(-1) if extra == "top1" else torch.randint(vocab, (rows,))}

    def run(i, backend):
        return token_logprobs(**i, return_entropy=extra == "entropy", return_top1=extra == "top1", backend=backend)

    eager = {"": alone, "entropy": with_entropy, "top1": with_top1}[extra]
    of_trl = {"": "selective_log_softmax", "entropy": "selective_log_softmax_and_entropy"}

    def eager_float(i):
        return eager({**i, "logits": i["logits"].float()})

    size = rows * vocab * dtype.itemsize
    return Case(
        op="token_logprobs",
        shape=f"{rows}x{vocab} {extra}".strip(),
        dtype=dtype,
        make=make,
        rows=rows,
        wrt=wrt,
        truth=lambda i: run(i, "reference"),
        providers={
            "torch eager": eager,
            **({"torch eager, fp32 copy": eager_float} if dtype != torch.float32 else {}),
            **({} if quick else compiled(eager_float)),
            **(optional("trl.trainer.utils", of_trl[extra], trl) if extra in of_trl else {}),
            **({"fastrl reference": lambda i: run(i, "reference")} if quick else {}),
            **(gpu_peers() if device == "cuda" and not extra else {}),
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


def with_top1(i):
    return alone(i), i["logits"].argmax(-1) == i["token_ids"]


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
