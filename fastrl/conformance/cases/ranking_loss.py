"""The pairwise loss of reward models."""

from __future__ import annotations

import torch

from fastrl.conformance.compare import close, finite, gradients


def closed_form(ranking_loss):
    """pitfall 31: -mean log sigmoid(chosen - rejected), and its gradients; a margin is taken off the difference."""
    inputs = {"chosen": torch.randn(6), "rejected": torch.randn(6)}
    for margin in (None, torch.rand(6)):
        given = "6 pairs" + ("" if margin is None else " with margins")
        exact = {k: v.double() for k, v in inputs.items()}
        truth, wanted = gradients(_naive, exact, None, margin=margin)
        got, found = gradients(ranking_loss, inputs, None, margin=margin)
        close(got, truth, given)
        for name in inputs:
            close(found[name], wanted[name], f"{given}: gradient of {name}")


def extreme_differences(ranking_loss):
    """T19: score differences of +-1000 give a finite loss and gradient."""
    for difference in (1000.0, -1000.0):
        inputs = {"chosen": torch.tensor([difference]), "rejected": torch.zeros(1)}
        got, found = gradients(ranking_loss, inputs, None)
        close(got, torch.tensor(max(0.0, -difference)).double(), f"a difference of {difference:g}", atol=1e-3)
        finite(found["chosen"], f"a difference of {difference:g}: gradient")


def _naive(chosen, rejected, *, margin=None):
    return -torch.nn.functional.logsigmoid(chosen - rejected - (0 if margin is None else margin)).mean()
