"""Two processes on CPU (gloo) against one: losses, parameters, stops, files, resume.

Gradients are summed over ranks with the denominators of the whole batch. In one process micro-batches are summed one
after the other, over ranks each rank's first: sums of two terms are the same bits, longer ones differ by rounding.
Adam divides gradients by their size, so that rounding in a gradient near 0 can move a weight by a share of the learning
rate (1e-3 here): weights agree to 5e-5 after four steps, losses to 1e-5 in relative terms.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch
from loops import LOOPS, everything, reported, tiny_run
from once import once
from safetensors.torch import load_file

from fastrl import cli
from fastrl.run import distributed
from fastrl.run.resume import step_seed

pytestmark = pytest.mark.ranks

LOSS, WEIGHT = 1e-5, 5e-5


@pytest.fixture(scope="module")
def configs(tmp_path_factory, tiny_policy, tiny_scalar):
    """Settings by name, with batches that two ranks cannot halve; outputs are still to be named."""

    def build(name: str, **changes):
        loop, _, kind = name.partition(", ")
        folder = tmp_path_factory.mktemp("data")
        _, cfg = tiny_run(loop if kind in ("bf16", "everything") else name, folder, tiny_policy, tiny_scalar)
        if loop == "ppo":
            cfg = replace(cfg, iterations=2, eval_every=1, target_kl=0.05, no_stop_score=-1.0, device="cpu")
        else:
            cfg = replace(cfg, eval_every=2, save_every=2, device="cpu")
        if kind == "everything":
            cfg = everything(cfg)
        if kind == "bf16":
            cfg = replace(cfg, lora_rank=0, dtype="bfloat16")
        return replace(cfg, **changes)

    return build


@pytest.fixture(scope="module")
def both(configs, tmp_path_factory, tiny_scalar, tiny_reward_adapter):
    """For each job: (what one process saw, what two saw, output of one, output of two). All jobs in one launch."""
    one, data = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("data")
    write_comparisons(data / "criteria.jsonl")
    dropout = {"lora_dropout": 0.2, "max_steps": 6}
    exact = {"batch_size": 2, "micro_batch_size": 1, "max_steps": 4}
    criteria = {"data": str(data / "criteria.jsonl"), "patience": 1, "eval_every": 1, "max_steps": 6}
    plans = {name: (name, {}, {}) for name in LOOPS}
    plans |= {
        "exact": ("sft, full", exact, {}),
        "exact bf16": ("sft, bf16", exact, {}),
        "exact reward": ("reward", exact, {}),
        "criteria": ("reward", criteria, {}),
        "rewards": ("ppo", {"rewards": [f"0.5*{tiny_scalar}", "0.1*loops:brevity"]}, {}),
        "one base": ("ppo", {"critic": "shared", "reward_model": str(tiny_reward_adapter)}, {}),
        "no targets": ("sft", exact, {"change": "no targets"}),
        "packed": ("sft", {"packing": "balanced", "max_length": 32}, {}),
        "one row": ("sft", {**exact, "batch_size": 1}, {}),
        "everything": ("ppo, everything", {}, {}),
        "one row of ppo": ("ppo", {"batch_size": 3, "minibatch_size": 1, "target_kl": None}, {}),
        "target_kl": ("ppo", {"target_kl": 1e-4, "learning_rate": 0.05, "epochs": 4}, {}),
        "nan": ("sft", {"save_every": 1, "micro_batch_size": 3}, {"change": "nan"}),
    }

    def launch(two: Path) -> None:
        (two / "file").write_text("of the user's")
        jobs = {"refused": ranks.job("sft", configs("sft", output=str(two / "file")))}
        for name, (loop, changes, options) in plans.items():
            cfg = configs(loop, output=str(two / name), **changes)
            jobs[name] = ranks.job(loop.partition(",")[0], cfg, **options)
        for name, changes in (("sft", dropout), ("ppo", {"iterations": 4, "eval_every": 2})):
            loop = configs(name, **changes)
            for part, settings, stop in (
                ("whole", {}, 0),
                ("interrupted", {}, 4),
                ("resumed", {"resume": True}, 0),
            ):
                folder = "whole" if part == "whole" else "parts"
                cfg = replace(loop, output=str(two / f"{name} {folder}"), **settings)
                jobs[f"{name} {part}"] = ranks.job(name, cfg, stop=stop)
        ranks.launch(jobs, two)

    two = once(tmp_path_factory, "two_processes", launch)
    jobs, seen = ranks.launched(two)

    @functools.cache
    def look(name: str):
        todo = json.loads(json.dumps(jobs[name]))
        todo["settings"]["output"] = str(one / name)
        alone = ranks.run_job(todo)
        return alone, seen[name], one / name, two / Path(jobs[name]["settings"]["output"]).name

    look.seen, look.two = seen, two
    return look


def write_comparisons(path: Path) -> None:
    """By two criteria, by none, and of three answers."""
    records: list[dict] = [
        {"prompt": f"{i} say:", "chosen": "a" * (1 + i % 3), "rejected": "b" * 5, "criterion": ("brief", "kind")[i % 2]}
        for i in range(16)
    ]
    records += [{"prompt": f"{i} of all:", "responses": ["c", "cc", "ccc"], "ranks": [1, 0, 2]} for i in range(6)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(path for path in folder.rglob("*.safetensors") if "checkpoints" not in path.parts)
    return {f"{path.relative_to(folder)} {name}": value for path in files for name, value in load_file(path).items()}


def numbers(record):
    """Those of a record; a curve's are named by their place."""
    found = {name: value for name, value in record.items() if name != "kind" and not isinstance(value, list)}
    for curve, points in record.items():
        if isinstance(points, list):
            found |= {(curve, i, j): x for i, point in enumerate(points) for j, x in enumerate(point)}
    return found


