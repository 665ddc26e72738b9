"""Merged adapters give the numbers that PEFT gives unmerged, in fastrl and in plain transformers, or are refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from train.conftest import tiny_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    LlamaForCausalLM,
    Qwen2Config,
)

from fastrl.commands.export import export
from fastrl.models import LoRASettings, add_lora, load_policy, load_scalar_model, merging, response_logprobs, tune
from fastrl.models.saving import save_merged_base, save_model

IDS = torch.tensor([[5, 60, 70, 80, 90, 33, 2]])


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def save_base(folder, tokenizer, *, tied=False, config=None, **overrides):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config) if config else LlamaForCausalLM(
        tiny_config(tie_word_embeddings=tied, **overrides)
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shake(model, seed=1, scale=0.3):
    """Non-zero values in everything that an adapter trains."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model


def save_adapter(folder, base, config, *, auto=AutoModelForCausalLM, **options):
    """An adapter as PEFT saves it; returns its logits."""
    adapted = shake(peft.get_peft_model(auto.from_pretrained(base, **options), config))
    adapted.save_pretrained(folder)
    return logits(adapted)


def same(got, want):
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def lora(**options):
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "up_proj"], **options})


KINDS = {
    "plain": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "all linear": lora(target_modules="all-linear"),
    "bias all": lora(bias="all"),
    "bias lora_only": lora(bias="lora_only"),
    "whole head": lora(modules_to_save=["lm_head"]),
    "whole embedding": lora(modules_to_save=["embed_tokens"]),
    "both whole": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "head": lora(target_modules=["lm_head", "q_proj"]),
    "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "head and embedding": lora(target_modules=["embed_tokens", "lm_head"]),
    "tied by PEFT": lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "tokens": lora(trainable_token_indices=[60, 70]),
    "norms": lora(modules_to_save=["norm"]),
    "pattern": lora(rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 16}),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    "loha": peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "no task": lora(task_type=None),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(kind, tied, tiny_tokenizer, tmp_path):
    """load_policy, export and the next loop's base have PEFT's logits; the latter two in plain transformers too."""
    base = save_base(tmp_path / "base", tiny_tokenizer, tied=tied)
    want = save_adapter(tmp_path / "adapter", base, KINDS[kind])
    assert (want - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.05
    same(logits(load_policy(tmp_path / "adapter")), want)
    export(str(tmp_path / "adapter"), tmp_path / "exported")
    save_merged_base(load_policy(tmp_path / "adapter"), tiny_tokenizer, tmp_path / "run")
    for folder in ("exported", "run/base"):
        same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / folder)), want)
        same(logits(load_policy(tmp_path / folder)), want)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_added_tokens(tied, tiny_tokenizer, tmp_path):
    """Resized embeddings that the adapter brings, trained whole or as they were."""
    base = save_base(tmp_path / "base", tiny_tokenizer, tied=tied)
    ids = torch.tensor([[5, 260, 70, 259]])
    for name, config in {
        "whole": lora(modules_to_save=["embed_tokens", "lm_head"]),
        "frozen": lora(),
        "adapted": lora(target_modules=["embed_tokens", "lm_head"]),
    }.items():
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(261, mean_resizing=False)
        adapted = shake(peft.get_peft_model(model, config))
        adapted.save_pretrained(tmp_path / name, save_embedding_layers="auto" if name == "whole" else True)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        want = logits(adapted, ids)
        assert want.shape[-1] == 261
        same(logits(load_policy(tmp_path / name), ids), want)
        export(str(tmp_path / name), tmp_path / f"{name} exported")
        same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / f"{name} exported"), ids), want)


def test_added_tokens_that_the_adapter_does_not_bring(tiny_tokenizer, tmp_path):
    base = save_base(tmp_path / "base", tiny_tokenizer)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(261, mean_resizing=False)
    adapted = peft.get_peft_model(model, lora(modules_to_save=["embed_tokens"]))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"model with 261 tokens, its base .*base has 259, .* rows of lm_head"):
        load_policy(tmp_path / "adapter")


