"""The measurements of first contact: which, and that a row costs itself alone whatever it does to its process."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from additions import addition
from gpus import HAS_GPU

from fastrl.benches import first_contact_cases, first_contact_rows, fresh_context, harness, machine, records
from fastrl.ops import backend

LOGITS, WEIGHT_GRADIENT, DIRECTION = list(first_contact_cases.products(first_contact_cases.DRY))
WORKER = """
import os, sys, time
from pathlib import Path
from fastrl.benches import records

path = Path(sys.argv[1])
does = {"plain": int, "dies": lambda: os._exit(11), "hangs": lambda: time.sleep(60), "last": int}
rows = records.read(path)
for provider in list(does)[len(rows):]:
    row = dict.fromkeys(records.KEY, "") | {"provider": provider, "status": "begun"}
    records.write(path, [*rows, row])
    does[provider]()
    rows.append(row | {"status": "ok"})
    records.write(path, rows)
"""


def test_a_row_that_dies_or_hangs_costs_itself_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(first_contact_rows, "ROW_SECONDS", 1)
    path = tmp_path / "rows.csv"
    assert first_contact_rows.supervise(path, [sys.executable, "-c", WORKER, str(path)]) == 0
    assert {row["provider"]: row["status"] for row in records.read(path)} == {
        "plain": "ok",
        "dies": "failed: exit status 11",
        "hangs": "failed: hung for 1 s",
        "last": "ok",
    }


def test_a_worker_that_never_comes_to_a_row_is_not_started_again(tmp_path):
    assert first_contact_rows.supervise(tmp_path / "rows.csv", [sys.executable, "-c", "raise SystemExit(3)"]) == 3


def measure(path, monkeypatch, **providers):
    case = addition(providers, bound="copy")
    monkeypatch.setattr(first_contact_rows, "cases", lambda device, sizes: [case])
    monkeypatch.setattr(machine, "ceilings", lambda *_, **__: {"copy": 1.0})
    first_contact_rows.measure_all(path, "cpu", dry=True)


def test_each_row_is_on_disk_before_the_next_begins(tmp_path, monkeypatch):
    path, seen = tmp_path / "rows.csv", []

    def looks(i):
        seen.append([(row["provider"], row["status"]) for row in records.read(path)])
        return i["x"] + 1

    monkeypatch.setenv("FASTRL_COMMIT", "abc")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    measure(path, monkeypatch, first=lambda i: i["x"] + 1, looks=looks)
    assert seen[0] == [("first", "ok"), ("looks", "begun")]
    row = records.read(path)[1]
    assert row["status"] == "ok" and row["commit"] == "abc" and row["torch"] == torch.__version__ and row["device"]


def test_a_row_cut_off_midway_is_measured_again_and_the_others_are_not(tmp_path, monkeypatch):
    path, calls = tmp_path / "rows.csv", []

    def provider(name):
        return lambda i: (calls.append(name), i["x"] + 1)[1]

    measure(path, monkeypatch, one=provider("one"), two=provider("two"))
    rows = records.read(path)
    records.write(path, [rows[0], rows[1] | {"status": "begun"}])
    calls.clear()
    measure(path, monkeypatch, one=provider("one"), two=provider("two"))
    assert set(calls) == {"two"} and [row["status"] for row in records.read(path)] == ["ok", "ok"]


def test_rows_that_decide(monkeypatch):
    monkeypatch.setattr(backend, "compute_capability", lambda index: (9, 0))
    cases = list(first_contact_cases.cases("cuda", first_contact_cases.FULL))
    labels = [case.label for case in cases]
    assert len(set(labels)) == len(labels)
    expected = [
        f"head product {what} {m}x4096x128256 bf16 fwd"
        for m in (1024, 2048, 4096)
        for what in ("logits", "weight gradient", "direction")
    ]
    expected += [
        f"head rows 1024x{v}{gradient} bf16 fwd"
        for v in (32000, 49152, 128256, 151936, 262144)
        for gradient in ("", " with gradient")
    ]
    expected += [f"token_logprobs 4096x128256 bf16 {direction}" for direction in ("fwd", "fwd+bwd")]
    for shape in ("8192x4096x128256", "8192x2048x128256", "8192x576x49152"):
        expected += [f"linear_logprobs {shape} bf16 {direction}" for direction in ("fwd", "fwd+bwd")]
        expected += [f"linear_cross_entropy {shape} trained head bf16 fwd+bwd"]
    for shape in ("8192x4096->4096", "2048x576->1536", "64x4096->4096"):
        for way in ("", " captured"):
            expected += [f"lora_linear {shape} r=16 bf16 {direction}{way}" for direction in ("fwd", "fwd+bwd")]
    for way in ("", " captured"):
        expected += [
            f"{op} {shape} fp32 fwd{way}"
            for op, shape in (
                ("ppo_advantages", "512x2048"),
                ("ppo_advantages", "8192x4096"),
                ("gae", "512x2048 ragged"),
                ("ppo_loss", "8192x2048"),
            )
        ]
        expected += [f"ppo_loss 8192x2048 fp32 fwd+bwd{way}"]
    for label in expected:
        assert label in labels, label
    assert all("fastrl triton" in case.providers for case in cases if case.op != "head product")
    first = [
        labels.index(next(label for label in labels if label.startswith(op)))
        for op in ("head product", "head rows", "token_logprobs", "linear_logprobs", "lora_linear", "ppo_advantages")
    ]
    assert first == sorted(first)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_row_kernels_are_right(monkeypatch, with_gradient):
    """In Triton's interpreter, or on a GPU."""
    device = "cuda" if HAS_GPU else "cpu"
    monkeypatch.setattr(first_contact_cases, "row_backends", lambda device: ["triton"])
    case = first_contact_cases.row_kernels(4, 1000, with_gradient, device)
    assert not harness.check(case, case.providers["fastrl triton"], device)[0]


