"""The loops on tiny models: what tests of all of them run, and what such a run reported."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastrl.cli import COMMANDS
from fastrl.run.metrics import MetricsLog

MODULES = {name: importlib.import_module(module) for name, (module, config, _) in COMMANDS.items() if config}
MAINS = {name: (module.main, getattr(module, COMMANDS[name][1])) for name, module in MODULES.items()}  # and settings
LOOPS = ["sft", "sft, full", "reward", "ppo", "ppo, full", "sft, bitfit", "sft, prefix"]


def tiny_run(name: str, folder: Path, policy: Path, scalar: Path) -> tuple[Callable[[Any], Any], Any]:
    """(main, configuration) of one of LOOPS, on 24 records that are written into `folder`; LoRA unless the name
    ends in another tuner."""
    name, _, tuner = name.partition(", ")
    unwanted = {"sft": ("chosen", "rejected"), "reward": ("completion",), "ppo": ()}[name]
    records = [
        {"prompt": f"{i} say:", "completion": "x" * (1 + i % 4), "chosen": "a" * (1 + i % 3), "rejected": "b" * 5}
        for i in range(24)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({k: v for k, v in r.items() if k not in unwanted}) + "\n" for r in records))
    common = {"model": str(policy), "data": str(data), "output": str(folder / "run"), "tuner": tuner or "lora"}
    common |= {"lora_rank": 4, "batch_size": 5, "micro_batch_size": 2, "learning_rate": 1e-3}
    if name == "ppo":
        options: dict[str, Any] = {"reward_model": str(scalar), "minibatch_size": 3, "max_new_tokens": 5, "epochs": 2}
    else:
        options = {"holdout": 0.2, "max_length": 64, "warmup_steps": 2}
    main, config = MAINS[name]
    return main, config(**common, **options)


def everything(cfg: Any) -> Any:
    """PPO with all that has a state, data or a gradient of its own."""
    penalty = {"kl_target": 0.5, "kl_horizon": 10, "kl_in": "loss", "kl_estimator": "k3"}
    scores = {"score_norm": True, "length_penalty": 0.1, "length_free": 2, "score_clip": 1.5}
    loss = {"ent_coef": 0.01, "dual_clip": 3.0, "ptx_data": cfg.data, "ptx_batch_size": 3, "ptx_max_length": 64}
    return replace(cfg, **penalty, **scores, **loss, keep_best=True)


def brevity(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward."""
    return [-float(len(response)) for response in responses]


def reported(folder: str, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without times and memory, and without the metrics named."""
    unwanted = ("tokens_per_s", "peak_mem_gib", *without)
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if k not in unwanted and not k.startswith("time_")} for r in lines]


def interrupt(monkeypatch: pytest.MonkeyPatch, main: Callable[[Any], Any], cfg: Any, step: int) -> None:
    """Runs until the training record of `step` would be written."""
    write = MetricsLog.write

    def stop(self: MetricsLog, at: int, kind: str = "train", **metrics: Any) -> None:
        if at == step and kind == "train":
            raise KeyboardInterrupt
        write(self, at, kind, **metrics)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(MetricsLog, "write", stop)
        main(cfg)
