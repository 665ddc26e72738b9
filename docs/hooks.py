"""What mkdocs fills in at build time, so that pages cannot say anything else than the code and the measurements do.

A mark in a page, alone on its line, is replaced:

    <!-- op gae -->                        the op's contract from its docstring, its backends, what was measured
    <!-- options ppo -->                   the settings of a loop
    <!-- include benches/results/README.md -->    a file of the repository

A page is added for every file of docs/examples. Entries of `nav` are patterns of files.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import re
import textwrap
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from fastrl import ops
from fastrl.benches import records, tables
from fastrl.cli import COMMANDS
from fastrl.ops.backend import DEVICES, NATIVE_BACKENDS
from fastrl.run.config import _introduced_in

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"^<!-- (op|options|include) (\S+) -->$", re.MULTILINE)
SECTION = re.compile(r"^(Args|Returns|Raises|Numerics|Cost|Source)\b([^:\n]*):[ \n]", re.MULTILINE)
ARGUMENT = re.compile(r"^ {4}(?=\w)([\w, ]+): ", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Adds the plots and a page for each example, and resolves the patterns of the nav."""
    for plot in sorted((ROOT / "benches/results").glob("*.svg")):
        files.append(File.generated(config, plot.name, abs_src_path=str(plot)))
    for example in sorted(Path(config.docs_dir).glob("examples/*.py")):
        files.append(File.generated(config, f"examples/{example.stem}.md", content=example_page(example)))
    config.nav = matching(config.nav, [file.src_uri for file in files.documentation_pages()], set())
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    fillers = {"op": contract, "options": options, "include": include}
    markdown = MARK.sub(lambda mark: fillers[mark[1]](mark[2]), markdown)
    return re.sub(r"(\(\S*examples/\w+)\.py\)", r"\1.md)", markdown)  # to the example's page


def matching(nav: list[Any], pages: list[str], seen: set[str]) -> list[Any]:
    """`nav` with each pattern replaced by the pages that it names, in order, none twice; empty sections left out."""
    found: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            ((title, below),) = entry.items()
            below = matching(below, pages, seen)
            found += [{title: below}] if below else []
        else:
            named = [page for page in sorted(pages) if fnmatch.fnmatch(page, entry) and page not in seen]
            seen.update(named)
            found += named
    return found


def contract(op: str) -> str:
    """What a caller of the op may rely on: signature, docstring, result types, backends, measurements."""
    function = getattr(ops, op)
    types = [item for item in vars(ops).values() if inspect.isclass(item) and item.__module__ == function.__module__]
    return "\n\n".join(
        [
            f"## {op}",
            code(re.search(r"def .*?\) -> .*?:\n", inspect.getsource(function), re.DOTALL)[0].rstrip(":\n")),  # type: ignore[index]
            docstring(function),
            *(f"### {item.__name__}\n\n{code(inspect.getsource(item))}" for item in types),
            f"### Backends\n\n{backends(op)}",
            measured(op),
        ]
    )


def docstring(function: Any) -> str:
    """A docstring as Markdown: its text and formulas as they are, then its sections, arguments as a list."""
    text, *parts = SECTION.split(inspect.getdoc(function) or "")
    sections = [text.rstrip()]
    for name, words, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        if name == "Args":
            body = ARGUMENT.sub(lambda match: f"- {quoted(match[1])}: ", body)
        title = {"Args": "Arguments"}.get(name, name) + words
        body = (body if name == "Args" else textwrap.dedent(body)).strip()
        sections.append(f"### {title}\n\n{body[0].upper()}{body[1:]}")
    return re.sub(r"arXiv:(\d+\.\d+)", r"[\g<0>](https://arxiv.org/abs/\1)", "\n\n".join(sections))


def quoted(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def backends(op: str) -> str:
    """The order of choice on each kind of device."""
    lines = []
    for device, words in (("cpu", "On a CPU"), ("cuda", "On a GPU")):
        order = [backend for backend in NATIVE_BACKENDS[op] if device in DEVICES[backend]] + ["reference"]
        lines.append(f"- {words}: {', else '.join(f'`{backend}`' for backend in order)}.")
    return "\n".join(lines)


def measured(op: str) -> str:
    """The op's rows of every committed table, and who was faster."""
    parts = []
    for file in sorted((ROOT / "benches/results").glob("*.csv")):
        rows = [row for row in records.read(file) if row["op"] == op]
        if rows:
            parts += [f"### Measured on {rows[0]['device']}", tables.markdown(rows)]
            parts += ["### When it is slower", slower(rows)]
    if not any(file.name.startswith("nvidia") for file in (ROOT / "benches/results").glob("*.csv")):
        parts.append("On a GPU: not yet measured.")
    return "\n\n".join(parts)


def slower(rows: list[records.Row]) -> str:
    """Every provider that was faster than fastrl at the same case."""
    lines = []
    for case, members in records.by_case(rows).items():
        mine = [row for row in members if row["provider"] in ("fastrl cpu", "fastrl cuda")]
        for row in members:
            if mine and row["status"] == "ok" and not row["provider"].startswith("fastrl "):
                if float(row["ms_p50"]) < float(mine[0]["ms_p50"]):
                    times = f"{row['provider']} {row['ms_p50']} ms, fastrl {mine[0]['ms_p50']} ms"
                    lines.append(f"- {' '.join(case[1:4])}: {times}.")
    return "\n".join(lines) or "No provider that was measured was faster."


def options(command: str) -> str:
    """A table of a loop's settings for each group of `fastrl COMMAND --help`."""
    module, name, _ = COMMANDS[command]
    config = getattr(importlib.import_module(module), name)
    groups: dict[str, list[Field[Any]]] = {}
    for item in fields(config):
        groups.setdefault(str(_introduced_in(config, item.name).__doc__), []).append(item)
    parts = []
    for title, items in groups.items():
        rows = [f"| `--{item.name}` | {default(item)} | {plain(item.metadata['help'])} |" for item in items]
        parts.append("\n".join([f"### {title}\n", "| option | default | |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts)


def plain(text: str) -> str:
    """Text whose signs mean nothing in a table of Markdown."""
    return re.sub(r"([|*_\\])", r"\\\1", text).replace("<", "&lt;")


def default(item: Field[Any]) -> str:
    if item.default is MISSING:
        return "required"
    return (
        "" if item.default in ("", None) else f"`{str(item.default).lower() if item.type == 'bool' else item.default}`"
    )


def include(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def example_page(path: Path) -> str:
    return f"# {path.stem.upper()} by hand\n\n`docs/examples/{path.name}`\n\n{code(path.read_text(encoding='utf-8'))}\n"


def code(text: str) -> str:
    return f"```python\n{text.strip()}\n```"
