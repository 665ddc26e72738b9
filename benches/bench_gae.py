"""gae against the loop over time steps that TRL's PPO trainer runs."""

from __future__ import annotations

import torch

from fastrl.benches.harness import Case, ours
from fastrl.ops import gae

GAMMA, LAMBDA = 1.0, 0.95
SHAPES = {"cpu": [(512, 1024), (64, 256)], "cuda": [(512, 2048), (8192, 4096), (64, 256)]}


def cases(device: str, quick: bool = False) -> list[Case]:
    shapes = [(64, 128)] if quick else SHAPES[device]
    return [case(*shape, ragged, device) for shape in shapes for ragged in (False, True)]


def case(rows: int, length: int, ragged: bool, device: str) -> Case:
    def make(rows: int):
        inputs = {"rewards": torch.randn(rows, length), "values": torch.randn(rows, length)}
        if ragged:
            kept = torch.randint(length // 4, length + 1, (rows, 1))
            inputs["mask"] = torch.arange(length) < kept
        return inputs

    return Case(
        op="gae",
        shape=f"{rows}x{length}" + (" ragged" if ragged else ""),
        dtype=torch.float32,
        make=make,
        rows=rows,
        truth=lambda i: run(i, "reference"),
        providers={
            "torch loop": loop,  # line by line what trl.experimental.ppo does
            "torch loop, time first": loop_time_first,
            "fastrl reference": lambda i: run(i, "reference"),
            **ours("gae", device, torch.float32, run),
        },
        bound="copy",
        bytes=rows * length * (16 + ragged),
    )


def run(i, backend):
    return gae(**i, gamma=GAMMA, gae_lambda=LAMBDA, backend=backend)


def loop(i):
    """Columns of a row-major array, right to left; a mask is honoured by zeroing before and after."""
    rewards, values = zeroed(i, i["rewards"]), zeroed(i, i["values"])
    steps = values.shape[1]
    carried, columns = 0.0, []
    for t in range(steps - 1, -1, -1):
        next_value = values[:, t + 1] if t + 1 < steps else 0.0
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        carried = delta + GAMMA * LAMBDA * carried
        columns.append(carried)
    advantages = torch.stack(columns[::-1], dim=1)
    return zeroed(i, advantages), zeroed(i, advantages + values)


def loop_time_first(i):
    """The same on transposed copies, so that every step reads and writes contiguous memory."""
    rewards, values = zeroed(i, i["rewards"]).t().contiguous(), zeroed(i, i["values"]).t().contiguous()
    deltas = rewards - values
    deltas[:-1] += GAMMA * values[1:]
    advantages = torch.empty_like(deltas)
    advantages[-1] = deltas[-1]
    for t in range(len(deltas) - 2, -1, -1):
        torch.add(deltas[t], advantages[t + 1], alpha=GAMMA * LAMBDA, out=advantages[t])
    return zeroed(i, advantages.t().contiguous()), zeroed(i, (advantages + values).t().contiguous())


def zeroed(i, tensor):
    return tensor.masked_fill(~i["mask"], 0) if "mask" in i else tensor


def test_gae(benchmark, run):
    benchmark(run)


if __name__ == "__main__":
    from fastrl.commands.bench import main

    main(["--op", "gae"])
