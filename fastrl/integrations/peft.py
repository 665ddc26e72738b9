"""PEFT: LoRA layers of an existing model computed by `fastrl.ops.lora_linear`; the code is in `fastrl.models.lora`."""

from fastrl.models.lora import FusedLinear, Patch, merged, patch

__all__ = ["FusedLinear", "Patch", "merged", "patch"]
