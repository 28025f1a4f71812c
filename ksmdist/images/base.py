"""What every reader of memory images offers, so that the flow knows no format.

Pages of an image are numbered in address order, 0 to `info.pages`; a reader yields any range of
them as `memory_image` record batches, in order, and what it cannot read as `Hole`s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from ksmdist.columns import arrow
from ksmdist.images.files import LocalFile
from ksmdist.images.stores import StoredFile
from ksmdist.tables import MEMORY_IMAGE, PAGE_FLAGS

__all__ = ["BATCH_BYTES", "Format", "Hole", "Image", "ImageInfo", "Pages", "page_batch", "runs_of"]

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
    nbytes:        size of the file
    fingerprint:   changes when the file does (size, time, inode): not a hash of its pages
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

    def take(self, pages: np.ndarray) -> Iterator[pa.RecordBatch | Hole]:
        """The pages with these numbers, int64[n], ascending, as batches() gives them: a few, from anywhere."""

    def close(self) -> None:
        """Let the file go."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format: its name, how its first bytes are known, and how an open file, which it takes over, is read as it."""

    name: str
    matches: Callable[[bytes], bool]
    open: Callable[[LocalFile | StoredFile, int], Image]


def runs_of(pages: np.ndarray) -> list[tuple[int, int]]:
    """Ascending page numbers, int64[n] -> [start, end) of each run of neighbours."""
    if len(pages) == 0:
        return []
    cuts = np.flatnonzero(np.diff(pages) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(pages, cuts)]


def page_batch(pages: np.ndarray, content: pa.Array, page_size: int) -> pa.RecordBatch:
    """A `memory_image` batch of eligible pages that say no more of themselves than where they are.

    pages: int64 page numbers, ascending; content: binary, one value a page.
    """
    n = len(pages)
    nodes = np.zeros(n, np.int16)
    flags = np.full(n, PAGE_FLAGS["eligible"], np.uint32)
    columns = [
        arrow(pages.astype(np.uint64) * np.uint64(page_size)),
        content,
        arrow(flags),
        arrow(nodes),
        pa.nulls(n, pa.uint64()),
        pa.nulls(n, MEMORY_IMAGE.schema.field("region").type),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=MEMORY_IMAGE.schema)
