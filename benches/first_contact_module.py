"""Has a native module that runs on this GPU: the one that is here, or one built for it. Says what else is here."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = "nvidia-smi", "nvcc --version", "g++ --version", "compute-sanitizer --version"
HERE = "fastrl.benches.first_contact_module"


def problem(dry: bool) -> str:
    """Why the native kernels do not run here; empty if they do. Imports the module, so a process sees one alone."""
    import torch

    from fastrl.ops import backend

    if dry:
        return backend.NATIVE_ERROR
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if reason := backend.why_not("cuda", "gae", torch.device("cuda", 0), torch.float32):
        return reason
    outcome = backend._C.cuda_probe()
    return "" if outcome == "no error" else f"a first kernel says: {outcome}"


def is_right(options: list[str]) -> bool:
    return subprocess.run([sys.executable, "-m", HERE, "--check", *options], cwd=ROOT).returncode == 0


def build(dry: bool) -> None:
    """Warnings are no errors: the compilers may be newer than those that the code is known to please."""
    environment = {**os.environ, "FASTRL_CUDA": "auto" if dry else "on"}
    if not dry:
        environment |= {"FASTRL_CUDA_ARCHITECTURES": architecture(), "CUDAFLAGS": "-lineinfo"}  # for the sanitizers
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment)


def architecture() -> str:
    """This GPU's, as CMake calls it."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major == 9 else ''}-real"


def say_versions() -> None:
    for command in PROGRAMS:
        name, *options = command.split()
        if shutil.which(name):
            subprocess.run([name, *options])
    subprocess.run([sys.executable, "-m", "pip", "list", "--disable-pip-version-check"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="whether the module that is here is right")
    parser.add_argument("--dry", action="store_true", help="one for the CPU will do")
    args = parser.parse_args()
    if args.check:
        print(found := problem(args.dry) or "the native module runs")
        return int(found != "the native module runs")
    options = ["--dry"] if args.dry else []
    say_versions()
    if not is_right(options):
        build(args.dry)
        if not is_right(options):
            return 1
    subprocess.run([sys.executable, "-m", "fastrl.cli", "doctor", "--dtype", "bfloat16"], cwd=ROOT)
    print("the native module runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
