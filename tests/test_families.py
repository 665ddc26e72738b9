"""Families of transformers: log-probs and samples of tiny random models are transformers' own."""

from __future__ import annotations

import csv

import pytest
import transformers
from families import (
    TABLE,
    Verdict,
    byte_tokenizer,
    judge,
    logprob_difference,
    randomised,
    sampled_as_alone,
    tiny_config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastrl.models.heads import logit_scale, softcap
from fastrl.models.probe import check_policy

MAIN = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {}, "Gemma2": {"tie_word_embeddings": True},
    "Gemma3Text": {"final_logit_softcapping": 3.0}, "Mistral": {}, "Phi3": {}, "GPT2": {}, "GPTNeoX": {}, "OPT": {},
    "FalconH1": {}, "Cohere": {"tie_word_embeddings": True}, "Granite": {}, "Olmo": {"clip_qkv": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("family", MAIN)
def test_log_probs_and_samples_are_transformers(family):
    """The log-probs that SFT trains on to 1e-5, and greedy tokens of a padded, cached batch."""
    config = tiny_config(getattr(transformers, f"{family}Config"), **MAIN[family])
    model, tokenizer = randomised(config), byte_tokenizer()
    assert (logit_scale(config) != 1) == (family in ("FalconH1", "Cohere", "Granite"))
    assert (softcap(config) is not None) == family.startswith("Gemma")
    check_policy(model, tokenizer, family)
    assert logprob_difference(model) <= 1e-5
    assert sampled_as_alone(model, tokenizer)


@pytest.mark.parametrize(
    "family, scale",
    [("Cohere", 0.37), ("Granite", 1 / 2.5), ("FalconH1", 0.37), ("MiniCPM3", 256 / 32), ("HyperCLOVAX", 2.5)],
)
def test_logit_scales_are_read_the_way_round_that_the_family_means(family, scale):
    assert logit_scale(tiny_config(getattr(transformers, f"{family}Config"))) == pytest.approx(scale)


def rows():
    with TABLE.open(newline="") as file:
        return [Verdict(**row) for row in csv.DictReader(file)]


def test_no_family_of_the_table_is_wrong():
    outcomes = {row.model_type: row.outcome for row in rows()}
    assert set(outcomes.values()) <= {"works", "refused", "not built"}
    assert all(row.reason for row in rows() if row.outcome != "works")
    assert sum(outcome == "works" for outcome in outcomes.values()) > 100


@pytest.mark.families
@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_causal_family_works_or_is_refused(model_type):
    """As the table says, where the installed transformers has the family as it was then."""
    before = next((row for row in rows() if row.model_type == model_type), None)
    if before and before.outcome == "not built":  # some take minutes and gigabytes to find out
        pytest.skip(before.reason)
    verdict = judge(model_type)
    assert verdict.outcome != "wrong", verdict
    if before and before.outcome == "works":
        assert verdict.outcome == "works", verdict
