"""Rewards as they are written, and functions that give them: what is read, and everything that can be wrong."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import numpy
import pytest
import torch

from fastrl.rlhf.rewards import (
    Term,
    check_weights,
    function_scores,
    load_function,
    parse_rewards,
    parse_weights,
    short_names,
    taken_columns,
)

PROMPTS, RESPONSES = ["a?", "b?", "c?"], ["one", "", "three"]


def scores(function, **columns):
    return function_scores("m:f", function, PROMPTS, RESPONSES, columns)


# ---- what is written ----


def test_weights_of_criteria():
    expected = {"helpful": 1.0, "harmless": -0.5}
    assert parse_weights("helpful=1, harmless=-0.5") == parse_weights({"helpful": 1, "harmless": -0.5}) == expected
    assert parse_weights("") == parse_weights({}) == {}


@pytest.mark.parametrize("weights", ["helpful", "helpful=", "=1", "helpful=much", "helpful=nan", {"helpful": math.inf}])
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match="reward_weights: expected"):
        parse_weights(weights)


def test_weights_must_be_of_the_models_criteria():
    check_weights({"helpful": 1}, ["harmless", "helpful"], "runs/hh")
    check_weights({}, ["score"], "runs/one")
    check_weights({"score": 0.5}, ["score"], "runs/one")
    with pytest.raises(ValueError, match="criteria of runs/hh, harmless, helpful, got helpfull, honest; did you m"):
        check_weights({"helpfull": 1, "honest": 1}, ["harmless", "helpful"], "runs/hh")
    with pytest.raises(ValueError, match="expected a weight for some of the criteria of .*harmless=1,helpful=1"):
        check_weights({}, ["harmless", "helpful"], "runs/hh")


def test_terms():
    texts = ["0.5*runs/a", "-2 * org/hub-id#honest", "my.rewards:Length.brief", "1e-1*../b"]
    expected = [
        Term(0.5, "runs/a"),
        Term(-2.0, "org/hub-id", "honest"),
        Term(1.0, "my.rewards:Length.brief"),
        Term(0.1, "../b"),
    ]
    assert parse_rewards(texts) == parse_rewards(", ".join(texts)) == expected
    assert [term.is_function for term in expected] == [False, False, True, False]
    assert parse_rewards("") == parse_rewards([]) == []


@pytest.mark.parametrize(
    "term, message",
    [
        ("x*runs/a", "expected a finite number as the weight, got 'x'"),
        ("inf*runs/a", "expected a finite number as the weight, got 'inf'"),
        ("*runs/a", "expected a finite number as the weight, got ''"),
        ("0.5*", "expected WEIGHT.MODEL, .* got '0.5.'"),
        ("runs/a#", "expected WEIGHT.MODEL"),
        ("m:f#honest", "expected a reward model before '#', got the function m:f"),
        ("m:f,2*m:f", "expected each reward once, got m:f twice"),
    ],
)
def test_terms_that_are_none(term, message):
    with pytest.raises(ValueError, match=f"rewards: {message}"):
        parse_rewards(term)


def test_names_of_means():
    """The last part, or all of it where that is not the only one of its name."""
    terms = parse_rewards("runs/polite/,m:brief,runs/hh#honest,a:length,b:length,c:helpful")
    assert short_names(terms, ["helpful"]) == ["polite", "brief", "honest", "a:length", "b:length", "c:helpful"]


# ---- functions ----


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


def test_a_function_of_the_working_directory(module):
    module(
        "my_rewards_1",
        "class Length:\n    def brief(prompts, responses):\n        return [1, 2, 3]\n",
    )
    assert scores(load_function("my_rewards_1:Length.brief")) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "source, message",
    [
        ("my_rewards_2:breif", "my_rewards_2 has no breif; did you mean brief"),
        ("my_rewards_2:LIMIT", "expected a function, got int"),
        ("my_rewards_3:brief", "no module my_rewards_3 is installed, or lies in /"),
        ("my_rewards_3.sub:brief", "no module my_rewards_3 is installed"),
        ("my_rewards_4:brief", "the module raised ModuleNotFoundError: No module named 'nowhere'"),
        ("my_rewards_5:brief", "the module raised ZeroDivisionError: division by zero"),
        ("my_rewards_6:brief", "the module raised SyntaxError"),
    ],
)
def test_functions_that_are_not_there(module, source, message):
    module("my_rewards_2", "LIMIT = 3\ndef brief(prompts, responses): ...\n")
    module("my_rewards_4", "import nowhere\n")
    module("my_rewards_5", "1 / 0\n")
    module("my_rewards_6", "def brief(:\n")
    with pytest.raises(ValueError, match=f"rewards: {source}: {message}"):
        load_function(source)


def test_columns_that_a_function_takes():
    def every(prompts, responses, **columns): ...
    def some(prompts, responses, answer, source=None): ...
    def none(prompts, responses): ...
    def one(prompts): ...

    names = ["answer", "level", "responses"]
    assert taken_columns("m:f", every, names) == ["answer", "level"]  # `responses` are the policy's
    assert taken_columns("m:f", some, names) == ["answer"]
    assert taken_columns("m:f", none, names) == []
    with pytest.raises(ValueError, match="missing a required argument: 'answer'; columns of the prompts: none"):
        taken_columns("m:f", some, ["level"])
    with pytest.raises(ValueError, match=r"rewards: m:f: expected a function of \(prompts, responses, \*\*columns\)"):
        taken_columns("m:f", one, names)


@pytest.mark.parametrize(
    "values", [[1, 2.5, True], (1, 2.5, 1), numpy.array([1, 2.5, 1]), torch.tensor([1, 2.5, 1]), [1, Fraction(5, 2), 1]]
)
def test_numbers_of_any_kind(values):
    assert scores(lambda prompts, responses: values) == [1.0, 2.5, 1.0]


def test_a_function_sees_texts_and_columns():
    def lengths(prompts, responses, answer):
        return [len(p + r) * (a or 1) for p, r, a in zip(prompts, responses, answer, strict=True)]

    assert scores(lengths, answer=[2, None, 3]) == [10.0, 2.0, 21.0]


@pytest.mark.parametrize(
    "given, message",
    [
        ([1, math.nan, 3], "expected a finite number, got nan, for the response '' to the prompt 'b\\?'"),
        ([1, 2, math.inf], "expected a finite number, got inf, for the response 'three' to the prompt 'c\\?'"),
        ([1, None, 3], "expected a finite number, got None, for the response ''"),
        (["1", 2, 3], "expected a finite number, got '1', for the response 'one'"),
        ([1, 2], "expected 3 numbers, one a response, got 2, for the response 'one' to the prompt 'a\\?' and what"),
        ([[1, 2, 3]], "expected 3 numbers, one a response, got 1"),
        ([], "expected 3 numbers, one a response, got 0"),
        ((x for x in [1, 2]), "expected 3 numbers, one a response, got 2"),
        ([1, 2, 10**400], "expected a finite number, got 1000"),
        ([1, 2, -1e39], "expected a finite number, got -1e.39"),
        (None, "expected a list of 3 numbers, got NoneType, for the response 'one'"),
        (1.0, "expected a list of 3 numbers, got float"),
        (torch.zeros(3, 2), "expected a finite number, got tensor"),
    ],
)
def test_what_is_no_number_a_response_names_the_record(given, message):
    with pytest.raises(ValueError, match=f"rewards: m:f: {message}"):
        scores(lambda prompts, responses: given)


def test_a_function_that_raises_names_the_record():
    def of_one(prompts, responses):
        return [1 / len(r) for r in responses]

    with pytest.raises(
        ValueError, match="m:f raised ZeroDivisionError: .*, for the response '' to the prompt 'b"
    ) as got:
        scores(of_one)
    assert isinstance(got.value.__cause__, ZeroDivisionError)


def test_a_function_that_raises_on_a_batch_alone():
    def fails_together(prompts, responses):
        if len(responses) > 1:
            raise RuntimeError("too many\nat once")
        return [1.0]

    with pytest.raises(
        ValueError, match="m:f raised RuntimeError: too many at once, for a batch of 3, of which no one"
    ):
        scores(fails_together)


def test_long_texts_are_cut_in_errors():
    with pytest.raises(ValueError) as got:
        function_scores("m:f", lambda prompts, responses: [math.nan], ["p" * 5000], ["r" * 5000], {})
    assert len(str(got.value)) < 600
