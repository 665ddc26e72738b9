"""Ctrl-C and SIGTERM ask a run to stop at its next step; a second Ctrl-C ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A run stopped because it was asked to, after it had saved; `status` is the process's exit status."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.status = 128 + number


class StopSignals:
    """Notes the first SIGINT or SIGTERM in `received` from `watch` to `restore`; a later SIGINT raises
    KeyboardInterrupt, and one after that kills the process.

    Only the main thread is told of signals; in another one nothing is noted.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def watch(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = number
            what = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            text = f"\n{what}: saving after this step, then ending; Ctrl-C ends at once\n"
            os.write(2, text.encode())  # print may be in the middle of another line
        elif number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
