"""What every reader of memory images offers, so that the flow knows no format.

Pages of an image are numbered in address order, 0 to `info.pages`; a reader yields any range of
them as `memory_image` record batches, in order, and what it cannot read as `Hole`s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa

from ksmdist.columns import arrow
from ksmdist.images.files import ImageFile
from ksmdist.tables import MEMORY_IMAGE, PAGE_FLAGS

__all__ = [
    "BATCH_BYTES",
    "NEVER_TOUCHED",
    "Format",
    "Hole",
    "Image",
    "ImageInfo",
    "Pages",
    "joined_holes",
    "joined_ranges",
    "lost_level",
    "page_batch",
    "runs_of",
]

NEVER_TOUCHED = "guest memory that was never touched is in it as zeros, and counts as zero pages"
"""Caveat of what QEMU writes: it reads all of a guest's memory, and a page that no one wrote to reads as zeros."""

BATCH_BYTES = 64 << 20
"""Most page bytes in one record batch: mapped, hashed and let go together."""


@dataclass(frozen=True, slots=True)
class Hole:
    """`pages` pages from `address` (bytes, page-aligned) on that should be there and are not readable."""

    address: int
    pages: int
    reason: str


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What is known of an image before its pages are read.

    pages:         rows it has, readable or not at the time of reading
    pages_absent:  pages of its address space that it does not hold
    pages_excluded: of these, pages that its producer's filter left out, as far as the image says
    nbytes:        size of the file, or of all files it is read from
    fingerprint:   changes when the file does (size, time, inode): not a hash of its pages
    parts:         other files that it is read from, as (path, fingerprint)
    base:          files that it is laid over (open_image), the lowest first; they are among its parts
    unpacked:      bytes in the file once decompressed; 0 if it is not compressed
    span:          bytes of its address space from 0 on, where it has an end of its own: a raw file's size; 0: unknown
    producer:      what wrote it, as far as the image says: QEMU, makedumpfile, gcore
    filter_level:  what its producer left out or made up, so that counts are not of the whole memory, for
                   people; empty if it left out nothing
    salt:          images with another share nothing with it under policy salt; not to be shown or kept in a run
    image_id:      empty where the format has no name in it
    caveats:       what its counts do not show, for people
    scan_order:    place in the order in which KSM scans the images; alike: by image id
    regions:       names that `memory_image.region` of every batch is an index of
    passed_over:   pages that have no row, as (region, reason of tables.PASSED_OVER, pages)
    ksm_stat:      /proc/PID/ksm_stat when it was taken, as (name, value)
    """

    path: str
    format: str
    kind: str
    page_size: int
    pages: int
    pages_absent: int
    nbytes: int
    fingerprint: str
    image_id: str = ""
    host: str = ""
    tenant: str = ""
    caveats: tuple[str, ...] = ()
    scan_order: int = 0
    regions: tuple[str, ...] = ()
    passed_over: tuple[tuple[str, str, int], ...] = ()
    ksm_stat: tuple[tuple[str, str], ...] = ()
    producer: str = ""
    filter_level: str = ""
    pages_excluded: int = 0
    parts: tuple[tuple[str, str], ...] = ()
    base: tuple[str, ...] = ()
    unpacked: int = 0
    span: int = 0
    salt: str = field(default="", repr=False)

    @classmethod
    def of(cls, file: ImageFile, format: str, kind: str, page_size: int, pages: int, absent: int, **more: Any) -> Self:
        """What is known of an image by its file, and by what its reader says. more: other fields, by name."""
        return cls(
            path=file.path,
            format=format,
            kind=kind,
            page_size=page_size,
            pages=pages,
            pages_absent=absent,
            nbytes=file.disk_nbytes,
            fingerprint=file.fingerprint,
            unpacked=file.unpacked,
            **more,
        )


class Pages(Protocol):
    """What has pages to read."""

    @property
    def info(self) -> ImageInfo:
        """What is known without reading pages."""

    @property
    def holes(self) -> tuple[Hole, ...]:
        """What is known at opening to be unreadable; these pages are not among `info.pages`."""

    def batches(self, start: int, end: int) -> Iterator[pa.RecordBatch | Hole]:
        """Pages [start, end) as `memory_image` batches of at most BATCH_BYTES, by address.

        A batch may point into the mapped file: use it and let it go before asking for the next.
        Raises ImageError where the structure is broken, ImageReadError where the file is gone.
        """


class Image(Pages, Protocol):
    """An open memory image."""

    def find(self, address: np.ndarray) -> np.ndarray:
        """Numbers of the pages at these addresses, uint64[n] -> int64[n]; -1 where there is none."""

    def ranges(self) -> np.ndarray:
        """Address ranges [start, end) of its pages, uint64[n, 2] in bytes, ascending, neighbours joined."""

    def take(self, pages: np.ndarray) -> Iterator[pa.RecordBatch | Hole]:
        """The pages with these numbers, int64[n], ascending, as batches() gives them: a few, from anywhere."""

    def close(self) -> None:
        """Let the file go."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format: its name, how its first bytes are known, and how an open file, which it takes over, is read as it."""

    name: str
    matches: Callable[[bytes], bool]
    open: Callable[[ImageFile, int], Image]


