"""PTX: the SFT loss on other data in PPO's steps, which keeps what the policy knew (Ouyang et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch import Tensor

from fastrl.data import Example, load_examples
from fastrl.data.batches import sft_batch, supervised_tokens
from fastrl.data.templates import without_record
from fastrl.models import Policy, check_context
from fastrl.run.distributed import share
from fastrl.train.epochs import accumulate
from fastrl.train.experience import shuffled_indices
from fastrl.train.losses import sft_loss


def load_ptx(cfg: Any, policy: Policy, tokenizer: Any) -> list[Example]:
    """The examples of `cfg.ptx_data`, none if that is empty. What was loaded is printed."""
    if not cfg.ptx_data:
        return []
    check_context(policy.model, cfg.ptx_max_length, "ptx_max_length", cfg)
    as_trained = cfg.ptx_template == "auto"
    examples, report = load_examples(
        cfg.ptx_data,
        tokenizer if as_trained else without_record(tokenizer),
        max_length=cfg.ptx_max_length,
        template=cfg.template if as_trained else cfg.ptx_template,
        columns=cfg.ptx_columns,
        max_bad_records=cfg.max_bad_records,
    )
    print(f"ptx: {report}")
    return examples


def ptx_batches(examples: Sequence[Example], cfg: Any, done: int) -> Iterator[list[list[Example]]]:
    """For each iteration after `done`, the examples of each of its optimizer steps; nothing without examples.

    An iteration passes over those of the steps that `target_kl` spares it: the order depends on its number alone.
    """
    steps = cfg.epochs * math.ceil(cfg.batch_size / cfg.minibatch_size)
    order = islice(shuffled_indices(len(examples), seed=cfg.seed), done * steps * cfg.ptx_batch_size, None)
    while examples:
        yield [[examples[i] for i in islice(order, cfg.ptx_batch_size)] for _ in range(steps)]


def ptx_gradients(policy: Policy, examples: Sequence[Example], cfg: Any, pad_id: int) -> Tensor:
    """Adds the gradients of ptx_coef * mean of -log p over the supervised tokens; this rank's part of that loss."""
    targets = max(1, supervised_tokens(examples))

    def loss_of(micro: Sequence[Example]) -> Tensor:
        return cfg.ptx_coef * sft_loss(policy, sft_batch(micro, pad_id, policy.device), denominator=targets)

    by_length = sorted(examples, key=lambda e: len(e.input_ids), reverse=True)
    return accumulate(share(by_length), cfg.micro_batch_size, loss_of)
