"""Shared model pieces: loading, adapters, hidden states, heads, scores, response
log-probabilities, folders.
"""

from __future__ import annotations

import copy
import json
import shutil

import peft
import pytest
import torch
import transformers
from families import byte_tokenizer, randomised, tiny_config
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from fastrl.checks import NonFiniteError
from fastrl.models import (
    LoRASettings,
    add_lora,
    final_hidden,
    last_token_scores,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    position_ids,
    response_logprobs,
    start_scalar_model,
    token_scores,
)
from fastrl.models.heads import lm_head
from fastrl.models.probe import check_scalar
from fastrl.models.saving import save_merged_base, save_model
from fastrl.models.score_heads import pad_apart
from fastrl.run.checkpoint import last_checkpoint, save_checkpoint
from fastrl.run.optim import check_finite, make_optimizer, make_schedule, optimizer_step

LORA = LoRASettings(rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
PROMPT, RESPONSE = [5, 6, 7, 8], [9, 10, 1]


def padded(sequences, side, width, pad=0):
    ids, mask = torch.full((len(sequences), width), pad), torch.zeros(len(sequences), width).bool()
    for row, sequence in enumerate(sequences):
        where = slice(width - len(sequence), None) if side == "left" else slice(0, len(sequence))
        ids[row, where] = torch.tensor(sequence)
        mask[row, where] = True
    return ids, mask


def randomize_adapter(model, seed=3):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def plain_logprobs(model, sequence, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.tensor([sequence])).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(sequence)[1:, None])[:, 0]


def test_position_ids_follow_the_mask():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("padding", [0, 1, 9])
@pytest.mark.parametrize("poison", [0, 200])
def test_response_logprobs_do_not_see_left_padding(tiny_policy, padding, poison):
    """pitfall 2, pitfall 3: any number of left pads, holding any token, leaves the log-probs as they are."""
    model = load_policy(tiny_policy)
    width = padding + len(PROMPT) + len(RESPONSE)
    ids, mask = padded([PROMPT + RESPONSE], "left", width, pad=poison)
    response_mask = torch.ones(1, len(RESPONSE)).bool()
    with torch.no_grad():
        logprobs = response_logprobs(model, ids, mask, response_mask, temperature=0.7)
    expected = plain_logprobs(model, PROMPT + RESPONSE, temperature=0.7)[-len(RESPONSE) :]
    torch.testing.assert_close(logprobs[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("columns", [[2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6], [0, 1, 4, 5, 6, 8, 9]])
def test_hidden_states_do_not_see_padding_on_any_side(tiny_policy, columns):
    """Padding is taken out before the backbone and put back after it: same bits, gradients included."""
    model = load_policy(tiny_policy)
    tokens, width = torch.tensor(PROMPT + RESPONSE), 10
    ids, mask = torch.full((1, width), 200), torch.zeros(1, width).bool()
    ids[0, columns], mask[0, columns] = tokens, True
    weight = model.get_decoder().layers[0].mlp.up_proj.weight
    results = []
    for arguments in ((ids, mask), (tokens[None], torch.ones(1, len(tokens)).bool())):
        hidden = final_hidden(model, *arguments)[arguments[1]]
        results.append((hidden, *torch.autograd.grad(hidden.square().sum(), weight)))
    for padded_result, plain in zip(*results, strict=True):
        assert torch.equal(padded_result, plain)


def test_response_logprobs_mask_and_entropy(tiny_policy):
    model = load_policy(tiny_policy)
    ids, mask = padded([PROMPT + RESPONSE], "left", 10)
    response_mask = torch.tensor([[True, True, False]])
    with torch.no_grad():
        logprobs, entropy = response_logprobs(model, ids, mask, response_mask, temperature=1.0, return_entropy=True)
        rows = model(torch.tensor([PROMPT + RESPONSE])).logits[0, 3:6].log_softmax(-1)
    torch.testing.assert_close(entropy[0, :2], -(rows.exp() * rows).sum(-1)[:2], atol=1e-5, rtol=1e-5)
    assert logprobs[0, 2] == 0 and entropy[0, 2] == 0
    with pytest.raises(ValueError, match="at least one prompt token"):
        response_logprobs(model, ids, mask, torch.ones(1, 10).bool(), temperature=1.0)


@pytest.mark.parametrize("kind", ["lora", "modules_to_save"])
def test_adapter_on_the_head_counts(tiny_policy, kind):
    """pitfall 30: LoRA or a trained copy on lm_head changes the log-probs exactly as it does in eager."""
    config = {"target_modules": ["q_proj", "lm_head"]} if kind == "lora" else {"target_modules": ["q_proj"]}
    saved = None if kind == "lora" else ["lm_head"]
    model = peft.get_peft_model(
        load_policy(tiny_policy),
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, modules_to_save=saved, **config),
    )
    randomize_adapter(model)
    if saved:
        torch.nn.init.normal_(lm_head(model).weight, std=0.3)
    model.eval()
    ids, mask = padded([PROMPT + RESPONSE], "left", 9)
    arguments = (ids, mask, torch.ones(1, 3).bool())
    with torch.no_grad():
        adapted = response_logprobs(model, *arguments, temperature=1.0)
        torch.testing.assert_close(adapted[0], plain_logprobs(model, PROMPT + RESPONSE)[-3:], atol=1e-5, rtol=1e-5)
        with model.disable_adapter():
            reference = response_logprobs(model, *arguments, temperature=1.0)
    expected = plain_logprobs(load_policy(tiny_policy), PROMPT + RESPONSE)[-3:]
    torch.testing.assert_close(reference[0], expected, atol=1e-5, rtol=1e-5)
    assert (adapted - reference).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, 1], ids=["pad", "pad==eos"])
