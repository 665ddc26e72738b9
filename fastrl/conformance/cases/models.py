"""Log-probs of whole sequences through a model, and padding."""

from __future__ import annotations

from typing import Any

import torch

from fastrl.conformance import tiny
from fastrl.conformance.compare import close, naive_logprobs


def left_padding(sequence_logprobs):
    """pitfall 2: padding on the left changes no log-prob of a model with rotary positions."""
    _check_padding(sequence_logprobs, tiny.language_model(initializer_range=0.5), "left", 0)


def left_padding_of_absolute_positions(sequence_logprobs):
    """pitfall 2: padding on the left changes no log-prob of a model with learned positions (GPT-2)."""
    _check_padding(sequence_logprobs, tiny.language_model_with_absolute_positions(), "left", 0)


def extra_padding(sequence_logprobs):
    """pitfall 3: more columns of padding change no log-prob."""
    for side in ("right", "left"):
        _check_padding(sequence_logprobs, tiny.language_model(initializer_range=0.5), side, 5)


def _check_padding(sequence_logprobs, model: Any, side: str, extra: int) -> None:
    model.eval()
    rows = [list(range(40, 40 + length)) for length in (9, 4, 2)]
    width = 9 + extra
    input_ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.bool)
    starts = [0 if side == "right" else width - len(ids) for ids in rows]
    for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
        input_ids[row, start : start + len(ids)], mask[row, start : start + len(ids)] = torch.tensor(ids), True
    with torch.no_grad():
        got = sequence_logprobs(model, input_ids, mask)
        for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
            alone = torch.tensor([ids])
            truth = naive_logprobs(model(input_ids=alone).logits.double()[0, :-1], alone[0, 1:])
            given = f"{type(model).__name__}, {len(ids)} tokens padded {side} to {width}"
            close(got[row, start : start + len(ids) - 1], truth, given, atol=1e-4)
