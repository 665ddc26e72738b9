"""Devices by the names that users give them."""

from __future__ import annotations

import platform
from pathlib import Path

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


def device_name(device: str | torch.device) -> str:
    """The model of the GPU, or of the CPU with the threads that torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"