def lost_level(*levels: str, lost: int, how: str) -> str:
    """The filter level of what is made of an image of which `lost` pages could not be read. how: imported, exported."""
    said = [level for level in levels if level]
    if lost:
        said.append(f"{lost:,} pages could not be read when it was {how}, and are not in it")
    return "; ".join(dict.fromkeys(said))


def runs_of(pages: np.ndarray) -> list[tuple[int, int]]:
    """Ascending page numbers, int64[n] -> [start, end) of each run of neighbours."""
    if len(pages) == 0:
        return []
    cuts = np.flatnonzero(np.diff(pages) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(pages, cuts)]


def joined_holes(pages: np.ndarray, page_size: int, reason: str) -> list[Hole]:
    """Holes of pages that cannot be had, int64[n] page numbers, ascending: one of neighbours each."""
    return [Hole(start * page_size, end - start, reason) for start, end in runs_of(pages)]


def joined_ranges(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Ascending, disjoint ranges, int64[n] each, in pages or bytes -> uint64[m, 2], neighbours joined."""
    if len(start) == 0:
        return np.zeros((0, 2), np.uint64)
    opens = np.concatenate(([True], start[1:] != end[:-1]))
    closes = np.concatenate((opens[1:], [True]))
    return np.column_stack((start[opens], end[closes])).astype(np.uint64)


def page_batch(
    pages: np.ndarray,
    content: pa.Array,
    page_size: int,
    flags: np.ndarray | None = None,
    region: np.ndarray | None = None,
    names: Sequence[str] = (),
) -> pa.RecordBatch:
    """A `memory_image` batch of pages that say little of themselves but where they are.

    pages: int64 page numbers, ascending; content: binary, one value a page; flags: uint32, None: all are eligible;
    region: int32 places in `names` (ImageInfo.regions), -1 for none; None: none has one.
    """
    n = len(pages)
    kind = MEMORY_IMAGE.schema.field("region").type
    if flags is None:
        flags = np.full(n, PAGE_FLAGS["eligible"], np.uint32)
    if region is None:
        regions = pa.nulls(n, kind)
    else:
        codes = pa.array(region, kind.index_type, mask=region < 0)
        regions = pa.DictionaryArray.from_arrays(codes, pa.array(names, pa.string()))
    columns = [
        arrow(pages.astype(np.uint64) * np.uint64(page_size)),
        content,
        arrow(flags),
        arrow(np.zeros(n, np.int16)),
        pa.nulls(n, pa.uint64()),
        regions,
    ]
    return pa.RecordBatch.from_arrays(columns, schema=MEMORY_IMAGE.schema)
