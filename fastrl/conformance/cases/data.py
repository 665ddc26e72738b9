"""What of a record is supervised, where a reward model reads its score, and runs that are gone on with."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fastrl.conformance import tiny
from fastrl.conformance.compare import close, expect, same_bits

RECORDS = [
    {"prompt": "two and two is ", "completion": "four"},
    {"prompt": "a a a ", "completion": "a"},  # the prompt holds its completion
    {"prompt": "x", "completion": "a longer answer than its prompt"},
]


def supervised_tokens(sft_labels):
    """pitfall 17: exactly the completion and its end token are supervised: the first token of it, and eos."""
    _check_labels(sft_labels, tiny.tokenizer(), "")


def end_token_is_the_pad_token(sft_labels):
    """pitfall 17: eos is supervised where it is the pad token too, and padding is not."""
    _check_labels(sft_labels, tiny.tokenizer(pad="<eos>"), ", pad == eos")


def score_of_the_last_token(pooled_scores):
    """pitfall 18: the score is of the last token, on either side of padding, with eos and without."""
    for side in ("right", "left"):
        for end in ([], [1]):
            _check_scores(pooled_scores, side, end, {}, 0)


def score_where_pad_is_eos(pooled_scores):
    """pitfall 18: a last token that is the pad token too is the last token, if the attention mask says so."""
    _check_scores(pooled_scores, "right", [1], {"pad_token_id": 1}, 0)


def extra_padding_of_scores(pooled_scores):
    """pitfall 19: more padding changes no score."""
    for side in ("right", "left"):
        _check_scores(pooled_scores, side, [1], {}, 5)


def a_run_that_is_gone_on_with(resume):
    """pitfall 41: six steps, cut off after three or not, end with the same weights, bit for bit on a CPU."""
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parts:
        uncut, cut = resume(Path(whole), 0), resume(Path(parts), 3)
    expect(len(uncut) == len(cut) > 0, "weights after six steps", f"{len(uncut)} tensors", len(cut))
    for number, (a, b) in enumerate(zip(uncut, cut, strict=True)):
        same_bits(a, b, f"weight {number} of {len(cut)} after six steps, cut off after three or not")


def _check_labels(sft_labels, tokenizer, note: str) -> None:
    found = sft_labels(tokenizer, RECORDS)
    expect(len(found) == len(RECORDS), f"{len(RECORDS)} records{note}", "as many examples", len(found))
    for record, (input_ids, labels) in zip(RECORDS, found, strict=True):
        given = f"prompt {record['prompt']!r}, completion {record['completion']!r}{note}"
        wanted = [*tokenizer(record["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        supervised = [i for i, label in enumerate(labels) if label != -100]
        got = tokenizer.decode([labels[i] for i in supervised])
        expect([labels[i] for i in supervised] == wanted, f"{given}: supervised", tokenizer.decode(wanted), got)
        last = list(range(len(input_ids) - len(wanted), len(input_ids)))
        expect(supervised == last, f"{given}: places of the labels", last, supervised)
        expect(all(input_ids[i] == labels[i] for i in supervised), f"{given}: labels", "the ids there", got)


def _check_scores(pooled_scores, side: str, end: list[int], changes: dict[str, int], extra: int) -> None:
    model = tiny.classifier(**changes)
    rows = [[*range(40, 40 + length), *end] for length in (9, 4, 1)]
    width, pad = max(map(len, rows)) + extra, model.config.pad_token_id
    input_ids, mask = torch.full((3, width), pad), torch.zeros(3, width, dtype=torch.bool)
    for row, ids in enumerate(rows):
        place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        input_ids[row, place], mask[row, place] = torch.tensor(ids), True
    with torch.no_grad():
        truth = torch.cat([_score(model, torch.tensor([ids])) for ids in rows])
        got = pooled_scores(model, input_ids, mask)
    given = f"lengths {[len(ids) for ids in rows]} padded {side} to {width} with {pad}, ends {end}"
    close(got, truth, given, atol=1e-4)


def _score(model, input_ids: Tensor) -> Tensor:
    """Of a row without padding: the head at its last place."""
    return model.score(model.model(input_ids=input_ids).last_hidden_state)[:, -1, 0]
