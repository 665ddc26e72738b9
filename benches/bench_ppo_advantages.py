"""ppo_advantages against the chain of TRL's PPO trainer: KL penalty, score, GAE loop, masked whitening."""

from __future__ import annotations

import torch

from fastrl.benches import bench_gae
from fastrl.benches.harness import Case, ours
from fastrl.ops import ppo_advantages

KL_COEF = 0.05
SHAPES = {"cpu": [(512, 1024), (64, 256)], "cuda": [(512, 2048), (8192, 4096), (64, 256)]}


def cases(device: str, quick: bool = False) -> list[Case]:
    shapes = [(64, 128)] if quick else SHAPES[device]
    return [case(*shape, device) for shape in shapes]


def case(rows: int, length: int, device: str) -> Case:
    def make(rows: int):
        logprobs = -torch.rand(rows, length) * 3
        return {
            "logprobs": logprobs,
            "ref_logprobs": logprobs + 0.1 * torch.randn(rows, length),
            "values": torch.randn(rows, length),
            "scores": torch.randn(rows),
            "mask": torch.arange(length) < torch.randint(length // 4, length + 1, (rows, 1)),
        }

    return Case(
        op="ppo_advantages",
        shape=f"{rows}x{length}",
        dtype=torch.float32,
        make=make,
        rows=rows,
        truth=lambda i: run(i, "reference"),
        providers={
            "trl chain (restated)": chain,
            "fastrl reference": lambda i: run(i, "reference"),
            **ours("ppo_advantages", device, torch.float32, run),
        },
        bound="copy",
        bytes=rows * length * 29,  # reads 3 floats and a mask, writes 4 floats
    )


def run(i, backend):
    result = ppo_advantages(**i, kl_coef=KL_COEF, gamma=bench_gae.GAMMA, gae_lambda=bench_gae.LAMBDA, backend=backend)
    return result.advantages, result.returns, result.rewards


def chain(i):
    """The steps of trl.experimental.ppo.PPOTrainer.train, whitening included, without its metrics.

    Three details follow fastrl's contract, at the same cost: the score lands on the last kept token (TRL: one past it,
    unless the response fills the row), the value is 0 from there on, and the variance is the population's.
    """
    dropped = ~i["mask"]
    logprobs, ref_logprobs = i["logprobs"].masked_fill(dropped, 1.0), i["ref_logprobs"].masked_fill(dropped, 1.0)
    values = i["values"].masked_fill(dropped, 0)
    rewards = -KL_COEF * (logprobs - ref_logprobs)
    rewards[torch.arange(len(rewards)), i["mask"].sum(1) - 1] += i["scores"]
    advantages, returns = bench_gae.loop({"rewards": rewards, "values": values})
    return whiten(advantages, i["mask"]).masked_fill(dropped, 0), returns.masked_fill(dropped, 0), rewards


def whiten(values, mask):
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = (((values - mean) ** 2) * mask).sum() / count
    return (values - mean) * torch.rsqrt(variance + 1e-8)


def test_ppo_advantages(benchmark, run):
    benchmark(run)


if __name__ == "__main__":
    from fastrl.commands.bench import main

    main(["--op", "ppo_advantages"])
