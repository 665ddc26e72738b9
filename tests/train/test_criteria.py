"""Reward models of several criteria: their loss by hand, what they learn, what is stored, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

import fastrl.train.reward as reward
from fastrl.commands.export import export
from fastrl.data import Preference, load_preferences, split_holdout
from fastrl.data.batches import ranking_batch
from fastrl.data.criteria import check_trained, criterion_columns, several_criteria
from fastrl.models import as_scorer, load_policy, load_scalar_model, load_tokenizer, score_head
from fastrl.models.score_heads import with_scalar_head
from fastrl.train.losses import reward_loss

NAMES = ["harmless", "helpful"]


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def conflict(tmp_path_factory):
    """Longer answers are more helpful, shorter ones more harmless; pairs, and groups of three."""
    records = []
    for i in range(48):
        answers = ["x" * (1 + i % 2), "x" * (4 + i % 3), "x" * 8][: 2 + i % 2]
        for criterion in NAMES:
            ranks = list(range(len(answers)))
            if criterion == "helpful":
                ranks.reverse()
            records.append({"prompt": f"{i}:", "responses": answers, "ranks": ranks, "criterion": criterion})
    return write(tmp_path_factory.mktemp("data") / "conflict.jsonl", records)


@pytest.fixture
def config(tiny_policy, conflict, tmp_path):
    return reward.RewardConfig(
        model=str(tiny_policy),
        data=conflict,
        output=str(tmp_path / "run"),
        holdout=0.25,
        max_length=32,
        max_steps=2,
        batch_size=12,
        micro_batch_size=12,
        learning_rate=1e-2,
        warmup_steps=2,
        lora_rank=4,
        eval_every=0,
        save_every=0,
        samples=0,
    )


@pytest.fixture
def two_scores(tiny_policy):
    torch.manual_seed(0)
    return with_scalar_head(load_policy(tiny_policy), NAMES).eval()


MIXED = [
    Preference([10, 11], [[20, 1], [21, 22, 1]], [0, 1], 0.0, "helpful"),
    Preference([12], [[20, 23, 1], [24, 1], [25, 1]], [2, 0, 1], 0.5, "harmless"),
    Preference([13, 14, 15], [[26, 1], [27, 27, 1]], [1, 0], 0.0, None),
    Preference([16], [[28, 1], [29, 1], [30, 1], [31, 1]], [0, 1, 1, 2], -0.25, "helpful"),
    Preference([17], [[32, 1], [33, 1], [34, 34, 1]], [0, 1, 2], 1.0, None),
]


def by_hand(model, preferences, center_coef):
    """Each comparison alone, unpadded, in plain torch: its column's K-wise loss, or the mean over the columns."""
    losses = []
    for p in preferences:
        scores = torch.stack([model(torch.tensor([[*p.prompt_ids, *r]])).logits[0] for r in p.responses])
        columns = [NAMES.index(p.criterion)] if p.criterion else range(len(NAMES))
        of_columns = []
        for s in (scores[:, c] for c in columns):
            pairs = [
                -logsigmoid(s[i] - s[j] - p.margin) + center_coef * (s[i] + s[j]) ** 2
                for i, rank in enumerate(p.ranks)
                for j, other in enumerate(p.ranks)
                if rank < other
            ]
            of_columns.append(torch.stack(pairs).mean())
        losses.append(torch.stack(of_columns).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("center_coef", [0.0, 0.1])
def test_each_column_learns_from_the_comparisons_of_its_name(two_scores, tiny_policy, center_coef):
    """Pairs and K-wise, ties, margins, both criteria and none in one batch: loss and every gradient are those of a
    loss written by hand."""
    torch.manual_seed(0)
    plain = with_scalar_head(load_policy(tiny_policy), NAMES).eval()
    loss, scores = reward_loss(two_scores, ranking_batch(MIXED, 0, names=NAMES), center_coef=center_coef)
    loss.backward()
    expected = by_hand(plain, MIXED, center_coef)
    expected.backward()
    assert scores.shape == (14, 2)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for (name, a), (_, b) in zip(two_scores.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_comparison_leaves_the_other_columns_alone(two_scores):
    loss, _ = reward_loss(two_scores, ranking_batch(MIXED[:1], 0, names=NAMES))
    loss.backward()
    gradient = two_scores.score.weight.grad
    assert (gradient[0] == 0).all() and (gradient[1] != 0).any()


def test_columns_of_comparisons():
    assert criterion_columns(["b", None, "a"], ["a", "b"]).tolist() == [[1, 1], [0, 1], [0, 0]]
    assert criterion_columns(["b", None], ["score"]).tolist() == [[0], [0]]
    assert several_criteria(["b", None], ["a", "b"]) == ["a", "b"]
    assert several_criteria(["b", None]) == several_criteria([None]) == []


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_conflicting_criteria_are_both_learned_and_normalised(config, rank, capsys, tmp_path):
    """One backbone, two heads that want the opposite; the folder has their names and numbers, and can be exported."""
    cfg = replace(config, lora_rank=rank, max_steps=30, samples=1, normalize_prompts=0)
    metrics = reward.main(cfg)
    assert metrics["eval_accuracy/helpful"] > 0.9 and metrics["eval_accuracy/harmless"] > 0.9
    assert metrics["length_correlation/helpful"] > 0.5 and metrics["length_correlation/harmless"] < -0.5
    assert metrics["criteria_correlation/harmless/helpful"] < -0.5
    shown = capsys.readouterr().out
    assert "harmless +" in shown or "harmless -" in shown

    model, tokenizer = load_scalar_model(cfg.output), load_tokenizer(cfg.output)
    assert score_head(model).names == ("harmless", "helpful")
    train, _ = split_holdout(load_preferences(cfg.data, tokenizer, max_length=32)[0], cfg.holdout, cfg.seed)
    batch = ranking_batch(train, tokenizer.pad_token_id)
    with torch.no_grad():
        scores = as_scorer(model)(batch.input_ids, batch.attention_mask, last_only=True)
    torch.testing.assert_close(scores.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.var(0, correction=0), torch.ones(2), atol=1e-3, rtol=0)
    stored = json.loads((Path(cfg.output) / ("fastrl_score.json" if rank else "config.json")).read_text())
    assert stored["fastrl_score_mean"] == [metrics["score_mean/harmless"], metrics["score_mean/helpful"]]
    assert stored["fastrl_score_std"] == [metrics["score_std/harmless"], metrics["score_std/helpful"]]

    exported = load_scalar_model(export(cfg.output, tmp_path / "exported"))
    with torch.no_grad():
        again = as_scorer(exported)(batch.input_ids, batch.attention_mask, last_only=True)
    torch.testing.assert_close(again, scores, atol=1e-4, rtol=1e-4)


def test_training_goes_on_from_a_model_of_the_same_criteria(config, tmp_path):
    reward.main(config)
    again = replace(config, model=config.output, output=str(tmp_path / "again"))
    reward.main(again)
    assert score_head(load_scalar_model(again.output)).names == ("harmless", "helpful")


def test_a_model_of_one_score_takes_all_comparisons(config, tiny_scalar, capsys):
    """As before there were criteria: one column, and the accuracy of each name in the records. It is said."""
    metrics = reward.main(replace(config, model=str(tiny_scalar)))
    assert load_scalar_model(config.output).score.out_features == 1
    assert "has one score, which the comparisons of all criteria train: harmless, helpful" in capsys.readouterr().out
    assert {"eval_accuracy/helpful", "eval_accuracy/harmless", "score_mean", "length_correlation"} <= metrics.keys()


def test_one_criterion_gives_the_bits_and_the_folder_of_none(config, tmp_path):
    records = [{"prompt": f"{i}:", "chosen": "x" * (1 + i % 3), "rejected": "y" * 5} for i in range(24)]
    folders = []
    for name, extra in (("none", {}), ("one", {"criterion": "helpful"}), ("empty", {"criterion": " "})):
        data = write(tmp_path / f"{name}.jsonl", [{**record, **extra} for record in records])
        cfg = replace(config, data=data, lora_rank=0, output=str(tmp_path / name))
        metrics = reward.main(cfg)
        assert ("eval_accuracy/helpful" in metrics) == (name == "one")
        folders.append([(Path(cfg.output) / file).read_bytes() for file in ("model.safetensors", "config.json")])
    assert folders[0] == folders[1] == folders[2]


def test_other_criteria_than_the_model_has_are_refused(config, tmp_path):
    reward.main(config)
    pair = {"prompt": "a:", "chosen": "b", "rejected": "c"}
    for criteria, message in (
        (("helpful", "honest"), "criterion: expected some of those that the model scores, harmless, helpful, got hon"),
        (("helpful", "helpful"), r"expected training comparisons for each score \(harmless, helpful\), got none for h"),
    ):
        records = [{**pair, "prompt": f"{i}:", "criterion": criteria[i % 2]} for i in range(16)]
        cfg = replace(config, model=config.output, data=write(tmp_path / "other.jsonl", records))
        with pytest.raises(ValueError, match=message):
            reward.main(replace(cfg, output=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_a_criterion_that_nothing_trains_is_refused(config, tmp_path):
    """Unless comparisons without a name train it too."""
    pair = {"prompt": "a:", "chosen": "b", "rejected": "c"}
    held_out = write(tmp_path / "held_out.jsonl", [{**pair, "criterion": "honest"}])
    with pytest.raises(ValueError, match="got none for honest, which nothing would train"):
        reward.main(replace(config, eval_data=held_out))
    assert not Path(config.output).exists()
    check_trained(["a", "b"], ["a", None])
    check_trained(["score"], ["a"])


def test_a_criterion_that_is_no_text_is_a_bad_record(config, tmp_path):
    records = [{"prompt": f"{i}:", "chosen": "b", "rejected": "c", "criterion": 3} for i in range(16)]
    with pytest.raises(ValueError, match="criterion"):
        reward.main(replace(config, data=write(tmp_path / "bad.jsonl", records)))


def test_scores_that_do_not_vary_are_named(two_scores):
    scores = torch.stack([torch.arange(4.0), torch.zeros(4)], 1)
    with pytest.raises(ValueError, match="normalize_scores: helpful: expected scores with some variance"):
        reward.normalize_scores(two_scores, scores)
