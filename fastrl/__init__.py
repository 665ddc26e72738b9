"""Fast RLHF kernels for PyTorch, and the SFT, reward-model and PPO loops that run on them."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastrl-kernels")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+source"


def patch(model, *, head=False, eval_logits=True, **options):
    """Swaps the PEFT LoRA layers of `model` for fused ones; with `head=True` also computes its loss without logits.

    See `fastrl.models.lora.patch`, which takes the further options, and `fastrl.models.head_patch.patch_head`, which
    takes `eval_logits` and may raise ValueError; the model is then as it was. Returns a handle for both with `undo()`.
    """
    from fastrl.models.lora import patch as patch_layers  # PEFT and transformers are slow to import

    handle = patch_layers(model, **{"expect_layers": not head, **options})
    if head:
        from fastrl.models.head_patch import patch_head

        try:
            handle.head = patch_head(model, eval_logits=eval_logits)
        except ValueError:
            handle.undo()
            raise
    return handle


__all__ = ["__version__", "patch"]
