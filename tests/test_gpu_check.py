"""The one-command check of a GPU, as far as a machine without one can see it."""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastrl.bench import OPS
from fastrl.benches import gpu_check, harness, machine
from fastrl.benches.gpu_check import Gpu, Step
from fastrl.ops import backend

H100 = Gpu("NVIDIA H100 80GB HBM3", "90a")


def python(code: str, seconds: float = 20) -> Step:
    return Step("a step", [sys.executable, "-c", code], seconds)


@pytest.mark.parametrize(
    "step, status, note",
    [
        (python("print('first'); print('last')"), "ok", "last"),
        (python("print('ERROR SUMMARY: 3 errors'); print('bye'); raise SystemExit(9)"), "failed (9)", "ERROR SUMMARY"),
        (python("import time; print('begun', flush=True); time.sleep(20)", 1), "too slow", "begun"),
        (Step("absent", ["no-such-program"]), "failed (127)", "timeout: "),
        (python("import os; os.kill(os.getpid(), 9)"), "failed (", ""),
    ],
    ids=["ok", "fails", "slow", "absent", "killed"],
)
def test_a_step_is_reported_and_never_raises(tmp_path, step, status, note):
    (outcome,) = gpu_check.run_part("tests", iter([step]), tmp_path)
    assert outcome.status.startswith(status) and outcome.note.startswith(note) and outcome.seconds < 5


def test_an_interrupt_ends_the_step(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        with pytest.raises(KeyboardInterrupt):
            gpu_check.run_step("tests", python("import os, time; print(os.getpid()); time.sleep(20)"), tmp_path, 20)
    finally:
        signal.signal(signal.SIGALRM, before)
    process = (tmp_path / "tests-a-step.log").read_text().strip()
    assert process and not Path(f"/proc/{process}").exists()


def test_programs_of_the_environment_are_found(tmp_path, monkeypatch):
    """Where Python is called by its path, without activating its environment."""
    monkeypatch.setattr(gpu_check, "PYTHON", str(tmp_path / "bin/python"))
    outcome = gpu_check.run_step("build", python("import os; print(os.environ['PATH'])"), tmp_path, 20)
    assert outcome.note.startswith(str(tmp_path / "bin") + ":")


PEER = "import json, sys; print(json.dumps(sys.argv[2:]))"
RUNS_A_PEER = "from fastrl.benches import bench_train as b; print(b.run('a_peer', b.HERE, 'ppo', 1, None))"


def test_steps_and_their_peers_see_the_packages_of_the_caller(tmp_path, monkeypatch):
    (tmp_path / "a_peer.py").write_text(PEER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = gpu_check.run_step("peers", python(RUNS_A_PEER), tmp_path, 60)
    assert (outcome.status, outcome.note) == ("ok", "['ppo']")
    monkeypatch.delenv("PYTHONPATH")
    assert gpu_check.python_path() == str(gpu_check.ROOT)


def test_a_part_keeps_its_time(tmp_path):
    slow = python("import time; time.sleep(20)")
    outcomes = list(gpu_check.run_part("tests", iter([slow, slow]), tmp_path, seconds=1.5))
    assert [outcome.status for outcome in outcomes] == ["cut off: out of time", "not run: out of time"]
    assert gpu_check.table(outcomes).endswith("to run it: --part tests --step 'a step'")


@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_every_part_has_steps(tmp_path, part):
    steps = list(getattr(gpu_check, part)(H100, tmp_path))
    assert steps and all(0 < step.seconds <= gpu_check.PART_SECONDS for step in steps)
    assert H100.csv.name == "nvidia-h100-80gb-hbm3.csv"
    assert gpu_check.PART_SECONDS <= 540  # of the ten minutes that a command may take


def test_no_loop_can_starve_another(tmp_path):
    assert sum(step.seconds for step in gpu_check.train(H100, tmp_path)) <= gpu_check.PART_SECONDS
    assert len(list(gpu_check.peers(H100, tmp_path))) == 1


def test_the_sanitizers_watch_every_triton_kernel():
    from gpu.test_triton_aot import entry_points

    assert entry_points() <= set(gpu_check.triton_kernels())


def test_initcheck_sees_the_kernels_that_write_what_ours_read(tmp_path):
    filtered = {step.name: "--kernel-name" in step.command for step in gpu_check.sanitize(H100, tmp_path)}
    assert filtered == {"memcheck": True, "racecheck": True, "synccheck": True, "initcheck": False}


@pytest.mark.parametrize(
    "variable, value", [("CUDA_HOME", "."), ("CUDA_PATH", "."), ("CUDACXX", "bin/nvcc"), ("PATH", "bin")]
)
def test_the_sanitizer_is_found_like_nvcc(tmp_path, monkeypatch, variable, value):
    program = tmp_path / "bin/compute-sanitizer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh")
    program.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH", "CUDACXX"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv(variable, str(tmp_path / value))
    assert gpu_check.cuda_tool("compute-sanitizer") == str(program)
    assert gpu_check.cuda_tool("no-such-tool") == "no-such-tool"


def test_failures_do_not_stop_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "this_gpu", lambda: H100)
    monkeypatch.setattr(gpu_check, "build", lambda gpu, folder: iter([python("raise SystemExit(1)")]))
    monkeypatch.setattr(gpu_check, "tests", lambda gpu, folder: iter([python("print('2 passed')")]))
    assert gpu_check.main(["--part", "build", "tests", "--output", str(tmp_path)]) == 1
    *_, first, second, _ = capsys.readouterr().out.splitlines()
    assert "failed (1)" in first and second.endswith("2 passed")


