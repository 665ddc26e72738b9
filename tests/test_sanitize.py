"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `pytest -m sanitize`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from once import once

ROOT = Path(__file__).parent.parent


def sanitizer_runtimes():
    """The shared runtimes that must be loaded before Python; empty where the compiler has none."""
    compiler = os.environ.get("CXX", "g++")
    paths = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        path = Path(found.stdout.strip())
        if found.returncode or not path.is_absolute():
            return []
        paths.append(str(path.resolve()))
    return paths


@pytest.fixture(scope="module")
def sanitized_tree(tmp_path_factory):
    def build(tree):
        ignore = shutil.ignore_patterns(".git", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=ignore, dirs_exist_ok=True)
        env = {**os.environ, "FASTRL_SANITIZE": "ON", "FASTRL_CUDA": "off"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        result = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    return once(tmp_path_factory, "sanitized", build)


@pytest.mark.sanitize
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_op_tests_pass_under_the_sanitizers(sanitized_tree, isa):
    import fastrl._C as native

    runtimes = sanitizer_runtimes()
    if not runtimes:
        pytest.skip("the compiler has no shared sanitizer runtimes")
    levels = ["baseline", "avx2", "avx512"]
    if levels.index(isa) > levels.index(native.cpu_isa()):
        pytest.skip(f"this CPU has no {isa}")
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep memory until exit
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "FASTRL_CPU_ISA": isa,
        "PYTHONPATH": str(sanitized_tree),
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
    }
    # What traces, compiles or differentiates once more calls no kernel in a way that other tests do not.
    tests = [sys.executable, "-m", "pytest", "tests/ops", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
    tests += ["-k", "not compiles and not opcheck and not gradcheck"]
    result = subprocess.run(tests, cwd=sanitized_tree, env=env, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