FAMILIES = {
    "gemma2": Gemma2Config(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    ),
    "gpt2": GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    "qwen2": Qwen2Config(  # its tokenizer adds an end of text
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_families(family, tiny_tokenizer, tmp_path):
    base = save_base(tmp_path / "base", tiny_tokenizer, config=FAMILIES[family])
    want = save_adapter(tmp_path / "adapter", base, lora(target_modules=["lm_head"]))
    export(str(tmp_path / "adapter"), tmp_path / "exported")
    for model in (load_policy(tmp_path / "adapter"), AutoModelForCausalLM.from_pretrained(tmp_path / "exported")):
        same(logits(model), want)


def test_an_adapter_on_a_merged_adapter_that_untied_its_base(tiny_tokenizer, tmp_path):
    """Our own loops: LoRA on a tied head, and again on what it gave."""
    base = save_base(tmp_path / "base", tiny_tokenizer, tied=True)
    source = base
    for name in ("first", "second"):
        model = load_policy(source)
        save_merged_base(model, tiny_tokenizer, tmp_path / name)
        adapted = shake(add_lora(model, LoRASettings(4, 8, 0.0, "lm_head,q_proj")))
        save_model(adapted, tiny_tokenizer, tmp_path / name)
        want, source = logits(adapted), tmp_path / name
        same(logits(load_policy(source)), want)
        same(logits(peft.AutoPeftModelForCausalLM.from_pretrained(source)), want)


def test_bfloat16(tiny_tokenizer, tmp_path):
    base = save_base(tmp_path / "base", tiny_tokenizer, tied=True)
    save_adapter(tmp_path / "adapter", base, lora(target_modules=["lm_head", "q_proj"]))
    exact, rounded = (logits(load_policy(tmp_path / "adapter", dtype=d)).float() for d in ("float32", "bfloat16"))
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()


def test_reward_adapter(tiny_scalar, tmp_path):
    config = lora(task_type="SEQ_CLS", modules_to_save=["score"])
    auto = AutoModelForSequenceClassification
    want = save_adapter(tmp_path / "adapter", tiny_scalar, config, auto=auto)
    same(logits(load_scalar_model(tmp_path / "adapter")), want)
    export(str(tmp_path / "adapter"), tmp_path / "exported")
    same(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")), want)
    assert load_scalar_model(tmp_path / "adapter", dtype="bfloat16").score.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=4),
        peft.PrefixTuningConfig(num_virtual_tokens=4),
        peft.PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8),
        peft.PromptEncoderConfig(num_virtual_tokens=4),
        peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_reparameterization_type="LSTM"),
    ],
)
def test_virtual_tokens_are_kept_and_not_merged(config, tiny_policy, tiny_tokenizer, tmp_path):
    """Anyone's: log-probs are PEFT's, `export` says that it cannot be, and another base is noticed."""
    config.task_type, folder = "CAUSAL_LM", tmp_path / "adapter"
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_policy), config).save_pretrained(folder)
    plain = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    ids, every = IDS[:1], torch.ones_like(IDS[:1])
    with torch.no_grad():
        want = plain(input_ids=ids).logits[0, -len(ids[0]) :].log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])
        same(response_logprobs(load_policy(folder), ids, every, every[:, 1:].bool())[0], want[:, 0])
    with pytest.raises(ValueError, match=f"a {config.peft_type.value} adapter cannot be merged into a model"):
        export(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(save_base(tmp_path / "wider", tiny_tokenizer, hidden_size=64))
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="adapter: cannot be read: "):
        load_policy(folder)


