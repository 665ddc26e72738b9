"""PEFT's own tests on fused layers: what passes on PEFT's layers passes on ours, but for the rows of a list.

PEFT_SOURCE names a source tree or sdist of the installed version; of what its tests import, `parameterized`, `scipy`,
`diffusers` and `attrs` must be there:

    pip download --no-binary :all: --no-deps peft==0.21.2
    PEFT_SOURCE=peft-0.21.2.tar.gz pytest -m hosts tests/integrations/test_peft_suite.py

The small random models that its tests of decoders load from the hub are made from configurations, every layer that LoRA
makes is patched, and the kernels run at any size (`tests/support/peft_suite.py`). What else needs the hub, a GPU or
another quantisation library is skipped on both sides.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEVIATIONS = Path(__file__).with_name("peft_deviations.csv")
FILES = (
    "test_custom_models", "test_decoder_models", "test_initialization", "test_mixed", "test_lora_variants",
    "test_low_level_api",
)  # fmt: skip

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with PEFT's tests as a package, which they are in its repository but not in its sdist."""
    given = os.environ.get("PEFT_SOURCE")
    if not given:
        pytest.skip(f"PEFT_SOURCE: expected a source tree or sdist of peft {version('peft')}")
    folder = tmp_path_factory.mktemp("peft")
    tree = Path(given).resolve()
    if tree.is_file():
        with tarfile.open(tree) as archive:
            archive.extractall(folder, filter="data")
        (tree,) = folder.iterdir()
    shutil.copytree(tree / "tests", folder / "run" / "tests")
    (folder / "run" / "tests" / "__init__.py").touch()
    return folder / "run"


@pytest.mark.parametrize("file", FILES)
def test_peft_passes_its_own_tests_on_fused_layers(source, file):
    plain, fused = outcomes(source, file, ""), outcomes(source, file, "1")
    assert plain.keys() == fused.keys()
    passed = {test for test, (outcome, _) in plain.items() if outcome == "passed"}
    broken = {test for test in passed if fused[test][0] != "passed"}
    with DEVIATIONS.open(newline="") as rows:
        known = {row["test"] for row in csv.DictReader(rows) if row["test"].startswith(f"tests/{file}.py")}
    ran = [test for test in passed if fused[test][1]]
    print(f"{file}: {len(passed)} passed, {len(ran)} of them through the fused op; {sorted(broken)}")
    assert broken == known
    assert bool(ran) == (file != "test_lora_variants")  # which run PEFT's forward
    assert not any(calls for _, calls in plain.values())


def outcomes(source, file, fused):
    """{test: [outcome, calls of the fused op]}"""
    report = source / f"{file}{fused}.json"
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH"))))
    own = {"PEFT_SUITE_REPORT": str(report), "PEFT_SUITE_FUSED": fused, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "-p", "peft_suite", "-q", "--tb=no"]
    done = subprocess.run(
        [*command, f"tests/{file}.py"], cwd=source, env={**os.environ, **own}, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]  # 1: some tests fail
    return json.loads(report.read_text())
