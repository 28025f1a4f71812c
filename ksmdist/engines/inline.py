"""The engine that runs everything in this process: the reference, and the fastest for small inputs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress

from ksmdist.engines.base import Machines, Result, Stage, Task

__all__ = ["InlineEngine"]

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container finds its limit (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst)."""


def _memory() -> int:
    """Bytes of memory that this process can use: the machine's, or its container's."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _LIMITS:
        with suppress(OSError, ValueError), open(path, encoding="ascii") as source:
            memory = min(memory, int(source.read()))
    return memory


class InlineEngine:
    """Runs one task after the other, or one in a thread for each CPU where they let go of Python's lock.

    Hashing a page holds Python's lock and sorting does not, so threads win only for the merge.
    """

    name = "inline"

    def machines(self) -> Machines:
        """This one."""
        cpus = len(os.sched_getaffinity(0))
        return Machines(frozenset({socket.gethostname(), "localhost"}), cpus, _memory() // cpus)

    def run(self, stage: Stage[Task, Result], tasks: Sequence[Task], on_done: Callable[[int, Result], None]) -> None:
        """See Engine.run."""
        if not stage.threads or len(tasks) < 2:
            for number, task in enumerate(tasks):
                on_done(number, stage.function(task))
            return
        with ThreadPoolExecutor(min(len(tasks), self.machines().cpus)) as pool:
            running = {pool.submit(stage.function, task): number for number, task in enumerate(tasks)}
            try:
                for future in as_completed(running):
                    on_done(running.pop(future), future.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def close(self) -> None:
        """Nothing is held."""
