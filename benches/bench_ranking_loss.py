"""ranking_loss, forward and backward, against TRL's line for pairs and the loop over groups of 2 to 9 answers."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from fastrl.benches.harness import Case, compiled, ours
from fastrl.ops import ranking_loss

SIZES = {"pairs": (2,), "groups of 2 to 9": tuple(range(2, 10))}  # of the groups, over and over
GROUPS = {"pairs": 2048, "groups of 2 to 9": 512}


def cases(device: str, quick: bool = False) -> list[Case]:
    return [case(32 if quick else GROUPS[kind], kind, device, quick) for kind in SIZES]


def case(groups: int, kind: str, device: str, quick: bool) -> Case:
    def sizes_of(groups: int) -> torch.Tensor:
        return torch.tensor(SIZES[kind])[torch.arange(groups) % len(SIZES[kind])]

    def make(groups: int):
        """Answers of a group stand together, best first, which spares the peers a sort."""
        sizes = sizes_of(groups)
        return {
            "scores": torch.randn(int(sizes.sum())),
            "group_ids": torch.arange(groups).repeat_interleave(sizes),
            "ranks": torch.cat([torch.arange(size) for size in sizes.tolist()]),
        }

    def padded(i):
        return over_padded_rows(i, max(SIZES[kind]))

    pairs, answers = kind == "pairs", int(sizes_of(groups).sum())
    return Case(
        op="ranking_loss",
        shape=f"{answers} in {kind}",
        dtype=torch.float32,
        make=make,
        rows=groups,
        wrt=("scores",),
        truth=lambda i: run(i, "reference"),
        providers={
            **({"torch eager": chosen_and_rejected} if pairs else {"torch loop": loop}),
            "torch padded": padded,
            **({} if quick else compiled(chosen_and_rejected if pairs else padded)),
            # What a GPU runs.
            **({"fastrl reference": lambda i: run(i, "reference")} if quick or device != "cpu" else {}),
            **ours("ranking_loss", device, torch.float32, run),
        },
        bound="copy",
        bytes=answers * 24,  # reads scores, ids and ranks, writes the gradient
    )


def run(i, backend):
    return ranking_loss(**i, backend=backend)[0]


def chosen_and_rejected(i):
    """What TRL's reward trainer computes, for pairs alone; like the other lines without statistics."""
    chosen, rejected = i["scores"].view(-1, 2).unbind(1)
    return -logsigmoid(chosen - rejected).mean()


def sizes_of_groups(i):
    return i["group_ids"].unique_consecutive(return_counts=True)[1]


def loop(i):
    losses = []
    for scores in i["scores"].split(sizes_of_groups(i).tolist()):
        better, worse = torch.triu_indices(len(scores), len(scores), 1, device=scores.device)
        losses.append(-logsigmoid(scores[better] - scores[worse]).mean())
    return torch.stack(losses).mean()


def over_padded_rows(i, length: int):
    """A row for each group, and all pairs of a row at once."""
    sizes = sizes_of_groups(i)
    taken = torch.arange(length, device=sizes.device) < sizes[:, None]
    scores = i["scores"].new_zeros(taken.shape).masked_scatter(taken, i["scores"])
    pairs = (taken[:, :, None] & taken[:, None, :]).triu(1)
    losses = torch.where(pairs, -logsigmoid(scores[:, :, None] - scores[:, None, :]), 0)
    return (losses.sum((1, 2)) / pairs.sum((1, 2))).mean()


def test_ranking_loss(benchmark, run):
    benchmark(run)


if __name__ == "__main__":
    from fastrl.commands.bench import main

    main(["--op", "ranking_loss"])
