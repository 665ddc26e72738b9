"""The names of the native module; a test compares them with the module.

A kernel takes what csrc/ops.h or csrc/cuda/ops.h declares, by position: a tensor or None for a pointer, `row_layout` of
a tensor or None for `Rows`, numbers, and last its threads or its stream.
"""

from collections.abc import Callable

from torch import Tensor

Kernel = Callable[..., None]

has_cuda: bool
cuda_architectures: str

def cpu_isa() -> str: ...
def advise_huge_pages(data: Tensor, bytes: int) -> None: ...
def cuda_runtime_version() -> int: ...
def cuda_driver_version() -> int: ...
def cuda_device_count() -> int: ...
def cuda_probe() -> str: ...

gae: Kernel
linear_head_begin: Kernel
linear_head_direction: Kernel
linear_head_finish: Kernel
linear_head_fold: Kernel
linear_head_gradient: Kernel
linear_head_scale: Kernel
linear_head_sweep: Kernel
lora_dropout: Kernel
ppo_advantages: Kernel
ppo_loss: Kernel
ranking_loss: Kernel
token_logprobs_bwd: Kernel
token_logprobs_fwd: Kernel

class cuda:
    """The submodule of the CUDA kernels; absent from a module that was built without CUDA."""

    gae: Kernel
    linear_head_gradient: Kernel
    linear_head_rows: Kernel
    lora_da: Kernel
    lora_down: Kernel
    lora_dropout: Kernel
    lora_dx: Kernel
    lora_up_backward: Kernel
    ppo_advantages: Kernel
    ppo_loss: Kernel
    scale_gradient: Kernel
    token_logprobs_bwd: Kernel
    token_logprobs_fwd: Kernel

    @staticmethod
    def linear_head_on_chip(vocab: int) -> bool: ...
    @staticmethod
    def lora_da_workspace(rows: int, cols: int, rank: int) -> int: ...
    @staticmethod
    def lora_up_backward_workspace(rows: int, cols: int, rank: int) -> int: ...
    @staticmethod
    def ppo_advantages_workspace(rows: int) -> int: ...
    @staticmethod
    def ppo_loss_workspace(size: int) -> int: ...
    @staticmethod
    def token_logprobs_workspace(rows: int, vocab: int, dtype: int) -> int: ...
