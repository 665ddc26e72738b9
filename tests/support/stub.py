"""What fastrl/_C.pyi declares, and what a native module has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

STUB = Path(__file__).parents[2] / "fastrl/_C.pyi"
Signatures = dict[str, list[str]]


def declared(submodule: str | None = None) -> Signatures:
    """Function -> names of its arguments; a submodule is declared as a class of static methods."""
    body = ast.parse(STUB.read_text()).body
    if submodule is not None:
        (body,) = (node.body for node in body if isinstance(node, ast.ClassDef) and node.name == submodule)
    return {f.name: [a.arg for a in f.args.args] for f in body if isinstance(f, ast.FunctionDef)}


def found(module) -> Signatures:
    """The same from the docstrings that pybind11 writes; every function must have one of ours too."""
    signatures = {}
    for name, value in vars(module).items():
        if callable(value) and not name.startswith("_"):
            lines = value.__doc__.strip().splitlines()
            assert len(lines) > 1, f"{name} has no docstring"
            signatures[name] = re.findall(r"[(,] ?(\w+):", lines[0])
    return signatures
