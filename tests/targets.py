"""Live processes that do what a test says, and their images."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ksmdist import images
from ksmdist.capture import Captured
from ksmdist.tables import PAGE_FLAGS

PAGE = os.sysconf("SC_PAGE_SIZE")
NOHUGE, HUGE, MERGEABLE, UNMERGEABLE, GUARD = 15, 14, 12, 13, 102

linux = pytest.mark.skipif(not os.path.exists("/proc/self/pagemap"), reason="needs Linux's /proc/PID/pagemap")
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: frame numbers, other users' processes, cgroups")

PRELUDE = f"""
import ctypes, json, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
P, told, kept = {PAGE}, {{}}, []

def at(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))

def anon(name, pages, *advice):
    memory = mmap.mmap(-1, pages * P, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for number in advice:
        memory.madvise(number)
    told[name] = at(memory)
    kept.append(memory)
    return memory

def aligned(name, mib, *advice):
    memory = anon(name, (mib + 2) << 8, *advice)
    told[name] = -(-at(memory) // (2 << 20)) * (2 << 20)
    return memory, told[name] - at(memory)

def write(memory, page, word, count=1):
    for number in range(page, page + count):
        memory[number * P : (number + 1) * P] = word.to_bytes(8, "little") * (P // 8)

def touch(memory, first, last):
    for page in range(first, last):
        memory[page * P]

def ready():
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        exec(line)
        print("done", flush=True)
"""


class Target:
    """A process that has done what `code` says, and waits for more."""

    def __init__(self, code: str, **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", PRELUDE + code + "\nready()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )
        self.pid = self.process.pid
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.told: dict[str, int] = json.loads(line)
        self._settled()

    def _settled(self) -> None:
        """Wait until it sleeps and faults no more: to print, and to begin to read, takes a page or two."""
        before, until = "", time.monotonic() + 5
        while time.monotonic() < until:
            state, *fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            faults = fields[6]  # minflt, proc_pid_stat(5)
            if state == "S" and faults == before:
                return
            before = faults
            time.sleep(0.01)

    def do(self, line: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def memory(self) -> dict[str, object]:
        """What a capture must not change, by other ways than the capture's."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found: dict[str, object] = {
            name: re.findall(rf"^{name}:\s+(\d+)", status, re.M) for name in ("VmRSS", "RssAnon", "VmPTE", "VmSwap")
        }
        smaps = Path(f"/proc/{self.pid}/smaps").read_text()
        found["smaps"] = re.findall(r"^(?:Rss|KSM|Anonymous|AnonHugePages):\s+(\d+)", smaps, re.M)
        return found

    def frames(self, name: str, pages: int) -> list[int]:
        with open(f"/proc/{self.pid}/pagemap", "rb", buffering=0) as file:
            file.seek(self.told[name] // PAGE * 8)
            return [entry & (1 << 55) - 1 for entry in np.frombuffer(file.read(pages * 8), np.uint64).tolist()]


Start = Callable[..., Target]


class Rows:
    """A captured image, by address."""

    def __init__(self, captured: Captured) -> None:
        image = images.open_image(str(captured.path), PAGE)
        self.info = image.info
        self.rows: dict[int, tuple[bytes | None, int, int | None, str]] = {}
        for item in image.batches(0, image.info.pages):
            assert isinstance(item, pa.RecordBatch)
            columns = (item.column(name).to_pylist() for name in ("address", "content", "flags", "frame", "region"))
            for address, content, flags, frame, region in zip(*columns, strict=True):
                self.rows[address] = (content, flags, frame, region)
        image.close()

    def at(self, address: int, pages: int) -> list[tuple[bytes | None, int, int | None, str]]:
        return [self.rows[a] for a in range(address, address + pages * PAGE, PAGE) if a in self.rows]

    def flags(self, address: int, pages: int) -> list[set[str]]:
        return [{n for n, bit in PAGE_FLAGS.items() if row[1] & bit} for row in self.at(address, pages)]

    def passed_over(self, region: str) -> dict[str, int]:
        return {reason: pages for name, reason, pages in self.info.passed_over if name == region}