def test_no_row_waits_for_a_compiler_or_a_loop():
    names = {name for case in first_contact_cases.cases("cpu", first_contact_cases.DRY) for name in case.providers}
    assert names and not [name for name in names if name.startswith(first_contact_cases.LEFT_OUT)]
    assert {"torch eager", "peft lora.Linear"} <= names


@pytest.mark.parametrize("case", [LOGITS, WEIGHT_GRADIENT], ids=["logits", "weight gradient"])
def test_products_that_lose_their_float32_results_are_wrong(case):
    def rounded(i):
        total = i.get("total", 0)
        return total + (i["a"] @ i["b"]).float()

    for name, provider in case.providers.items():
        problem, error, _ = harness.check(case, provider, "cpu")
        assert not problem and error < 1e-5, name
    assert harness.check(case, rounded, "cpu")[0].startswith("wrong: error")
    assert not harness.check(DIRECTION, DIRECTION.providers["bf16 out"], "cpu")[0]


def test_replays_count_as_so_many_calls(monkeypatch):
    calls = []
    case = addition({"p": lambda i: (calls.append(1), i["x"] + 1)[1]}, captured=True)
    (run,) = harness.runs_of(case, case.providers, "cpu").values()
    run()
    assert len(calls) == run.calls == 16 and case.direction == "fwd captured"
    monkeypatch.setattr(harness, "seconds_of", lambda run, repeats, device: run.calls * 1e-3)
    times, _ = harness.time_in_turn({"plain": run.run, "replay": run}, "cpu", first_contact_rows.QUICK)
    assert times["plain"][0] == times["replay"][0] == pytest.approx(1e-3)


def test_the_bandwidth_of_the_datasheet(monkeypatch):
    h100 = SimpleNamespace(memory_clock_rate=2_619_000, memory_bus_width=5120)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    assert machine.datasheet("cuda")["datasheet"] == pytest.approx(3352, abs=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    assert machine.datasheet("cuda") == machine.datasheet("cpu") == {}


@pytest.mark.parametrize("worker, exits", [("gw0", [1]), ("", [])])
def test_a_worker_with_a_broken_context_ends(monkeypatch, worker, exits):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
    protocol = fresh_context.pytest_runtest_protocol(SimpleNamespace(nodeid="a test"))
    next(protocol)
    with pytest.raises(StopIteration):
        protocol.send(True)
    assert ended == exits
