"""Peak memory of Ray's driver at 1, 4 and 16 million pages: the real flow with made-up digests.

Only reading and hashing are replaced: each shard makes a sorted table of random digests, 40 % of
its pages zero, as large as the one that a real shard of unique pages would send.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ksmdist import classes, pipeline, tree
from ksmdist.columns import arrow
from ksmdist.digests import fill_digest
from ksmdist.images import ImageInfo
from ksmdist.settings import Settings
from ksmdist.shards import Shard
from ksmdist.tables import CLASSES, KINDS, SHARD_CONTENT

MILLIONS = (1, 4, 16)


def scan(
    infos: Sequence[ImageInfo], region_names: Sequence[str], settings: Settings, ranges: int, group: tuple[Shard, ...]
) -> tuple[pipeline._Mapped, list[pa.Table]]:
    """In the place of pipeline._scan."""
    found: dict[int, pipeline._Scanned] = {}
    tables = []
    for shard in group:
        n = shard.pages
        zero = n * 40 // 100
        rng = np.random.default_rng(shard.start)
        digest = rng.integers(0, 256, (n - zero + 1, 16), np.uint8)
        digest[0] = np.frombuffer(fill_digest(0, settings.page_size), np.uint8)
        pages = np.ones(len(digest), np.int64)
        pages[0] = zero
        columns = [
            arrow(digest),
            arrow(np.full(len(digest), shard.image, np.int32)),
            arrow(np.zeros(len(digest), np.int16)),
            arrow(np.ones(len(digest), bool)),
            arrow(np.zeros(len(digest), bool)),
            arrow(pages),
            arrow(np.arange(len(digest), dtype=np.uint64)),
            arrow(np.full(len(digest), -1, np.int32)),
            pa.nulls(len(digest), pa.uint64()),
            arrow(np.zeros(len(digest), np.uint64), null=np.arange(len(digest)) > 0),
        ]
        tables.append(pa.Table.from_arrays(columns, schema=SHARD_CONTENT.schema))
        scanned = found.setdefault(shard.image, pipeline._Scanned.nothing(infos[shard.image], settings))
        scanned.classes[CLASSES.index("zero")] += zero
        scanned.kinds[KINDS.index("zero")] += zero
        scanned.kinds[KINDS.index("other")] += n - zero
    mapped = pipeline._Mapped(found, [], sum(shard.pages for shard in group))
    return mapped, tree.split(classes.combine(tables), ranges)


def drive(millions: int) -> None:
    """One run in this process, which is the driver; prints its peak memory in MiB."""
    info = ImageInfo("made-up", "raw", "guest", 4096, millions << 20, 0, millions << 32, "")
    pipeline._opened = lambda paths, settings: [("made-up", info, ())]
    pipeline._scan = scan
    with tempfile.TemporaryDirectory() as scratch:
        pipeline.run(["made-up"], Path(scratch) / "run", engine="ray")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        drive(int(sys.argv[1]))
    else:
        print("| million pages | peak memory of the driver, MiB |\n|---|---|")
        for size in MILLIONS:
            child = subprocess.run([sys.executable, __file__, str(size)], capture_output=True, text=True, check=True)
            print(f"| {size} | {float(child.stdout.split()[-1]):.0f} |")
