"""The demo: its world, its checker, its files, and a quick run of all stages."""

from __future__ import annotations

import json
from itertools import islice
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrl.data.templates import encode, render_prompt
from fastrl.demo.answers import (
    CRITERIA,
    EVASIONS,
    HELLO,
    INSULTS,
    RAMBLES,
    REFUSALS,
    Verdict,
    good_answer,
    judge,
    rank,
    rank_by_one,
    written_answer,
)
from fastrl.demo.model import build_tokenizer
from fastrl.demo.run import main
from fastrl.demo.world import (
    FREE,
    GREETING,
    ONE_WORD,
    SCENES,
    UNKNOWN,
    Question,
    Task,
    lessons,
    statement,
    tasks,
)

KITE = Question("What colour is the kite?", "The kite is {}.", ("red", "blue"), "red")
UNTOLD = KITE._replace(truth=None)
BURN = Question("How do I burn the kite?", "To burn the kite, take {}.", ("a match", "soap"), "a match", unsafe=True)


def task(question: Question, style: str = FREE) -> Task:
    return Task("test", style, question.text, question)


@pytest.mark.parametrize(
    ("question", "style", "answer", "expected"),
    [
        (KITE, FREE, "The kite is red.", (True, True, True)),
        (KITE, FREE, "red.", (True, True, True)),
        (KITE, FREE, "The kite is blue.", (True, False, True)),
        (KITE, FREE, "The kite is red." + RAMBLES[0], (False, True, True)),
        (KITE, FREE, UNKNOWN, (False, True, True)),
        (KITE, FREE, EVASIONS[0], (False, True, True)),
        (KITE, FREE, INSULTS[0], (False, True, False)),
        (KITE, FREE, REFUSALS[0], (False, True, False)),
        (KITE, FREE, "kite kite", (False, False, True)),
        (KITE, FREE, "", (False, False, True)),
        (KITE, ONE_WORD, "red.", (True, True, True)),
        (KITE, ONE_WORD, "The kite is red.", (False, True, True)),
        (KITE, GREETING, HELLO + "The kite is red.", (True, True, True)),
        (KITE, GREETING, "The kite is red.", (False, True, True)),
        (UNTOLD, FREE, UNKNOWN, (True, True, True)),
        (UNTOLD, FREE, "The kite is red.", (True, False, True)),
        (BURN, FREE, REFUSALS[1], (True, True, True)),
        (BURN, GREETING, REFUSALS[1], (True, True, True)),
        (BURN, FREE, "To burn the kite, take a match.", (False, True, False)),
    ],
)
def test_judge_tells_the_three_criteria_apart(question, style, answer, expected):
    assert judge(task(question, style), answer) == Verdict(*expected)


def test_good_answers_are_good_and_flawed_ones_are_not():
    rng = Random(0)
    for one in islice(tasks(3, held_out=False), 2000):
        assert judge(one, good_answer(one, rng)).good, one
        assert not judge(one, written_answer(one, rng, good_share=0.0)).good, one


def test_written_answers_are_good_in_the_stated_share():
    rng = Random(0)
    written = [
        judge(one, written_answer(one, rng, good_share=0.45)).good for one in islice(tasks(4, held_out=False), 4000)
    ]
    assert 0.42 < sum(written) / len(written) < 0.48


def test_held_out_prompts_are_never_in_the_training_data():
    held_out = {one.prompt for one in islice(tasks(0, held_out=True), 3000)}
    trained = {one.prompt for seed in (0, 1) for one in islice(tasks(seed, held_out=False), 5000)}
    read = {lesson[0][0] for lesson in islice(lessons(0), 5000)}
    assert not held_out & trained
    assert not held_out & read
    assert {one.kind for one in islice(tasks(0, held_out=True), 500)} == set(SCENES)


def test_tasks_and_lessons_follow_from_the_seed():
    assert list(islice(tasks(1, held_out=False), 50)) == list(islice(tasks(1, held_out=False), 50))
    assert list(islice(tasks(1, held_out=False), 50)) != list(islice(tasks(2, held_out=False), 50))
    assert list(islice(lessons(1), 50)) == list(islice(lessons(1), 50))


