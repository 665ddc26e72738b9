"""Every CUDA kernel compiled for every device that the module is built for: registers, stack, spills, shared memory.

`pytest -m ptxas`; needs nvcc, and no GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gpu import budgets
from gpu.budgets import Usage

ROOT = Path(__file__).parents[2]
BUILT_FOR = re.compile(r"set\(CMAKE_CUDA_ARCHITECTURES (.*)\)")
ARCHS = re.findall(r"\d+a?", BUILT_FOR.search((ROOT / "csrc/CMakeLists.txt").read_text())[1])  # type: ignore[index]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def compile_for_device(source: Path, arch: str, output: Path) -> str:
    """What ptxas says about the kernels of `source`; nvcc's warnings are errors."""
    target = f"arch=compute_{arch},code=sm_{arch}"
    flags = ["-std=c++17", "-O3", "-gencode", target, "-Xptxas", "-v", "-Werror", "all-warnings", "-cubin"]
    done = subprocess.run([NVCC, *flags, "-o", output, source], capture_output=True, text=True)
    assert done.returncode == 0, f"{source.name} sm_{arch}: {done.stderr}"
    return done.stderr


def parse(log: str) -> list[Usage]:
    """ptxas prints three lines on each kernel: its name, stack and spills, registers and memory."""
    usages, name, arch, stack, spills = [], "", "", 0, 0
    for line in log.splitlines():
        if found := ENTRY.search(line):
            name, arch = found.groups()
        elif found := STACK.search(line):
            stack, spills = int(found[1]), int(found[2]) + int(found[3])
        elif found := USED.search(line):
            shared = int(found[2] or 0)
            usages.append(Usage("nvcc", short_name(name), arch, int(found[1]), stack, spills, shared))
    return usages


def short_name(mangled: str) -> str:
    """`gae_kernel<float, 4>` for a mangled name; without the namespaces and the arguments."""
    filter_ = shutil.which("c++filt")
    if filter_ is None:
        return mangled
    name = subprocess.run([filter_, mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").replace("fastrl::cuda::", "").replace("fastrl::", "")
    name = re.sub(r"\((?:int|unsigned int|bool|long)\)", "", name.removeprefix("void "))
    return name.split("(")[0]


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6fastrl4cuda10gae_kernelIfLi4EEEvPT_' for 'sm_90a'
ptxas info    : Function properties for _ZN6fastrl4cuda10gae_kernelIfLi4EEEvPT_
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes stack, 128 bytes smem
ptxas info    : Compiling entry function '_ZN6fastrl4cuda12other_kernelEv' for 'sm_90a'
ptxas info    : Function properties for _ZN6fastrl4cuda12other_kernelEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
"""


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="names need c++filt")
def test_the_log_is_understood(tmp_path):
    usages = parse(LOG)
    assert usages == [
        Usage("nvcc", "gae_kernel<float, 4>", "sm_90a", 40, 16, 12, 128),
        Usage("nvcc", "other_kernel", "sm_90a", 10, 0, 0, 0),
    ]
    table = tmp_path / "budgets.csv"
    table.write_text("compiler,kernel,arch,registers,shared,notes\nnvcc,gae_kernel<*>,sm_90a,40,128,\n")
    spilled, unknown = budgets.problems(usages, table)
    assert "16 bytes of stack, 12 bytes spilled" in spilled
    assert unknown == "no budget, line to add: nvcc,other_kernel*,*,16,0,"
    tidy = usages[0]._replace(stack=0, spills=0)
    assert budgets.problems([tidy], table) == []
    (over,) = budgets.problems([tidy._replace(shared=132)], table)
    assert "40 registers and 132 bytes of shared memory, budget 40 and 128" in over
    assert budgets.problems([tidy._replace(registers=51)], table)
    with pytest.warns(UserWarning, match="50 registers .* budget 40"):
        assert budgets.problems([tidy._replace(registers=50)], table) == []


@pytest.mark.ptxas
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_kernels_keep_their_budgets(tmp_path):
    jobs = [(source, arch, tmp_path / f"{source.stem}.{arch}.cubin") for source in SOURCES for arch in ARCHS]
    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(lambda job: compile_for_device(*job), jobs))
    usages = [usage for log in logs for usage in parse(log)]
    print(budgets.report(usages))
    assert {usage.arch for usage in usages} == {f"sm_{arch}" for arch in ARCHS} and len(ARCHS) >= 5
    assert not (wrong := budgets.problems(usages)), "\n".join(wrong)
