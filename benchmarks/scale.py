"""From 4 GiB to 1 TiB of pages through combine, split, merge and count on one machine: time, memory, disk.

Only reading and hashing are replaced: a task makes the digests that a guest's pages might have (35 % zero, a
quarter out of a library that all guests draw on, the popular ones most, 5 % repeated inside, the rest unique),
and all that follows is the real flow, on Ray with a worker for each CPU. Peaks are the kernel's (VmHWM) of the
driver and of every worker, watched from outside; CPU time is theirs too, making the digests apart.

    python benchmarks/scale.py SCRATCH [MILLIONS ...]     1 million = 2**20 pages = 4 GiB
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from ksmdist import classes, pipeline, roster, stages
from ksmdist.columns import arrow
from ksmdist.digests import Digester
from ksmdist.images import ImageInfo
from ksmdist.scanned import Mapped, Opened, Scanned
from ksmdist.settings import Settings
from ksmdist.tables import CLASSES, KINDS, SHARD_CONTENT

MILLIONS = (1, 4, 16, 64, 256)
IMAGE_PAGES = 1 << 20
ZERO, SHARED, REPEATED = 35, 25, 5  # of 100


def mixed(number: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood 2014): uint64[n] that look random, a function of uint64[n]."""
    word = number + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def read(
    region_names: Sequence[str], settings: Settings, digester: Digester, scan: stages.Scan
) -> tuple[Mapped, pa.Table, list[pa.Table]]:
    """In the place of stages.read_shards."""
    began = time.process_time()
    found: dict[int, Scanned] = {}
    tables = []
    library = np.uint64(max(1, scan.images[scan.task.shards[0].image].info.nbytes * SHARED // 100 // 8))
    for shard in scan.task.shards:
        n = shard.pages
        zero, shared, repeated = (n * part // 100 for part in (ZERO, SHARED, REPEATED))
        rng = np.random.default_rng([shard.image, shard.start])
        chosen = (rng.random(shared) ** 3 * float(library)).astype(np.uint64)  # the low numbers most often
        own = (np.uint64(shard.image) << np.uint64(32)) + np.uint64(shard.start)
        unique = n - zero - shared
        alone = (np.uint64(1) << np.uint64(62)) + own + np.arange(unique, dtype=np.uint64)
        alone[:repeated] = alone[repeated : 2 * repeated]
        number = np.concatenate((chosen, alone))
        frames = -(-zero // 512)  # zero pages come first, a row for each frame of the size of a huge page
        words = np.empty((frames + len(number), 2), ">u8")
        words[:frames] = np.frombuffer(digester.of_word(0, settings.page_size), ">u8")
        words[frames:, 0], words[frames:, 1] = mixed(number), mixed(number ^ np.uint64(0x5555))
        rows = len(words)
        pages = np.ones(rows, np.int64)
        pages[:frames] = np.minimum(512, zero - 512 * np.arange(frames))
        place = np.concatenate((512 * np.arange(frames), zero + np.arange(len(number)))).astype(np.uint64)
        columns = [
            arrow(words.view(np.uint8).reshape(-1, 16)),
            arrow(np.full(rows, shard.image, np.int32)),
            arrow(np.zeros(rows, np.int16)),
            arrow(np.ones(rows, bool)),
            arrow(np.zeros(rows, np.int64)),
            arrow(np.zeros(rows, bool)),
            arrow(np.zeros(rows, bool)),
            arrow(pages),
            arrow((np.uint64(shard.start) + place) * np.uint64(4096)),
            arrow(((pages - 1) + (place % 512).astype(np.int64)).clip(0, 511).astype(np.uint16)),
            arrow(np.full(rows, -1, np.int32)),
            pa.nulls(rows, pa.uint64()),
            arrow(np.zeros(rows, np.uint64), null=np.arange(rows) >= frames),
        ]
        fields = [pa.array(c) if isinstance(c, np.ndarray) else c for c in columns]
        tables.append(
            pa.Table.from_arrays(
                [c.cast(f.type) if c.type != f.type else c for c, f in zip(fields, SHARD_CONTENT.schema, strict=True)],
                schema=SHARD_CONTENT.schema,
            )
        )
        scanned = found.setdefault(shard.image, Scanned.nothing(scan.images[shard.image].info, settings))
        scanned.classes[CLASSES.index("zero")] += zero
        scanned.kinds[KINDS.index("zero")] += zero
        scanned.kinds[KINDS.index("other")] += n - zero
        scanned.colors[0, 0] += zero
    made = time.process_time() - began
    with open(os.environ["KSMDIST_SCALE_MADE"], "a", encoding="ascii") as log:
        log.write(f"{made}\n")
    return Mapped(found, [], scan.task.pages), classes.combine(tables, settings.page_size), []


def drive(millions: int, out: Path) -> None:
    """One run in this process, which is the driver."""
    count = max(1, (millions << 20) // IMAGE_PAGES)
    pages = (millions << 20) // count
    infos = [
        ImageInfo(f"made-{n:05d}", "raw", "guest", 4096, pages, 0, millions << 20, "", image_id=f"made-{n:05d}")
        for n in range(count)
    ]
    opened = [Opened(info.image_id, "", info) for info in infos]
    roster.look = lambda runner, sources, settings, strict: (opened, [])
    stages.read_shards = read
    pipeline.run(["made-up"], out, engine="ray")


def look(driver: int, seen: dict[int, tuple[str, int, float]]) -> None:
    """Note VmHWM, in KiB, and CPU seconds of the driver and of every worker."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            status = Path(f"/proc/{entry}/status").read_text(encoding="ascii", errors="replace")
            times = Path(f"/proc/{entry}/stat").read_text(encoding="ascii", errors="replace").rsplit(")", 1)[1].split()
            command = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if "VmHWM" not in fields:
            continue
        kind = "driver" if int(entry) == driver else "worker" if command.startswith("ray::") else ""
        if kind:
            cpu = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
            seen[int(entry)] = (kind, int(fields["VmHWM"].split()[0]), cpu)


def measure(millions: int, scratch: Path) -> None:
    """Run in a process of its own, watch it, and print a row."""
    out, made = scratch / "run", scratch / "made"
    for old in (out, scratch / "run.partial"):
        shutil.rmtree(old, ignore_errors=True)
    made.write_text("")
    environment = {**os.environ, "KSMDIST_SCALE_MADE": str(made)}
    driver = subprocess.Popen([sys.executable, __file__, "--drive", str(millions), str(out)], env=environment)
    seen: dict[int, tuple[str, int, float]] = {}
    work = 0
    looked = 0.0
    while driver.poll() is None:
        look(driver.pid, seen)
        if time.monotonic() - looked > 5:
            looked = time.monotonic()
            with suppress(OSError):  # a file that has just gone
                work = max(work, sum(path.stat().st_size for path in scratch.rglob("work/*.arrow")))
        time.sleep(0.2)
    if driver.returncode:
        raise SystemExit(f"the run of {millions} million pages failed")
    run = json.loads((out / "run.json").read_text())
    making = sum(map(float, made.read_text().split()))
    timings = run["timings"]
    pages = millions << 20
    largest = {kind: max(kib for k, kib, _ in seen.values() if k == kind) / 1024 for kind in ("driver", "worker")}
    used = {kind: sum(cpu for k, _, cpu in seen.values() if k == kind) for kind in ("driver", "worker")}
    spent = used["driver"] + used["worker"] - making
    print(
        f"| {millions} | {run['settings']['ranges']} | {run['engine']['tasks']} | {spent:.1f} | {used['driver']:.1f} | "
        f"{spent / pages * 1e9:.0f} | {timings['scan_s']:.1f} | {timings['merge_s']:.1f} | {largest['worker']:.0f} | "
        f"{largest['driver']:.0f} | {work / (1 << 30):.2f} |",
        flush=True,
    )
    shutil.rmtree(out)


if __name__ == "__main__":
    if sys.argv[1] == "--drive":
        drive(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        print(
            "| million pages | ranges | tasks | CPU s | driver's | CPU ns a page | scan, s | merge and count, s "
            "| largest worker, MiB | driver, MiB | disk meanwhile, GiB |\n" + "|---" * 11 + "|",
            flush=True,
        )
        for size in map(int, sys.argv[2:]) if len(sys.argv) > 2 else MILLIONS:
            measure(size, Path(sys.argv[1]))
