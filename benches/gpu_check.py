"""Checks and measures fastrl on a GPU, in the checkout: `python -m benches.gpu_check [--part PART ...]`.

    build     for this GPU; fastrl doctor
    tests     tests/gpu
    sanitize  compute-sanitizer over every op
    bench     every op beside its peers
    train     the demo with a tiny budget; SFT, reward model and PPO with LoRA on its data
    demo      the whole demo
    peers     whole updates beside TRL and transformers

A part takes less than ten minutes, its table included. What fails is reported, and the rest still runs; what no longer
fits is listed as not run, and `--part PART --step STEP` runs it alone. Needs fastrl's dependencies with a torch for
CUDA, nvcc and pytest.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

from fastrl.bench import OPS

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("build", "tests", "sanitize", "bench", "train", "demo", "peers")
PART_SECONDS = 540  # a minute less than ten: imports, a step that is slow to end and the table come on top
LEAST_SECONDS = 1  # with less a step is not begun
PYTHON = sys.executable
# As in pyproject.toml, without the plugin that GPU machines may not have.
PYTEST = [PYTHON, "-m", "pytest", "-o", "addopts=--strict-markers --import-mode=importlib -ra", "--durations=10"]
WORKLOAD = (
    "--device cuda --dtype bfloat16 --layers 30 --vocab 49152 --batch 64 --minibatch 64 --micro-batch 16 "
    "--prompt 256 --response 256 --iterations 3 --repeats 1"
).split()
DEMO = [PYTHON, "-m", "fastrl.cli", "demo", "--device", "cuda"]
BRIEF = ["--max_length", "128", "--max_steps", "10", "--eval_limit", "32", "--device", "cuda"]


class Step(NamedTuple):
    name: str
    command: list[str]
    seconds: float = PART_SECONDS  # at most
    environment: dict[str, str] = {}


class Outcome(NamedTuple):
    part: str
    step: str
    status: str
    seconds: float
    note: str  # the last line of the output


def build(gpu: Gpu, folder: Path) -> Iterator[Step]:
    environment = {"FASTRL_CUDA": "on", "FASTRL_WERROR": "ON", "FASTRL_CUDA_ARCHITECTURES": f"{gpu.arch}-real"}
    environment["CUDAFLAGS"] = "-lineinfo"  # compute-sanitizer and profilers then name source lines
    yield Step("build", [PYTHON, "setup.py", "build_ext", "--inplace"], environment=environment)
    yield Step("doctor", [PYTHON, "-m", "fastrl.cli", "doctor", "--dtype", "bfloat16"], 60)


def tests(gpu: Gpu, folder: Path) -> Iterator[Step]:
    number = min(8, os.cpu_count() or 1)  # Triton and torch.compile work on the CPU
    workers = ["-n", str(number), "--dist", "worksteal"] if find_spec("xdist") else []
    yield Step("tests/gpu", [*PYTEST, *workers, "tests/gpu", "tests/train/test_gpu.py"])


def sanitize(gpu: Gpu, folder: Path) -> Iterator[Step]:
    """Only fastrl's kernels are watched: the libraries' would take most of the time.

    But initcheck, which comes last, must see every kernel that writes what fastrl's read. API errors do not count:
    torch and Triton ask the driver for what it may not have, and fastrl raises its own.
    """
    options = "--error-exitcode 9 --report-api-errors no --launch-timeout 0".split()  # importing torch takes a while
    names = ["fastrl", *triton_kernels()]
    filters = [argument for name in names for argument in ("--kernel-name", f"kns={name}")]
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        watched = [] if tool == "initcheck" else filters
        command = [cuda_tool("compute-sanitizer"), "--tool", tool, *options, *watched]
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # one allocation for each tensor
        yield Step(tool, [*command, PYTHON, "tests/gpu/every_op.py"], 240, environment)


def bench(gpu: Gpu, folder: Path) -> Iterator[Step]:
    for op in OPS:
        yield Step(op, [PYTHON, "-m", "fastrl.bench", "--device", "cuda", "--op", op, "--csv", str(gpu.csv)], 240)


def train(gpu: Gpu, folder: Path) -> Iterator[Step]:
    tiny, out = folder / "quick-demo", folder / "runs"

    def loop(name: str, *arguments: str | Path) -> Step:
        command = [PYTHON, "-m", "fastrl.cli", name, "--output", str(out / name), *map(str, arguments)]
        return Step(name, command, 120)

    yield Step("quick demo", [*DEMO, "--quick", "--output", str(tiny)], 180)
    yield loop("sft", "--model", tiny / "pretrained", "--data", tiny / "data/instructions.jsonl", *BRIEF)
    yield loop("reward", "--model", tiny / "sft", "--data", tiny / "data/rankings.jsonl", *BRIEF)
    models = ["--model", tiny / "sft", "--reward_model", tiny / "reward"]
    few = "--iterations 2 --max_new_tokens 28 --max_prompt_length 100 --device cuda".split()
    yield loop("ppo", *models, "--data", tiny / "data/prompts.jsonl", *few)


def demo(gpu: Gpu, folder: Path) -> Iterator[Step]:
    yield Step("demo", [*DEMO, "--output", str(folder / "demo")])


def peers(gpu: Gpu, folder: Path) -> Iterator[Step]:
    """Up to nine processes; the table grows with every kind of update that is done."""
    peer = ["--trl-python", PYTHON] if find_spec("trl") else []
    command = [PYTHON, "-m", "fastrl.benches.bench_train", "--csv", str(gpu.csv), *WORKLOAD, *peer]
    yield Step("updates", command)


def cuda_tool(name: str) -> str:
    """A program of the CUDA toolkit, where setup.py looks for nvcc; its bare name if it is nowhere."""
    beside = [Path(nvcc).parent / name for nvcc in [os.environ.get("CUDACXX")] if nvcc]
    homes = [Path(os.environ[home]) / "bin" / name for home in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(home)]
    candidates = [*beside, *homes, name, f"/usr/local/cuda/bin/{name}"]
    return next((path for candidate in candidates if (path := shutil.which(str(candidate)))), name)


def triton_kernels() -> list[str]:
    """Names of the Triton functions that are launched."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "kernels").glob("*.py")))
    return sorted(set(re.findall(r"@triton\.jit(?:\([^)]*\))?\ndef (\w*kernel\w*)\(", text)))


