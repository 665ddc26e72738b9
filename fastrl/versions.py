"""Versions of fastrl and of what it stands on; nothing is imported for it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "triton", "transformers", "peft", "datasets", "accelerate")


def versions() -> dict[str, str]:
    """{name: version}: fastrl, python, the system and the packages that fastrl uses."""
    from fastrl import __version__

    own = {"fastrl": __version__, "python": platform.python_version()}
    system = {"system": f"{platform.system()} {platform.machine()}"}
    return own | system | {name: package_version(name) for name in PACKAGES}


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
