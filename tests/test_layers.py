"""Who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fastrl

ROOT = Path(fastrl.__file__).parent


def all_imports() -> Iterator[tuple[str, str]]:
    """(module of the package without the leading `fastrl.`, what it imports anywhere in its text)."""
    for file in sorted(ROOT.rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            yield from ((name, module) for module in found)


def imports() -> Iterator[tuple[str, str]]:
    """(module, module of the package that it imports), both without the leading `fastrl.`."""
    return ((name, m.removeprefix("fastrl.")) for name, m in all_imports() if m.startswith("fastrl."))


def importers(package: str) -> set[str]:
    """Modules outside of a package that import it or a part of it."""
    return {name for name, module in imports() if module.split(".")[0] == package and name.split(".")[0] != package}


def test_the_oracle_is_imported_by_the_ops_alone():
    assert {name.split(".")[0] for name in importers("reference")} == {"ops"}


def test_the_ops_stand_alone():
    """They know nothing of models, loops and commands; how a kernel is called does not ask which one runs."""
    found = {(name, module.split(".")[0]) for name, module in imports() if name.split(".")[0] == "ops"}
    above = {"commands", "data", "demo", "integrations", "models", "rlhf", "rollout", "run", "train"}
    assert not [pair for pair in found if pair[1] in above]
    assert not [pair for pair in imports() if pair[0] == "ops.native" and pair[1].startswith("ops.")]


def test_the_heads_do_not_import_each_other():
    heads = {"ops.linear_logprobs", "ops.linear_cross_entropy"}
    assert not [pair for pair in imports() if pair[0] in heads and pair[1] in heads]


def test_an_integration_is_a_leaf():
    assert importers("integrations") == set()


def test_models_know_nothing_of_runs_loops_or_commands():
    above = {"integrations", "run", "train", "commands", "rollout", "cli", "demo"}
    found = {(name, module) for name, module in imports() if name.startswith("models.")}
    assert not {(name, module) for name, module in found if module.split(".")[0] in above}


def test_runs_know_nothing_of_models_ops_or_loops():
    above = {"models", "ops", "kernels", "reference", "integrations", "data", "train", "commands", "rollout"}
    above |= {"demo", "rlhf"}
    found = {(name, module) for name, module in imports() if name.startswith("run.")}
    assert not {(name, module) for name, module in found if module.split(".")[0] in above}


def test_what_rlhf_adds_is_numbers_and_tensors_alone():
    allowed = {"checks", "constants", "masked", "ops", "rlhf"}
    assert not [pair for pair in imports() if pair[0].startswith("rlhf") and pair[1].split(".")[0] not in allowed]
    assert {name.split(".")[0] for name in importers("rlhf")} <= {"train", "conformance"}


def test_accelerate_is_known_to_two_modules():
    """One for the ranks, one for trackers."""
    known = {name for name, module in all_imports() if module.split(".")[0] == "accelerate"}
    assert known == {"run.distributed", "run.trackers"}


def test_loops_are_run_by_the_demo_benches_and_conformance_alone():
    """One integration fills a loop's settings in."""
    settings = "integrations.trl.ppo"
    assert {name.split(".")[0] for name in importers("train") - {settings}} <= {"demo", "benches", "conformance"}
    assert {module for name, module in imports() if name == settings} & {"train.ppo.main", "train.ppo.train"} == set()


def test_the_conformance_suite_knows_fastrl_as_one_implementation_among_others():
    """Its cases compare with lines of their own; one adapter alone imports the ops, models and loops."""
    assert {name.split(".")[0] for name in importers("conformance")} == {"commands"}
    others = {(name, m) for name, m in imports() if name.startswith("conformance") and m.split(".")[0] != "conformance"}
    assert {name for name, _ in others} == {"conformance.adapters.fastrl", "conformance.markdown"}
    assert {m.split(".")[0] for name, m in others if name == "conformance.markdown"} == {"versions"}
