"""GB/s of capturing a live process: read into memory alone, and written to a RAM disk; whole and fragmented.

`every 2nd page`: each second page is untouched, the worst there is: a system call for each page.
Run as root: as another user the frames are hidden, which is less work.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ksmdist.capture import capture
from ksmdist.images.live import LiveImage
from ksmdist.images.proc import Machine

ROUNDS = 5
PAGE = 4096
TARGET = """
import mmap, sys
import numpy as np
pages, step, advice = map(int, sys.argv[1:])
memory = mmap.mmap(-1, pages * step * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(advice)
rows = np.frombuffer(memory, np.uint64).reshape(-1, 512)
for at in range(0, pages * step, step):
    rows[at] = at
print("ready", flush=True)
sys.stdin.read()
"""
SHAPES = {  # pages in steps of how many, and MADV_NOHUGEPAGE or MADV_HUGEPAGE
    "4 KiB pages": (1, 15),
    "huge pages": (1, 14),
    "every 2nd page": (2, 15),
}


def read(pid: int, machine: Machine) -> tuple[float, float, int]:
    """Seconds of the first look, and of reading; pages with content."""
    image = LiveImage(pid, machine)
    began = time.perf_counter()
    image.look()
    looked = time.perf_counter()
    pages = 0
    for _ in image.batches(0, image.info.pages):
        pages = image.rows
    done = time.perf_counter()
    image.close()
    return looked - began, done - looked, pages


def main(gib: float, scratch: Path) -> None:
    machine = Machine.here()
    print(f"{'shape':<16}{'GB':>6}{'look ms':>10}{'read GB/s':>11}{'capture GB/s':>14}")
    for shape, (step, advice) in SHAPES.items():
        arguments = [str(int(gib * (1 << 30)) // PAGE), str(step), str(advice)]
        target = subprocess.Popen(
            [sys.executable, "-c", TARGET, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert target.stdout is not None
        target.stdout.readline()
        looks, reads, captures, pages = [], [], [], 0
        for number in range(ROUNDS):
            look, seconds, pages = read(target.pid, machine)
            looks.append(look * 1e3)
            reads.append(pages * PAGE / seconds / 1e9)
            began = time.perf_counter()
            capture([target.pid], scratch / str(number))
            captures.append(pages * PAGE / (time.perf_counter() - began) / 1e9)
            shutil.rmtree(scratch / str(number))
        target.communicate()
        middle = [statistics.median(values) for values in (looks, reads, captures)]
        print(f"{shape:<16}{pages * PAGE / 1e9:>6.2f}{middle[0]:>10.1f}{middle[1]:>11.2f}{middle[2]:>14.2f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else "/dev/shm") as directory:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else 2, Path(directory))
