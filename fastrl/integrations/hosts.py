"""How integrations look at a host before they change anything, and how they change it."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version


def check_installed(package: str, oldest: str, newest: str) -> None:
    try:
        version(package)
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            f"fastrl: {package} is not installed: pip install '{package}>={oldest},<={newest}'", name=package
        ) from None


def check_signature(name: str, function: Callable[..., Any], *expected: str) -> None:
    """Raises where a host's function takes other arguments than those that ours would be called with."""
    found = tuple(inspect.signature(function).parameters)
    if found != expected:
        raise RuntimeError(
            f"fastrl: {name}: expected the arguments {', '.join(expected)}; got {', '.join(found)}. "
            "This version is not supported, and nothing was changed"
        )


def warn_untested(package: str, oldest: str, newest: str) -> None:
    """Warns of a version that passed the checks of its signatures but was not tested."""
    found = version(package)
    if not Version(oldest) <= Version(found) <= Version(newest):
        warnings.warn(
            f"fastrl: {package} {found} was not tested ({oldest} to {newest} were); its functions take the arguments "
            "that are expected, so it is used",
            stacklevel=3,
        )


def swap(package: str, old: object, new: object) -> None:
    """What is `old` in an imported module of the package becomes `new`, under whatever name it was imported."""
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(package + "."):
            for key in [key for key, value in vars(module).items() if value is old]:
                setattr(module, key, new)
