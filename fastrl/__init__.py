"""Fast RLHF kernels for PyTorch, and the SFT, reward-model and PPO loops that run on them."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastrl-kernels")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+source"


def patch(model, **options):
    """Swaps the PEFT LoRA layers of `model` for fused ones; see `fastrl.models.lora.patch`."""
    from fastrl.models.lora import patch as patch_peft  # PEFT and transformers are slow to import

    return patch_peft(model, **options)


__all__ = ["__version__", "patch"]
