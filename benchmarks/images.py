"""The images that are measured: four raw guests of 512 MiB, made once, the same bytes each time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

PAGE_BYTES = 4096
PAGES = 1 << 17  # 512 MiB


def make_images(directory: Path, count: int = 4, pages: int = PAGES) -> list[Path]:
    """Raw images: 40 % zero pages, 12 % shared by all of them, 4 % repeated inside, the rest unique.

    Made in a process of its own: what is started from one that was large once counts as large.
    """
    subprocess.run([sys.executable, __file__, str(directory), str(count), str(pages)], check=True)
    return [directory / f"guest-{number + 1}.raw" for number in range(count)]


def _make(directory: Path, count: int, pages: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    words = PAGE_BYTES // 8
    library = np.random.default_rng(0).integers(0, 1 << 64, (pages * 12 // 100, words), np.uint64)
    for number in range(count):
        path = directory / f"guest-{number + 1}.raw"
        if path.exists() and path.stat().st_size == pages * PAGE_BYTES:
            continue
        rng = np.random.default_rng(number + 1)
        image = np.zeros((pages, words), np.uint64)
        zero, repeated = pages * 40 // 100, pages * 4 // 100
        image[zero : zero + len(library)] = library
        own = image[zero + len(library) :]
        own[:] = rng.integers(0, 1 << 64, own.shape, np.uint64)
        own[:repeated] = own[repeated : 2 * repeated]
        rng.shuffle(image)
        partial = path.with_suffix(".partial")
        image.tofile(partial)
        os.replace(partial, path)


def linked(paths: list[Path], times: int, directory: Path) -> list[Path]:
    """`times` names for each image: larger inputs that still fit the page cache."""
    directory.mkdir(parents=True, exist_ok=True)
    links = []
    for time in range(times):
        for path in paths:
            link = directory / f"{path.stem}-{time:03d}.raw"
            if not link.exists():
                link.hardlink_to(path)
            links.append(link)
    return links


def warm(paths: list[Path]) -> None:
    """Read every image once, so that all are in the page cache."""
    for path in paths:
        with open(path, "rb", buffering=0) as source:
            while source.read(16 << 20):
                pass


if __name__ == "__main__":
    _make(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
