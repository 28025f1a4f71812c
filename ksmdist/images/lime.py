"""LiME v1: ranges of guest-physical memory, each behind a header with its addresses.

Rules: LiME's src/lime.h (lime_mem_range_header) and src/main.c. A header is 32 bytes, little-endian: magic, version,
first and last byte's address, 8 reserved; the range's bytes follow, then the next header. Ranges may come in any
order, begin and end within pages, and overlap: a page counts once, from the range that starts lowest. What LiME could
not read, or not in time, it writes as zeros. AVML writes this format too, in blocks of 16 MiB, of which it leaves out
those that are all zeros (AVML's src/image.rs, copy_if_nonzero): a range of that very length is taken for one of them.

Raises ImageError: no header where one should be, another version, a range that ends before it begins or at 2**64,
more than MOST_RANGES of them.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass

import numpy as np

from ksmdist.errors import ImageError
from ksmdist.images.base import Format, Image, ImageInfo
from ksmdist.images.extents import extent_image
from ksmdist.images.files import ImageFile
from ksmdist.images.segments import Segments, cut_pages, holes_of
from ksmdist.images.windows import Window

__all__ = ["AVML_ZEROS", "HEADER_BYTES", "LIME", "MOST_RANGES", "RUNNING", "Header", "read_header"]

RUNNING = "was taken while the machine ran: its pages are of different moments"
"""Caveat of what a machine writes of itself."""

_LIME_ZEROS = "what LiME could not read, or not within its timeout, is in it as zeros, and counts as zero pages"

AVML_ZEROS = "AVML: blocks of 16 MiB, and shorter ranges, that are all zeros are left out"
"""ImageInfo.filter_level of what AVML writes."""

MOST_RANGES = 1 << 20
"""Ranges in a file: AVML has one for each 16 MiB, 16 TiB in all. Of a byte each, so many take 0.5 GB to index."""

HEADER_BYTES = 32
_MAGIC, _VERSION = b"EMiL", 1
_WHERE_KNOWN = 24  # bytes of a header that say where its range is
_BLOCK_BYTES = 16 << 20  # AVML's MAX_BLOCK_SIZE
_HINT = "take it again, or check that it was copied whole"


@dataclass(frozen=True, slots=True)
class Header:
    """Where a range is, [start, end) in bytes; end == start: the file is cut off before the header says."""

    start: int
    end: int


def read_header(window: Window, at: int, magic: bytes, version: int, path: str) -> Header:
    """The header at byte `at`, which is in the file; cut off by its end, as much as there is of it.

    Raises ImageError naming the byte.
    """
    head = window.read(at, HEADER_BYTES)
    begins = magic + struct.pack("<I", version)
    if not begins.startswith(head[: len(begins)]) or (at == 0 and len(head) < HEADER_BYTES):
        if head.startswith(magic) and at == 0 and len(head) >= len(begins):
            found = int.from_bytes(head[4:8], "little")
            raise ImageError(f"has version {found} in its header, ksmdist reads version {version}", path, _HINT)
        if len(head) < HEADER_BYTES and at == 0:
            raise ImageError("truncated: it ends within its first header", path, _HINT)
        raise ImageError(f"has no header of a range at byte {at}, where one should be", path, _HINT)
    if len(head) < _WHERE_KNOWN:
        return Header(0, 0)
    start, last = struct.unpack_from("<QQ", head, 8)
    if last < start or last == 2**64 - 1:
        raise ImageError(f"has a range at byte {at} from {start:#x} to {last:#x}, which is none", path, _HINT)
    return Header(start, last + 1)


def _open(file: ImageFile, page_size: int) -> Image:
    path, nbytes = file.path, file.nbytes
    window = Window(file)
    columns = [array("Q") for _ in range(4)]
    add_start, add_end, add_offset, add_there = (column.append for column in columns)
    caveats = [RUNNING]
    at = 0
    while at < nbytes:  # 1 us a range
        header = read_header(window, at, _MAGIC, _VERSION, path)
        data_at = at + HEADER_BYTES
        if header.start == header.end:
            caveats.append(f"is cut off at byte {at}: what came after is not counted")
            break
        add_start(header.start)
        add_end(header.end)
        add_offset(data_at)
        if len(columns[0]) > MOST_RANGES:
            raise ImageError(f"has more than {MOST_RANGES} ranges, more than anything writes", path, _HINT)
        at = data_at + header.end - header.start
        add_there(header.start + max(0, min(at, nbytes) - data_at))
    start, end, offset, there = (np.frombuffer(column, np.uint64) for column in columns)

    dumped = Segments(start, end, offset)
    available = dumped.up_to(there, page_size).disjoint()
    extents, partial = cut_pages(available, page_size)
    holes = holes_of(dumped.disjoint(), available, partial, page_size)
    in_blocks = bool((end - start == _BLOCK_BYTES).any())
    info = ImageInfo.of(
        file,
        "lime",
        "guest",
        page_size,
        extents.pages,
        0,
        producer="AVML" if in_blocks else "LiME",
        filter_level=AVML_ZEROS if in_blocks else "",
        caveats=(*caveats, *(() if in_blocks else (_LIME_ZEROS,))),
    )
    return extent_image([file], info, extents, tuple(holes))


LIME = Format("lime", lambda head: head.startswith(_MAGIC), _open)
"""LiME's own format; its raw and padded ones are raw."""
