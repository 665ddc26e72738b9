"""The package installs, imports and explains itself wherever it lands: no GPU, no Triton, no compiler, no checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import stub
from once import once

from fastrl.ops import backend

ROOT = Path(__file__).parent.parent
OPS = list(backend.NATIVE_BACKENDS)
UNTRACKED = shutil.ignore_patterns(".git", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def run(*command, env=None, cwd=None, check=True):
    result = subprocess.run(
        [str(c) for c in command], env={**os.environ, **(env or {})}, cwd=cwd, capture_output=True, text=True
    )
    output = result.stdout + result.stderr
    assert not check or result.returncode == 0, output
    return result.returncode, output


def python(code, **options):
    return run(sys.executable, "-c", code, **options)


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """A copy of the tracked files, so that builds leave nothing in the checkout."""
    tree = tmp_path_factory.mktemp("source") / "fastrl-kernels"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=UNTRACKED)
    return tree


@pytest.fixture(scope="module")
def wheel(source_tree, tmp_path_factory):
    """FASTRL_WHEEL, or one made from an sdist, as a packager would, without the CUDA kernels."""
    if "FASTRL_WHEEL" in os.environ:
        return Path(os.environ["FASTRL_WHEEL"])

    def make(folder):
        build = [sys.executable, "-m", "build", "--no-isolation"]
        run(*build, "--sdist", "-o", folder, cwd=source_tree)
        (sdist,) = folder.glob("*.tar.gz")
        shutil.unpack_archive(sdist, folder / "unpacked")
        (unpacked,) = (folder / "unpacked").iterdir()
        run(*build, "--wheel", "-o", folder, cwd=unpacked, env={"FASTRL_CUDA": "off"})

    (wheel,) = once(tmp_path_factory, "wheel", make).glob("*.whl")
    return wheel


@pytest.mark.wheel
def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.fullmatch(r"fastrl/_C\..*\.so", name) for name in names)
    for wanted in (
        "fastrl/py.typed",
        "fastrl/_C.pyi",
        "fastrl/ops/token_logprobs.py",
        "fastrl/benches/harness.py",
        "fastrl/recipes/demo.yaml",
    ):
        assert wanted in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "kernels/", "benches/", "csrc/")) for name in names)


@pytest.mark.wheel
def test_wheel_works_in_a_clean_environment_outside_the_checkout(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    clean = tmp_path / "venv/bin/python"
    run(clean, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    # Dependencies come from the running environment; path files in there (an editable fastrl) are not read.
    _, site = run(clean, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    (Path(site.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = (
        "import torch, fastrl, fastrl._C\n"
        "from fastrl.ops import token_logprobs\n"
        "x = token_logprobs(torch.zeros(2, 4), torch.tensor([0, 3]), backend='cpu')\n"
        "assert torch.allclose(x.exp(), torch.tensor(0.25)), x\n"
        "print(fastrl.__file__, fastrl.__version__)"
    )
    _, output = run(clean, "-c", code, cwd=tmp_path, env=NO_GPU)
    assert str(tmp_path) in output
    _, doctor = run(tmp_path / "venv/bin/fastrl", "doctor", cwd=tmp_path, env=NO_GPU)
    assert "token_logprobs" in doctor


CMAKE = """#!/bin/sh
# Configures in earnest, builds nothing: a dry run of the build's plan.
echo "$@" >> {log}
case "$1" in --build) exec {cmake} "$@" -- -n ;; *) exec {cmake} "$@" ;; esac
"""


@pytest.mark.wheel
def test_builds_again_in_another_environment(source_tree, tmp_path):
    """pip's build environments vanish: a second install from one checkout must not look for the first one's ninja."""
    tree, log = tmp_path / "checkout", tmp_path / "log"
    shutil.copytree(source_tree, tree, symlinks=True)
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")

    def build(name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "cmake").write_text(CMAKE.format(log=log, cmake=cmake))
        (folder / "cmake").chmod(0o755)
        if not (folder / "ninja").exists():
            (folder / "ninja").symlink_to(ninja)
        path = f"{folder}:{os.environ['PATH']}"
        run(sys.executable, "setup.py", "build_ext", cwd=tree, env={"PATH": path, "FASTRL_CUDA": "off"})
        return "--fresh" in log.read_text().splitlines()[-2]

    assert not build("first")
    assert not build("first")  # goes on with what is built
    shutil.rmtree(tmp_path / "first")
    assert build("second")
    assert not build("second")
    tree = tree.rename(tmp_path / "moved")
    assert build("second")


BLOCK = "import sys; sys.modules |= dict.fromkeys({blocked!r})\n"  # as if not installed


def test_import_needs_no_triton_no_gpu_no_transformers():
    code = BLOCK.format(blocked=("triton", "transformers", "peft", "datasets", "accelerate"))
    code += "import torch, fastrl.ops as ops\n"
    code += "print(ops.token_logprobs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), backend='cpu'))"
    python(code, env={"CUDA_VISIBLE_DEVICES": "", "CUDA_HOME": "", "PATH": "/nowhere"})  # no GPU, no nvcc


def test_without_the_native_module_everything_runs_on_reference():
    code = BLOCK.format(blocked=("fastrl._C",))
    code += (
        "import torch, fastrl.ops as ops\n"
        "print(ops.token_logprobs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)))\n"
        "try: ops.token_logprobs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), backend='cpu')\n"
        "except ValueError as error: print(error)\n"
        "from fastrl.cli import main\n"
        "sys.exit(main(['doctor']) or 0)"
    )
    _, output = python(code)
    assert "import of fastrl._C halted" in output and "reference" in output


def test_one_openmp_runtime():
    """torch and fastrl._C share one libgomp; two of them would oversubscribe the cores."""
    code = "import torch, fastrl._C, re\n"
    code += "print(len(set(re.findall(r'\\S*/libgomp\\S*', open('/proc/self/maps').read()))), 'runtimes')"
    assert "1 runtimes" in python(code)[1]


def test_forced_instruction_set():
    code = "import torch, fastrl._C as c; print(c.cpu_isa())"
    assert "baseline" in python(code, env={"FASTRL_CPU_ISA": "baseline"})[1]
    status, output = python(code, env={"FASTRL_CPU_ISA": "sse9"}, check=False)
    assert status != 0 and "FASTRL_CPU_ISA: expected" in output


def test_backend_requests(monkeypatch):
    import torch

    logits, ids = torch.zeros(1, 3), torch.zeros(1, dtype=torch.long)
    monkeypatch.setenv("FASTRL_BACKEND", "reference")
    assert backend.choose("token_logprobs", logits) == "reference"
    assert backend.choose("token_logprobs", logits, "cpu") == "cpu"
    monkeypatch.setenv("FASTRL_BACKEND", "quantum")
    with pytest.raises(ValueError, match="FASTRL_BACKEND: expected one of reference, cpu, triton, cuda, got 'quantum'"):
        backend.choose("token_logprobs", logits)
    with pytest.raises(ValueError, match="backend='cuda' is not possible: .*; possible here: reference, cpu"):
        from fastrl.ops import token_logprobs

        token_logprobs(logits, ids, backend="cuda")
    monkeypatch.setenv("FASTRL_BACKEND", "cuda")  # an op without such a kernel runs as ever
    assert backend.choose("ranking_loss", logits) == "cpu"
    with pytest.raises(ValueError, match="ranking_loss has no cuda kernel in this version; possible here: reference"):
        backend.choose("ranking_loss", logits, "cuda")
    monkeypatch.delenv("FASTRL_BACKEND")
    assert backend.choose("token_logprobs", logits.double()) == "reference"
    with pytest.raises(ValueError, match="float64"):
        backend.choose("token_logprobs", logits.double(), "cpu")


def build_in_place(tree, **env):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "lib", "--build-temp", "temp"]
    shutil.rmtree(tree / "temp", ignore_errors=True)
    return run(*command, cwd=tree, env=env, check=False)


def test_build_failures_are_clear(source_tree, tmp_path):
    status, output = build_in_place(source_tree, FASTRL_CUDA="maybe")
    assert status != 0 and "FASTRL_CUDA must be auto, on or off, got 'maybe'" in output
    bare = {"CUDACXX": "", "CUDA_HOME": str(tmp_path), "CUDA_PATH": "", "PATH": "/nowhere"}
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        status, output = build_in_place(source_tree, FASTRL_CUDA="on", **bare)
        assert status != 0 and "FASTRL_CUDA=on, but nvcc was not found" in output
    status, output = build_in_place(source_tree, FASTRL_CUDA="off", CXX=str(tmp_path / "no-such-compiler"))
    assert status != 0 and "no-such-compiler" in output
    old = tmp_path / "g++"
    old.write_text('#!/bin/sh\nexec /usr/bin/env g++ -U__GNUC__ -D__GNUC__=8 "$@"\n')
    old.chmod(0o755)
    status, output = build_in_place(source_tree, FASTRL_CUDA="off", CXX=str(old))
    assert status != 0 and re.search(r"needs\s+GCC >= 9 or Clang >= 12,\s+found\s+GNU\s+8", output), output
    other_platform = "import platform, sys, runpy; platform.system = lambda: 'Darwin'\n"
    other_platform += "sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py')"
    status, output = python(other_platform, cwd=source_tree, check=False)
    assert status != 0 and "only Linux is supported, this is Darwin" in output


def test_stub_matches_the_module():
    """fastrl/_C.pyi names the module's functions; tests/gpu looks at `cuda`."""
    import fastrl._C as native

    declared, found = stub.declared(), stub.found(native)
    if not native.has_cuda:
        declared = {name for name in declared if not name.startswith("cuda_")}
    assert found == declared


