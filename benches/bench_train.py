"""PPO updates, SFT steps and steps of transformers' Trainer, beside TRL 1.12 (the last with PPO) and plain PEFT.

    python -m fastrl.benches.bench_train --trl-python /path/to/venv-with-trl-1.12/bin/python

Every peer gets the same weights and the same sequences, runs in a process of its own, and must report the same
log-probs, scores or loss before its time counts. tokens/s counts response tokens, once per iteration however many
epochs; sampling is excluded. Memory is the peak resident set of the process (on a GPU: what torch allocated there): in
all (peak MiB) and beyond what the imports took (extra MiB).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import torch

from fastrl.benches import machine, records, train_workload
from fastrl.benches.harness import number, percentiles
from fastrl.benches.train_workload import Settings

HERE = Path(__file__).resolve().parent
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # of what the peers report before their times count
OURS, PLAIN, TRL = "fastrl.benches.train_fastrl", "fastrl.benches.train_transformers", "train_trl.py"
TRAINER = "fastrl.benches.train_trainer"
PEERS = {  # task -> (provider, program, its argument), baseline first
    "PPO update, LoRA": [
        ("trl + peft", TRL, "ppo-lora"),
        ("trl + peft, LoRA critic", TRL, "ppo-lora-critic"),
        ("fastrl loop", OURS, "ppo-lora"),
    ],
    "PPO update, LoRA, reward adapter": [
        ("fastrl loop, two bases", OURS, "ppo-lora-separate"),
        ("fastrl loop, one base", OURS, "ppo-lora-shared"),
    ],
    "PPO update, full": [("trl", TRL, "ppo-full"), ("fastrl loop", OURS, "ppo-full")],
    "SFT step, LoRA": [
        ("transformers + peft", PLAIN, "sft-lora"),
        ("transformers + peft + liger", PLAIN, "sft-lora-liger"),
        ("fastrl loop", OURS, "sft-lora"),
    ],
    "SFT step, full": [
        ("transformers", PLAIN, "sft-full"),
        ("transformers + liger", PLAIN, "sft-full-liger"),
        ("fastrl loop", OURS, "sft-full"),
    ],
    "Trainer step, LoRA": [
        ("transformers Trainer + peft", TRAINER, "lora"),
        ("fastrl callback", TRAINER, "lora-fastrl"),
    ],
}


def parser(name: str, description: str, tasks: Iterable[str], settings: Settings, csv: str) -> argparse.ArgumentParser:
    """The options of a bench of whole updates; of the workload's settings, those given are the defaults."""
    options = argparse.ArgumentParser(prog=f"python -m fastrl.benches.{name}", description=description.split("\n")[0])
    options.add_argument("--task", nargs="+", choices=list(tasks), default=list(tasks))
    options.add_argument("--repeats", type=int, default=2, help="turns that every peer gets")
    options.add_argument("--csv", type=Path, default=Path(csv), help="CSV to update")
    options.set_defaults(trl_python=None)
    for setting in fields(Settings):
        flag = f"--{setting.name.replace('_', '-')}"
        options.add_argument(flag, type=type(setting.default), default=getattr(settings, setting.name))
    return options


