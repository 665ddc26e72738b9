"""The probe of a loaded model: what is not what fastrl takes it for is refused or marked, what is right passes."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import byte_tokenizer, randomised, sampled_as_alone, tiny_config

from fastrl.models import load_scalar_model
from fastrl.models.decoding import NO_CACHE
from fastrl.models.probe import Comparison, check_policy, check_scalar
from fastrl.models.score_heads import with_scalar_head


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def llama():
    return randomised(tiny_config(transformers.LlamaConfig))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Llama", "Mixtral", "GPT2"])
def test_a_right_model_passes(tokenizer, family, dtype, capsys):
    """Experts too, whose router rounding may tip in bfloat16."""
    model = randomised(tiny_config(getattr(transformers, f"{family}Config"))).to(dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    check_policy(model, tokenizer, "m")
    assert not getattr(model, NO_CACHE, False) and capsys.readouterr().out == ""
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_bfloat16_is_judged_by_the_size_of_its_rounding(llama):
    """SmolLM2-135M's cached logits differ by 3 % of their spread, one of 49152 by 14 %."""
    check = Comparison(llama.bfloat16(), "m")
    logits = torch.randn(4, 49152)
    rounded = logits + 0.03 * torch.randn_like(logits)
    assert (rounded - logits).abs().max() > 0.1
    check.same("logits", rounded, logits, logits.std(), "")
    with pytest.raises(ValueError, match="logits: expected a difference below 0.1, got 0.2"):
        check.same("logits", logits + 0.2 * torch.randn_like(logits), logits, logits.std(), "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [lambda logits: logits * 0.5, lambda logits: 0.5 * torch.tanh(logits / 0.5)])
def test_a_scale_or_cap_that_no_field_explains_is_refused(llama, tokenizer, change, dtype):
    llama.lm_head.register_forward_hook(lambda head, inputs, logits: change(logits))
    with pytest.raises(ValueError, match=r"^m: LlamaForCausalLM: log-probs: expected a difference below .*, got"):
        check_policy(llama.to(dtype), tokenizer, "m")


def test_a_transform_below_the_head_is_refused(llama, tokenizer):
    llama.lm_head.register_forward_pre_hook(lambda head, inputs: (torch.nn.functional.gelu(inputs[0]),))
    with pytest.raises(ValueError, match="LlamaForCausalLM: log-probs: .*choose another model"):
        check_policy(llama, tokenizer, "m")


def test_another_decoder_than_the_heads_is_refused(llama, tokenizer):
    llama.get_decoder = lambda: transformers.AutoModel.from_config(llama.config)
    with pytest.raises(ValueError, match="LlamaForCausalLM: log-probs: "):
        check_policy(llama, tokenizer, "m")


def test_a_model_that_sees_what_it_should_predict_is_refused(tokenizer):
    config = tiny_config(transformers.BertConfig, is_decoder=False)
    model = randomised(config)
    with pytest.raises(ValueError, match="m: BertLMHeadModel: causality: .* got .*decoder-only"):
        check_policy(model, tokenizer, "m")
    with pytest.raises(ValueError, match="causality"):
        check_policy(model.bfloat16(), tokenizer, "m")


def without_cache(model, arguments, inputs):
    return arguments, {**inputs, "past_key_values": None}


def without_mask(model, arguments, inputs):
    return arguments, {name: value for name, value in inputs.items() if name not in ("attention_mask", "position_ids")}


@pytest.mark.parametrize("defect", [without_cache, without_mask])
def test_a_model_whose_cache_or_padding_is_wrong_is_sampled_without(llama, tokenizer, defect, capsys):
    """Nor is it sampled wrongly: rows of the batch are those of decoding each prompt alone."""
    llama.register_forward_pre_hook(defect, with_kwargs=True)
    check_policy(llama, tokenizer, "m")
    said = capsys.readouterr().out
    assert said.startswith("sampling without a cache, which is slower: m: LlamaForCausalLM: logits")
    assert getattr(llama, NO_CACHE)
    assert sampled_as_alone(llama, tokenizer)


def test_a_family_without_a_key_value_cache_is_sampled_without(tokenizer):
    model = randomised(tiny_config(transformers.MambaConfig))
    check_policy(model, tokenizer, "m")
    assert getattr(model, NO_CACHE)
    assert sampled_as_alone(model, tokenizer)


def test_what_a_foreign_forward_raises_is_one_line(llama, tokenizer):
    def fail(*_):
        raise TypeError("first line\nsecond line")

    llama.model.norm.register_forward_hook(fail)
    with pytest.raises(ValueError, match="^m: LlamaForCausalLM: forward pass failed: TypeError: first line$"):
        check_policy(llama, tokenizer, "m")


def test_sizes(llama, tokenizer):
    """A tokenizer may have fewer tokens than the model has rows, not more; both numbers are named."""
    grown = byte_tokenizer()
    grown.add_tokens([f"<{i}>" for i in range(300 - len(grown))])
    check_policy(llama, grown, "m")
    grown.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"m: tokenizer: expected at most 300 tokens, .*embedding, got 301.*'\[PAD\]'"):
        check_policy(llama, grown, "m")
    llama.resize_token_embeddings(301)
    check_policy(llama, grown, "m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores(llama, tokenizer, dtype, tmp_path):
    """Right scores pass, with the stored bias; a head that does more, or a model that is not causal, does not."""
    torch.manual_seed(0)
    model = with_scalar_head(llama)
    model.save_pretrained(tmp_path)
    model = load_scalar_model(tmp_path, dtype=dtype)
    model.config.fastrl_score_bias = 0.5
    check_scalar(model, tokenizer, "m")
    model.model.register_forward_hook(lambda layer, inputs, output: output)
    handle = model.register_forward_hook(lambda layer, inputs, output: {"logits": 1.5 * output.logits})
    with pytest.raises((ValueError, AttributeError)):
        check_scalar(model, tokenizer, "m")
    handle.remove()
    check_scalar(model, tokenizer, "m")