def test_score_is_of_the_last_kept_token(tiny_scalar, side, pad):
    """pitfall 5, pitfall 18: last token by the mask under either padding, pad == eos, with and without eos."""
    model = load_scalar_model(tiny_scalar)
    sequences = [[5, 6, 1], [7, 8, 9, 10, 11], [12]]
    ids, mask = padded(sequences, side, 8, pad)
    with torch.no_grad():
        scores = last_token_scores(model, ids, mask)
        every = token_scores(model, ids, mask)
        plain = torch.stack(
            [model.score(model.model(torch.tensor([s])).last_hidden_state[0, -1])[0] for s in sequences]
        )
    torch.testing.assert_close(scores, plain, atol=1e-5, rtol=1e-5)
    last = [7] * 3 if side == "left" else [len(s) - 1 for s in sequences]
    torch.testing.assert_close(every[torch.arange(3), last], plain, atol=1e-5, rtol=1e-5)


def test_score_bias_is_subtracted_and_zero_is_a_score(tiny_scalar):
    """pitfall 43: a score of exactly 0.0 is a value like any other."""
    model = load_scalar_model(tiny_scalar)
    ids, mask = padded([[5, 6, 1]], "right", 3)
    with torch.no_grad():
        raw = last_token_scores(model, ids, mask)
        model.config.fastrl_score_bias = float(raw)
        assert last_token_scores(model, ids, mask).item() == 0.0


def test_scalar_model_from_a_causal_lm(tiny_policy, capfd):
    torch.manual_seed(0)
    model = start_scalar_model(tiny_policy)
    policy = load_policy(tiny_policy)
    ids, mask = padded([[5, 6, 7]], "right", 4)
    with torch.no_grad():
        torch.testing.assert_close(final_hidden(model, ids, mask), final_hidden(policy, ids, mask))
        assert last_token_scores(model, ids, mask).shape == (1,)
    assert model.score.weight.dtype == torch.float32 and model.config.num_labels == 1
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert 0.5 < model.score.weight.std().item() * 33**0.5 < 1.5
    said = "".join(capfd.readouterr())
    assert "newly initialized" not in said and "MISSING" not in said


def test_bf16_scalar_model_keeps_an_fp32_head(tiny_policy, tiny_scalar):
    for model in (start_scalar_model(tiny_policy, dtype="bfloat16"), load_scalar_model(tiny_scalar, dtype="bfloat16")):
        ids, mask = padded([[5, 6, 7]], "right", 4)
        assert model.score.weight.dtype == torch.float32
        assert next(model.model.parameters()).dtype == torch.bfloat16
        assert last_token_scores(model, ids, mask).dtype == torch.float32


