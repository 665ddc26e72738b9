"""One run at a time in a folder: `run.lock` names the process that writes there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

LOCK = "run.lock"


def take_lock(folder: Path) -> list[Path]:
    """Make the folder, if it is not there, and lock it; the folders that were made.

    A lock whose process is gone is taken over. Of a process on another machine nothing is known: its lock is refused.

    Raises:
        ValueError: another run holds the lock.
        OSError: the disk is full or read-only; nothing is left there.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not _write_lock(folder / LOCK):
            _remove_if_stale(folder / LOCK)
    except OSError:
        _remove_empty(made)
        raise
    return made


def release_lock(folder: Path, made: list[Path]) -> None:
    """Remove this process's lock, and the folders that `take_lock` made if nothing is in them."""
    if _read(folder / LOCK).get("pid") == os.getpid():
        (folder / LOCK).unlink(missing_ok=True)
    _remove_empty(made)


def move_lock(source: Path, target: Path) -> None:
    """Move a lock from one folder to another, unless a run has just locked that.

    Raises:
        ValueError: another run holds the target's lock.
    """
    if not (source / LOCK).exists():
        return
    try:
        os.link(source / LOCK, target / LOCK)
    except FileExistsError as error:
        raise _taken(target / LOCK, _read(target / LOCK)) from error
    except OSError:  # no hard links there
        os.replace(source / LOCK, target / LOCK)
        return
    (source / LOCK).unlink()


def _write_lock(path: Path) -> bool:
    """Whether the file could be made and says that it is this process's."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        try:
            _hold(file)  # one that takes it for stale does so before or after this, and is seen below
            file.write(json.dumps(_this_process()) + "\n")
            file.flush()
        except OSError:
            path.unlink()
            raise
        return _is_at(file, path)  # else it was taken for a stale one before it said whose it is


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _remove_if_stale(path: Path) -> None:
    """Remove the lock of a process that is gone; one of two that want to does so."""
    try:
        with path.open(encoding="utf-8") as file:
            _hold(file)
            if not _is_at(file, path):
                return  # another one has taken it over
            holder = _read(path)
            if not _is_gone(holder):
                raise _taken(path, holder)
            path.unlink()
            print(f"{path}: the run of process {holder.get('pid', 'unknown')} is gone; its lock is taken over")
    except FileNotFoundError:
        return


def _hold(file: IO[str]) -> None:
    """Wait until no other process holds the file; where the file system has no such locks, go on."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _taken(path: Path, holder: dict[str, Any]) -> ValueError:
    here = holder.get("host") == socket.gethostname()
    advice = "wait for it, end it, or name another output"
    if not here:
        advice += f"; if it is gone, delete {path}"
    return ValueError(
        f"output: {path.parent}: expected no other run in it, got that of process {holder.get('pid')} on"
        f" {holder.get('host')}, begun {holder.get('begun')}: {advice}"
    )


def _this_process() -> dict[str, Any]:
    begun = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": socket.gethostname(), "begun": begun, "ticks": _ticks(os.getpid())}


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the process is known to have ended; another one may have its number since."""
    pid = holder.get("pid")
    if not isinstance(pid, int):  # killed before it said who it is
        return True
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return _ticks(pid) != holder.get("ticks")


def _ticks(pid: int) -> str:
    """When the process began, in ticks since the machine did; "" where that is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