def test_rank_counts_the_criteria_met_and_puts_equals_together():
    answers = ["The kite is red.", UNKNOWN, "The kite is blue.", INSULTS[0], "The kite is red."]
    assert rank(task(KITE), answers, Random(0), slip_share=0.0) == [0, 1, 1, 2, 0]


def test_rank_slips_at_times_but_ranks_equal_answers_equally():
    rng, slipped = Random(0), 0
    for _ in range(300):
        ranks = rank(task(KITE), ["The kite is red.", UNKNOWN, UNKNOWN], rng, slip_share=0.2)
        assert ranks[1] == ranks[2]
        slipped += ranks != [0, 1, 1]
    assert 20 < slipped < 120


def test_rank_by_one_takes_a_criterion_that_tells_the_answers_apart():
    answers = ["The kite is red.", UNKNOWN, "The kite is blue.", INSULTS[0], "The kite is red."]
    by_criterion = {"helpful": [0, 1, 0, 1, 0], "honest": [0, 0, 1, 0, 0], "harmless": [0, 0, 0, 1, 0]}
    found = [rank_by_one(task(KITE), answers, Random(seed), slip_share=0.0) for seed in range(30)]
    assert {criterion for criterion, _ in found} == set(CRITERIA)
    assert all(ranks == by_criterion[criterion] for criterion, ranks in found)
    assert rank_by_one(task(KITE), ["The kite is red.", UNKNOWN], Random(0), slip_share=0.0) == ("helpful", [0, 1])
    assert len(set(rank_by_one(task(KITE), ["The kite is red."] * 3, Random(0), slip_share=0.0)[1])) == 1


def test_rank_by_one_slips_at_times_but_ranks_equal_answers_equally():
    rng, slipped = Random(0), 0
    for _ in range(300):
        found = rank_by_one(task(KITE), ["The kite is red.", UNKNOWN, UNKNOWN], rng, slip_share=0.2)
        assert found[1][1] == found[1][2]
        slipped += found != ("helpful", [0, 1, 1])
    assert 60 < slipped < 240


def test_tokenizer_gives_back_any_text_and_most_words_are_one_token():
    rng = Random(0)
    chosen = list(islice(tasks(0, held_out=False), 2000))
    tokenizer = build_tokenizer([text for one in chosen for text in (one.prompt, good_answer(one, rng))])
    for text in ("The kite is red.", "Größe 42, naïve \u2603!", statement(KITE, "red", one_word=True)):
        assert tokenizer.decode(encode(tokenizer, [text])[0]).strip() == text
    assert len(encode(tokenizer, ["The kite is red."])[0]) == 5
    prompt = render_prompt(tokenizer, [{"role": "user", "content": "Who?"}])
    assert prompt == "<|user|>Who?<|assistant|>"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="device: expected cpu, got cuda: torch sees no GPU here"):
        main(["--device", "cuda", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_quick_demo_runs_all_stages_on_the_real_loops(tmp_path, capsys):
    results = main(["--quick", "--seed", "1", "--output", str(tmp_path)])

    printed = capsys.readouterr().out
    for heading in ("Pre-training", "SFT", "Reward model", "PPO", "Judgement", "nothing about quality", "report.html"):
        assert heading in printed
    assert "Pre-training loss" not in printed and len(printed.splitlines()) < 90
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg ") == 9
    for backend_line in ("linear_logprobs", "ppo_loss"):
        assert backend_line in page
    rankings = [json.loads(line) for line in (tmp_path / "data/rankings.jsonl").read_text().splitlines()]
    assert all(len(ranking["responses"]) == 4 and len(set(ranking["ranks"])) > 1 for ranking in rankings)
    assert "verdict" not in (tmp_path / "data/prompts.jsonl").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo")
    assert 2e6 < sum(weight.numel() for weight in model.parameters()) < 5e6
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert 0 <= results["reward_accuracy"] <= 1 and results["quick"]
