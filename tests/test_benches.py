"""The measuring itself: the check before the clock, the memory, the CSV, the tables and the plot made of it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from additions import addition

from fastrl.benches import bench_patch, bench_train, harness, machine, memory, plot, records, tables
from fastrl.benches.train_workload import Settings
from fastrl.commands import bench
from fastrl.ops import backend

ROOT = Path(__file__).resolve().parents[1]
RATES = {"read": 10.0, "copy": 10.0, "gemm fp32": 100.0}
FAST = harness.Budget(seconds=0.02, warmup=0.0, min_rounds=3)


def square_case(**changes):
    case = harness.Case(
        op="square",
        shape="8x1000",
        dtype=torch.float32,
        make=lambda rows: {"x": torch.randn(rows, 1000)},
        rows=8,
        wrt=("x",),
        truth=lambda i: i["x"] ** 2,
        providers={"torch eager": lambda i: i["x"] ** 2, "fastrl cpu": lambda i: i["x"] * i["x"]},
        bound="copy",
        bytes=64000,
    )
    return dataclasses.replace(case, **changes)


def measure(case):
    return {row["provider"]: row for row in harness.measure(case, "cpu", RATES, FAST)}


def test_a_row_adds_up():
    rows = measure(square_case())
    ours, eager = rows["fastrl cpu"], rows["torch eager"]
    assert ours["status"] == "ok" and ours["direction"] == "fwd+bwd"
    assert float(ours["ms_p20"]) <= float(ours["ms_p50"]) <= float(ours["ms_p80"])
    assert float(ours["speedup"]) == pytest.approx(float(eager["ms_p50"]) / float(ours["ms_p50"]), rel=1e-2)
    assert float(ours["rate"]) == pytest.approx(64000 / float(ours["ms_p50"]) / 1e6, rel=1e-2)
    assert float(ours["percent"]) == pytest.approx(100 * float(ours["rate"]) / 10, rel=1e-2)
    assert set(ours) <= set(records.COLUMNS)


@pytest.mark.parametrize(
    "provider, status",
    [
        (lambda i: i["x"] ** 2 * 1.001, "wrong: error"),
        (lambda i: i["x"].detach() ** 2 + 0 * i["x"], "wrong: error"),
        (lambda i: i["x"] * torch.nan, "wrong: error inf"),
        (lambda i: (i["x"] ** 2)[1:], "wrong: error inf"),
        (lambda i: i["y"], "failed: KeyError"),
    ],
    ids=["result", "gradient", "nan", "shape", "raises"],
)
def test_a_wrong_provider_is_reported_and_not_timed(provider, status):
    case = square_case()
    row = measure(dataclasses.replace(case, providers={**case.providers, "peer": provider}))["peer"]
    assert row["status"].startswith(status)
    assert "ms_p50" not in row


def test_a_floor_is_timed_but_not_checked():
    row = measure(square_case(floors={"bare": lambda i: i["x"] + 0}))["bare"]
    assert row["status"] == "floor" and float(row["ms_p50"]) > 0 and "percent" not in row


@pytest.mark.parametrize("wrt", [(), ("x",)], ids=["fwd", "fwd+bwd"])
def test_a_provider_that_overwrites_its_inputs_has_its_own(wrt):
    """As Liger's cross entropy does. The others find the first values at every call."""
    seen = {"before": set(), "after": set()}

    def reads(name):
        def provider(i):
            seen[name].add(float(i["x"].detach().sum()))
            return i["x"] ** 2

        return provider

    def overwrites(i):
        result = i["x"].clone() ** 2
        i["x"].data.zero_()
        return result

    providers = {"before": reads("before"), "peer": harness.Overwriting(overwrites), "after": reads("after")}
    case = square_case(wrt=wrt, gate_rows=8, providers=providers)
    rows = measure(case)
    assert all(row["status"] == "ok" and float(row["ms_p50"]) > 0 for row in rows.values())
    first = float(harness.inputs_of(case, case.rows, "cpu")["x"].detach().sum())
    assert seen == {"before": {first}, "after": {first}}


def test_every_op_is_measured():
    assert {*bench.OPS, "lora_linear_group"} == set(backend.NATIVE_BACKENDS)  # groups are in lora_linear's bench
    assert {path.stem for path in (ROOT / "benches").glob("bench_*.py")} == {
        f"bench_{op}" for op in (*bench.OPS, "patch", "train", "trl")
    }


