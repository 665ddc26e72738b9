"""First contact with a GPU that is there for minutes: `python -m benches.first_contact --budget SECONDS --results DIR`.

    module    the native module that is here, or one built for this GPU; versions; fastrl doctor
    smoke     every op on both backends, every result finite
    rows      the measurements that decide something, most decisive first (first_contact_rows.py)
    tests     tests/gpu and the loops on a GPU
    memcheck, racecheck    compute-sanitizer over the kernels of every op
    peers     the heads and token_logprobs beside every library that is here
    compiled  the ops under torch.compile
    demo      fastrl demo --quick

A step that fails stops nothing. DIR holds at most eight files whenever this is killed: steps.csv with a line for each
step, rows.csv, peers.csv and its plot, logs.zip, and the log of the step that runs. A second call with the same DIR,
or with `--earlier` a copy of it, goes on where the first one ended. `--dry` runs all of it on a CPU, in small.
See first_contact.md.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
BUDGETS = 490, 300  # seconds of the two calls
DRY_TIMES = 5  # that long may a step take on a CPU
# As in pyproject.toml, without the plugin that GPU machines may not have.
PYTEST = [PYTHON, "-m", "pytest", "-o", "addopts=--strict-markers --import-mode=importlib -ra", "-q", "--durations=10"]
COMPILERS = ("test_bindings.py", "test_ptxas.py", "test_sources.py", "test_triton_aot.py")  # need no GPU
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": str(min(4, os.cpu_count() or 1)),
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool of compilers in each of many processes
}


class Step(NamedTuple):
    name: str
    command: list[str]
    seconds: float  # at most
    environment: dict[str, str] = {}
    every_call: bool = False  # also where it has been done: each call may find another machine
    goes_on: bool = False  # run out of its time, it has kept what it did and does the rest in another call


class Outcome(NamedTuple):
    """A line of steps.csv."""

    step: str
    status: str
    seconds: str
    at: str  # seconds since the call began
    note: str  # the last line of the output


def steps(results: Path, work: Path, dry: bool) -> list[Step]:
    device, small = ("cpu", ["--dry"]) if dry else ("cuda", [])
    every_op = [PYTHON, "tests/gpu/every_op.py", "--device", device]
    rows = [PYTHON, "-m", "fastrl.benches.first_contact_rows", "--csv", str(results / "rows.csv"), *small]
    beside = ["gae", "--quick"] if dry else ["linear_logprobs", "linear_cross_entropy", "token_logprobs"]
    peers = [
        PYTHON,
        "-m",
        "fastrl.commands.bench",
        "--device",
        device,
        "--csv",
        str(results / "peers.csv"),
        "--op",
        *beside,
    ]
    demo = [PYTHON, "-m", "fastrl.cli", "demo", "--quick", "--device", device, "--output", str(work / "demo")]
    todo = [
        Step("module", [PYTHON, "-m", "fastrl.benches.first_contact_module", *small], 90, every_call=True),
        Step("smoke", [*every_op, "--seconds", "45"], 60),
        Step("rows", rows, 170, goes_on=True),
        Step("tests", [*pytest(), *gpu_tests(dry)], 160),
        *(sanitizer(tool, every_op, dry) for tool in ("memcheck", "racecheck")),
        Step("peers", peers, 60),
        Step("compiled", [*pytest(), "tests/gpu/test_device.py", "-k", "compiled_without"], 50),
        Step("demo", demo, 50),
    ]
    return [step._replace(seconds=DRY_TIMES * step.seconds) for step in todo] if dry else todo


def pytest() -> list[str]:
    """Many workers, since Triton compiles on the CPU, and a minute for each test, where their plugins are installed."""
    workers = ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal", "-p", "fastrl.benches.fresh_context"]
    limit = ["--timeout", "60", "--timeout-method", "thread"]  # a signal does not reach Python in a call of the driver
    return [*PYTEST, *(workers if find_spec("xdist") else []), *(limit if find_spec("pytest_timeout") else [])]


def gpu_tests(dry: bool) -> list[str]:
    if dry:
        return ["tests/gpu/test_sources.py"]  # the others compile for minutes
    left_out = [f"--ignore=tests/gpu/{name}" for name in COMPILERS]
    return ["tests/gpu", "tests/train/test_gpu.py", *left_out, "-k", "not compiled_without"]


def sanitizer(tool: str, program: list[str], dry: bool) -> Step:
    """Only fastrl's kernels are watched: the libraries' would take most of the time.

    API errors do not count: torch and Triton ask the driver for what it may not have, and fastrl raises its own.
    """
    options = "--error-exitcode 9 --report-api-errors no --launch-timeout 0".split()  # importing torch takes a while
    filters = [word for name in ("fastrl", *triton_kernels()) for word in ("--kernel-name", f"kns={name}")]
    watch = [] if dry else [cuda_tool("compute-sanitizer"), "--tool", tool, *options, *filters]
    one_allocation_per_tensor = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, [*watch, *program, "--seconds", "35"], 60, one_allocation_per_tensor)


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


def run(todo: list[Step], results: Path, budget: float, common: dict[str, str]) -> list[Outcome]:
    """Runs what steps.csv does not have as done; a step is begun while half of its time is left."""
    start, outcomes = time.monotonic(), []
    for step in todo:
        left = start + budget - time.monotonic()
        if is_done(step, results):
            print(f"== {step.name}: done in an earlier call", flush=True)
        elif left < step.seconds / 2:
            print(f"== {step.name}: not begun, {left:.0f} s are left", flush=True)
        else:
            print(f"== {step.name}", flush=True)
            at = budget - left
            outcomes.append(run_step(step, results, min(step.seconds, left), at, common))
    return outcomes


def is_done(step: Step, results: Path) -> bool:
    """Whether it ended, well or not, and not because a call ran out of time."""
    table = results / "steps.csv"
    if step.every_call or not table.exists():
        return False
    with table.open(newline="") as file:
        status = {line["step"]: line["status"] for line in csv.DictReader(file)}.get(step.name, "cut off")
    return status != "cut off" and not (step.goes_on and status == "too slow")


def run_step(step: Step, results: Path, seconds: float, at: float, common: dict[str, str]) -> Outcome:
    """Runs the command, shows the end of its output, and keeps its log and its line of the table."""
    log = results / f"{number_of_logs(results) + 1:02d}-{step.name}.log"
    path = f"{Path(PYTHON).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # cmake, ninja of that environment
    environment = {**os.environ, "PATH": path, "PYTHONPATH": python_path(), **common, **step.environment}
    start = time.monotonic()
    with log.open("w") as file:
        try:
            code = run_group(step.command, seconds, environment, file)
            status = "ok" if code == 0 else f"failed ({code})"
            if code and time.monotonic() - start >= seconds:
                status = "too slow" if seconds == step.seconds else "cut off"
        except OSError as error:
            status = f"failed: {error}"
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(lines[-(8 if status == "ok" else 40) :]), flush=True)
    outcome = Outcome(step.name, status, f"{time.monotonic() - start:.0f}", f"{at:.0f}", summary(lines))
    record(outcome, results / "steps.csv")
    keep_logs(results)
    return outcome


def run_group(command: list[str], seconds: float, environment: dict[str, str], log: IO[str]) -> int:
    """Exit status of a command that is ended, with all that it started, after `seconds` or when this one is."""
    limited = ["timeout", "--kill-after=5", f"{seconds:.1f}", *command]
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


def record(outcome: Outcome, table: Path) -> None:
    is_new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(Outcome._fields)
        writer.writerow(outcome)


def keep_logs(results: Path) -> None:
    """Moves the logs, also of a call that was killed, into the archive."""
    with zipfile.ZipFile(results / "logs.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        for log in sorted(results.glob("*.log")):
            archive.write(log, log.name)
            log.unlink()


def number_of_logs(results: Path) -> int:
    archive = results / "logs.zip"
    return len(zipfile.ZipFile(archive).namelist()) if archive.exists() else 0


def shown(outcomes: list[Outcome]) -> str:
    rows = [(o.step, o.status, f"{o.seconds} s", f"at {o.at} s", o.note) for o in outcomes]
    widths = [max(len(row[n]) for row in rows) for n in range(4)]
    return "\n".join("  ".join([*(f"{c:{w}}" for c, w in zip(row, widths, strict=False)), row[4]]) for row in rows)


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benches.first_contact", description=__doc__, formatter_class=raw)
    parser.add_argument("--budget", type=float, default=BUDGETS[0], metavar="SECONDS", help="default: %(default)s")
    parser.add_argument(
        "--results", type=Path, default=Path("first-contact"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--earlier", type=Path, metavar="DIR", help="results of an earlier call to go on from")
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="these alone, done or not")
    parser.add_argument("--dry", action="store_true", help="on a CPU, in small")
    args = parser.parse_args(argv)
    if not (ROOT / "tests/gpu").is_dir():
        raise SystemExit("first_contact: expected a checkout of the repository, got an installed package")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs ends too
    results = args.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    if args.earlier:
        shutil.copytree(args.earlier, results, copy_function=shutil.copyfile, dirs_exist_ok=True)
    keep_logs(results)
    with tempfile.TemporaryDirectory() as work:
        todo = steps(results, Path(work), args.dry)
        if args.steps:
            if unknown := set(args.steps) - {step.name for step in todo}:
                parser.error(f"no such step: {', '.join(sorted(unknown))}")
            todo = [step._replace(every_call=True) for step in todo if step.name in args.steps]
        outcomes = run(todo, results, args.budget, ENVIRONMENT)
    print(f"\n{shown(outcomes) if outcomes else 'nothing was left to do'}\nresults: {results}")
    left = [step.name for step in todo if not step.every_call and not is_done(step, results)]
    print(f"left for another call: {', '.join(left) or 'nothing'}")
    return int(any(outcome.status != "ok" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
