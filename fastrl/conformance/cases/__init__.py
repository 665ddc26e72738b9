"""The cases: each is a function of a module here, whose first line says its numbers and what must hold.

Its parameters are the parts of an adapter that it asks, and it raises AssertionError with the failing input.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any, NamedTuple

TITLE = re.compile(r"((?:T|pitfall )\d+(?:, (?:T|pitfall )\d+)*): (.+)")


class Case(NamedTuple):
    """`name` is module.function, `numbers` T1 to T38 and pitfall 1 to 48, `sentence` what must hold."""

    name: str
    numbers: tuple[str, ...]
    sentence: str
    function: Callable[..., None]
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def cases() -> list[Case]:
    """All of them, in the order of their files."""
    return [
        _case(module.name, function)
        for module in pkgutil.iter_modules(__path__)
        for function in vars(importlib.import_module(f"{__name__}.{module.name}")).values()
        if inspect.isfunction(function) and function.__module__ == f"{__name__}.{module.name}"
        if not function.__name__.startswith("_")
    ]


def _case(module: str, function: Callable[..., Any]) -> Case:
    title = TITLE.fullmatch((inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " "))
    assert title is not None, f"{module}.{function.__name__}: its docstring begins with its numbers: 'T1: what holds'"
    numbers = tuple(title[1].split(", "))
    parts = tuple(inspect.signature(function).parameters)
    return Case(f"{module}.{function.__name__}", numbers, title[2], function, parts)
