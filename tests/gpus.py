"""What the tests of GPU kernels can use on this machine."""

from __future__ import annotations

import torch

HAS_GPU = torch.cuda.is_available()

# Triton's interpreter and the host have no bfloat16 arithmetic worth testing.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if HAS_GPU else [torch.float32, torch.float16]
