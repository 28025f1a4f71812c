"""Raw images: guest-physical memory byte for byte, no header. Holes in the file are absent pages.

An object store knows of no holes: there every page is present, as it is in a file that was copied whole.
"""

from __future__ import annotations

import numpy as np

from ksmdist.errors import ImageError
from ksmdist.images.base import Format, Image, ImageInfo
from ksmdist.images.extents import Extents, extent_image
from ksmdist.images.files import LocalFile
from ksmdist.images.stores import StoredFile

__all__ = ["RAW"]


def _open(file: LocalFile | StoredFile, page_size: int) -> Image:
    path, nbytes = file.path, file.nbytes
    if nbytes == 0 or nbytes % page_size:
        if nbytes == 0:
            raise ImageError("is empty: not a memory image", path, "check that the dump was written")
        raise ImageError(
            f"is not a memory image: no known magic, and its {nbytes} bytes are not a whole number of "
            f"{page_size}-byte pages (it ends {nbytes % page_size} bytes into one)",
            path,
            "check that it was copied whole, or give the right --page-size",
        )
    data = file.data_extents()
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
        pages_absent=nbytes // page_size - present,
        nbytes=nbytes,
        fingerprint=file.fingerprint,
    )
    return extent_image(file, info, Extents(starts, count, starts * page_size, {}))


RAW = Format("raw", lambda head: True, _open)
"""The format of what has no magic."""
