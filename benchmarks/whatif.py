"""One run, then a hundred what-ifs of it: seconds, with and without reading the run back each time."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

from images import make_images

import ksmdist
from ksmdist.ksmd import Stretch, settle

SETTINGS = [
    ksmdist.Settings(
        max_page_sharing=2 + 37 * number, use_zero_pages=bool(number % 2), merge_across_nodes=number % 3 > 0
    )
    for number in range(100)
]


def _forked(pages: int) -> list[Stretch]:
    """One content in `pages` frames, all of them shared by a process and its child."""
    return [Stretch(image, -1, frame, 1) for image, frame in itertools.product(range(2), range(pages))]


def _seconds(what: object) -> float:
    began = time.perf_counter()
    what()  # type: ignore[operator]
    return time.perf_counter() - began


if __name__ == "__main__":
    scratch = Path(sys.argv[1])
    images = make_images(scratch / "images")
    out = scratch / f"whatif-{time.time_ns()}"
    run = ksmdist.run(images, out, engine="inline")
    print("| 100 what-ifs of four guests of 512 MiB | s |\n|---|---|")
    print(f"| of a run in memory | {_seconds(lambda: [ksmdist.whatif(run, one) for one in SETTINGS]):.3f} |")
    print(f"| each reading the run back | {_seconds(lambda: [ksmdist.whatif(out, one) for one in SETTINGS]):.3f} |")
    print("\n| one content in 400,000 frames shared by fork, max_page_sharing | s |\n|---|---|")
    stretches = _forked(400_000)
    for limit in (2, 16, 256, None):
        print(f"| {limit or 'unlimited'} | {_seconds(lambda: settle(stretches, limit)):.2f} |")  # noqa: B023
