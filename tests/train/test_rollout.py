"""Rollouts: the sampled distribution, stop tokens, masks, padding, repeatability."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import transformers

from fastrl.models import response_logprobs
from fastrl.models.stopping import find_stop_token_ids
from fastrl.rollout import Trajectory, decode_responses, rollout, sample_tokens

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]]
VOCABULARY = 32
PAD, EOS = 0, 1


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=PAD,
        eos_token_id=EOS,
        attention_dropout=0.5,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # logits that differ enough to tell distributions apart
    return model


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.deepcopy(tiny_tokenizer)


def sample(model, tokenizer, prompts=PROMPTS, *, seed=0, **options):
    options = {"max_new_tokens": 8, "stop_token_ids": [EOS], **options}
    return rollout(
        model,
        tokenizer,
        prompts,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def test_layout_and_masks(model, tokenizer):
    """pitfall 2, pitfall 38: prompts padded left, responses in the last R columns, nothing kept after the stop."""
    trajectory = sample(model, tokenizer, PROMPTS * 8, stop_token_ids=range(1, 8))
    batch, length = trajectory.responses.shape
    assert batch == 24 and trajectory.input_ids.shape == (24, 6 + length)
    assert torch.equal(trajectory.input_ids[:, 6:], trajectory.responses)
    assert torch.equal(trajectory.attention_mask[:, 6:], trajectory.response_mask)
    assert trajectory.stopped.any() and not trajectory.stopped.all()
    for row, prompt in enumerate(PROMPTS * 8):
        kept = trajectory.input_ids[row][trajectory.attention_mask[row]].tolist()
        response = trajectory.responses[row][trajectory.response_mask[row]].tolist()
        assert kept == prompt + response
        ends = [t for t, token in enumerate(response) if 1 <= token < 8]
        assert ends == ([len(response) - 1] if trajectory.stopped[row] else [])
        assert trajectory.stopped[row] or len(response) == length == 8
        assert (trajectory.responses[row][~trajectory.response_mask[row]] == PAD).all()


def test_rows_match_decoding_without_cache_or_padding(model, tokenizer):
    """pitfall 2, pitfall 3: with the argmax, each row of a padded, cached, shrinking batch equals decoding it alone."""
    stop = list(range(1, 9))
    trajectory = sample(
        model,
        tokenizer,
        PROMPTS * 2,
        greedy=True,
        max_new_tokens=12,
        stop_token_ids=stop,
    )
    model.eval()
    for row, prompt in enumerate(PROMPTS * 2):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in stop:
                break
        kept = trajectory.responses[row][trajectory.response_mask[row]]
        assert kept.tolist() == ids[len(prompt) :]


def test_sampled_distribution_is_softmax_of_logits_over_temperature():
    """pitfall 20: frequencies of 200,000 draws lie within five standard errors; impossible tokens never come."""
    logits = torch.tensor([2.0, 1.0, -1.0, -torch.inf, 0.5, -3.0, -torch.inf])
    draws = sample_tokens(
        logits.expand(200_000, -1),
        temperature=0.7,
        generator=torch.Generator().manual_seed(1),
    )
    probs = (logits.double() / 0.7).softmax(-1)
    counts = draws.flatten().bincount(minlength=7)
    error = (counts / 200_000 - probs).abs()
    assert (error <= 5 * (probs * (1 - probs) / 200_000).sqrt()).all()


def test_whole_vocabulary_is_sampled_and_generation_config_is_named(model, tokenizer):
    """pitfall 20: top_k in the generation config is not applied, and a warning says so."""
    model.generation_config.top_k = 1
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.warns(UserWarning, match="top_k=1; not applied"):
        trajectory = sample(model, tokenizer, [[5]] * 200, stop_token_ids=[])
    assert trajectory.responses.unique().numel() == VOCABULARY


def test_sampled_tokens_follow_the_logprobs_used_in_training(model, tokenizer):
    """pitfall 26, pitfall 48: mean log-prob of sampled tokens equals minus the mean entropy at the same temperature."""
    model.eval()
    trajectory = sample(model, tokenizer, PROMPTS * 300, temperature=0.7)
    with torch.no_grad():
        logprobs, entropy = response_logprobs(
            model,
            trajectory.input_ids,
            trajectory.attention_mask,
            trajectory.response_mask,
            temperature=0.7,
            return_entropy=True,
        )
    kept = trajectory.response_mask
    surprise = (logprobs + entropy)[kept]
    assert surprise.mean().abs() < 5 * surprise.std() / kept.sum().sqrt()


def test_same_seed_same_tokens(model, tokenizer):
    first, again, other = (sample(model, tokenizer, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first.responses, other.responses)
    torch.manual_seed(5)
    by_global = rollout(model, tokenizer, PROMPTS, max_new_tokens=8)
    torch.manual_seed(5)
    assert torch.equal(
        by_global.responses,
        rollout(model, tokenizer, PROMPTS, max_new_tokens=8).responses,
    )


def test_a_row_is_sampled_alike_whatever_the_others_do(model, tokenizer):
    """Parts of a batch, as several processes sample them, and other stop tokens: the noise is a row's own."""
    prompts = PROMPTS * 4
    whole = sample(model, tokenizer, prompts, stop_token_ids=range(1, 8))
    assert 1 < len({int(length) for length in whole.response_mask.sum(1)})
    for part in (range(0, 12, 2), range(1, 12, 2), [5], []):
        alone = sample(model, tokenizer, prompts, stop_token_ids=range(1, 8), rows=part)
        assert alone.input_ids.shape[0] == len(part) == len(alone.stopped)
        for row, mask, number in zip(alone.responses, alone.response_mask, part, strict=True):
            assert row[mask].tolist() == whole.responses[number][whole.response_mask[number]].tolist()
    unstopped = sample(model, tokenizer, prompts, stop_token_ids=[])
    assert (unstopped.responses[:, : whole.responses.shape[1]] == whole.responses)[whole.response_mask].all()