def test_policy_adapter_folder_loads_merged(tiny_policy, tiny_tokenizer, tmp_path):
    """pitfall 33: what an adapter folder stands for is the adapted policy, not its base."""
    model = add_lora(load_policy(tiny_policy), LORA)
    randomize_adapter(model)
    model.eval()
    save_model(model, tiny_tokenizer, tmp_path / "sft")
    expected = plain_logprobs(model, PROMPT + RESPONSE)
    plain = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "sft")
    torch.testing.assert_close(plain_logprobs(plain, PROMPT + RESPONSE), expected, atol=1e-5, rtol=1e-5)
    merged = load_policy(tmp_path / "sft")
    assert isinstance(merged, transformers.LlamaForCausalLM)
    torch.testing.assert_close(plain_logprobs(merged, PROMPT + RESPONSE), expected, atol=1e-5, rtol=1e-5)
    assert load_tokenizer(tmp_path / "sft").pad_token_id == 0


def test_adapter_on_a_merged_adapter_loads_with_plain_peft(tiny_policy, tiny_tokenizer, tmp_path):
    """pitfall 33: the second adapter's folder names the merged first policy as its base."""
    first = add_lora(load_policy(tiny_policy), LORA)
    randomize_adapter(first, seed=3)
    save_model(first, tiny_tokenizer, tmp_path / "sft")
    merged = load_policy(tmp_path / "sft")
    save_merged_base(merged, tiny_tokenizer, tmp_path / "ppo")
    second = add_lora(merged, LORA)
    randomize_adapter(second, seed=4)
    second.eval()
    save_model(second, tiny_tokenizer, tmp_path / "ppo")
    expected = plain_logprobs(second, PROMPT + RESPONSE)
    for loaded in (
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ppo"),
        load_policy(tmp_path / "ppo"),
    ):
        torch.testing.assert_close(plain_logprobs(loaded, PROMPT + RESPONSE), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_scalar_model_round_trip(tiny_policy, tiny_tokenizer, tmp_path, adapted):
    torch.manual_seed(0)
    model = start_scalar_model(tiny_policy)
    if adapted:
        model = add_lora(model, LORA)
        randomize_adapter(model)
        model.eval()
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert any("score" in n for n in trainable)
        assert not any("score" in n and "lora" in n for n in trainable)
    ids, mask = padded([[5, 6, 7], [8, 9]], "right", 4)
    base = model.get_base_model() if adapted else model
    base.config.fastrl_score_bias = 0.25
    with torch.no_grad():
        expected = last_token_scores(model, ids, mask)
    save_model(model, tiny_tokenizer, tmp_path / "reward")
    with torch.no_grad():
        again = last_token_scores(load_scalar_model(tmp_path / "reward"), ids, mask)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)
    if adapted:
        plain = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1)
    else:
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    with torch.no_grad():
        logits = plain(torch.tensor([[5, 6, 7]])).logits[0, 0]
    torch.testing.assert_close(logits - 0.25, expected[0], atol=1e-5, rtol=1e-5)


def test_other_architectures_reach_backbone_and_head(tiny_tokenizer):
    """Absolute positions (GPT-2) and a softcapped head (Gemma 2) give eager's log-probs under left padding."""
    shared = {"vocab_size": 259, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **shared)
    gemma2 = transformers.Gemma2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        head_dim=8, num_key_value_heads=2, final_logit_softcapping=2.0, initializer_range=0.2,
        **shared,
    )  # fmt: skip
    for config in (gpt2, gemma2):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        ids, mask = padded([PROMPT + RESPONSE], "left", 10)
        with torch.no_grad():
            logprobs = response_logprobs(model, ids, mask, torch.ones(1, 3).bool(), temperature=1.0)
        expected = plain_logprobs(model, PROMPT + RESPONSE)[-3:]
        torch.testing.assert_close(logprobs[0], expected, atol=1e-4, rtol=1e-4)


def test_bad_models(tiny_policy, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dtype"):
        load_policy(tiny_policy, dtype="float8")
    with pytest.raises(ValueError, match="rank"):
        add_lora(load_policy(tiny_policy), LoRASettings(0, 8, 0.0, "all-linear"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        load_policy(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tiny_policy)})
    )
    assert load_tokenizer(tmp_path / "adapter").pad_token_id == 0  # the base's
    with pytest.raises(FileNotFoundError, match="save the adapter as safetensors"):
        load_policy(tmp_path / "adapter")


def test_a_model_folder_without_its_head_is_refused(tiny_scalar, tiny_policy, tmp_path):
    with pytest.raises(ValueError, match="missing.*lm_head"):
        load_policy(tiny_scalar)
    torch.save(load_policy(tiny_policy).state_dict(), tmp_path / "pytorch_model.bin")
    load_policy(tiny_policy).config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        load_policy(tmp_path)


