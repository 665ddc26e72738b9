"""A two-layer Llama and a byte tokenizer, made by code and saved as ordinary folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import make_reward_adapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """Two machines agree."""


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer of 256 bytes + pad + eos + bos = 259 tokens (odd on purpose)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", chat_template=CHAT_TEMPLATE
    )


def tiny_config(**overrides) -> LlamaConfig:
    settings = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    return LlamaConfig(**{**settings, **overrides})


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory, tiny_tokenizer) -> Path:
    """Folder of a two-layer Llama causal LM (hidden 32, 259 tokens, context 256) with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "policy"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_scalar(tmp_path_factory, tiny_tokenizer) -> Path:
    """Folder of a two-layer Llama reward model with one output."""
    folder = tmp_path_factory.mktemp("tiny") / "scalar"
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(tiny_config(num_labels=1)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reward_adapter(tmp_path_factory, tiny_policy, tiny_tokenizer) -> Path:
    """Folder of a reward model with one output that is a LoRA adapter on the tiny policy."""
    return make_reward_adapter(tiny_policy, tmp_path_factory.mktemp("tiny") / "adapter", tiny_tokenizer)
