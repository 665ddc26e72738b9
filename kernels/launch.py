"""How every Triton kernel is launched: on the device of its tensors, on torch's current stream."""

from __future__ import annotations

import torch


def launch(kernel, grid: tuple[int, ...], tensor: torch.Tensor, *args, **options) -> None:
    """kernel[grid](*args, **options) on the device of `tensor`; nothing for an empty grid."""
    if 0 in grid:
        return
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():  # not cuda: the interpreter, in tests
        kernel[grid](*args, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
