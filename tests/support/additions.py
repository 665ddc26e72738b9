"""The smallest case of the benches: one is added to eight numbers."""

from __future__ import annotations

from typing import Any

import torch

from fastrl.benches import harness


def addition(providers: dict[str, Any], **options: Any) -> harness.Case:
    return harness.Case(
        op="add",
        shape="8",
        dtype=torch.float32,
        make=lambda rows: {"x": torch.randn(rows)},
        rows=8,
        truth=lambda i: i["x"] + 1,
        providers=providers,
        **options,
    )
