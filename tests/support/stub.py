"""What fastrl/_C.pyi declares, and what a native module has."""

from __future__ import annotations

import ast
from pathlib import Path

STUB = Path(__file__).parents[2] / "fastrl/_C.pyi"


def declared(submodule: str | None = None) -> set[str]:
    """Names of functions; a submodule is declared as a class."""
    body = ast.parse(STUB.read_text()).body
    if submodule is not None:
        (body,) = (node.body for node in body if isinstance(node, ast.ClassDef) and node.name == submodule)
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    kernels = {
        ast.unparse(n.target) for n in body if isinstance(n, ast.AnnAssign) and ast.unparse(n.annotation) == "Kernel"
    }
    return functions | kernels


def found(module) -> set[str]:
    """The same of a module; every function must have a docstring of ours below pybind11's signature."""
    functions = {name: value for name, value in vars(module).items() if callable(value) and not name.startswith("_")}
    for name, value in functions.items():
        assert len(value.__doc__.strip().splitlines()) > 1, f"{name} has no docstring"
    return set(functions)
