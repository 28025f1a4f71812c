"""Images whose pages lie in a file with other bytes between them: runs at a stride, and gathering them.

A stream has a header before each page, so none lies back to back with the next: a mapping cannot give them. What a
block of pages needs of the file is read in a few pieces, and the pages are copied out of that together.
Measured, 4 KiB pages at a stride of 4,104 bytes in a cached file: 10 GB/s, and 0.6 where each was read by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from threading import Event

import numpy as np
import pyarrow as pa

from ksmdist.errors import ImageError
from ksmdist.images.base import Hole, Image, ImageInfo, joined_holes, joined_ranges, page_batch
from ksmdist.images.extents import FILLED, Extents, check_forward, content_array, extent_image, find_in_runs
from ksmdist.images.files import ImageFile, LocalFile
from ksmdist.images.joined import read_into
from ksmdist.images.stores import StoredFile

__all__ = ["MOST_RUNS", "PageRuns", "RunIndex", "concatenated", "scattered_image"]

MOST_RUNS = 1 << 25
"""Most runs of an index: 1.2 GB. A guest of 1 TiB has fewer, unless its zero pages lie all alone."""

_BLOCK_BYTES = 4 << 20  # of pages in one batch: what is copied is still in the cache when it is hashed
_GAP_BYTES = 16 << 10  # pieces of the file this near are read as one
_LONG_PAGES = 24  # of a run on average, from which on it costs less to map each than to copy all


@dataclass(frozen=True, slots=True)
class PageRuns:
    """Runs of pages, page[i] + k at byte offset[i] + k * step[i] of a file; offset FILLED - b: all bytes are b.

    page, count, offset, step: int64[n], in pages, pages, bytes, bytes; region: int32[n], places in ImageInfo.regions.
    """

    page: np.ndarray
    count: np.ndarray
    offset: np.ndarray
    step: np.ndarray
    region: np.ndarray

    def __len__(self) -> int:
        return len(self.page)

    @property
    def pages(self) -> int:
        """Pages in all runs."""
        return int(self.count.sum())

    def take(self, rows: np.ndarray | slice) -> PageRuns:
        """Some of the runs, by their places or bool[n]."""
        return PageRuns(self.page[rows], self.count[rows], self.offset[rows], self.step[rows], self.region[rows])

    def cut(self, start: int, end: int) -> PageRuns:
        """What of ascending, disjoint runs lies in pages [start, end)."""
        ends = self.page + self.count
        some = slice(int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(self.page, end)))
        found = self.take(some)
        first = np.maximum(found.page, start)
        skipped = first - found.page
        return replace(
            found,
            page=first,
            count=np.minimum(ends[some], end) - first,
            offset=found.offset + skipped * found.step,
        )

    def moved(self, pages: int, region: int) -> PageRuns:
        """The same bytes, `pages` further on, all of one region."""
        return replace(self, page=self.page + pages, region=np.full(len(self), region, np.int32))

    def gaps(self, start: int, end: int) -> np.ndarray:
        """Pages of [start, end) that no run has: int64[m, 2], ranges; of ascending, disjoint runs inside of it."""
        edges = np.column_stack(
            (np.concatenate(([start], self.page + self.count)), np.concatenate((self.page, [end])))
        ).astype(np.int64)
        return edges[edges[:, 0] < edges[:, 1]]

    @classmethod
    def of(cls, page: np.ndarray, offset: np.ndarray, stride: int) -> PageRuns:
        """The runs that single pages make, int64[n] each, in the order given: each goes on `stride` bytes further."""
        if len(page) == 0:
            return concatenated([])
        filled = offset < 0
        wanted = np.where(filled[:-1], 0, stride)
        goes_on = (np.diff(page) == 1) & (np.diff(offset) == wanted) & (filled[:-1] == filled[1:])
        first = np.flatnonzero(np.concatenate(([True], ~goes_on)))
        count = np.diff(np.append(first, len(page)))
        step = np.where(filled[first], 0, stride)
        return cls(page[first], count, offset[first], step, np.zeros(len(first), np.int32))


def concatenated(parts: list[PageRuns]) -> PageRuns:
    """Runs of several, one after the other."""
    empty = np.zeros(0, np.int64)
    parts = [*parts, PageRuns(empty, empty, empty, empty, np.zeros(0, np.int32))]
    return PageRuns(
        np.concatenate([part.page for part in parts]),
        np.concatenate([part.count for part in parts]),
        np.concatenate([part.offset for part in parts]),
        np.concatenate([part.step for part in parts]),
        np.concatenate([part.region for part in parts]),
    )


class RunIndex:
    """Where each page lies that was written once or more often: the last time counts.

    Raises ImageError for more than MOST_RUNS runs. path: of the file, for that.
    """

    def __init__(self, stride: int, path: str) -> None:
        self._stride, self._path = stride, path
        self._levels: list[PageRuns] = []  # each a few times as long as the next: a run is merged log n times

    def add(self, page: np.ndarray, offset: np.ndarray) -> None:
        """Pages as they are written, int64[n]: page numbers, and PageRuns.offset of each."""
        runs = PageRuns.of(page, offset, self._stride)
        if len(runs) == 0:
            return
        if bool((runs.page[1:] < runs.page[:-1] + runs.count[:-1]).any()):
            last_first = len(page) - 1 - np.unique(page[::-1], return_index=True)[1]
            runs = PageRuns.of(page[last_first], offset[last_first], self._stride)
        self._levels.append(runs)
        while len(self._levels) > 1 and len(self._levels[-2]) <= 2 * len(self._levels[-1]):
            self._merge()

    def runs(self) -> PageRuns:
        """All pages, ascending, each once."""
        while len(self._levels) > 1:
            self._merge()
        return self._levels[0] if self._levels else concatenated([])

    def _merge(self) -> None:
        newer, older = self._levels.pop(), self._levels.pop()
        if newer.page[0] < older.page[-1] + older.count[-1]:
            older = _less(older, newer)
        both = concatenated([older, newer])
        if bool((np.diff(both.page) < 0).any()):
            both = both.take(np.argsort(both.page, kind="stable"))
        if len(both) > MOST_RUNS:
            raise ImageError(
                f"has its pages in more than {MOST_RUNS} runs, more than an index of them may take of memory",
                self._path,
                "dump the guest as ELF, or migrate it with mapped-ram",
            )
        self._levels.append(both)


def _less(runs: PageRuns, other: PageRuns) -> PageRuns:
    """What of runs others do not have; both ascending and disjoint."""
    edges = np.concatenate((runs.page, runs.page + runs.count, other.page, other.page + other.count))
    step = np.repeat(np.array([1, -1, -2, 2]), [len(runs)] * 2 + [len(other)] * 2)
    order = np.argsort(edges, kind="stable")
    edges, level = edges[order], np.cumsum(step[order])
    here = np.flatnonzero((level[:-1] == 1) & (edges[:-1] < edges[1:]))
    page = edges[here]
    of = np.searchsorted(runs.page, page, side="right") - 1
    left = runs.take(of)
    return replace(left, page=page, count=edges[here + 1] - page, offset=left.offset + (page - left.page) * left.step)


class ScatteredImage:
    """An image whose pages are runs of one file at a stride."""

    def __init__(self, file: ImageFile, info: ImageInfo, runs: PageRuns, holes: tuple[Hole, ...]) -> None:
        self._file = file
        self._runs = runs
        self._ends = np.cumsum(runs.count)
        self.info = info
        self.holes = holes

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def ranges(self) -> np.ndarray:
        """See Image.ranges."""
        runs = self._runs
        return joined_ranges(runs.page, runs.page + runs.count) * np.uint64(self.info.page_size)

    def find(self, address: np.ndarray) -> np.ndarray:
        """See Image.find."""
        return find_in_runs(self._runs.page, self._runs.count, address // np.uint64(self.info.page_size))

    def batches(self, start: int, end: int) -> Iterator[pa.RecordBatch | Hole]:
        """Pages [start, end) by address, copied."""
        return self.take(np.arange(start, end))

    def take(self, pages: np.ndarray) -> Iterator[pa.RecordBatch | Hole]:
        """See Image.take."""
        most = max(1, _BLOCK_BYTES // self.info.page_size)
        blocks = (pages[at : at + most] for at in range(0, len(pages), most))
        if isinstance(self._file, StoredFile):
            for items in self._file.in_order(functools.partial(self._block, block) for block in blocks):
                yield from items
            if len(pages):
                self._file.checked()
            return
        for block in blocks:
            yield from self._block(block)
        if len(pages):
            self._file.checked()

    def _block(self, numbers: np.ndarray, stop: Event | None = None) -> list[pa.RecordBatch | Hole]:
        """The pages with these numbers."""
        size, runs = self.info.page_size, self._runs
        run = np.searchsorted(self._ends, numbers, side="right")
        at = numbers - (self._ends - runs.count)[run]
        page, offset = runs.page[run] + at, runs.offset[run] + at * runs.step[run]
        filled = offset < 0
        pieces = _Pieces(offset[~filled], size)
        fills, fill = np.unique(offset[filled], return_inverse=True)
        data = np.empty(pieces.nbytes + len(fills) * size, np.uint8)
        data[pieces.nbytes :] = np.repeat((FILLED - fills).astype(np.uint8), size)
        damaged = pieces.read(self._file, data, stop)
        lies = np.empty(len(numbers), np.int64)
        lies[filled] = pieces.nbytes + fill * size
        lies[~filled] = pieces.place(offset[~filled])
        keep = np.ones(len(numbers), bool)
        keep[~filled] = ~damaged
        lies = lies[keep]
        items: list[pa.RecordBatch | Hole] = []
        if len(lies):
            rows = np.lib.stride_tricks.as_strided(data, (len(data) - size + 1, size), (1, 1), writeable=False)[lies]
            content = content_array(pa.py_buffer(rows), len(rows), size)
            items.append(page_batch(page[keep], content, size, None, runs.region[run[keep]], self.info.regions))
        reason = "unreadable" if isinstance(self._file, LocalFile) else "damaged"
        items += joined_holes(page[~keep], size, reason)
        return items


class _Pieces:
    """Pieces of a file in which pages lie, and where each goes in a buffer of `nbytes`."""

    def __init__(self, offset: np.ndarray, size: int) -> None:
        self._offset, self._size = offset, size
        ordered = np.sort(offset)
        cuts = np.flatnonzero(np.diff(ordered) > size + _GAP_BYTES) + 1
        opens = np.concatenate(([0], cuts)) if len(ordered) else np.zeros(0, np.int64)
        closes = np.append(opens[1:], len(ordered)) if len(ordered) else opens
        self._start = ordered[opens]
        self._nbytes = ordered[closes - 1] + size - self._start
        self._base = np.cumsum(self._nbytes) - self._nbytes
        self.nbytes = int(self._nbytes.sum())

    def place(self, offset: np.ndarray) -> np.ndarray:
        """Places in the buffer of bytes of the file."""
        if len(offset) == 0:
            return offset
        piece = np.searchsorted(self._start, offset, side="right") - 1
        return np.asarray(self._base[piece] + offset - self._start[piece])

    def read(self, file: ImageFile, data: np.ndarray, stop: Event | None) -> np.ndarray:
        """Fill the buffer; bool[n] of the pages that could not be read."""
        damaged = np.zeros(len(self._offset), bool)
        view = data.data
        for start, nbytes, base in zip(self._start.tolist(), self._nbytes.tolist(), self._base.tolist(), strict=True):
            if _read_into(file, start, view[base : base + nbytes], stop):
                continue
            inside = np.flatnonzero((self._offset >= start) & (self._offset < start + nbytes))
            for number in inside.tolist():  # only where the disk has failed or a packed file is damaged
                offset = int(self._offset[number])
                target = view[base + offset - start :][: self._size]
                damaged[number] = not _read_into(file, offset, target, stop)
        return damaged


def _read_into(file: ImageFile, offset: int, target: memoryview, stop: Event | None) -> bool:
    """Whether all bytes from `offset` on could be read into `target`."""
    if isinstance(file, StoredFile):
        target[:] = file.read_exactly(offset, len(target), stop)
        return True
    if not isinstance(file, LocalFile):
        data = file.read(offset, len(target))
        if len(data) == len(target):
            target[:] = data
        return len(data) == len(target)
    return read_into(target, file.fd, offset)


def scattered_image(file: ImageFile, info: ImageInfo, runs: PageRuns, holes: tuple[Hole, ...] = ()) -> Image:
    """The image whose pages are ascending, disjoint runs of this file, which it takes over.

    Raises ImageError for a compressed file whose pages lie in it in another order than by address.
    """
    extents = Extents(runs.page, runs.count, runs.offset, region=runs.region)
    back_to_back = (runs.offset < 0) | (runs.step == info.page_size)
    if runs.pages >= _LONG_PAGES * len(runs) and back_to_back.all():
        return extent_image([file], info, extents, holes)
    check_forward(file, extents)
    return ScatteredImage(file, info, runs, holes)