@pytest.mark.parametrize("op", bench.OPS)
def test_quick_cases_agree_with_float64(op):
    for case in harness.cases([op], "cpu", quick=True):
        assert "fastrl cpu" in case.providers
        for name, provider in case.providers.items():
            problem, *_ = harness.check(case, provider, "cpu")
            assert not problem, f"{case.label} {name}: {problem}"


def test_patched_layers_are_measured_beside_pefts_own():
    """From one token to 2048 rows of 4096, in both directions; the small cases agree with float64."""
    labels = {case.label for case in bench_patch.cases()}
    for dtypes in ("fp32 adapters fp32", "bf16 adapters bf16", "fp32 adapters bf16"):
        assert f"patch 1x576->1536 r=16 {dtypes} fwd" in labels
        assert f"patch 2048x4096->4096 r=16 {dtypes} fwd" in labels
    assert "patch 2048x4096->4096 r=16 fp32 adapters fp32 fwd+bwd" in labels
    for case in bench_patch.cases(quick=True):
        for name, provider in case.providers.items():
            problem, *_ = harness.check(case, provider, "cpu")
            assert not problem, f"{case.label} {name}: {problem}"


def test_cublas_without_a_context_is_no_error():
    """Its warning comes from torch, whichever module asked for the product; those of fastrl's own stay errors."""
    text = "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context..."
    warnings.warn_explicit(text, UserWarning, "lora_linear.py", 1, module="fastrl.ops.lora_linear")
    with pytest.raises(UserWarning, match="another"):
        warnings.warn_explicit("another", UserWarning, "lora_linear.py", 1, module="fastrl.ops.lora_linear")


def test_cases_of_the_gpu(monkeypatch):
    """The shapes that have targets on an H100 are measured, with every backend that dispatch knows."""
    monkeypatch.setattr(backend, "compute_capability", lambda index: (9, 0))
    cases = harness.cases(bench.OPS, "cuda", quick=False)
    assert all("fastrl triton" in case.providers for case in cases if "triton" in backend.NATIVE_BACKENDS[case.op])
    labels = [case.label for case in cases]
    assert len(set(labels)) == len(labels)
    for row in (
        "token_logprobs 4096x128256 bf16 fwd",
        "token_logprobs 4096x128256 bf16 fwd+bwd",
        "token_logprobs 4096x128256 entropy bf16 fwd",
        "token_logprobs 4096x128256 entropy bf16 fwd+bwd",
        "linear_logprobs 8192x4096x128256 bf16 fwd",
        "linear_logprobs 8192x4096x128256 bf16 fwd+bwd",
        "linear_cross_entropy 8192x4096x128256 trained head bf16 fwd+bwd",
        "lora_linear 8192x4096->4096 r=16 bf16 fwd",
        "lora_linear 8192x4096->4096 r=16 bf16 fwd+bwd",
        "ppo_advantages 512x2048 fp32 fwd",
        "ppo_advantages 8192x4096 fp32 fwd",
        "ppo_loss 512x2048 fp32 fwd+bwd",
        "ppo_loss 8192x2048 fp32 fwd+bwd",
        "ranking_loss 4096 in pairs fp32 fwd+bwd",
        "ranking_loss 2816 in groups of 2 to 9 fp32 fwd+bwd",
    ):
        assert row in labels, row


PEERS = {
    "trl.trainer.utils": ["selective_log_softmax", "selective_log_softmax_and_entropy"],
    "trl.kernels": ["ChunkedLogProbFunction"],
    "liger_kernel.ops.cross_entropy": ["LigerCrossEntropyFunction"],
    "liger_kernel.ops.fused_linear_cross_entropy": ["LigerFusedLinearCrossEntropyFunction"],
    "liger_kernel.ops.cutedsl.ops": ["LigerCrossEntropyFunction", "LigerFusedScaledCrossEntropySM90Function"],
    "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90": ["liger_fused_linear_cross_entropy_sm90"],
    "cut_cross_entropy": ["linear_cross_entropy"],
}


