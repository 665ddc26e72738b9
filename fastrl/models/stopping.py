"""Which tokens end a response, in rollouts and in saved models."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrl.data.templates import end_token_id


def find_stop_token_ids(tokenizer: Any, model: Any = None, stop_tokens: Sequence[str] = ()) -> list[int]:
    """Ids of the tokens that end a response.

    The given `stop_tokens` alone when there are any; else the chat template's end of turn, the tokenizer's eos and
    the end-of-sequence ids of the model's generation config.

    Raises:
        ValueError: a stop token is not one token of this tokenizer, or there is nothing to stop at.
    """
    ids: set[int | None] = set()
    for token in stop_tokens:
        pieces = tokenizer.encode(token, add_special_tokens=False)
        if len(pieces) != 1:
            raise ValueError(
                f"stop token {token!r}: expected one token of the tokenizer, got {len(pieces)}: "
                f"{tokenizer.convert_ids_to_tokens(pieces)}"
            )
        ids.update(pieces)
    if not ids:
        configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ids.update(configured if isinstance(configured, list) else [configured])
        ids.update([end_token_id(tokenizer), tokenizer.eos_token_id])
    return sorted(token_id for token_id in ids if token_id is not None)


def write_generation_config(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write generation_config.json: the model's own settings, and every token that ends a response as its eos, so that
    transformers and vLLM stop where `fastrl chat` stops.

    Settings that transformers would refuse to save (a temperature without do_sample) are kept as they are.
    """
    settings = copy.deepcopy(model.generation_config)
    stops = find_stop_token_ids(tokenizer, model)
    settings.eos_token_id = stops[0] if len(stops) == 1 else stops
    (folder / "generation_config.json").write_text(settings.to_json_string(), encoding="utf-8")