def assert_same_run(one: Path, two: Path, loss: float = LOSS, weight: float = WEIGHT) -> None:
    first, second = reported(str(one)), reported(str(two))
    assert [(r["step"], r["kind"], sorted(r)) for r in first] == [(r["step"], r["kind"], sorted(r)) for r in second]
    for a, b in zip(first, second, strict=True):
        assert numbers(b) == pytest.approx(numbers(a), rel=loss, abs=loss)
    got, want = weights(two), weights(one)
    assert got.keys() == want.keys() and want
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=weight, rtol=weight, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("name", [*LOOPS, "criteria", "rewards", "one base", "packed"])
def test_two_processes_equal_one(both, name):
    """Batches of 5 and 4 rows, in shares of 3 and 2: the same records and weights, and the same weights on both."""
    alone, seen, one, two = both(name)
    assert alone["error"] is None is seen[0]["error"] is seen[1]["error"]
    assert seen[0]["hashes"] == seen[1]["hashes"] and len(seen[0]["hashes"]) == len(alone["hashes"]) > 0
    tolerance = {"loss": 1e-4} if "ppo" in name or name in ("rewards", "one base") else {}
    assert_same_run(one, two, **tolerance)
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}


def test_two_processes_equal_one_with_all_that_ppo_has(both):
    """pitfalls 32 and 34: one loss, whatever the ranks, and a reference that the policy leaves on each; with adaptive
    KL in the loss, scores normalised over the run, PTX and the best policy."""
    alone, seen, one, two = both("everything")
    assert alone["error"] is None is seen[0]["error"] is seen[1]["error"]
    assert seen[0]["hashes"] == seen[1]["hashes"] and len(seen[0]["hashes"]) == len(alone["hashes"]) > 0
    assert_same_run(one, two, loss=1e-4)
    assert any(name.startswith("best/") for name in weights(two))
    last = [r for r in reported(str(two)) if r["kind"] == "train"][-1]
    assert last["kl_k3"] > 0 and last["ptx_loss"] > 0 and last["kl_coef"] != 0.05


@pytest.mark.parametrize("name", ["exact", "exact bf16", "exact reward", "no targets"])
def test_sums_of_two_terms_are_the_same_bits(both, name):
    """Two rows, one a micro-batch: a sum over micro-batches is the sum over ranks. A rank without targets adds 0."""
    alone, seen, one, two = both(name)
    assert alone["hashes"] == seen[0]["hashes"] == seen[1]["hashes"]
    assert [r for r in reported(str(one)) if r["kind"] == "train"] == [
        r for r in reported(str(two)) if r["kind"] == "train"
    ]
    assert all(torch.equal(value, weights(two)[key]) for key, value in weights(one).items())


@pytest.mark.parametrize("name", ["one row", "one row of ppo"])
def test_a_rank_without_rows_takes_part(both, name):
    alone, seen, one, two = both(name)
    assert alone["error"] is None is seen[0]["error"] and seen[0]["hashes"] == seen[1]["hashes"]
    assert_same_run(one, two, loss=1e-4)


def test_every_rank_ends_the_updates_at_target_kl(both):
    alone, seen, one, two = both("target_kl")
    updates = [r["updates"] for r in reported(str(one)) if r["kind"] == "train"]
    assert updates == [r["updates"] for r in reported(str(two)) if r["kind"] == "train"] and 1 <= max(updates) < 8
    assert len(seen[0]["hashes"]) == len(seen[1]["hashes"]) == len(alone["hashes"])


def test_samples_do_not_depend_on_the_number_of_ranks(both):
    _, _, one, two = both("ppo")
    first, second = ([json.loads(x) for x in (f / "samples.jsonl").read_text().splitlines()] for f in (one, two))
    assert [r["response"] for r in first] == [r["response"] for r in second]
    assert len({r["response"] for r in first}) > 1