def test_tokenizer_without_pad_or_eos(tiny_tokenizer, tmp_path):
    """pitfall 18: pad falls back to eos; with neither there is a clear error."""
    plain = {"tokenizer_object": tiny_tokenizer.backend_tokenizer}
    transformers.PreTrainedTokenizerFast(**plain, eos_token="<eos>").save_pretrained(tmp_path / "eos")
    assert load_tokenizer(tmp_path / "eos").pad_token_id == 1
    transformers.PreTrainedTokenizerFast(**plain).save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="a pad token or an eos token, got neither"):
        load_tokenizer(tmp_path / "none")


def test_schedule_and_step(tiny_policy):
    model = load_policy(tiny_policy)
    optimizer = make_optimizer(model, learning_rate=1.0, weight_decay=0.1)
    schedule = make_schedule(optimizer, kind="linear", warmup_steps=2, total_steps=6)
    used = []
    for _ in range(6):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert used == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    with pytest.raises(ValueError, match="cosine"):
        make_schedule(optimizer, kind="cosin", warmup_steps=0, total_steps=2)
    with pytest.raises(NonFiniteError, match="step 7"):
        check_finite(float("nan"), 7)


def test_gradients_are_clipped_and_a_nan_gradient_changes_nothing(tiny_policy):
    model = load_policy(tiny_policy)
    optimizer = make_optimizer(model, learning_rate=0.1)
    weight = model.lm_head.weight
    weight.grad = torch.full_like(weight, 3.0)
    before = weight.detach().clone()
    norm = optimizer_step(model, optimizer, None, max_grad_norm=1.0, step=1)
    assert norm == pytest.approx(3.0 * weight.numel() ** 0.5) and not torch.equal(weight, before)
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, float("nan"))
    with pytest.raises(NonFiniteError, match="step 2"):
        optimizer_step(model, optimizer, None, max_grad_norm=1.0, step=2)
    assert torch.equal(weight, before)


def test_checkpoints_are_pruned_and_never_hold_nan(tiny_policy, tiny_tokenizer, tmp_path):
    model = load_policy(tiny_policy)

    def write(folder):
        save_model(model, tiny_tokenizer, folder)

    for step in (1, 2, 3):
        save_checkpoint(write, tmp_path, step, keep=2)
    kept = [p.name for p in sorted((tmp_path / "checkpoints").iterdir())]
    assert kept == ["step-000002", "step-000003"]
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="lm_head"):
        save_checkpoint(write, tmp_path, 4)
    assert last_checkpoint(tmp_path).name == "step-000003"
    assert transformers.AutoModelForCausalLM.from_pretrained(last_checkpoint(tmp_path)).lm_head is not None


