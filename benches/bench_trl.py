"""Steps of TRL's SFT, DPO and GRPO trainers with PEFT's LoRA, as they are and on fastrl's kernels.

    python -m fastrl.benches.bench_trl --csv benches/results/trainers-cpu.csv

One model with a vocabulary of 49152 and random weights, the same texts, seed and batches for all. `patched` is
`fastrl.integrations.trl.patch()` alone, `patched, with its layers` also `fastrl.patch(trainer.model)`. Each runs in a
process of its own, in turn, and must report TRL's losses, entropies and norms of gradients before its time counts.
tokens/s counts the tokens that are trained on, completions alone; GRPO's completions are given, not sampled. Memory is
the peak resident set beyond what the imports took.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastrl.benches import records, train_workload
from fastrl.benches.bench_train import measure, parser
from fastrl.benches.train_workload import Settings

PROGRAM = "fastrl.benches.train_trainers"
WAYS = {"trl + peft": "plain", "patched": "head", "patched, with its layers": "all"}
PEERS = {
    f"TRL {kind} step, LoRA": [(provider, PROGRAM, f"{kind.lower()}-{way}") for provider, way in WAYS.items()]
    for kind in ("SFT", "DPO", "GRPO")
}
SETTINGS = Settings(vocab=49152, prompt=128, response=128, epochs=1, batch=8, minibatch=8)
SMALL: dict[str, Any] = {
    "hidden": 64,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "intermediate": 128,
    "vocab": 1000,
    "batch": 4,
}


def main(argv: list[str] | None = None) -> None:
    options = parser("bench_trl", __doc__, PEERS, SETTINGS, "fastrl-bench/trl.csv")
    options.add_argument(
        "--quick", action="store_true", help="a tiny model and short texts: whether it runs and agrees"
    )
    args = options.parse_args(argv)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    if args.quick:
        settings = replace(settings, **SMALL, prompt=16, response=16, micro_batch=2)
    rows: list[records.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        train_workload.write(Path(folder), settings)
        for task in args.task:
            rows += measure(task, PEERS[task], Path(folder), settings, args)
            records.write(args.csv, records.merge(records.read(args.csv), rows))
    print(f"{records.table(rows)}\n\n{args.csv} written")
    if bad := [f"{row['op']}: {row['provider']}: {row['status']}" for row in rows if row["status"] != "ok"]:
        sys.exit("\n".join(["not every way ran and agreed:", *bad]))


if __name__ == "__main__":
    main()