def test_early_exit_when_all_rows_ended(model, tokenizer):
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    trajectory = sample(model, tokenizer, stop_token_ids=range(VOCABULARY), max_new_tokens=32)
    assert len(calls) == 1 and trajectory.responses.shape == (3, 1)
    assert trajectory.stopped.all() and trajectory.response_mask.all()


def test_eval_mode_during_rollout_and_flags_restored(model, tokenizer):
    """pitfall 36: dropout is off; a module that was frozen in eval mode stays so."""
    model.train()
    model.model.norm.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    seen = []
    model.model.register_forward_pre_hook(lambda module, _: seen.append(module.layers[0].training))
    sample(model, tokenizer)
    assert not any(seen)
    assert {name: module.training for name, module in model.named_modules()} == flags


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_keeps_the_cache(model, tokenizer):
    widths = []
    expected = sample(model.train(), tokenizer)
    model.gradient_checkpointing_enable()
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    assert torch.equal(sample(model.train(), tokenizer).responses, expected.responses)
    assert widths[0] == 6 and set(widths[1:]) == {1}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_through_peft(model, tokenizer):
    base = sample(model, tokenizer).responses
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    assert not torch.equal(sample(adapted, tokenizer).responses, base)
    with adapted.disable_adapter():
        assert torch.equal(sample(adapted, tokenizer).responses, base)


def test_prompt_longer_than_the_context_keeps_its_end(model, tokenizer):
    prompt = [3 + i % 20 for i in range(100)]
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than 54 tokens"):
        trajectory = sample(model, tokenizer, [prompt, [4]], max_new_tokens=10)
    assert trajectory.input_ids[0, :54].tolist() == prompt[-54:]


def test_find_stop_token_ids(model, tokenizer):
    """pitfall 4: the configured stop tokens alone when there are any; else eos and the end of a chat turn."""
    assert find_stop_token_ids(tokenizer, model) == [EOS]
    model.generation_config.eos_token_id = [EOS, 9]
    assert find_stop_token_ids(tokenizer, model) == [EOS, 9]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    assert find_stop_token_ids(tokenizer, model) == [EOS, 9, 259]
    a, b = tokenizer.encode("ab", add_special_tokens=False)
    assert find_stop_token_ids(tokenizer, model, ["b", "a"]) == [a, b]
    with pytest.raises(ValueError, match="stop token 'ab': expected one token of the tokenizer, got 2"):
        find_stop_token_ids(tokenizer, model, ["ab"])


def test_decode_responses_gives_kept_tokens_without_special_ones(tokenizer):
    ids = torch.tensor([tokenizer.encode("yes", add_special_tokens=False) + [EOS], [*tokenizer.encode("no"), 70, 71]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    trajectory = Trajectory(ids, mask, ids, mask, mask[:, -1])
    assert decode_responses(tokenizer, trajectory) == ["yes", "no"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected > 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature: expected > 0, got nan"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected >= 1, got 0"),
        ({"max_new_tokens": 64}, "leaves no room for a prompt"),
        ({"prompts": []}, "expected at least one, got none"),
        ({"prompts": [[3], []]}, r"prompts\[1\]: expected at least one token"),
    ],
)
def test_bad_input(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        sample(model, tokenizer, **options)
