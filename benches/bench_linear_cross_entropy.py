"""linear_cross_entropy, frozen and trained head, against cross_entropy on the whole logits and the bare GEMMs."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, linear

from fastrl.benches import bench_linear_logprobs as heads
from fastrl.benches.harness import Case, compiled, optional, ours
from fastrl.ops import linear_cross_entropy

SHAPES = {"cpu": (1024, 576, 49152), "cuda": (8192, 4096, 128256)}
FROZEN, TRAINED = ("hidden",), ("hidden", "weight")


def cases(device: str, quick: bool = False) -> list[Case]:
    shape = (128, 64, 8000) if quick else SHAPES[device]
    return [case(*shape, torch.bfloat16, wrt, device, quick) for wrt in (FROZEN, TRAINED)]


def case(rows, hidden_size, vocab, dtype, wrt, device, quick) -> Case:
    def make(rows: int):
        return {
            "hidden": torch.randn(rows, hidden_size).to(dtype),
            "weight": (torch.randn(vocab, hidden_size) / hidden_size**0.5).to(dtype),
            "labels": torch.randint(vocab, (rows,)),
        }

    return Case(
        op="linear_cross_entropy",
        shape=f"{rows}x{hidden_size}x{vocab} {'frozen' if wrt == FROZEN else 'trained'} head",
        dtype=dtype,
        make=make,
        rows=rows,
        gate_rows=128,  # Liger's CuTe kernel takes multiples of it
        wrt=wrt,
        truth=lambda i: linear_cross_entropy(**i, backend="reference"),
        providers={
            "torch eager": eager,
            **({} if quick else compiled(eager)),
            **optional(*heads.TRL_HEAD, trl, "trl chunked head"),
            **({"fastrl reference": lambda i: linear_cross_entropy(**i, backend="reference")} if quick else {}),
            **(gpu_peers() if device == "cuda" else {}),
            **ours("linear_cross_entropy", device, dtype, lambda i, name: linear_cross_entropy(**i, backend=name)),
        },
        floors={"bare GEMMs": lambda i: linear(i["hidden"], i["weight"])},
        flops=(1 + len(wrt)) * 2 * rows * hidden_size * vocab,
    )


def eager(i):
    return cross_entropy(linear(i["hidden"], i["weight"]).float(), i["labels"])


def trl(function, i):
    """The loss of its SFT trainer."""
    return -heads.trl_head(function, i["hidden"], i["weight"], i["labels"]).mean()


def gpu_peers():
    """Liger's CuTe kernel is Hopper's; it forms the weight's gradient of a frozen head too."""

    def triton(function, i):
        return heads.liger_head(function, i["hidden"], i["weight"], i["labels"], "mean")

    def peer(function, i):
        return function(i["hidden"], i["weight"], i["labels"])

    cute = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90", "liger_fused_linear_cross_entropy_sm90"
    return {
        **optional(*heads.LIGER_TRITON, triton, "liger triton"),
        **optional(*cute, peer, "liger cute"),
        **optional("cut_cross_entropy", "linear_cross_entropy", peer),
        **optional("quack.linear_cross_entropy", "chunked_linear_cross_entropy", peer),
        **optional("quack.linear_cross_entropy", "scaled_exp_linear_cross_entropy", peer),
    }


def test_linear_cross_entropy(benchmark, run):
    benchmark(run)


if __name__ == "__main__":
    from fastrl.commands.bench import main

    main(["--op", "linear_cross_entropy"])
