"""ppo_loss, forward and backward, against eager torch and torch.compile."""

from __future__ import annotations

import torch

from fastrl.benches.harness import Case, compiled, ours
from fastrl.ops import ppo_loss

CLIP, VF_CLIP, VF_COEF = 0.2, 0.2, 0.1
SHAPES = {"cpu": [(512, 1024), (64, 256)], "cuda": [(512, 2048), (8192, 2048), (64, 256)]}


def cases(device: str, quick: bool = False) -> list[Case]:
    shapes = [(64, 128)] if quick else SHAPES[device]
    return [case(*shape, device, quick) for shape in shapes]


def case(rows: int, length: int, device: str, quick: bool) -> Case:
    def make(rows: int):
        old_logprobs, old_values = -3 * torch.rand(rows, length), torch.randn(rows, length)
        return {
            "logprobs": old_logprobs + 0.2 * torch.randn(rows, length),
            "values": old_values + 0.2 * torch.randn(rows, length),
            "old_logprobs": old_logprobs,
            "old_values": old_values,
            "advantages": torch.randn(rows, length),
            "returns": torch.randn(rows, length),
            "mask": torch.arange(length) < torch.randint(length // 4, length + 1, (rows, 1)),
        }

    return Case(
        op="ppo_loss",
        shape=f"{rows}x{length}",
        dtype=torch.float32,
        make=make,
        rows=rows,
        wrt=("logprobs", "values"),
        truth=lambda i: run(i, "reference"),
        providers={
            "torch eager": lambda i: eager(i)[0],
            "trl chain (restated)": with_statistics,
            **({} if quick else compiled(with_statistics)),
            "fastrl reference": lambda i: run(i, "reference"),
            **ours("ppo_loss", device, torch.float32, run),
        },
        bound="copy",
        bytes=rows * length * 33,  # reads 6 floats and a mask, writes 2 gradients
    )


def run(i, backend):
    return ppo_loss(**i, clip_coef=CLIP, vf_clip_coef=VF_CLIP, vf_coef=VF_COEF, backend=backend)[0]


def eager(i):
    """The loss alone, no statistics."""
    mask, count = i["mask"], i["mask"].sum()
    difference = i["logprobs"] - i["old_logprobs"]
    ratio = difference.exp()
    policy = -i["advantages"] * ratio
    policy_clipped = -i["advantages"] * ratio.clamp(1 - CLIP, 1 + CLIP)
    clipped = torch.clamp(i["values"], i["old_values"] - VF_CLIP, i["old_values"] + VF_CLIP)
    value, value_clipped = (i["values"] - i["returns"]).square(), (clipped - i["returns"]).square()
    policy_loss = (torch.max(policy, policy_clipped) * mask).sum() / count
    value_loss = 0.5 * (torch.max(value, value_clipped) * mask).sum() / count
    return policy_loss + VF_COEF * value_loss, (policy, policy_clipped, value, value_clipped, difference, ratio)


def with_statistics(i):
    """The loss and the statistics that TRL's PPO trainer takes of it, the entropy apart."""
    loss, (policy, policy_clipped, value, value_clipped, difference, ratio) = eager(i)
    mask, count = i["mask"], i["mask"].sum()
    with torch.no_grad():
        clip_frac = ((policy_clipped > policy) * mask).sum() / count
        vf_clip_frac = ((value_clipped > value) * mask).sum() / count
        approx_kl = 0.5 * difference.square().mean()
        stats = torch.stack([clip_frac, vf_clip_frac, approx_kl, ratio.mean()])
    return loss + 0 * stats.sum()  # or the compiler would drop them


def test_ppo_loss(benchmark, run):
    benchmark(run)


if __name__ == "__main__":
    from fastrl.commands.bench import main

    main(["--op", "ppo_loss"])