@pytest.mark.parametrize("absent", ["", "trl", "liger_kernel", "liger_kernel.ops.cutedsl"])
def test_peers_of_the_gpu(monkeypatch, absent):
    """Each library's kernels are rows of their own: Liger's Triton ones need nothing of its CuTe ones."""
    monkeypatch.setattr(backend, "compute_capability", lambda index: (9, 0))
    for module, names in PEERS.items():
        there = not absent or not f"{module}.".startswith(f"{absent}.")
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**dict.fromkeys(names)) if there else None)
    expected = {
        "token_logprobs 4096x128256 bf16 fwd": ["trl selective_log_softmax", "liger triton", "liger cute"],
        "token_logprobs 4096x128256 entropy bf16 fwd+bwd": ["trl selective_log_softmax_and_entropy"],
        "linear_logprobs 8192x4096x128256 bf16 fwd+bwd": ["trl chunked head", "liger triton", "liger cute"],
        "linear_cross_entropy 8192x4096x128256 frozen head bf16 fwd+bwd": ["trl chunked head", "liger cute"],
        "linear_cross_entropy 8192x4096x128256 trained head bf16 fwd+bwd": ["trl chunked head", "liger triton"],
    }
    gone = {"": (), "trl": ("trl",), "liger_kernel": ("liger",), "liger_kernel.ops.cutedsl": ("liger cute",)}[absent]
    heads = ("token_logprobs", "linear_logprobs", "linear_cross_entropy")
    providers = {case.label: list(case.providers) for case in harness.cases(heads, "cuda", quick=False)}
    for label, peers in expected.items():
        for peer in peers:
            assert (peer in providers[label]) == (not peer.startswith(gone)), (label, peer)
    assert all("torch.compile" in names for names in providers.values()) or not harness.compiled(len)


def test_events_time_a_gpu(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 6.0

    calls = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert machine.seconds_of(lambda: calls.append(1), 3, "cuda") == pytest.approx(2e-3)
    assert len(calls) == 3


def test_a_provider_that_fails_at_full_size_is_a_row(monkeypatch):
    def large(i):
        if len(i["x"]) > 4:
            raise RuntimeError("CUDA out of memory")
        return i["x"] + 1

    providers = {"torch eager": lambda i: i["x"] + 1, "peer": large}
    case = addition(providers, gate_rows=4, bound="copy", bytes=64)
    rows = measure(case)
    assert rows["peer"]["status"] == "failed: RuntimeError: CUDA out of memory" and "ms_p50" not in rows["peer"]
    assert rows["torch eager"]["status"] == "ok" and float(rows["torch eager"]["ms_p50"]) > 0


def test_an_absent_peer_is_left_out():
    def peer(function, i):
        return function(i)

    present = harness.optional("math", "sqrt", peer) | harness.optional("math", "exp", peer, "math e to the x")
    assert list(present) == ["math sqrt", "math e to the x"] and present["math sqrt"](4.0) == 2.0
    assert harness.optional("no_such_module", "sqrt", peer) == harness.optional("math", "no_such_name", peer) == {}


def test_memory_bound_inputs_leave_the_cache_before_they_return():
    case = square_case(rows=64)
    inputs = harness.rotation(case, "cpu")
    first = next(inputs)["x"]
    seen = 1
    while (x := next(inputs)["x"]) is not first:
        assert torch.equal(x, first) and x.requires_grad and x.data_ptr() != first.data_ptr()
        seen += 1
    assert seen == 64 or seen * first.nbytes >= 2 * machine.cache_bytes("cpu")
    compute_bound = harness.rotation(square_case(bound="gemm"), "cpu")
    assert next(compute_bound) is next(compute_bound)


PEAKS = """
import numpy, torch
from fastrl.benches.memory import peak_extra_mib
calls = {
    "nothing": lambda: None,
    "torch": lambda: torch.ones(16 << 20).sum(),
    "numpy": lambda: numpy.ones(8 << 20).sum(),
    "freed": lambda: [torch.ones(4 << 20).sum() for _ in range(3)] and torch.ones(16 << 20).sum(),
}
for name, call in calls.items():
    call()
    print(name, peak_extra_mib(call))
"""


def test_peak_memory_counts_every_allocator_and_no_freed_block():
    environment = {**os.environ, **memory.RETURN_FREED_BLOCKS, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PEAKS], env=environment, capture_output=True, text=True, check=True)
    peaks = {name: float(peak) for name, peak in map(str.split, done.stdout.splitlines())}
    assert peaks == pytest.approx({"nothing": 0, "torch": 64, "numpy": 64, "freed": 64}, abs=2)


