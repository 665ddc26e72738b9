"""Devices by the names that users give them."""

from __future__ import annotations

import torch


def default_device() -> str:
    """cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(device: str | torch.device) -> torch.device:
    """The named device; `auto` is cuda where there is one, else cpu.

    Raises:
        ValueError: there is no such kind of device, or torch sees no GPU.
    """
    try:
        found = torch.device(default_device() if device == "auto" else device)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected cpu, got {found}: torch sees no GPU here; `fastrl doctor` says why")
    return found
