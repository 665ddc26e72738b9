"""A patched PEFT model under FSDP2, one of several processes: `torchrun --nproc_per_node 2 sharded.py OUTPUT.json`."""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from peft_models import tiny_llama, with_lora
from torch.distributed.fsdp import fully_shard

import fastrl
from fastrl.models import fused_linear

ORDERS = (["shard"], ["patch", "shard"], ["shard", "patch"])
BATCH = torch.arange(4 * 100).reshape(4, 100) * 7 % 64  # half of it for each of two ranks


def train(order: list[str], rank: int = 0, ranks: int = 1) -> dict:
    """Losses of four AdamW steps on a share of the batch, and how often the fused op ran.

    `order`: what is done to the model first, "patch" and "shard" or one of them.
    """
    model = with_lora(tiny_llama())
    with mock.patch.object(fused_linear, "lora_linear", wraps=fused_linear.lora_linear) as fused:
        for act in order:
            {"patch": fastrl.patch, "shard": shard}[act](model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(4):
            ids = BATCH.chunk(ranks)[rank]
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return {"losses": losses, "calls": fused.call_count}


def shard(model) -> None:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def main(output: str) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    seen = {" ".join(order): train(order, rank, ranks) for order in ORDERS}
    Path(f"{output}.{rank}").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
