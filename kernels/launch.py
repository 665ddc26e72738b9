"""How every Triton kernel is launched: on the device of its tensors, on torch's current stream."""

from __future__ import annotations

import torch


def launch(kernel, grid: tuple[int, ...], tensor: torch.Tensor, *args, **options) -> None:
    """kernel[grid](*args, **options) on the device of `tensor`; nothing for an empty grid."""
    if 0 in grid:
        return
    if tensor.device.type != "cuda":  # the interpreter, in tests
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(tensor.device):
        kernel[grid](*args, **options)