def parse(argv: list[str] | None) -> argparse.Namespace:
    options = parser("bench_train", __doc__, PEERS, Settings(), "fastrl-bench/train.csv")
    options.add_argument("--trl-python", help="interpreter that has trl==1.12.0 and peft; without it no TRL rows")
    return options.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    rows: list[records.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        train_workload.write(Path(folder), settings)
        for task in args.task:
            peers = [peer for peer in PEERS[task] if is_here(peer, settings, args)]
            rows += measure(task, peers, Path(folder), settings, args)
            records.write(args.csv, records.merge(records.read(args.csv), rows))
    print(f"{records.table(rows)}\n\n{args.csv} written")
    if bad := [f"{row['op']}: {row['provider']}: {row['status']}" for row in rows if row["status"] != "ok"]:
        sys.exit("\n".join(["not every peer ran and agreed:", *bad]))


def measure(
    task: str, peers: list[tuple[str, str, str]], folder: Path, settings: Settings, args: argparse.Namespace
) -> list[records.Row]:
    """One row per peer of `task`; the first that works is the baseline."""
    reports, failures = run_in_turn(task, peers, folder, settings, args)
    environment = machine.environment(settings.device)
    if settings.device == "cpu":
        environment["threads"] = str(settings.threads)
    environment |= {"op": task, "shape": describe(settings), "direction": "step"}
    environment["dtype"] = machine.short(getattr(torch, settings.dtype))
    tokens = sum(map(len, train_workload.read(folder)[2]))
    baseline = next(iter(reports), "")
    rows = []
    for provider, *_ in peers:
        row = environment | {"provider": provider, "status": failures.get(provider, "ok")}
        if provider in reports:
            error = disagreement(reports[provider][0]["check"], reports[baseline][0]["check"])
            if not error < TOLERANCE[settings.dtype]:
                row["status"] = f"differs from {baseline}"
            row |= {"baseline": baseline, "error": number(error)}
            row |= figures(reports[provider], reports[baseline], tokens)
        rows.append(row)
    return rows


def is_here(peer: tuple[str, str, str], settings: Settings, args: argparse.Namespace) -> bool:
    """Whether the libraries of a peer are; Liger's kernels are for GPUs."""
    _, program, argument = peer
    if argument.endswith("-liger"):
        return settings.device == "cuda" and find_spec("liger_kernel") is not None
    return program != TRL or bool(args.trl_python)


def run_in_turn(
    task: str, peers: list[tuple[str, str, str]], folder: Path, settings: Settings, args: argparse.Namespace
) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """Reports of the peers that work, and what is wrong with the others, which do not stop these."""
    reports: dict[str, list[dict]] = {provider: [] for provider, *_ in peers}
    failures = {}
    for turn in range(args.repeats):
        for provider, program, argument in peers:
            if provider in failures:
                continue
            print(f"[{turn + 1}/{args.repeats}] {task}: {provider}", file=sys.stderr, flush=True)
            try:
                reports[provider].append(run(program, folder, argument, settings.threads, args.trl_python))
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                failures[provider] = f"failed: {str(error).splitlines()[-1][:120]}"
                del reports[provider]
    return reports, failures


def figures(reports: list[dict], base: list[dict], tokens: int) -> dict[str, str]:
    """Times, rate and memory of a peer, from its reports, which may count tokens of their own, and the baseline's."""
    p20, p50, p80 = percentiles(all_seconds(reports))
    return {f"ms_p{p}": number(1e3 * value) for p, value in ((20, p20), (50, p50), (80, p80))} | {
        "speedup": number(percentiles(all_seconds(base))[1] / p50),
        "rate": number(reports[0].get("tokens", tokens) / p50),
        "unit": "tokens/s",
        "peak_mib": number(max(report["peak_mib"] for report in reports)),
        "peak_extra_mib": number(max(report["peak_mib"] - report["imported_mib"] for report in reports)),
    }


def run(program: str, folder: Path, argument: str, threads: int, trl_python: str | None) -> dict:
    """The JSON that a peer prints on its last line."""
    command = [trl_python, str(HERE / TRL)] if program == TRL else [sys.executable, "-m", program]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*command, str(folder), argument], env=environment, capture_output=True, text=True)  # type: ignore[list-item]
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} {argument} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def all_seconds(reports: list[dict]) -> list[float]:
    return [seconds for report in reports for seconds in report["seconds"]]


def disagreement(check: dict[str, float], expected: dict[str, float]) -> float:
    """Largest relative difference of what both report before the first update."""
    return max(abs(check[name] - value) / max(abs(value), 1e-6) for name, value in expected.items()) or 0.0


def describe(settings: Settings) -> str:
    s = settings
    million = (s.vocab * s.hidden + s.layers * s.hidden * layer_width(s)) / 1e6
    return f"{math.ceil(million)}M V={s.vocab} {s.batch}x({s.prompt}+{s.response}) {s.epochs} epochs"


def layer_width(s: Settings) -> int:
    """Weights of a layer per hidden unit: query, output, key, value, gate, up, down."""
    return 2 * s.hidden + 2 * s.hidden * s.kv_heads // s.heads + 3 * s.intermediate


if __name__ == "__main__":
    main()
