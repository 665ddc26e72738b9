"""What does not fit is refused by every command at its start, before anything is written."""

from __future__ import annotations

import copy

import pytest
import transformers
from families import byte_tokenizer, randomised, tiny_config
from loops import tiny_run

from fastrl.commands import chat
from fastrl.commands.export import export


@pytest.fixture(scope="module")
def more_tokens(tmp_path_factory, tiny_policy, tiny_tokenizer):
    """A policy whose tokenizer got a pad token for which the model has no row."""
    folder = tmp_path_factory.mktemp("more") / "policy"
    transformers.AutoModelForCausalLM.from_pretrained(tiny_policy).save_pretrained(folder)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """BERT, which sees the tokens that it should predict."""
    folder = tmp_path_factory.mktemp("encoder") / "policy"
    randomised(tiny_config(transformers.BertConfig, is_decoder=False)).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("loop", ["sft", "reward", "ppo"])
def test_loops_refuse_a_tokenizer_with_more_tokens_than_rows(more_tokens, tiny_scalar, tmp_path, loop):
    reward_model = more_tokens if loop == "ppo" else tiny_scalar
    main, config = tiny_run(loop, tmp_path, more_tokens, reward_model)
    with pytest.raises(ValueError, match="expected at most 259 tokens, the rows of the model's embedding, got 260"):
        main(config)
    assert not (tmp_path / "run").exists()


def test_chat_and_export_refuse_it_too(more_tokens, tmp_path):
    with pytest.raises(ValueError, match="expected at most 259 tokens"):
        chat.main([str(more_tokens)])
    with pytest.raises(ValueError, match="expected at most 259 tokens"):
        export(str(more_tokens), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("loop, message", [("sft", "causality"), ("reward", "linear head `score`, got none")])
def test_loops_refuse_an_encoder(encoder, tiny_scalar, tmp_path, loop, message):
    main, config = tiny_run(loop, tmp_path, encoder, tiny_scalar)
    with pytest.raises(ValueError, match=message):
        main(config)
    assert not (tmp_path / "run").exists()


def test_ppo_refuses_a_language_model_as_its_reward_model(tiny_policy, tmp_path):
    main, config = tiny_run("ppo", tmp_path, tiny_policy, tiny_policy)
    with pytest.raises(ValueError, match="expected a reward model, got a language model without a score head"):
        main(config)
    assert not (tmp_path / "run").exists()
