"""The reward loop: its loss against plain transformers, normalisation, folders, guarantees."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from torch.nn.functional import logsigmoid

import fastrl.train.reward as reward
from fastrl.checks import NonFiniteError
from fastrl.commands.export import export
from fastrl.data import load_preferences, split_holdout
from fastrl.data.batches import ranking_batch
from fastrl.models import last_token_scores, load_scalar_model, load_tokenizer
from fastrl.train.losses import reward_loss

WORDS = ["sun", "moon", "a river", "tea", "wall", "bee"]


@pytest.fixture(scope="module")
def preferences_path(tmp_path_factory):
    """Pairs and K = 3, 4 groups of ragged answers: fewer exclamation marks are better."""
    path = tmp_path_factory.mktemp("data") / "preferences.jsonl"
    records = []
    for i, word in enumerate(WORDS * 4):
        answers = [word + "!" * n for n in range(2 + i % 3)]
        ranks = list(range(len(answers)))
        records.append({"prompt": f"{i} name:", "responses": answers[::-1], "ranks": ranks[::-1]})
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def config(tiny_policy, preferences_path, tmp_path):
    return reward.RewardConfig(
        model=str(tiny_policy),
        data=str(preferences_path),
        output=str(tmp_path / "run"),
        holdout=0.25,
        max_length=64,
        max_steps=3,
        batch_size=6,
        micro_batch_size=2,
        learning_rate=1e-2,
        warmup_steps=2,
        lora_rank=4,
        lora_alpha=8,
        eval_every=0,
        save_every=0,
        samples=0,
    )


@pytest.fixture
def preferences(preferences_path, tiny_tokenizer):
    return load_preferences(str(preferences_path), tiny_tokenizer, max_length=64)[0]


def records(output, kind="train"):
    lines = [json.loads(line) for line in open(f"{output}/metrics.jsonl")]
    return [line for line in lines if line["kind"] == kind]


def plain_scores(model, preference):
    """Head output on the last token, each response alone and unpadded, as transformers computes it."""
    return torch.stack([model(torch.tensor([[*preference.prompt_ids, *r]])).logits[0, 0] for r in preference.responses])


def plain_ranking_loss(scores, ranks):
    pairs = [
        logsigmoid(scores[i] - scores[j]) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]
    ]
    return -torch.stack(pairs).mean()


def plain_loss(model, preferences):
    losses = [plain_ranking_loss(plain_scores(model, p), p.ranks) for p in preferences]
    return torch.stack(losses).mean()


def test_loss_and_gradient_equal_plain_transformers(tiny_scalar, preferences):
    """pitfall 18, pitfall 19: pairs and K-wise groups, ragged lengths, equal eager's to 1e-5."""
    ours, plain = load_scalar_model(tiny_scalar), load_scalar_model(tiny_scalar)
    loss, scores = reward_loss(ours, ranking_batch(preferences[:5], 0))
    loss.backward()
    expected = plain_loss(plain, preferences[:5])
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert scores.shape == (sum(len(p.responses) for p in preferences[:5]), 1)
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_extra_padding_changes_nothing(tiny_scalar, preferences):
    """pitfall 19: pads after the response are outside the loss, whatever they hold."""
    model = load_scalar_model(tiny_scalar)
    batch = ranking_batch(preferences[:3], 0)
    extra = torch.full((len(batch.ranks), 5), 1)
    wider = batch._replace(
        input_ids=torch.cat([batch.input_ids, extra], 1),
        attention_mask=torch.cat([batch.attention_mask, torch.zeros_like(extra).bool()], 1),
    )
    torch.testing.assert_close(reward_loss(model, wider)[0], reward_loss(model, batch)[0])


