"""How much memory an image may say it holds for what is in its file: a few bytes may claim what takes hours to count.

A compressed file may, and so may one with holes, which counts them as zeros: QEMU's mapped-ram, an ELF core of a
guest. Files of a guest that is almost empty are right with it: MOST_RATIO is what zstd makes of zeros at best.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ksmdist.errors import ImageError
from ksmdist.images.files import LocalFile
from ksmdist.images.uris import local_path

__all__ = ["FREE_BYTES", "MOST_RATIO", "check_claim", "most_claimed"]

MOST_RATIO = 1 << 15
"""Bytes of memory for one byte that is stored: 128 KiB of a block of zstd in 4 bytes (RFC 8878, 3.1.1.2), more than
gzip's 1032, LZ4's 255 and xz's some 7000; the same for a bit of a bitmap for each page of 4 KiB."""

FREE_BYTES = 1 << 36
"""Bytes of memory that any file may say it holds besides: 64 GiB. Measured: 4 GiB of an ELF core that is all holes are
read in 3.6 s on two busy cores, so that these take a minute."""


def most_claimed(path: str, nbytes: int) -> int:
    """Most bytes of memory that may be in a file. nbytes: of the file, of which holes do not count."""
    return FREE_BYTES + MOST_RATIO * _stored(path, nbytes)


def check_claim(claimed: int, path: str, nbytes: int, parts: Sequence[str] = ()) -> None:
    """Raises ImageError where an image claims more bytes of memory than its files can be right with.

    nbytes: of its file, or of all its files; parts: paths of the others.
    """
    if claimed <= FREE_BYTES + MOST_RATIO * min(nbytes, sum(map(_blocks, (path, *parts)))):
        return
    stored = _stored(path, nbytes) + sum(_stored(part, 0) for part in parts)
    if claimed > FREE_BYTES + MOST_RATIO * stored:
        raise ImageError(
            f"says that it has {claimed} bytes of memory, in {stored} bytes that are stored: more than {MOST_RATIO} "
            f"times as many, and {FREE_BYTES} besides",
            path,
            "it is damaged, or made to mislead; if it is right, write it as a raw file with holes, and scan that",
        )


def _blocks(path: str) -> int:
    """Bytes that a local file takes on its disk, as it says at once; some file systems say so late."""
    local = local_path(path)
    try:
        return 0 if local is None else os.stat(local).st_blocks * 512
    except OSError:
        return 0


def _stored(path: str, nbytes: int) -> int:
    """Bytes of a file that are no holes; nbytes where it is not local, which has none, or is a folder."""
    local = local_path(path)
    if local is None or not os.path.isfile(local):
        return nbytes
    file = LocalFile(local)
    try:
        if _blocks(path) >= file.nbytes:
            return file.nbytes
        data = file.data_extents()
        return int((data[:, 1] - data[:, 0]).sum())
    finally:
        file.close()
