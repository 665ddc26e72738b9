"""Early stop: a run ends when its held-out accuracy no longer rises, and its best weights are those that are saved."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrl.run.masters import restore, trained
from fastrl.run.output import LOG
from fastrl.run.run import Run

MEASURE = "eval_accuracy"


class EarlyStop:
    """The evaluations of a run so far, and the weights of the best one (the first of equals).

    All it decides is a function of the records in the run's log, so that a resumed run decides the same. The best
    weights are in `checkpoints/best-NNNNNN.pt`; where checkpoints are kept, one of the same step is kept with them, so
    that no run goes on from before the weights that its log calls the best.

    Args:
        model: what is trained.
        patience: evaluations without improvement after which the run is over; 0: never, and no weights are kept.
    """

    def __init__(self, run: Run, model: nn.Module, patience: int) -> None:
        self._run, self._model, self._patience = run, model, patience
        self._seen: list[dict[str, Any]] = run.write(lambda: evaluations(run.output)) if run.done else []

    def note(self, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of an evaluation after the run's current step; its weights are kept if it is the best."""
        self._seen.append({**metrics, "step": self._run.step})
        if self._patience and self._best() == len(self._seen) - 1:
            self._run.write(self._write)
            if self._run.settings.save_every and self._run.step:
                self._run.save(self._run.step)
            self._run.write(self._drop_others)

    @property
    def noted(self) -> bool:
        """Whether the model as it is now has been evaluated."""
        return bool(self._seen) and self._seen[-1]["step"] == self._run.step

    @property
    def over(self) -> bool:
        """Whether the last `patience` evaluations were no better than the best before them."""
        return self._patience > 0 and len(self._seen) - 1 - self._best() >= self._patience

    def finish(self) -> dict[str, Any]:
        """Give the model the weights of the best evaluation, or with patience 0 leave the last ones; its metrics."""
        if not self._patience:
            return {name: value for name, value in self._seen[-1].items() if name != "step"}
        metrics = dict(self._seen[self._best()])
        metrics["best_step"] = step = metrics.pop("step")
        if step != self._run.step:
            restore(self._model, torch.load(self._file(step), map_location="cpu", weights_only=True))
        self._run.print(f"  held-out accuracy was best after step {step}, with {metrics[MEASURE]:.4g}: saved is that")
        return metrics

    def _best(self) -> int:
        """Number of the best evaluation."""
        return max(range(len(self._seen)), key=lambda i: (self._seen[i][MEASURE], -i))

    def _file(self, step: int) -> Path:
        return self._run.output / "checkpoints" / f"best-{step:06d}.pt"

    def _write(self) -> None:
        file = self._file(self._run.step)
        file.parent.mkdir(exist_ok=True)
        weights = {name: tensor.detach() for name, tensor in trained(self._model)}
        torch.save(weights, file.with_suffix(".partial"))
        os.replace(file.with_suffix(".partial"), file)

    def _drop_others(self) -> None:
        for file in self._file(0).parent.glob("best-*"):
            if file != self._file(self._run.step):
                file.unlink()


def evaluations(output: Path) -> list[dict[str, Any]]:
    """The records of evaluations in the log of a run, oldest first."""
    records = map(json.loads, (output / LOG).read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in r.items() if k != "kind"} for r in records if r["kind"] == "eval"]