def test_bottlenecks_of_another_base_are_refused(tiny_policy, tiny_tokenizer, tmp_path):
    settings = SimpleNamespace(tuner="adapter", adapter_size=4, adapter_places="both")
    save_model(tune(load_policy(tiny_policy), settings).model, tiny_tokenizer, tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    for sizes in ({"hidden_size": 64}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}):
        stored["base_model_name_or_path"] = str(save_base(tmp_path / f"{sizes}", tiny_tokenizer, **sizes))
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(stored))
        with pytest.raises(ValueError, match="adapter: the adapter is of another base: model.layers"):
            load_policy(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="save the adapter as safetensors"):
        load_policy(tmp_path / "adapter")


def test_an_adapter_that_is_kept_stands_on_a_whole_model(tiny_policy, tiny_tokenizer, tmp_path):
    save_adapter(tmp_path / "first", tiny_policy, lora())
    settings = SimpleNamespace(tuner="adapter", adapter_size=4, adapter_places="mlp")
    save_model(tune(load_policy(tmp_path / "first"), settings).model, tiny_tokenizer, tmp_path / "second")
    with pytest.raises(
        ValueError, match="needs a whole model as its base, got the adapter .*first; write that one with"
    ):
        load_policy(tmp_path / "second")


def test_what_peft_cannot_merge_is_refused(tiny_policy, tmp_path):
    save_adapter(tmp_path / "adapter", tiny_policy, lora(lora_bias=True))
    with pytest.raises(ValueError, match="PEFT cannot merge this adapter: .*base layer has no bias"):
        load_policy(tmp_path / "adapter")


def test_an_adapter_of_another_base(tiny_tokenizer, tmp_path):
    base = save_base(tmp_path / "base", tiny_tokenizer)
    save_adapter(tmp_path / "adapter", base, lora(layers_to_transform=None))
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    for name, sizes, message in [
        ("wider", {"hidden_size": 64}, r"another base: size mismatch for .*q_proj.*\[4, 32\].*\[4, 64\]"),
        ("shallower", {"num_hidden_layers": 1}, r"it adapts model\.layers\.1\.mlp\.up_proj \(of 2 such layers\)"),
        ("deeper", {"num_hidden_layers": 3}, r"missing adapter keys.*layers\.2"),
    ]:
        settings["base_model_name_or_path"] = str(save_base(tmp_path / name, tiny_tokenizer, **sizes))
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=message):
            load_policy(tmp_path / "adapter")
    save_base(tmp_path / "gpt2", tiny_tokenizer, config=FAMILIES["gpt2"])
    settings["base_model_name_or_path"] = str(tmp_path / "gpt2")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"it adapts model\.layers.*which GPT2LMHeadModel of .*gpt2 does not have"):
        load_policy(tmp_path / "adapter")


def test_a_part_of_an_adapter_is_refused(tiny_policy, tmp_path):
    save_adapter(tmp_path / "adapter", tiny_policy, lora())
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in weights if "layers.1" in name and "lora_B" in name))
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="its file is not whole: .*missing adapter keys"):
        load_policy(tmp_path / "adapter")


def test_a_reward_adapter_is_no_policy(tiny_scalar, tiny_policy, tmp_path):
    auto = AutoModelForSequenceClassification
    save_adapter(tmp_path / "adapter", tiny_policy, lora(task_type="SEQ_CLS"), auto=auto, num_labels=1)
    with pytest.raises(ValueError, match="expected an adapter of a language model, got .*of a reward model"):
        load_policy(tmp_path / "adapter")


def test_a_merge_that_changes_the_model_is_an_error(tiny_tokenizer, tmp_path, monkeypatch):
    """The comparison sees what the other checks would let pass: here a tied weight that is not untied."""
    base = save_base(tmp_path / "base", tiny_tokenizer, tied=True)
    save_adapter(tmp_path / "adapter", base, lora(target_modules=["lm_head"]))
    monkeypatch.setattr(merging, "_untie", lambda base: None)
    with pytest.raises(ValueError, match=r"outputs on 8 tokens differ from the unmerged ones by .*expected at most"):
        load_policy(tmp_path / "adapter")
    with pytest.raises(ValueError, match="merging the adapter changes the model"):
        export(str(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    AutoTokenizer.from_pretrained(base)
