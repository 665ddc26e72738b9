"""How a run over epochs of data begins, and gradients micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastrl.data import shuffled_batches
from fastrl.data.batches import chunks
from fastrl.models import add_lora, base_model
from fastrl.models.lora import lora_settings
from fastrl.models.saving import save_merged_base, save_model
from fastrl.run.optim import Learner, count_steps, make_optimizer, make_schedule
from fastrl.run.run import Run

Item = TypeVar("Item")


def begin_epochs(
    run: Run, cfg: Any, model: Any, tokenizer: Any, train: Sequence[Item]
) -> tuple[Learner, Iterator[list[Item]]]:
    """The model with its adapters and optimizer, and the batches of the steps to come; the folder is the run's.

    Args:
        cfg: `run.settings.EpochSettings`, `OptimSettings` and `TunerSettings`.
    """
    total = count_steps(len(train), cfg.batch_size, epochs=cfg.epochs, max_steps=cfg.max_steps)
    run.claim()
    lora = lora_settings(cfg)
    if lora:
        run.write(lambda: save_merged_base(model, tokenizer, cfg.output))
        model = add_lora(model, lora)
    if cfg.gradient_checkpointing:
        base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model, learning_rate=cfg.learning_rate, weight_decay=cfg.weight_decay, eps=cfg.adam_eps)
    schedule = make_schedule(optimizer, kind=cfg.schedule, warmup_steps=cfg.warmup_steps, total_steps=total)
    learner = Learner(model, optimizer, schedule)
    run.begin(total, [learner], lambda folder: save_model(model, tokenizer, folder))
    order = chain.from_iterable(
        shuffled_batches(len(train), cfg.batch_size, seed=cfg.seed, epoch=epoch) for epoch in count()
    )
    return learner, ([train[i] for i in indices] for indices in islice(order, run.done, None))


def accumulate(items: Any, size: int, loss_of: Callable[[Any], Tensor]) -> Tensor:
    """Add the gradients of `loss_of` over micro-batches of `size` items (or rows of a tensor); the losses' sum."""
    losses = []
    for micro in chunks(items, size):
        loss = loss_of(micro)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum() if losses else torch.zeros(())
