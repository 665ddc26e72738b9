"""Score heads of one criterion and of several: in memory, on disk, and as transformers reads them."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers

from fastrl.models import (
    LoRASettings,
    Scorer,
    add_lora,
    as_scorer,
    last_token_scores,
    load_policy,
    load_scalar_model,
    only_criterion,
    score_head,
    start_scalar_model,
)
from fastrl.models.heads import normalize_head
from fastrl.models.probe import check_scalar
from fastrl.models.saving import save_model
from fastrl.models.score_heads import with_scalar_head

CRITERIA = ["helpful", "harmless", "brief"]
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
MASK = IDS > 0
MEAN, STD = [0.5, -1.0, 2.0], [2.0, 0.5, 1.0]


@pytest.fixture
def model(tiny_policy):
    torch.manual_seed(0)
    return with_scalar_head(load_policy(tiny_policy), CRITERIA).eval()


def scores(model, last_only=True):
    with torch.no_grad():
        return as_scorer(model)(IDS, MASK, last_only=last_only)


def test_a_column_for_each_criterion(model, tiny_tokenizer):
    check_scalar(model, tiny_tokenizer, "three")
    assert isinstance(as_scorer(model), Scorer) and score_head(model).names == tuple(CRITERIA)
    assert scores(model).shape == (2, 3) and scores(model, last_only=False).shape == (2, 4, 3)
    with torch.no_grad():
        own = model(input_ids=IDS, attention_mask=MASK.long()).logits
    torch.testing.assert_close(scores(model), own, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="expected one criterion, got 3"):
        last_token_scores(model, IDS, MASK)


def test_criteria_are_normalised_each_on_its_own(model):
    before = scores(model)
    normalize_head(model, MEAN, STD)
    expected = (before - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(scores(model), expected, atol=1e-5, rtol=1e-5)
    normalize_head(model, [1.0, 1.0, 1.0], [4.0, 4.0, 4.0])
    torch.testing.assert_close(scores(model), (expected - 1) / 4, atol=1e-5, rtol=1e-5)
    assert model.config.fastrl_score_mean == [1.0, 1.0, 1.0] and model.config.fastrl_score_std == [4.0, 4.0, 4.0]


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_several_criteria_survive_a_folder(model, tiny_tokenizer, tmp_path, adapted):
    if adapted:
        model = add_lora(model, LoRASettings(4, 8))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.eval()
    normalize_head(model, MEAN, STD)
    folder = save_model(model, tiny_tokenizer, tmp_path / "three")
    again = load_scalar_model(folder)
    torch.testing.assert_close(scores(again), scores(model), atol=1e-5, rtol=1e-5)
    assert score_head(again)[1:] == score_head(model)[1:]
    assert again.config.fastrl_score_mean == MEAN and again.config.fastrl_score_std == STD
    assert again.config.id2label == dict(enumerate(CRITERIA))
    if adapted:
        plain = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    else:
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        logits = plain(input_ids=IDS, attention_mask=MASK.long()).logits
    bias = torch.tensor(score_head(model).bias)
    torch.testing.assert_close(logits - bias, scores(model), atol=1e-5, rtol=1e-5)
    assert score_head(start_scalar_model(folder, ["brief", "helpful"])).names == tuple(CRITERIA)
    with pytest.raises(ValueError, match="criterion: expected some of .*helpful, harmless, brief, got honest"):
        start_scalar_model(folder, ["helpful", "honest"])


def test_combined_scores(model):
    head, every = score_head(model), scores(model, last_only=False)
    combined = head.combine(every, {"brief": -0.5, "helpful": 2.0})
    assert combined.shape == (2, 4)
    torch.testing.assert_close(combined, 2 * every[..., 0] - 0.5 * every[..., 2])
    with pytest.raises(ValueError, match="weights: expected some of helpful, harmless, brief, got honest"):
        head.combine(every, {"honest": 1.0})
    with pytest.raises(ValueError, match="got none"):
        head.combine(every, {})


def test_one_criterion_is_saved_as_ever(tiny_policy, tiny_tokenizer, tmp_path):
    """num_labels = 1 and three plain numbers: nothing of the folder says that there could be more."""
    torch.manual_seed(0)
    model = start_scalar_model(tiny_policy)
    before = scores(model)
    normalize_head(model, [0.5], [2.0])
    torch.testing.assert_close(only_criterion(scores(model)), (before[:, 0] - 0.5) / 2, atol=1e-5, rtol=1e-5)
    config = json.loads((save_model(model, tiny_tokenizer, tmp_path / "full") / "config.json").read_text())
    assert {key: value for key, value in config.items() if key.startswith("fastrl_")} == {
        "fastrl_score_bias": 0.25, "fastrl_score_mean": 0.5, "fastrl_score_std": 2.0,
    }  # fmt: skip
    assert config["id2label"] == {"0": "LABEL_0"}
    folder = save_model(add_lora(model, LoRASettings(4, 8)), tiny_tokenizer, tmp_path / "lora")
    stored = json.loads((folder / "fastrl_score.json").read_text())
    assert stored == {"fastrl_score_bias": 0.25, "fastrl_score_mean": 0.5, "fastrl_score_std": 2.0}


@pytest.mark.parametrize("names", [["a", "b"], ["a", "a", "b"], "abc", [["a"], ["b"], ["c"], ["d"]]])
def test_names_that_do_not_fit_the_outputs_are_refused(model, tiny_tokenizer, tmp_path, names):
    folder = save_model(model, tiny_tokenizer, tmp_path / "three")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "fastrl_score_names": names}))
    with pytest.raises(ValueError, match="3 outputs, expected one for each of fastrl_score_names"):
        load_scalar_model(folder)


def test_a_bias_for_each_criterion_is_expected(model):
    model.config.fastrl_score_bias = 0.5
    with pytest.raises(ValueError, match="fastrl_score_bias: expected 3 values, one a criterion, got .0.5."):
        scores(model)
