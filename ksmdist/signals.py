"""Signals that must not cut short what puts things back, KSM's knobs, processes that were stopped; and core dumps,
which other signals leave."""

from __future__ import annotations

import os
import resource
import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Signals", "leave_no_core"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def leave_no_core() -> None:
    """Have no core dump written of this process and those it starts: it would hold pages of images, and seeds.

    The soft RLIMIT_CORE becomes 1, or 0 where the hard limit is 0. A dump goes to a file only where the limit is a page
    or more; to a collector, a pipe in core_pattern, always but where it is exactly 1 (fs/coredump.c, core(5)).
    Not PR_SET_DUMPABLE: /proc/self/pagemap and mem would be root's (proc(5)), and capture reads them.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (1 if hard else 0, hard))


class Signals:
    """Signals that end a process as exceptions, the first of them only, for the time of a block.

    Handlers and no mask: in a process with threads a masked signal just goes to another one.
    """

    def __init__(self) -> None:
        self._handlers: dict[signal.Signals, Any] = {}
        self._holding = self._raised = False
        self._waiting: int | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._waiting is not None and not self._raised:
            os.kill(os.getpid(), self._waiting)

    def hold(self) -> None:
        """From now on signals wait for the end."""
        self._holding = True

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._waiting = number
            return
        self._holding = self._raised = True
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
