"""`fastrl conformance`: what passes, what each case notices, tables, errors, and the pytest plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from mutants import MUTANTS

import fastrl
from fastrl import cli
from fastrl.conformance import Adapter, NotOffered
from fastrl.conformance.adapter import PARTS
from fastrl.conformance.cases import cases
from fastrl.conformance.left_out import LEFT_OUT
from fastrl.conformance.run import check, implementations, load

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(fastrl.__file__).parents[1]
CASES = cases()
(TORCH,) = load("torch")


@pytest.mark.parametrize(
    ("adapter", "case"),
    [(a, case) for a in (TORCH, *load("fastrl")) for case in CASES if not set(case.parts) & set(a.absent)],
    ids=lambda value: getattr(value, "title", str(value)),
)
def test_fastrl_and_plain_torch_pass(adapter, case):
    """But for the conventions that an adapter states, each of which is needed."""
    verdict = check(case, adapter)
    assert verdict.outcome == ("differs" if case.name in adapter.conventions else "pass"), verdict.detail


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_notices_what_it_is_about(case):
    """The input and what it gave, not an exception of the broken part."""
    verdict = check(case, replace(TORCH, **MUTANTS[case.name]))
    assert verdict.outcome == "FAIL" and ": expected " in verdict.detail, verdict
    assert "\n" not in verdict.detail


def test_mutants_are_of_cases():
    assert set(MUTANTS) == {case.name for case in CASES}


def test_every_number_is_asked_or_left_out_with_a_reason():
    asked = {number for case in CASES for number in case.numbers}
    known = {f"T{i}" for i in range(1, 39)} | {f"pitfall {i}" for i in range(1, 49)}
    assert asked | set(LEFT_OUT) == known and not asked & set(LEFT_OUT)
    assert all(len(why) > 10 for why in LEFT_OUT.values())


def test_cases_ask_for_parts_of_adapters():
    assert all(set(case.parts) <= set(PARTS) for case in CASES)
    assert {part for case in CASES for part in case.parts} == set(PARTS)


def verdict_of(name, adapter):
    (case,) = [case for case in CASES if case.name == name]
    return check(case, adapter)


def test_what_is_not_offered_does_not_apply():
    def refuses(*args, **options):
        raise NotOffered("no softcap")

    case = "token_logprobs.softcap_after_banning"
    adapter = Adapter("mine", "1.0", token_logprobs=refuses, absent={"gae": "inline in a trainer"})
    assert verdict_of(case, adapter) == ("mine 1.0", case, "-", "no softcap")
    assert verdict_of("gae.holes", adapter).detail == "inline in a trainer"
    assert verdict_of("ranking_loss.closed_form", adapter).detail == "has no ranking_loss"


def test_a_convention_is_a_note_and_a_remark_does_not_excuse():
    broken = {"token_logprobs": MUTANTS["token_logprobs.common_offset"]["token_logprobs"]}
    case = "token_logprobs.common_offset"
    noted = verdict_of(case, Adapter("mine", "1.0", **broken, conventions={case: "on purpose"}))
    assert noted.outcome == "differs" and noted.detail.startswith("on purpose (logits (5, 257)")
    failed = verdict_of(case, Adapter("mine", "1.0", **broken, remarks={case: "Known"}))
    assert failed.outcome == "FAIL" and failed.detail.endswith(". Known")
    assert verdict_of(case, replace(TORCH, conventions={case: "on purpose"})).outcome == "pass"


def test_an_error_of_the_implementation_fails_with_its_text():
    def breaks(*args, **options):
        raise KeyError("two\nlines")

    verdict = verdict_of("gae.by_hand", Adapter("mine", "1.0", gae=breaks))
    assert verdict.outcome == "FAIL" and verdict.detail == r"KeyError: 'two\nlines'"


def test_a_case_leaves_the_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    check(CASES[0], TORCH)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_table_has_failing_inputs_and_the_status_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", module())
    with pytest.raises(SystemExit) as stop:
        cli.main(["conformance", "torch", "mine:adapter", "--case", "ranking_loss"])
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["torch", torch.__version__, "mine", "1.0"]
    assert "ranking_loss.extreme_differences" in lines[2] and lines[2].split()[1:] == ["pass", "FAIL"]
    inputs = lines[lines.index("failing inputs:") + 1 :]
    wanted = "a difference of -1000, element 0 of 1: expected 1000, got inf"
    assert f"  mine 1.0: ranking_loss.extreme_differences: {wanted}" in inputs
    assert lines[-1] == "mine 1.0: 2 fail"


def module():
    """A user's module with an adapter."""
    loss = MUTANTS["ranking_loss.extreme_differences"]["ranking_loss"]
    return types.SimpleNamespace(adapter=Adapter("mine", "1.0", ranking_loss=loss), nothing=3)


