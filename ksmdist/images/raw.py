"""Raw images: guest-physical memory byte for byte, no header. Holes in the file are absent pages."""

from __future__ import annotations

import os

import numpy as np

from ksmdist.errors import ImageError
from ksmdist.images.base import Format, ImageInfo
from ksmdist.images.extents import ExtentImage, Extents, data_extents, open_file

__all__ = ["RAW"]


def _open(path: str, page_size: int) -> ExtentImage:
    fd, stat = open_file(path)
    if stat.nbytes == 0 or stat.nbytes % page_size:
        os.close(fd)
        if stat.nbytes == 0:
            raise ImageError("is empty: not a memory image", path, "check that the dump was written")
        raise ImageError(
            f"is not a memory image: no known magic, and its {stat.nbytes} bytes are not a whole number of "
            f"{page_size}-byte pages (it ends {stat.nbytes % page_size} bytes into one)",
            path,
            "check that it was copied whole, or give the right --page-size",
        )
    data = data_extents(fd, stat.nbytes)
    # A page is present if any byte of it is data; runs that meet in one page become one.
    starts = data[:, 0] // page_size
    ends = -(-data[:, 1] // page_size)
    if len(data):
        opens = np.concatenate(([True], starts[1:] > ends[:-1]))
        closes = np.concatenate((opens[1:], [True]))
        starts, ends = starts[opens], ends[closes]
    count = ends - starts
    present = int(count.sum())
    info = ImageInfo(
        path=path,
        format="raw",
        kind="guest",
        page_size=page_size,
        pages=present,
        pages_absent=stat.nbytes // page_size - present,
        nbytes=stat.nbytes,
        fingerprint=stat.fingerprint,
    )
    return ExtentImage(fd, info, Extents(starts, count, starts * page_size, {}))


RAW = Format("raw", lambda head: True, _open)
"""The format of what has no magic."""