# Everything of an op that is a file of its own; CONTRIBUTING.md says what goes into each.
FILES = (
    "fastrl/ops/{op}.py",
    "fastrl/reference/{op}.py",
    "csrc/cpu/{kernel}.cpp",
    "csrc/cuda/{kernel}.cu",
    "kernels/{kernel}.py",
    "tests/ops/test_{op}.py",
    "tests/gpu/test_{op}.py",
    "benches/bench_{op}.py",
    "docs/ops/{op}.md",
)
LISTS = ("README.md", "tests/conformance/calls.py")  # that name every op


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_found_by_its_name(op):
    """Parallel names; groups live with the op that they extend, both heads share their kernels."""
    import fastrl.ops

    assert op in fastrl.ops.__all__ and "backend" in getattr(fastrl.ops, op).__kwdefaults__
    stem = {"lora_linear_group": "lora_linear"}.get(op, op)
    kernel = {"linear_logprobs": "linear_head", "linear_cross_entropy": "linear_head"}.get(stem, stem)
    for place in FILES:
        if "gpu" in place or "cuda" in place or place.startswith("kernels"):
            if "cuda" not in backend.NATIVE_BACKENDS[op]:
                continue
        path = place.format(op=stem, kernel=kernel)
        assert (ROOT / path).is_file(), path
        assert path.startswith("tests/") or place in (ROOT / "CONTRIBUTING.md").read_text(), f"CONTRIBUTING.md: {place}"
    for path in LISTS:
        assert stem in (ROOT / path).read_text(), path


def test_pickle_and_remote_code_are_not_used():
    for path in (ROOT / "fastrl").rglob("*.py"):
        text = path.read_text()
        assert "trust_remote_code=True" not in text and "import pickle" not in text, path
        assert "torch.load(" not in text or "weights_only=True" in text, path