def test_cases_are_chosen_by_name_or_number(capsys):
    assert cli.main(["conformance", "torch", "--case", "pitfall 22"]) == 0
    assert "torch " + torch.__version__ + ": 1 pass" in capsys.readouterr().out
    assert cli.main(["conformance", "torch", "--case", "T99"]) == 2
    assert "no case has it in its name or as its number" in capsys.readouterr().err


def test_unknown_implementations(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", module())
    errors = {
        "torchlr": "unknown implementation 'torchlr'; did you mean 'torchrl'?",
        "xyz": f"expected one of {', '.join(implementations())}",
        "mine:missing": "module mine has no 'missing'",
        "mine:nothing": "expected a fastrl.conformance.Adapter or a list of them, got 3",
        "no_such_module:adapter": "needs a module that is not installed: no_such_module",
        "trl@/no/such/folder": "there is no folder '/no/such/folder'",
    }
    for name, error in errors.items():
        assert cli.main(["conformance", name]) == 2
        assert error in capsys.readouterr().err


def test_a_missing_package_is_named_with_what_to_do(capsys, monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr("fastrl.conformance.adapters.version", missing)
    assert cli.main(["conformance", "trl"]) == 2
    assert "needs trl (tried: 1.12.0, 1.16.0); to do: pip install trl" in capsys.readouterr().err
    assert cli.main(["conformance", "--case", "ranking_loss"]) == 0  # all that are installed
    out = capsys.readouterr().out
    assert "not run: conformance: needs trl" in out and "fastrl cpu" in out


@pytest.mark.slow
def test_another_version_from_a_folder(tmp_path, capsys):
    """NAME@FOLDER imports from the folder first, in a process of its own."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom fastrl.conformance import Adapter\n"
        "loss = lambda good, bad, margin=None: -torch.sigmoid(good - bad).log().mean()\n"
        "adapter = Adapter('mine', '2.0', ranking_loss=loss)\n"
    )
    with pytest.raises(SystemExit):
        cli.main(["conformance", f"mine:adapter@{tmp_path}", "--case", "extreme_differences"])
    assert "mine 2.0: 1 fail" in capsys.readouterr().out


def test_json(capsys):
    assert cli.main(["conformance", "torch", "--case", "ranking_loss", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == [TORCH.title, "ranking_loss.closed_form", "pass", ""]


def test_the_page_accounts_for_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", module())
    page = tmp_path / "conformance.md"
    assert cli.main(["conformance", "torch", "mine:adapter", "--case", "loss", "--markdown", str(page)]) == 0
    text = page.read_text()
    assert f"| torch {torch.__version__} |" in text and "## Failing inputs" in text and "**no**" in text
    assert "expected 1000, got inf" in text and "has no ppo_loss" in text
    assert all(f"| {number} | {why} |" in text for number, why in LEFT_OUT.items())


def test_the_committed_page_has_every_case():
    """`fastrl conformance ... --markdown docs/conformance.md` writes it; CONTRIBUTING.md has the whole command."""
    text = (ROOT / "docs" / "conformance.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for case in CASES:
        assert any(row.startswith(f"| {', '.join(case.numbers)} | {case.sentence} |") for row in rows), case.name


@pytest.mark.slow
def test_the_pytest_plugin(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from fastrl.conformance import Adapter\nfrom fastrl.conformance.adapters import torch as good\n"
        "loss = lambda good, bad, margin=None: (good - bad).mean()\n"
        "adapter = Adapter('mine', '1.0', ranking_loss=loss, gae=good.gae)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "fastrl.conformance.plugin", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [*command, "--pyargs", "fastrl.conformance", "--impl", "mine:adapter", "-k", "ranking or gae"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "2 failed, 7 passed" in done.stdout, done.stdout[-2000:]
    assert "pitfall 31: -mean log sigmoid" in done.stdout
