"""Images made on the spot that look like real ones, for a first look with no dump at hand.

Not random: the same bytes each time. Shares of pages follow guests measured on Debian 12.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

__all__ = ["make_images"]

_PAGE = 4096
_PAGES = 8192  # 32 MiB an image


def make_images(directory: Path, count: int = 3) -> list[Path]:
    """Write `count` raw guests of 32 MiB: about 38 % zero pages, a tenth shared libraries, a few
    same-filled pages, a few copies inside, the rest their own, and a stretch never touched (a hole).

    Returns their paths. Pages are 4096 bytes.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    library = np.random.default_rng(0).integers(0, 1 << 64, (1000, _PAGE // 8), np.uint64)
    paths = []
    for number in range(count):
        rng = np.random.default_rng(number + 1)
        words = np.zeros((_PAGES, _PAGE // 8), np.uint64)
        mapped = 900 + 30 * number  # each maps a little more of the same library
        words[:mapped] = library[:mapped]
        words[1000:1020] = np.uint64(0xFFFFFFFFFFFFFFFF)
        words[1020:1040] = np.uint64(0x6B6B6B6B6B6B6B6B)  # SLUB's poison (include/linux/poison.h)
        own = words[1040 : _PAGES - 3100]
        own[:] = rng.integers(0, 1 << 64, own.shape, np.uint64)
        own[100:160] = own[0]
        rng.shuffle(words)
        path = directory / f"guest-{number + 1}.raw"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as sink:
            sink.write(words.tobytes())
            sink.seek(_PAGES * _PAGE + (4 << 20))
            os.truncate(sink.fileno(), _PAGES * _PAGE + (4 << 20))
        paths.append(path)
    return paths