def test_margin_is_subtracted_from_the_difference(tiny_scalar, preferences):
    model = load_scalar_model(tiny_scalar)
    pairs = [p._replace(margin=m) for p, m in zip(preferences[::3], (0.5, 2.0), strict=False)]
    loss, _ = reward_loss(model, ranking_batch(pairs, 0))
    expected = []
    for pair in pairs:
        rejected, chosen = plain_scores(model, pair)
        expected.append(-logsigmoid(chosen - rejected - pair.margin))
    torch.testing.assert_close(loss, torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_micro_batches_add_up(config, rank):
    """pitfall 11, pitfall 16: micro-batches of 1, 2 or 6 prompts make the same run, centring too."""
    runs = []
    for size in (1, 2, 6):
        cfg = replace(config, micro_batch_size=size, lora_rank=rank, center_coef=0.1, output=f"{config.output}{size}")
        reward.main(cfg)
        runs.append([(r["loss"], r["grad_norm"]) for r in records(cfg.output)])
    for other in runs[1:]:
        for step, reference in zip(other, runs[0], strict=True):
            assert step == pytest.approx(reference, rel=1e-4)


def test_three_steps_equal_a_plain_loop(config, tiny_scalar):
    """Loss of three full fine-tuning steps equals plain transformers + AdamW to 1e-5."""
    cfg = replace(config, model=str(tiny_scalar), lora_rank=0, learning_rate=1e-3, schedule="constant", warmup_steps=0)
    reward.main(cfg)
    model = load_scalar_model(cfg.model)
    data, _ = load_preferences(cfg.data, load_tokenizer(cfg.model), max_length=cfg.max_length)
    train, _ = split_holdout(data, cfg.holdout, cfg.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, weight_decay=0.0)
    batches = reward.shuffled_batches(len(train), cfg.batch_size, seed=cfg.seed, epoch=0)
    for indices, record in zip(batches, records(cfg.output), strict=True):
        loss = plain_loss(model, [train[i] for i in indices])
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_same_seed_same_run_bit_for_bit(config, rank):
    """pitfall 46: head and adapter are drawn after seeding; another seed draws others."""
    outputs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cfg = replace(config, lora_rank=rank, lora_dropout=0.1, seed=seed, output=config.output + name)
        reward.main(cfg)
        file = "adapter_model.safetensors" if rank else "model.safetensors"
        outputs.append(open(f"{cfg.output}/{file}", "rb").read())
    losses = [[r["loss"] for r in records(config.output + name)] for name in "abc"]
    assert losses[0] == losses[1] != losses[2]
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_learns_normalises_and_saves_an_ordinary_folder(config, rank, capsys):
    """Held-out accuracy 1; scores of the saved model have mean 0, variance 1; PEFT loads it."""
    cfg = replace(
        config, lora_rank=rank, max_steps=40, batch_size=9, micro_batch_size=9, samples=1, normalize_prompts=0
    )  # fmt: skip
    metrics = reward.main(cfg)
    assert records(cfg.output)[0]["loss"] > 0.4 and metrics["loss"] < 0.05
    assert metrics["eval_accuracy"] == 1.0
    assert "(rank 0)" in capsys.readouterr().out

    tokenizer, model = load_tokenizer(cfg.output), load_scalar_model(cfg.output)
    data, _ = load_preferences(cfg.data, tokenizer, max_length=cfg.max_length)
    train, _ = split_holdout(data, cfg.holdout, cfg.seed)
    batch = ranking_batch(train, tokenizer.pad_token_id)
    with torch.no_grad():
        scores = last_token_scores(model, batch.input_ids, batch.attention_mask)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert scores.var(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    stored = json.load(open(f"{cfg.output}/{'fastrl_score' if rank else 'config'}.json"))
    assert stored["fastrl_score_mean"] == metrics["score_mean"]
    assert stored["fastrl_score_std"] == metrics["score_std"] > 0

    auto = transformers.AutoModelForSequenceClassification
    if rank:
        auto = peft.AutoPeftModelForSequenceClassification
    plain = auto.from_pretrained(cfg.output, num_labels=1)
    with torch.no_grad():
        expected = torch.cat([plain_scores(plain, p) for p in train[:3]])
    torch.testing.assert_close(scores[: len(expected)], expected - stored["fastrl_score_bias"], atol=1e-4, rtol=1e-4)


def test_normalising_twice_is_normalising(tiny_scalar, preferences):
    """The stored bias takes part: a normalised model that is normalised again stays as it is."""
    model = load_scalar_model(tiny_scalar)
    first = reward.normalize_scores(model, reward.score_preferences(model, preferences, 0, 8))
    second = reward.normalize_scores(model, reward.score_preferences(model, preferences, 0, 8))
    assert first["score_std"] != pytest.approx(1.0)
    assert second == pytest.approx({"score_mean": 0.0, "score_std": 1.0}, abs=1e-4)
    with pytest.raises(ValueError, match="tells no responses apart"):
        reward.normalize_scores(model, torch.zeros(4, 1))


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_plain_transformers_scores_a_batch_as_we_do(config, tiny_policy, tmp_path, rank):
    """pitfall 18: of a tokenizer whose pad is its eos too; the saved one pads with what ends no response."""
    folder = tmp_path / "policy"
    transformers.AutoModelForCausalLM.from_pretrained(tiny_policy).save_pretrained(folder)
    tokenizer = load_tokenizer(tiny_policy)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", chat_template=tokenizer.chat_template
    ).save_pretrained(folder)
    cfg = replace(config, model=str(folder), lora_rank=rank)
    reward.main(cfg)
    output = cfg.output
    if rank:
        output = export(output, tmp_path / "exported")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(output)
    padded = transformers.AutoTokenizer.from_pretrained(output)(
        ["ab<eos>", "longer<eos>"], padding=True, return_tensors="pt"
    )
    assert plain.config.num_labels == 1 and (padded["input_ids"][:, 2] == 1).tolist() == [True, False]
    ours = load_scalar_model(cfg.output)
    with torch.no_grad():
        expected = plain(**padded).logits[:, 0] - ours.config.fastrl_score_bias
        scores = last_token_scores(ours, padded["input_ids"], padded["attention_mask"])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_trains_on_from_an_adapter_of_a_policy(config, tiny_policy, tiny_tokenizer, tmp_path):
    """pitfall 33: the reward adapter's base is the merged policy, and both load back."""
    from fastrl.models import LoRASettings, add_lora, load_policy
    from fastrl.models.saving import save_model

    torch.manual_seed(0)
    policy = add_lora(load_policy(tiny_policy), LoRASettings(4, 8, 0.0, "q_proj,v_proj"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_model(policy, tiny_tokenizer, tmp_path / "sft")
    cfg = replace(config, model=str(tmp_path / "sft"))
    reward.main(cfg)
    again = load_scalar_model(cfg.output)
    plain = peft.AutoPeftModelForSequenceClassification.from_pretrained(cfg.output, num_labels=1)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        score = last_token_scores(again, ids, torch.ones_like(ids).bool())
        expected = plain(ids).logits[0, 0] - again.config.fastrl_score_bias
    torch.testing.assert_close(score[0], expected, atol=1e-5, rtol=1e-5)


def test_nan_stops_and_keeps_the_last_good_checkpoint(config, monkeypatch):
    """NaN loss at step 3: the error names the step and the checkpoint proven by a finite loss."""
    calls = []

    def loss_with_nan(*arguments, **options):
        calls.append(None)
        loss, scores = reward_loss(*arguments, **options)
        return loss * (math.nan if len(calls) == 3 else 1.0), scores

    monkeypatch.setattr(reward, "reward_loss", loss_with_nan)
    cfg = replace(config, save_every=1, micro_batch_size=6)
    with pytest.raises(NonFiniteError, match="nan at step 3.*step-000001"):
        reward.main(cfg)
    model = load_scalar_model(f"{cfg.output}/checkpoints/step-000001")
    assert all(p.isfinite().all() for p in model.parameters())


def test_bf16_runs(config):
    metrics = reward.main(replace(config, dtype="bfloat16"))
    assert math.isfinite(metrics["loss"])
    assert load_scalar_model(config.output, dtype="bfloat16").score.weight.dtype == torch.float32


def test_bad_input(config, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty data set"):
        reward.main(replace(config, data=str(tmp_path / "empty.jsonl")))
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    (tmp_path / "same.jsonl").write_text(json.dumps(same) + "\n")
    with pytest.raises(ValueError, match="identical"):
        reward.main(replace(config, data=str(tmp_path / "same.jsonl")))
    with pytest.raises(ValueError, match="max_length: expected at most 256"):
        reward.main(replace(config, max_length=512))
