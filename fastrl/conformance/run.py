"""Which implementations there are, a case against one of them, and the tables of the verdicts."""

from __future__ import annotations

import difflib
import importlib
import io
import pkgutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from typing import NamedTuple

import torch

from fastrl.conformance import adapters
from fastrl.conformance.adapter import Adapter, NotOffered
from fastrl.conformance.cases import Case

PASS, FAIL, DIFFERS, NOT_OFFERED = "pass", "FAIL", "differs", "-"


class Verdict(NamedTuple):
    """What came of a case; `detail` is the failing input, the note of a convention, or why it does not apply."""

    implementation: str
    case: str
    outcome: str
    detail: str = ""


def implementations() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(adapters.__path__)]


def load(name: str) -> list[Adapter]:
    """The adapters of an implementation, or of `module:attribute`: an Adapter, or a function that gives one or several.

    Raises:
        ValueError: there is no such implementation.
        ImportError: its package is missing, or does not run here.
    """
    module, _, attribute = name.partition(":")
    if attribute:
        found = getattr(importlib.import_module(module), attribute, None)
        if found is None:
            raise ValueError(f"conformance: {name!r}: module {module} has no {attribute!r}")
    elif name in implementations():
        found = importlib.import_module(f"{adapters.__name__}.{name}").adapters
    else:
        near = difflib.get_close_matches(name, implementations(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(implementations())}"
        raise ValueError(f"conformance: unknown implementation {name!r}; {hint} (your own is given as module:adapter)")
    found = found() if callable(found) else found
    several = list(found) if isinstance(found, (list, tuple)) else [found]
    if not several or not all(isinstance(adapter, Adapter) for adapter in several):
        expected = "a fastrl.conformance.Adapter or a list of them"
        raise ValueError(f"conformance: {name!r}: expected {expected}, got {found!r}")
    return several


def check(case: Case, adapter: Adapter) -> Verdict:
    """The verdict on one case; torch's generator is seeded for it and put back."""
    verdict = partial(Verdict, adapter.title, case.name)
    for part in case.parts:
        if getattr(adapter, part) is None:
            return verdict(NOT_OFFERED, adapter.absent.get(part, f"has no {part}"))
    try:
        with torch.random.fork_rng(), torch.device(adapter.device), _silence():
            torch.manual_seed(0)
            case.function(**{part: getattr(adapter, part) for part in case.parts})
    except NotOffered as missing:
        return verdict(NOT_OFFERED, str(missing))
    except AssertionError as failure:
        found = _line(failure)
    except Exception as error:  # noqa: BLE001 - whatever an implementation raises is what it gives for the input
        found = f"{type(error).__name__}: {_line(error)}"
    else:
        return verdict(PASS)
    if case.name in adapter.conventions:
        return verdict(DIFFERS, f"{adapter.conventions[case.name]} ({found})")
    remark = adapter.remarks.get(case.name)
    return verdict(FAIL, f"{found.rstrip('.')}. {remark}" if remark else found)


def table(verdicts: Sequence[Verdict], cases: Sequence[Case]) -> str:
    """Cases down, implementations across, then every failing input and every note."""
    columns = list(dict.fromkeys(v.implementation for v in verdicts))
    outcome = {(v.case, v.implementation): v.outcome for v in verdicts}
    width = max(len(case.name) for case in cases)
    lines = ["  ".join([f"{'':{width}}", *columns])]
    for case in cases:
        cells = [f"{outcome[case.name, column]:{len(column)}}" for column in columns]
        lines.append("  ".join([f"{case.name:{width}}", *cells]).rstrip())
    for title, kind in (("failing inputs", FAIL), ("conventions", DIFFERS)):
        found = [v for v in verdicts if v.outcome == kind]
        lines += ["", f"{title}:"] if found else []
        lines += [f"  {v.implementation}: {v.case}: {v.detail}" for v in found]
    lines += ["", *(f"{column}: {summary(verdicts, column)}" for column in columns)]
    return "\n".join(lines)


def summary(verdicts: Sequence[Verdict], column: str) -> str:
    own = [v.outcome for v in verdicts if v.implementation == column]
    words = ((PASS, "pass"), (FAIL, "fail"), (DIFFERS, "differ by convention"), (NOT_OFFERED, "not offered"))
    return ", ".join(f"{own.count(kind)} {word}" for kind, word in words if kind in own)


@contextmanager
def _silence() -> Iterator[None]:
    """What an implementation prints and warns of is no verdict."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else f"{text[:297]}..."
