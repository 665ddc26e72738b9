"""How a run over epochs of data begins, and gradients micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastrl.data import shuffled_batches
from fastrl.data.batches import chunks
from fastrl.models import Policy, Scorer, describe, saves_adapter, tune
from fastrl.models.saving import save_merged_base, save_model
from fastrl.run.optim import Learner, count_steps, make_optimizer, make_schedule
from fastrl.run.run import Run

Item = TypeVar("Item")
Module = TypeVar("Module", Policy, Scorer)


def begin_epochs(
    run: Run,
    cfg: Any,
    model: Any,
    tokenizer: Any,
    train: Sequence[Item],
    around: type[Module],
    *,
    keep_loaded: bool = False,
) -> tuple[Module, Learner, Iterator[list[Item]]]:
    """The module around the tuned model, its optimizer, and the batches of the steps to come; the folder is the run's.

    Args:
        cfg: `run.settings.EpochSettings`, `OptimSettings` and `TunerSettings`.
        around: `Policy` or `Scorer`.
        keep_loaded: the loop needs the model as it was loaded, through `tuner.off()`.
    """
    total = count_steps(len(train), cfg.batch_size, epochs=cfg.epochs, max_steps=cfg.max_steps)
    run.claim()
    if saves_adapter(cfg):
        run.write(lambda: save_merged_base(model, tokenizer, cfg.output))
    module = around(tune(model, cfg, keep_loaded=keep_loaded))
    print(describe(module, cfg))
    optimizer = make_optimizer(module, learning_rate=cfg.learning_rate, weight_decay=cfg.weight_decay, eps=cfg.adam_eps)
    schedule = make_schedule(optimizer, kind=cfg.schedule, warmup_steps=cfg.warmup_steps, total_steps=total)
    learner = Learner(module, optimizer, schedule)
    run.begin(total, [learner], lambda folder: save_model(module.model, tokenizer, folder))
    order = chain.from_iterable(
        shuffled_batches(len(train), cfg.batch_size, seed=cfg.seed, epoch=epoch) for epoch in count()
    )
    return module, learner, ([train[i] for i in indices] for indices in islice(order, run.done, None))


def learn(run: Run, learner: Learner, loss: Tensor) -> dict[str, float]:
    """One step on the gradients, and of the schedule; what every loop reports of it."""
    lr = learner.learning_rate
    total, (grad_norm,) = run.update(loss, learner)
    learner.schedule.step()
    return {"loss": total, "lr": lr, "grad_norm": grad_norm}


def accumulate(items: Any, size: int, loss_of: Callable[[Any], Tensor]) -> Tensor:
    """Add the gradients of `loss_of` over micro-batches of `size` items (or rows of a tensor); the losses' sum."""
    losses = []
    for micro in chunks(items, size):
        loss = loss_of(micro)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum() if losses else torch.zeros(())