def test_nan_on_one_rank_stops_all(both):
    """The loss of rank 1's share is NaN at step 4: both raise the same error, and nothing was updated."""
    first, second = both.seen["nan"]
    assert first["error"] == second["error"]
    assert first["error"].startswith("NonFiniteError: loss is nan at step 4") and "step-000002" in first["error"]
    assert first["hashes"] == second["hashes"] and len(first["hashes"]) == 3
    assert not (both.two / "nan/run.lock").exists()


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_two_resumed_processes_equal_uninterrupted_ones(both, name):
    """Bit for bit, with dropout."""
    assert both.seen[f"{name} interrupted"][0]["error"].startswith("KeyboardInterrupt")
    whole, parts = both.two / f"{name} whole", both.two / f"{name} parts"
    assert reported(str(whole)) == reported(str(parts))
    got, want = weights(parts), weights(whole)
    assert want and all(torch.equal(value, got[key]) for key, value in want.items())
    if name == "ppo":
        assert (whole / "samples.jsonl").read_text() == (parts / "samples.jsonl").read_text()


def test_dropout_differs_between_ranks():
    seeds = {step_seed(seed, step, rank) % 2**32 for seed in (0, 1) for step in range(100) for rank in range(8)}
    assert len(seeds) == 2 * 100 * 8 and step_seed(3, 5, 0) == 3 * 1_000_003 + 5


def test_a_plain_process_talks_to_nobody():
    items, tensor = [1, 2, 3], torch.ones(2)
    assert distributed.join("cpu") == "cpu" and (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.share(items) is items and distributed.unshare(items) == items
    assert distributed.sum_over_ranks(tensor) is tensor and distributed.gather(items) == [items]
    assert distributed.on_main(lambda: 5) == distributed.max_over_ranks(5) == 5
    distributed.sum_gradients(iter([]))
    assert not torch.distributed.is_initialized()


def test_a_refusal_is_raised_by_all_and_said_by_one(both):
    first, second = both.seen["refused"]
    assert first["error"] == second["error"] and "output: expected a folder, got the file" in first["error"]
    assert (first["told"], second["told"]) == (False, True)


# --- ranks that end


def two_by_hand(todo, folder: Path) -> list[tuple[int, str]]:
    """(exit status, stderr) of two processes that no launcher watches, run by `fastrl.cli`'s rules."""
    code = (
        "import json, sys, ranks\n"
        "from fastrl import cli\n"
        "todo = json.loads(sys.argv[1])\n"
        "main, config = ranks.MAINS[todo['loop']]\n"
        "def run(command, arguments):\n"
        "    with ranks.CHANGES[todo['change']]():\n"
        "        main(config(**todo['settings']))\n"
        "cli.run = run\n"
        "sys.exit(cli.main(['sft']))\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env = ranks.environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **place)
        command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(todo)]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    try:
        ended = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (p.returncode, "".join(x for x in e[1].splitlines(True) if "fastrl:" in x))
        for p, e in zip(processes, ended, strict=True)
    ]


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others_with_its_error(configs, tmp_path):
    cfg = configs("sft", output=str(tmp_path / "run"), max_steps=50, micro_batch_size=3)
    first, second = two_by_hand(ranks.job("sft", cfg, change="raise"), tmp_path)
    assert second == (2, "fastrl: error: row 3 is broken\n")
    assert first == (2, "fastrl: error: rank 0 ended: rank 1 failed: row 3 is broken\n")
    assert not (tmp_path / "run/run.lock").exists()


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others(configs, tmp_path):
    cfg = configs("sft", output=str(tmp_path / "run"), max_steps=50, micro_batch_size=3)
    first, second = two_by_hand(ranks.job("sft", cfg, change="die"), tmp_path)
    assert second[0] == -signal.SIGKILL
    assert first[0] == 2 and first[1].startswith("fastrl: error: rank 0 ended: another rank is gone (killed")


@pytest.mark.slow
def test_accelerate_launch_and_sigterm(configs, tmp_path):
    """The command under `accelerate launch`: SIGTERM saves on one rank for both; one process goes on to the end."""
    cfg = configs("sft", max_steps=100, save_every=0, eval_every=0, samples=0)
    shown = ("model", "data", "lora_rank", "batch_size", "micro_batch_size", "learning_rate", "holdout", "max_length")
    shown += ("warmup_steps", "device", "max_steps", "save_every", "eval_every", "samples")
    arguments = [f"--{name}={getattr(cfg, name)}" for name in shown] + [f"--output={tmp_path / 'run'}"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launcher, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    process = subprocess.Popen(
        [*command, "-m", "fastrl.cli", "sft", *arguments],
        env=ranks.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "run/metrics.jsonl"
    end = time.monotonic() + 90
    while time.monotonic() < end and process.poll() is None and (not log.exists() or log.read_text().count("\n") < 4):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    text = process.communicate(timeout=60)[1]
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert text.count(f"fastrl: stopped after step {step} of 100, which is saved: go on with --resume true") == 1
    assert not (tmp_path / "run/run.lock").exists()
    steps = [r["step"] for r in reported(str(tmp_path / "run")) if r["kind"] == "train"]
    assert steps == list(range(1, step + 1))
    assert cli.main(["sft", *arguments, "--resume=true"]) == 0
    steps = [r["step"] for r in reported(str(tmp_path / "run")) if r["kind"] == "train"]
    assert steps == list(range(1, 101))
