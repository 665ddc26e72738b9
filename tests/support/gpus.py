"""What the tests of GPU kernels can use on this machine."""

from __future__ import annotations

import torch

HAS_GPU = torch.cuda.is_available()
