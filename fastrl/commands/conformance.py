"""`fastrl conformance [IMPL...]`: what is known to break in RLHF code, tried on implementations of it.

Runs the cases against the functions of each implementation and prints a table with the failing inputs. IMPL is one of
{names}; `module:adapter` for your own (fastrl.conformance.Adapter says what it is made of); or NAME@FOLDER for another
version, which `pip install --target FOLDER` put there. Without any: all that are installed. Exit status 1 if a case
fails. The same cases in pytest:

    pytest -p fastrl.conformance.plugin --pyargs fastrl.conformance --impl module:adapter
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fastrl.conformance.cases import Case, cases
from fastrl.conformance.markdown import page
from fastrl.conformance.run import FAIL, Verdict, check, implementations, load, table


def main(argv: Sequence[str]) -> None:
    """Print the table, or write the page."""
    text = (__doc__ or "").format(names=", ".join(implementations()))
    parser = argparse.ArgumentParser(
        prog="fastrl conformance", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("implementations", metavar="IMPL", nargs="*", help="default: all that are installed")
    parser.add_argument("--case", metavar="TEXT", default="", help="only cases whose name or number has this text")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the table and the cases as a page")
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    options = parser.parse_args(list(argv))
    chosen = select(options.case)
    verdicts, missing = run(options.implementations, options.case)
    if options.json:
        print(json.dumps(verdicts))
        return
    if options.markdown:
        options.markdown.write_text(page(verdicts, chosen, missing), encoding="utf-8")
        print(f"wrote {options.markdown}")
    else:
        print(table(verdicts, chosen))
    for line in missing:
        print(f"not run: {line}")
    if any(verdict.outcome == FAIL for verdict in verdicts) and not options.markdown:
        sys.exit(1)


def select(text: str) -> list[Case]:
    """The cases whose name has the text, or one of whose numbers it is.

    Raises:
        ValueError: there is none.
    """
    found = [case for case in cases() if text in case.name or text in case.numbers]
    if not found:
        raise ValueError(f"conformance: --case {text!r}: no case has it in its name or as its number (T6, pitfall 17)")
    return found


def run(names: Sequence[str], text: str = "") -> tuple[list[Verdict], list[str]]:
    """(verdicts on the cases that `select` finds, what could not be run and why); one that is named has to run."""
    verdicts: list[Verdict] = []
    missing: list[str] = []
    for name in names or implementations():
        if "@" in name:
            verdicts += _elsewhere(name, text)
            continue
        try:
            found = load(name)
        except ImportError as error:
            if names:
                raise
            missing.append(str(error))
            continue
        verdicts += [check(case, adapter) for adapter in found for case in select(text)]
    return verdicts, missing


def _elsewhere(name: str, text: str) -> list[Verdict]:
    """The verdicts on NAME@FOLDER, in a process that imports from the folder first."""
    implementation, _, folder = name.partition("@")
    if not Path(folder).is_dir():
        raise ValueError(f"conformance: {name!r}: there is no folder {folder!r}; pip install --target makes one")
    places = [folder, *sys.path]  # this process's own fastrl, whatever it was found by
    command = [sys.executable, "-c", "from fastrl.cli import main; raise SystemExit(main())"]
    done = subprocess.run(
        [*command, "conformance", implementation, "--json", "--case", text],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"conformance: {name!r}: {done.stderr.strip().splitlines()[-1] if done.stderr else 'failed'}")
    return [Verdict(*fields) for fields in json.loads(done.stdout.splitlines()[-1])]