def changed_config(source, folder, **fields):
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def with_weights(source, folder, **tensors):
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_hidden_layers": 3}, "config.json: num_hidden_layers: expected 2, as the weights have, got 3"),
        ({"num_hidden_layers": 1}, "config.json: num_hidden_layers: expected 2, as the weights have, got 1"),
        ({"vocab_size": 300}, "config.json: vocab_size: expected 259, as the weights have, got 300"),
        ({"intermediate_size": 96}, "config.json: intermediate_size: expected 64, as the weights have, got 96"),
        ({"pad_token_id": 259}, "config.json: pad_token_id: expected less than vocab_size, 259, got 259"),
        ({"model_type": "t5"}, "expected a causal language model, got model_type 't5'"),
    ],
)
def test_a_config_that_disagrees_with_its_weights_is_refused_in_its_own_words(tiny_policy, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        load_policy(changed_config(tiny_policy, tmp_path / "m", **fields))


def test_unknown_weights_are_named(tiny_policy, tiny_scalar, tmp_path):
    """TRL's value heads, and any other weight that would be left out."""
    value_head = with_weights(tiny_policy, tmp_path / "v", **{"v_head.summary.weight": torch.zeros(1, 32)})
    with pytest.raises(ValueError, match="unexpected weights v_head.summary.weight: a value head"):
        load_policy(value_head)
    other = with_weights(tiny_policy, tmp_path / "o", **{"model.extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="LlamaForCausalLM: unexpected weights model.extra.weight"):
        load_policy(other)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification: unexpected weights more.weight"):
        load_scalar_model(with_weights(tiny_scalar, tmp_path / "s", **{"more.weight": torch.zeros(1)}))


def test_only_reward_training_makes_a_head(tiny_policy, tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="expected a reward model, got a language model without a score head"):
        load_scalar_model(tiny_policy)
    save_model(add_lora(load_policy(tiny_policy), LORA), tiny_tokenizer, tmp_path / "sft")
    with pytest.raises(ValueError, match="expected a reward model, got .* without a score head"):
        load_scalar_model(tmp_path / "sft")
    assert start_scalar_model(tmp_path / "sft").score.out_features == 1


def reward_adapter(policy, tokenizer, folder, **options):
    """A reward adapter as TRL and PEFT save it; returns the model."""
    torch.manual_seed(2)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(policy, **{"num_labels": 1, **options})
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
    model = peft.get_peft_model(base, config)
    randomize_adapter(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def own_scores(model, sequences):
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([sequence])).logits[:, 0] for sequence in sequences])


SEQUENCES = [[5, 6, 7, 1], [8, 9, 10, 11, 12, 1]]


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_a_foreign_reward_adapter_gives_its_scores(tiny_policy, tiny_tokenizer, tmp_path, task_type):
    """The head that was saved is used, also where the config has lost the task."""
    model = reward_adapter(tiny_policy, tiny_tokenizer, tmp_path / "r")
    config = json.loads((tmp_path / "r" / "adapter_config.json").read_text())
    changed = {**config, "task_type": task_type, "modules_to_save": ["score"] if task_type else None}
    (tmp_path / "r" / "adapter_config.json").write_text(json.dumps(changed))
    with torch.no_grad():
        scores = last_token_scores(load_scalar_model(tmp_path / "r"), *padded(SEQUENCES, "right", 8))
    torch.testing.assert_close(scores, own_scores(model, SEQUENCES), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="expected an adapter of a language model, got .*score"):
        load_policy(tmp_path / "r")


def test_an_adapter_that_lost_its_head_is_refused(tiny_policy, tiny_scalar, tiny_tokenizer, tmp_path):
    reward_adapter(tiny_policy, tiny_tokenizer, tmp_path / "r")
    file = tmp_path / "r" / "adapter_model.safetensors"
    save_file({name: x for name, x in load_file(file).items() if "score" not in name}, file)
    for load in (load_scalar_model, start_scalar_model):
        with pytest.raises(ValueError, match="an adapter without a score head: adapter_model.safetensors has no"):
            load(tmp_path / "r")


def test_a_classifier_of_two_labels_is_no_reward_model(tiny_policy, tiny_tokenizer, tmp_path):
    model = reward_adapter(tiny_policy, tiny_tokenizer, tmp_path / "adapter", num_labels=2)
    model.merge_and_unload().save_pretrained(tmp_path / "full")
    for folder in ("adapter", "full"):
        for load in (load_scalar_model, start_scalar_model):
            with pytest.raises(ValueError, match="2 outputs, expected 1"):
                load(tmp_path / folder)


def test_a_projected_backbone_gets_a_head_of_its_width(tmp_path):
    """OPT-350m: the head stands on word_embed_proj_dim values, not on hidden_size."""
    model = randomised(tiny_config(transformers.OPTConfig, word_embed_proj_dim=16))
    model.save_pretrained(tmp_path)
    scalar = start_scalar_model(tmp_path)
    assert scalar.score.in_features == 16
    check_scalar(scalar, byte_tokenizer(), tmp_path)


def test_pad_apart(tiny_tokenizer):
    """Pitfall 18: a pad token that ends no response, so that transformers' classifiers find the last token."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    pad_apart(tokenizer)
    assert tokenizer.pad_token == "<pad>"
    tokenizer.pad_token = "<eos>"
    pad_apart(tokenizer)
    assert tokenizer.pad_token == "<bos>"
    words = Tokenizer(WordLevel({"<eos>": 0, "a": 1, "b": 2}))
    alone = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    pad_apart(alone)
    assert alone.pad_token == "b"


def test_a_foreign_reward_model_that_pads_with_eos_gives_its_scores(tiny_policy, tmp_path):
    """Trained so, it never saw the score of eos: the token before it counts, in a batch as alone."""
    torch.manual_seed(2)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_policy, num_labels=1).eval()
    model.config.pad_token_id = 1
    model.save_pretrained(tmp_path)
    ids, mask = padded(SEQUENCES, "right", 8, pad=1)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
        scores = last_token_scores(load_scalar_model(tmp_path), ids, mask)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, own_scores(model, SEQUENCES), atol=1e-5, rtol=1e-5)