def test_what_git_cannot_say_is_left_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("FASTRL_COMMIT", "abc")
    told = {}
    for state in ("no git", "refused", "clean", "dirty"):
        if state == "refused":
            (tmp_path / ".git").write_text("not what git expects")
        if state == "clean":
            (tmp_path / ".git").unlink()
            (tmp_path / "file").write_text("old")
            author = ["-c", "user.name=a", "-c", "user.email=a@b"]
            for command in (["init"], ["add", "file"], [*author, "commit", "-m", "first"]):
                subprocess.run(["git", "-C", str(tmp_path), *command], check=True, capture_output=True)
        if state == "dirty":
            (tmp_path / "file").write_text("new")
        row = machine.environment("cpu")
        told[state] = (row["commit"] == "abc", row["dirty"])
    assert told == {"no git": (True, ""), "refused": (True, ""), "clean": (False, "no"), "dirty": (False, "yes")}


def test_rows_are_replaced_by_key(tmp_path):
    rows = [row | {"device": "d", "threads": "2"} for row in measure(square_case()).values()]
    path = tmp_path / "sub" / "bench.csv"
    records.write(path, rows)
    assert len(records.read(path)) == 2
    again = [dict(rows[1], ms_p50="7"), dict(rows[1], threads="1")]
    merged = records.merge(records.read(path), again)
    assert len(merged) == 3
    assert [row["ms_p50"] for row in merged if row["provider"] == "fastrl cpu" and row["threads"] == "2"] == ["7"]


def test_a_table_takes_in_the_rows_of_others(tmp_path):
    rows = [row | {"device": "d", "threads": "2"} for row in measure(square_case()).values()]
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    records.write(one, rows)
    records.write(two, [dict(rows[1], ms_p50="7")])
    records.main([str(tmp_path / "all.csv"), str(one), str(two)])
    assert [row["ms_p50"] for row in records.read(tmp_path / "all.csv")] == [rows[0]["ms_p50"], "7"]


def test_readme_tables_come_from_the_csv(tmp_path):
    rows = [row | {"device": "d", "threads": "2"} for row in measure(square_case()).values()]
    records.write(tmp_path / "cpu.csv", rows)
    text = "before\n<!-- bench cpu.csv -->\nold\n<!-- /bench cpu.csv -->\nafter\n"
    filled = tables.fill(text, tmp_path)
    assert filled.startswith("before\n") and filled.endswith("after\n") and "old" not in filled
    assert f"| {rows[1]['speedup']}x |" in filled and tables.fill(filled, tmp_path) == filled
    with pytest.raises(ValueError, match="no.csv"):
        tables.fill(text.replace("cpu.csv", "no.csv"), tmp_path)


def test_the_columns_of_the_ops_come_from_the_csv(tmp_path):
    rows = [
        row | {"op": "gae", "device": "d", "threads": "2", "peak_extra_mib": "3"}
        for row in measure(square_case()).values()
    ]
    rows[0] |= {"peak_extra_mib": "10"}
    fast, slow = (
        [dict(row, shape=name, speedup=speedup) for row in rows] for name, speedup in (("a", "29.6"), ("b", "0.257"))
    )
    records.write(tmp_path / "cpu.csv", fast + slow)
    text = "<!-- ops cpu.csv,none.csv -->\n| op | equals | CPU | H100 |\n| {} | a loop | {} | {} |\n{}"
    end = "<!-- /ops cpu.csv,none.csv -->\n"
    filled = text.format("[`gae`](gae.md)", "0.26x to 30x, up to 7 MiB less", "not yet measured", end)
    assert tables.fill(text.format("[`gae`](gae.md)", "old", "old", end), tmp_path) == filled
    assert "not yet measured | not yet" in tables.fill(text.format("`ppo_loss`", "old", "old", end), tmp_path)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tables_agree_with_the_committed_results(page):
    text = page.read_text()
    assert tables.MARKERS.search(text), "no tables"
    assert tables.fill(text) == text, "run python -m fastrl.benches.tables"


