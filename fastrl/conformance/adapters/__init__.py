"""One module for each implementation: `adapters()` lists what of it runs here, or says what is missing."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed(package: str, tried: str) -> str:
    """The version of a package.

    Raises:
        ImportError: it is not installed; names the package and the versions that were tried.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        raise ImportError(f"conformance: needs {package} (tried: {tried}); to do: pip install {package}") from None
