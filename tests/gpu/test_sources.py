"""Rules that hold for the text of every GPU kernel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = [*sorted((ROOT / "kernels").glob("*.py")), *sorted((ROOT / "csrc/cuda").glob("*.cu*"))]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_grids_have_one_dimension(path):
    """T12: x takes 2^31 blocks, y and z 65,535; along these go at most tiles of a weight's columns and ranks."""
    text = path.read_text()
    if path.name == "lora_linear.py":
        grids = re.findall(r"lora_\w+_kernel, \(([^,]*),(.*)\), \w+,$", text, re.MULTILINE)
        assert len(grids) == 5 and not any("rows" in others for _, others in grids)
        return
    for other in ("blockIdx.y", "blockIdx.z", "program_id(1)", "program_id(2)", "program_id(axis=1)"):
        assert other not in text


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_nothing_is_tuned_at_run_time(path):
    """T14: trial runs would repeat in-place kernels, and their timing would choose the result's bits."""
    assert "autotune" not in path.read_text()


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_no_block_is_as_large_as_the_vocabulary(path):
    """A block of next_power_of_2(vocabulary) spills its registers and is compiled anew for every size: blocks are
    constants, only ranks are rounded up.
    """
    text = path.read_text()
    assert set(re.findall(r"next_power_of_2\((.*?)\)", text)) <= {"rank"} and "bit_length" not in text


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_sums_have_a_fixed_order(path):
    """T15, pitfall 44: an atomic sum of floats depends on who comes first."""
    assert "atomicAdd" not in path.read_text() and "atomic_add" not in path.read_text()
