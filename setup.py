"""Builds the native module fastrl._C with CMake and Ninja; everything else is in pyproject.toml.

FASTRL_CUDA=auto|on|off chooses the CUDA part: auto builds it when nvcc is found, never by looking for a GPU.
FASTRL_CUDA_ARCHITECTURES, in CMake's form ("90a-real", "80;90a"), builds for fewer or other GPUs than the default.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file())


def find_nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes), "nvcc"]
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def choose_nvcc():
    """The nvcc to build with, or None for a build without CUDA."""
    choice = os.environ.get("FASTRL_CUDA", "auto")
    if choice not in ("auto", "on", "off"):
        sys.exit(f"fastrl: FASTRL_CUDA must be auto, on or off, got {choice!r}")
    nvcc = None if choice == "off" else find_nvcc()
    if choice == "on" and nvcc is None:
        sys.exit("fastrl: FASTRL_CUDA=on, but nvcc was not found on PATH, in CUDACXX, CUDA_HOME or CUDA_PATH")
    return nvcc


def is_of_another_environment(build_dir, values):
    """Whether CMake's cache there names a make program, Python or pybind11 other than `values`, or another folder.

    pip builds in an environment that is gone afterwards, and what a cache names of it with it.
    """
    try:
        lines = (build_dir / "CMakeCache.txt").read_text().splitlines()
    except FileNotFoundError:
        return False
    cache = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith(("#", "//")))
    cached = {name.split(":")[0]: value for name, value in cache.items()}
    return any(cached.get(name) != value for name, value in values.items())


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        if platform.system() != "Linux":
            sys.exit(f"fastrl: only Linux is supported, this is {platform.system()}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        nvcc = choose_nvcc()
        environment = {
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        folders = {"CMAKE_HOME_DIRECTORY": str(ROOT / "csrc"), "CMAKE_CACHEFILE_DIR": str(build_dir)}
        configure = [
            "cmake", "-S", str(ROOT / "csrc"), "-B", str(build_dir), "-G", "Ninja",
            *(["--fresh"] if is_of_another_environment(build_dir, environment | folders) else []),
            *(f"-D{name}={value}" for name, value in environment.items() if value),
            f"-DFASTRL_CUDA={'ON' if nvcc else 'OFF'}",
            *(f"-D{flag}={os.environ.get(flag, 'OFF')}" for flag in ("FASTRL_WERROR", "FASTRL_SANITIZE")),
            f"-DFASTRL_OUTPUT_DIR={target.parent}",
            f"-DFASTRL_OUTPUT_NAME={target.name}",
        ]  # fmt: skip
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
            if architectures := os.environ.get("FASTRL_CUDA_ARCHITECTURES"):
                configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build_dir)], check=True)
        except FileNotFoundError as error:
            sys.exit(f"fastrl: {error.filename} is needed to build the kernels; pip install cmake ninja")
        except subprocess.CalledProcessError:
            sys.exit("fastrl: building the native kernels failed; the compiler's message is above")


setup(ext_modules=[Extension("fastrl._C", SOURCES)], cmdclass={"build_ext": CMakeBuild})
