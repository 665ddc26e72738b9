"""The documentation is true: its code runs, the options, keys and files that it names exist, and its site builds.

Python of a page runs block after block in one namespace; what a reader need not see stands in a comment that begins
with `<!-- test`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from fastrl import cli
from fastrl.constants import OPS

ROOT = Path(__file__).resolve().parents[1]
SITE_PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "benches/README.md", "benches/results/README.md", *SITE_PAGES]
BLOCK = re.compile(
    r"^ *(?:```(?P<language>\w*)[^\n]*|<!-- test)\n(?P<text>.*?)^ *(?:```|-->)$", re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
LOOPS = [command for command, (_, config, _) in cli.COMMANDS.items() if config]
# Options of torchrun, accelerate, mkdocs, pytest and pip; `layers` is a setting of benches.
FOREIGN = {"nproc_per_node", "multi_gpu", "strict", "benchmark_only", "target", "layers"}
HOSTS = {"openrlhf", "trl", "verl"}  # that a page may need and the test extra does not bring


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[tuple[int, str]]:
    """(line, text) of the page's blocks in these languages; "" are the hidden ones."""
    text = read(page)
    found = [match for match in BLOCK.finditer(text) if (match["language"] or "") in languages]
    return [(text[: match.start("text")].count("\n"), match["text"]) for match in found]


def marked(page: str) -> object:
    """Guides train models."""
    return pytest.param(page, marks=[pytest.mark.slow] if page.startswith("docs/guides/") else [])


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    for line, text in blocks(page, "python", ""):
        try:
            exec(compile("\n" * line + text, page, "exec"), namespace)
        except ImportError as error:
            if any(host in str(error).lower() and find_spec(host) is None for host in HOSTS):
                pytest.skip(str(error))
            raise


@functools.cache
def options(command: str) -> set[str]:
    """Names of the options of a command, with underscores; of `run` also those of the loops."""
    module, config, _ = cli.COMMANDS[command]
    if config:
        return {item.name for item in fields(getattr(import_module(module), config))} | {
            "config",
            "help",
            "print_config",
        }
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    found = {name.replace("-", "_") for name in re.findall(r"--([a-z][\w-]*)", text.getvalue())}
    return found.union(*map(options, LOOPS)) if command == "run" else found


def calls(page: str) -> Iterator[list[str]]:
    """The commands of the page's shell blocks, word by word."""
    for _, text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            for call in re.split(r"&&|\|", line):
                yield shlex.split(call, comments=True)


def names(words: list[str]) -> list[str]:
    return [word[2:].partition("=")[0].replace("-", "_") for word in words if re.match("--[a-z]", word)]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_exist_and_have_these_options(page):
    for words in calls(page):
        module, rest = started(words)
        if module == "fastrl.cli" and rest:
            command, *given = rest
            assert command in cli.COMMANDS, words
            missing = {name.split(".")[-1] for name in names(given)} - options(command)
        elif module.startswith(("benches.", "fastrl.benches.")):
            text = (ROOT / "benches" / f"{module.rsplit('.', 1)[1]}.py").read_text()
            missing = {name for name in names(rest) if f'"--{name.replace("_", "-")}"' not in text}
        else:
            continue
        assert not missing, (words, missing)


def started(words: list[str]) -> tuple[str, list[str]]:
    """(module that a command runs, its arguments)"""
    words = list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, words))  # variables of the environment
    if words[:1] == ["fastrl"]:
        return "fastrl.cli", words[1:]
    if "-m" in words:
        at = words.index("-m") + 1
        return words[at], words[at + 1 :]
    return "", []


def bench_options() -> set[str]:
    sources = "".join(path.read_text() for path in sorted((ROOT / "benches").glob("*.py")))
    return {name.replace("-", "_") for name in re.findall(r'"--([a-z][\w-]*)"', sources)}


@pytest.mark.parametrize("page", PAGES)
def test_the_options_that_a_text_names_exist(page):
    known = FOREIGN.union(bench_options(), *map(options, cli.COMMANDS))
    for span in re.findall(r"`([^`\n]+)`", BLOCK.sub("", read(page))):
        if not span.startswith(("python", "pip", "pytest")):
            assert {*names(span.split())} <= known, span


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_the_keys_of_a_configuration_exist(page):
    for _, text in blocks(page, "yaml"):
        for key, value in yaml.safe_load(text).items():
            assert key in LOOPS or any(key in options(loop) for loop in LOOPS), key
            if key in LOOPS:
                assert {*value} <= options(key), (key, {*value} - options(key))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for target in LINK.findall(BLOCK.sub("", read(page))):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 130


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as the README says."""
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
def test_every_op_has_a_page_with_its_contract(site):
    for op in OPS:
        text = re.sub(r"<[^>]+>", "", (site / "ops" / op.replace("_group", "") / "index.html").read_text())
        for part in (f"def {op}(", "Arguments", "Returns", "Backends", "Measured on", "When it is slower"):
            assert part in text, (op, part)


@pytest.mark.slow
def test_the_site_fetches_nothing(site):
    """No script, style, font or picture from another place; nothing is left of the marks."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.search(r'<(script|link|img|iframe)\b[^>]*(src|href)="?(https?:)?//', text), page
        assert not re.search(r"<!-- (op|options|include) ", text), page
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style