class Gpu(NamedTuple):
    name: str
    arch: str  # as nvcc says it

    @property
    def csv(self) -> Path:
        stem = re.sub(r"\W+", "-", self.name.lower()).strip("-")
        return ROOT / f"benches/results/{stem}.csv"


def this_gpu() -> Gpu:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu_check: torch sees no CUDA device; `fastrl doctor` says why")
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), f"{major}{minor}" + ("a" if major == 9 else ""))


def run_part(part: str, steps: Iterator[Step], folder: Path, seconds: float = PART_SECONDS) -> Iterator[Outcome]:
    end = time.monotonic() + seconds
    for step in steps:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            note = f"to run it: --part {part} --step {shlex.quote(step.name)}"
            yield Outcome(part, step.name, "not run: out of time", 0, note)
            continue
        print(f"\n== {part}: {step.name}", flush=True)
        yield run_step(part, step, folder, min(step.seconds, left))


def run_step(part: str, step: Step, folder: Path, seconds: float) -> Outcome:
    """Runs the command in a process group of its own; the output goes to a log and, its end, to the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{part}-{re.sub(r'[^a-z0-9]+', '-', step.name.lower())}.log"
    path = f"{Path(PYTHON).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # cmake, ninja of that environment
    common = {"PATH": path, "PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with log.open("w") as file:
        try:
            code = run_group(step.command, seconds, {**os.environ, **common, **step.environment}, file)
            status = "ok" if code == 0 else f"failed ({code})"
            if code and time.monotonic() - start >= seconds:
                status = "too slow" if seconds == step.seconds else "cut off: out of time"
        except OSError as error:
            status = f"failed: {error}"
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(lines[-(15 if status == "ok" else 60) :]), flush=True)
    return Outcome(part, step.name, status, time.monotonic() - start, summary(lines))


def run_group(command: list[str], seconds: float, environment: dict[str, str], log: IO[str]) -> int:
    """Exit status of a command that is ended, with all that it started, after `seconds` or by Ctrl-C."""
    limited = ["timeout", "--kill-after=10", f"{seconds:.1f}", *command]
    with subprocess.Popen(limited, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # timeout passes it on; killed, it would leave the command running on the GPU
            process.wait()
            raise


def python_path() -> str:
    """This checkout first; then what the caller has there, such as packages installed with `pip install --target`."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def summary(lines: list[str]) -> str:
    """What pytest or compute-sanitizer sum up, else the last line."""
    said = [line for line in lines if line.strip()]
    counted = [line for line in said if "SUMMARY:" in line]
    return (counted or said or [""])[-1].strip("= ")[:100]


def table(outcomes: list[Outcome]) -> str:
    rows = [(o.part, o.step, o.status, f"{o.seconds:.0f} s", o.note) for o in outcomes]
    widths = [max(len(row[n]) for row in rows) for n in range(4)]
    return "\n".join("  ".join([*(f"{c:{w}}" for c, w in zip(row, widths, strict=False)), row[4]]) for row in rows)


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benches.gpu_check", description=__doc__, formatter_class=raw)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--step", nargs="+", help="only these steps of the parts, by their names in the table")
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), help="folder for logs and runs")
    args = parser.parse_args(argv)
    if not (ROOT / "tests/gpu").is_dir():
        raise SystemExit("gpu_check: expected a checkout of the repository, got an installed package")
    gpu, folder = this_gpu(), args.output.resolve()
    outcomes: list[Outcome] = []
    for part in args.part:
        steps = (step for step in globals()[part](gpu, folder) if not args.step or step.name in args.step)
        outcomes += run_part(part, steps, folder)
    if not outcomes:
        parser.error(f"no such step in {', '.join(args.part)}: {', '.join(args.step)}")
    print(f"\n{gpu.name}\n{table(outcomes)}\nlogs: {folder}, measurements: {gpu.csv}")
    return int(any(outcome.status != "ok" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
