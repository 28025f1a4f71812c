"""Runs that something happens to: images of several tasks, and what to do in a task of a scan or a merge."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ksmdist import stages
from ksmdist.digests import Digester
from ksmdist.settings import Settings

from .conftest import PAGE, ZERO, page

SETTINGS = Settings(shard_pages=4, ranges=4)
TASKS = 8


def images(folder: Path, count: int = 2) -> list[Path]:
    """`count` raw images of 16 pages: 8 tasks with SETTINGS if there are two."""
    made = []
    for number in range(count):
        pages = [ZERO, *(page(n % 5 + 1) for n in range(9)), *(page(100 * number + n) for n in range(5)), page(7)]
        path = folder / f"image{number}.raw"
        path.write_bytes(b"".join(pages))
        assert path.stat().st_size == 16 * PAGE
        made.append(path)
    return made


def reader(before: Callable[[stages.Scan], None]) -> stages.Reader:
    """stages.read_shards, with something before it; pickled by value, for workers."""

    def read(names: Sequence[str], settings: Settings, digester: Digester, scan: stages.Scan) -> Any:
        before(scan)
        return stages_read(names, settings, digester, scan)

    stages_read = stages.read_shards
    return read


def once(flag: Path, number: int, then: Callable[[], None]) -> Callable[[stages.Scan], None]:
    """Do `then` the first time that task `number` is read, on whichever worker."""

    def before(scan: stages.Scan) -> None:
        if scan.task.number == number:
            try:
                os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            then()

    return before


def counted(log: Path) -> Callable[[stages.Scan], None]:
    """Note every task that is read."""

    def before(scan: stages.Scan) -> None:
        with open(log, "a", encoding="ascii") as sink:
            sink.write(f"{scan.task.number}\n")

    return before


def die() -> None:
    """End this process as the out-of-memory killer would."""
    os.kill(os.getpid(), signal.SIGKILL)


def driver(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A driver in a process of its own that runs `code`, with ksmdist's modules and `arguments` as argv[1:]."""
    head = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from ksmdist import checkpoint, cli, pipeline, stages, store\n"
        "from ksmdist.settings import Settings\n"
    )
    environment = {**os.environ}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something is true; fails after so many seconds."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)
