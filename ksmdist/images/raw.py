"""Raw images: guest-physical memory byte for byte, no header. Holes in the file are absent pages.

An object store knows of no holes: there every page is present, as it is in a file that was copied whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ksmdist.errors import ImageError
from ksmdist.images.base import Format, Image, ImageInfo
from ksmdist.images.extents import Extents, extent_image
from ksmdist.images.files import ImageFile, LocalFile
from ksmdist.images.segments import Segments, uncovered

__all__ = ["RAW", "open_layers"]


def open_layers(files: Sequence[ImageFile], page_size: int, caveats: tuple[str, ...] = ()) -> Image:
    """A raw image, or one laid over others: a page is that of the last file that has data there, not a hole.

    So a Firecracker Diff snapshot is read: a hole in it is a page that has not changed since the file below.
    files: the lowest first, all of one size; caveats: to say besides. Raises ImageError.
    """
    top = files[-1]
    path, nbytes = top.path, top.nbytes
    if nbytes == 0 or nbytes % page_size:
        if nbytes == 0:
            raise ImageError("is empty: not a memory image", path, "check that the dump was written")
        raise ImageError(
            f"is not a memory image: no known magic, and its {nbytes} bytes are not a whole number of "
            f"{page_size}-byte pages (it ends {nbytes % page_size} bytes into one)",
            path,
            "check that it was copied whole, or give the right --page-size",
        )
    for file in files[:-1]:
        if file.nbytes != nbytes:
            raise ImageError(
                f"has {file.nbytes} bytes, and {path}, which is laid over it, {nbytes}",
                file.path,
                "give as --base the memory file that was taken before it, of the same microVM",
            )
    for file in files[1:]:
        if not isinstance(file, LocalFile):
            raise ImageError(
                "is laid over a base, and where it lies, or compressed, it has no holes to say what is unchanged",
                file.path,
                "keep it sparse on a file system, or lay it over first: ksmdist export DIFF --base FULL -o WHOLE.raw",
            )
    start, end = _present(top, page_size)
    number = np.full(len(start), len(files) - 1, np.int32)
    for lower in range(len(files) - 2, -1, -1):
        first, last = _present(files[lower], page_size)
        free = uncovered(Segments(first, last, first), Segments(start, end, start))
        below, below_end = np.array(free, np.int64).reshape(-1, 2).T
        start, end = np.concatenate((start, below)), np.concatenate((end, below_end))
        number = np.concatenate((number, np.full(len(below), lower, np.int32)))
        order = np.argsort(start)
        start, end, number = start[order], end[order], number[order]
    present = int((end - start).sum())
    caveats += tuple(
        f"{file.path} has no hole: if it was copied without them, its zero pages are unchanged memory"
        for file in files[1:]
        if len(file.data_extents()) == 1 and int(np.diff(file.data_extents()[0])[0]) == nbytes
    )
    info = ImageInfo.of(
        top,
        "raw",
        "guest",
        page_size,
        present,
        nbytes // page_size - present,
        parts=tuple((file.path, file.fingerprint) for file in files[:-1]),
        base=tuple(file.path for file in files[:-1]),
        span=nbytes,
        caveats=caveats,
    )
    extents = Extents(start, end - start, start * page_size, file=None if len(files) == 1 else number)
    return extent_image(files, info, extents)


def _present(file: ImageFile, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last page, exclusive, of each run of pages of which any byte is data."""
    data = file.data_extents()
    starts = data[:, 0] // page_size
    ends = -(-data[:, 1] // page_size)
    if len(data):  # runs that meet in one page become one
        opens = np.concatenate(([True], starts[1:] > ends[:-1]))
        closes = np.concatenate((opens[1:], [True]))
        starts, ends = starts[opens], ends[closes]
    return starts, ends


def _open(file: ImageFile, page_size: int) -> Image:
    return open_layers([file], page_size)


RAW = Format("raw", lambda head: True, _open)
"""The format of what has no magic."""