def test_the_plot_agrees_with_the_committed_csv():
    for path in tables.RESULTS.glob("*.svg"):
        assert plot.svg(records.read(path.with_suffix(".csv"))) == path.read_text(), "run python -m fastrl.benches.plot"


def test_every_case_is_a_dot_of_the_plot():
    rows = records.read(tables.RESULTS / "cpu.csv")
    cases = [row for row in rows if row["provider"] == "fastrl cpu"]
    drawn = plot.svg(rows)
    assert drawn.count("<circle") == len(cases)
    assert drawn.count('class="slower"') == sum(float(row["speedup"]) < 1 for row in cases)


@pytest.mark.slow
def test_command_measures_and_writes(tmp_path, capsys):
    bench.main(["--op", "ppo_loss", "--quick", "--output", str(tmp_path)])
    rows = records.read(tmp_path / "bench.csv")
    assert {row["direction"] for row in rows} == {"fwd+bwd"}
    assert all(row["status"] == "ok" for row in rows)
    assert all(float(row["peak_extra_mib"]) < 64 for row in rows)
    assert (tmp_path / "bench.png").stat().st_size > 1000
    assert "ppo_loss 64x128 fp32 fwd+bwd" in capsys.readouterr().out


def test_peers_must_agree_before_their_times_count():
    expected = {"surprisal": 100.0, "score": 0.5}
    assert bench_train.disagreement({"surprisal": 100.0, "score": 0.5}, expected) == 0
    assert bench_train.disagreement({"surprisal": 101.0, "score": 0.5}, expected) == pytest.approx(0.01)


@pytest.mark.parametrize("device, there, expected", [("cuda", True, 3), ("cuda", False, 2), ("cpu", True, 2)])
def test_liger_joins_on_a_gpu_where_it_is_installed(monkeypatch, device, there, expected):
    monkeypatch.setattr(bench_train, "find_spec", lambda name: object() if there else None)
    args = bench_train.parse(["--device", device])
    for task in ("SFT step, LoRA", "SFT step, full"):
        peers = [p for p in bench_train.PEERS[task] if bench_train.is_here(p, Settings(device=device), args)]
        assert len(peers) == expected


def test_a_peer_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def run(program, *_):
        if program == bench_train.TRL:
            raise RuntimeError("python train_trl.py failed:\nTraceback\nModuleNotFoundError: No module named 'trl.x'")
        return {"seconds": [1.0], "peak_mib": 2.0, "imported_mib": 1.0, "check": {"score": 1.0}}

    monkeypatch.setattr(bench_train, "run", run)
    path = tmp_path / "train.csv"
    small = "--hidden 32 --layers 1 --heads 2 --kv-heads 1 --intermediate 64 --vocab 100 --batch 4 --trl-python python"
    with pytest.raises(SystemExit, match="PPO update, full: trl: failed: ModuleNotFoundError"):
        bench_train.main(["--csv", str(path), "--task", "PPO update, full", *small.split()])
    rows = {row["provider"]: row for row in records.read(path)}
    assert rows["trl"]["status"].startswith("failed: ModuleNotFoundError") and not rows["trl"]["ms_p50"]
    ours = rows["fastrl loop"]
    assert (ours["status"], ours["baseline"], float(ours["speedup"])) == ("ok", "fastrl loop", 1)


@pytest.mark.hosts
@pytest.mark.parametrize("peers", [("SFT step, LoRA", "fastrl loop"), ("Trainer step, LoRA", "fastrl callback")])
def test_train_bench_runs_both_peers_on_the_same_work(tmp_path, peers):
    path = tmp_path / "train.csv"
    small = "--hidden 32 --layers 1 --heads 2 --kv-heads 1 --intermediate 64 --vocab 100 --batch 4 --minibatch 4"
    rest = "--prompt 8 --response 8 --iterations 1 --repeats 1 --threads 1"
    task, ours = peers
    bench_train.main(["--csv", str(path), "--task", task, *small.split(), *rest.split()])
    rows = {row["provider"]: row for row in records.read(path)}
    assert set(rows) == {"transformers Trainer + peft" if "Trainer" in task else "transformers + peft", ours}
    assert all(row["status"] == "ok" and float(row["rate"]) > 0 for row in rows.values())
    assert float(rows[ours]["error"]) < 1e-4
