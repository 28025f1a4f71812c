"""What image x image costs where thousands of images share: memory and time of the tasks that relate them."""

from __future__ import annotations

import itertools
import resource
import sys
import time

import numpy as np

from ksmdist import plan
from ksmdist.pairs import Pairs, find_sets

CONTENTS = 20_000
HELD_BY = 0.05  # of the images, each
PIECES = 8


def measure(images: int) -> None:
    """Print a row; in a process of its own, so that memory is its own."""
    rng = np.random.default_rng(images)
    began = time.process_time()
    sets = []
    for _ in range(PIECES):
        member = rng.random((CONTENTS // PIECES, images)) < HELD_BY
        content, image = np.nonzero(member)
        sets.append(find_sets(content, image, np.ones(len(image), np.int64)))
        del member, content, image
    found = time.process_time() - began
    groups = plan.groups([1] * images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, rows = time.process_time(), 0
    first = 0.0
    for number, (start, end) in enumerate(itertools.pairwise(groups)):
        pairs = Pairs(start, end, images)
        for table in sets:
            pairs.add(table)
        names = [f"image-{n:05d}" for n in range(images)]
        rows += sum(map(len, pairs.tables(names, np.zeros((images, 2), np.int64))))
        if number == 0:
            first = time.process_time() - began
        if number == 4:  # the others are like these; what later ones have less is images after them
            break
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    members = sum(map(len, sets))
    print(
        f"| {images:,} | {members:,} | {found:.1f} | {len(groups) - 1} | {first:.2f} | {more:.0f} | {rows:,} |",
        flush=True,
    )


if __name__ == "__main__":
    print(
        "| images | members of sets | finding sets, CPU s | tasks | first task, CPU s | memory it adds, MiB "
        "| rows of up to 5 tasks |\n" + "|---" * 7 + "|",
        flush=True,
    )
    for size in map(int, sys.argv[1:] or ("1000", "3000", "10000")):
        measure(size)
