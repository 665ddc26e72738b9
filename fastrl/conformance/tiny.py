"""A byte tokenizer and two-layer Llamas of 16 dimensions, for the cases that need a whole model; no download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VOCABULARY = 259  # 256 bytes, <pad>, <eos> and <bos>
RECORDS = [{"prompt": f"{i} says: ", "completion": "ab" * (1 + i % 4)} for i in range(24)]


def tokenizer(pad: str = "<pad>") -> Any:
    """A byte is a token; nothing is added to a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=names, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, eos_token="<eos>", bos_token="<bos>")


def config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **(sizes | ids | changes))


def language_model(**changes: Any) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(config(**changes))


def language_model_with_absolute_positions() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_positions": 128, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, initializer_range=0.5, bos_token_id=2, eos_token_id=1, **sizes)
    )


def classifier(**changes: Any) -> Any:
    """A sequence classifier with one label."""
    from transformers import LlamaForSequenceClassification

    return LlamaForSequenceClassification(config(num_labels=1, initializer_range=0.5, **changes)).eval()


def save_records(folder: Path, records: Sequence[dict[str, str]] = RECORDS) -> Path:
    """The records as a file of JSON lines."""
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
