"""One run in a folder at a time: whose lock counts, whose does not."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastrl.run import lock
from fastrl.run.lock import LOCK, move_lock, release_lock, take_lock


def written(folder, **holder):
    (folder / LOCK).write_text(json.dumps(holder))


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    made = take_lock(tmp_path / "a/run")
    with pytest.raises(
        ValueError, match=rf"expected no other run in it, got that of process {os.getpid()} on .* begun"
    ):
        take_lock(tmp_path / "a/run")
    release_lock(tmp_path / "a/run", made)
    assert list(tmp_path.iterdir()) == []  # the folders were the lock's
    take_lock(tmp_path / "a/run")


def test_folders_with_something_in_them_stay(tmp_path):
    made = take_lock(tmp_path / "a/run")
    (tmp_path / "a/notes.txt").write_text("mine")
    release_lock(tmp_path / "a/run", made)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["notes.txt"]


def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, capsys):
    code = "import sys; from pathlib import Path; from fastrl.run.lock import take_lock; take_lock(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    gone = json.loads((tmp_path / LOCK).read_text())["pid"]
    take_lock(tmp_path)
    assert f"the run of process {gone} is gone; its lock is taken over" in capsys.readouterr().out
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_another_process_with_the_number_of_one_that_is_gone(tmp_path):
    holder = {**lock._this_process(), "ticks": "1"}
    written(tmp_path, **holder)
    take_lock(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["ticks"] != "1"


def test_the_lock_of_another_machine_is_refused_with_advice(tmp_path):
    written(tmp_path, **{**lock._this_process(), "pid": 2**30, "host": "elsewhere"})
    with pytest.raises(ValueError, match=rf"on elsewhere, .*; if it is gone, delete {tmp_path}/run.lock"):
        take_lock(tmp_path)


def test_a_lock_that_was_never_written_counts_for_nothing(tmp_path):
    (tmp_path / LOCK).touch()
    take_lock(tmp_path)


def test_of_many_that_take_over_a_lock_one_has_it(tmp_path):
    def contend(folder):
        start.wait()
        try:
            take_lock(folder)
        except ValueError:
            return "refused"
        return "taken"

    start = threading.Barrier(8)
    with ThreadPoolExecutor(8) as threads:
        for i in range(100):
            folder = tmp_path / str(i)
            folder.mkdir()
            written(folder, **{**lock._this_process(), "ticks": "1"})
            assert sorted(threads.map(contend, [folder] * 8)) == ["refused"] * 7 + ["taken"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    written(tmp_path, **{**lock._this_process(), "ticks": "1"})
    take_lock(tmp_path)
    with pytest.raises(ValueError, match="expected no other run"):
        take_lock(tmp_path)


def test_a_lock_moves_with_its_run_unless_another_has_come(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    take_lock(old)
    new.mkdir()
    move_lock(old, new)
    assert not (old / LOCK).exists() and (new / LOCK).exists()
    take_lock(old)
    with pytest.raises(ValueError, match="expected no other run"):
        move_lock(old, new)
    move_lock(tmp_path, new)  # there is none


def test_a_lock_of_another_process_is_not_released(tmp_path):
    written(tmp_path, **{**lock._this_process(), "pid": 1})
    release_lock(tmp_path, [])
    assert (tmp_path / LOCK).exists()