def test_one_step_alone(tmp_path, monkeypatch, capsys):
    steps = [python("print('this')"), python("print('that')")._replace(name="other")]
    monkeypatch.setattr(gpu_check, "this_gpu", lambda: H100)
    monkeypatch.setattr(gpu_check, "build", lambda gpu, folder: iter(steps))
    command = ["--part", "build", "--output", str(tmp_path), "--step"]
    assert gpu_check.main([*command, "other"]) == 0
    assert "this" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_check.main([*command, "neither"])
    assert "no such step in build: neither" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="torch sees no CUDA device; `fastrl doctor` says why"):
        gpu_check.main(["--part", "build"])


def test_cublas_without_a_context_is_no_error():
    """Its warning comes from torch, whichever module asked for the product; those of fastrl's own stay errors."""
    text = "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context..."
    warnings.warn_explicit(text, UserWarning, "lora_linear.py", 1, module="fastrl.ops.lora_linear")
    with pytest.raises(UserWarning, match="another"):
        warnings.warn_explicit("another", UserWarning, "lora_linear.py", 1, module="fastrl.ops.lora_linear")


def test_cases_of_the_gpu(monkeypatch):
    """The shapes that have targets on an H100 are measured, with every backend that dispatch knows."""
    monkeypatch.setattr(backend, "compute_capability", lambda index: (9, 0))
    cases = harness.cases(OPS, "cuda", quick=False)
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

    case = harness.Case(
        op="add",
        shape="8",
        dtype=torch.float32,
        make=lambda rows: {"x": torch.randn(rows)},
        rows=8,
        gate_rows=4,
        truth=lambda i: i["x"] + 1,
        providers={"torch eager": lambda i: i["x"] + 1, "peer": large},
        bound="copy",
        bytes=64,
    )
    fast = harness.Budget(seconds=0.02, warmup=0.0, min_rounds=3)
    rows = {row["provider"]: row for row in harness.measure(case, "cpu", {"copy": 1.0}, fast)}
    assert rows["peer"]["status"] == "failed: RuntimeError: CUDA out of memory" and "ms_p50" not in rows["peer"]
    assert rows["torch eager"]["status"] == "ok" and float(rows["torch eager"]["ms_p50"]) > 0
