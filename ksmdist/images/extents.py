"""Images whose pages lie uncompressed in one file: runs of pages, and reading them with no copy."""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from threading import Event

import numpy as np
import pyarrow as pa

from ksmdist.images.base import BATCH_BYTES, Hole, Image, ImageInfo, page_batch, runs_of
from ksmdist.images.files import LocalFile
from ksmdist.images.stores import StoredFile

__all__ = ["ExtentImage", "Extents", "StoredExtentImage", "extent_image", "populate", "read_rows"]

_MADV_POPULATE_READ = 22  # include/uapi/asm-generic/mman-common.h, Linux 5.14; not named by Python 3.11
_GATHER_PAGES = 256  # runs shorter than 1 MiB are copied together: a mapping for each costs more


@dataclass(frozen=True, slots=True)
class Extents:
    """Runs of pages, ascending and disjoint: page[i] + k is at byte offset[i] + k * page_size.

    page, count, offset: int64[n], in pages, pages, bytes. offset -1: the one page of this run is
    made of `pieces[i]`, a list of (file offset, nbytes) laid end to end.
    """

    page: np.ndarray
    count: np.ndarray
    offset: np.ndarray
    pieces: Mapping[int, tuple[tuple[int, int], ...]]

    def __len__(self) -> int:
        return len(self.page)


def populate(mapping: mmap.mmap, start: int, nbytes: int) -> bool:
    """Map these bytes ahead of use; False if some cannot be read, and touching them would be SIGBUS.

    Measured: 250 ns a page hashed from a populated mapping, 370 through pread and a copy.
    """
    aligned = start - start % mmap.PAGESIZE
    try:
        mapping.madvise(_MADV_POPULATE_READ, aligned, start + nbytes - aligned)
    except OSError:  # EFAULT, EIO: not readable; EINVAL: a kernel before 5.14, that cannot tell
        return False
    return True


def read_rows(fd: int, offset: int, count: int, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Read `count` pages at a byte offset; bytes uint8[n, page_size] of those read, and bool[count] which."""
    rows = np.zeros((count, page_size), np.uint8)
    if _pread_into(fd, rows.data.cast("B"), offset):
        return rows, np.ones(count, bool)
    readable = np.zeros(count, bool)
    for index in range(count):  # only where the disk has failed: then each page is asked for alone
        readable[index] = _pread_into(fd, rows[index].data, offset + index * page_size)
    return rows[readable], readable


def _pread_into(fd: int, target: memoryview, offset: int) -> bool:
    done = 0
    try:
        while done < len(target):
            n = os.preadv(fd, [target[done:]], offset + done)
            if n == 0:
                return False
            done += n
    except OSError:
        return False
    return True


def content_array(data: pa.Buffer, count: int, page_size: int) -> pa.Array:
    """`count` pages that lie back to back in `data` as a binary array, with no copy."""
    offsets = np.arange(0, (count + 1) * page_size, page_size, dtype=np.int32)
    return pa.BinaryArray.from_buffers(pa.binary(), count, [None, pa.py_buffer(offsets), data])


def _runs(extents: Extents, ends: np.ndarray, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(extent, first page in it, pages) that make up pages [start, end). ends: running sum of extents.count."""
    index = int(np.searchsorted(ends, start, side="right"))
    while start < end:
        base = int(ends[index] - extents.count[index])
        stop = min(end, int(ends[index]))
        yield index, start - base, stop - start
        start = stop
        index += 1


def _find(extents: Extents, ends: np.ndarray, page_size: int, address: np.ndarray) -> np.ndarray:
    """Image.find()."""
    page = (address // np.uint64(page_size)).astype(np.int64)
    run = np.searchsorted(extents.page, page, side="right") - 1
    inside = run >= 0
    run = np.maximum(run, 0)
    if len(extents) == 0:
        return np.full(len(address), -1, np.int64)
    at = page - extents.page[run]
    return np.where(inside & (at < extents.count[run]), ends[run] - extents.count[run] + at, -1)


class ExtentImage:
    """An image whose pages are `extents` of a file on this host."""

    def __init__(self, file: LocalFile, info: ImageInfo, extents: Extents, holes: tuple[Hole, ...] = ()) -> None:
        self._file = file
        self._fd = file.fd
        self._extents = extents
        self._ends = np.cumsum(extents.count)
        self.info = info
        self.holes = holes

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def find(self, address: np.ndarray) -> np.ndarray:
        """See Image.find."""
        return _find(self._extents, self._ends, self.info.page_size, address)

    def batches(self, start: int, end: int) -> Iterator[pa.RecordBatch | Hole]:
        """Pages [start, end) by address; long runs as views of the mapped file, short ones copied."""
        size = self.info.page_size
        most = max(1, BATCH_BYTES // size)
        short: list[tuple[int, int, int]] = []
        short_pages = 0
        for index, first, count in _runs(self._extents, self._ends, start, end):
            if count < _GATHER_PAGES:
                short.append((index, first, count))
                short_pages += count
                if short_pages + _GATHER_PAGES <= most:
                    continue
            if short:
                yield from self._gathered(short)
                short, short_pages = [], 0
            if count >= _GATHER_PAGES:
                for at in range(first, first + count, most):
                    yield from self._mapped(index, at, min(most, first + count - at))
        if short:
            yield from self._gathered(short)

    def take(self, pages: np.ndarray) -> Iterator[pa.RecordBatch | Hole]:
        """See Image.take: copied together, since a batch for each page would cost more than to read it."""
        most = max(1, BATCH_BYTES // self.info.page_size)
        for at in range(0, len(pages), most):
            some = runs_of(pages[at : at + most])
            yield from self._gathered([run for span in some for run in _runs(self._extents, self._ends, *span)])

    def _mapped(self, index: int, first: int, count: int) -> Iterator[pa.RecordBatch | Hole]:
        size = self.info.page_size
        page = int(self._extents.page[index]) + first
        offset = int(self._extents.offset[index]) + first * size
        aligned = offset - offset % mmap.ALLOCATIONGRANULARITY
        delta, nbytes = offset - aligned, count * size
        try:
            mapping = mmap.mmap(self._fd, delta + nbytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=aligned)
        except (OSError, ValueError):  # ValueError: the file has become shorter
            mapping = None
        if mapping is None or not populate(mapping, delta, nbytes):
            yield from self._read(page, offset, count)
            return
        data = pa.py_buffer(mapping).slice(delta, nbytes)
        yield page_batch(np.arange(page, page + count), content_array(data, count, size), size)

    def _read(self, page: int, offset: int, count: int) -> Iterator[pa.RecordBatch | Hole]:
        size = self.info.page_size
        rows, readable = read_rows(self._fd, offset, count, size)
        pages = np.arange(page, page + count)
        if len(rows):
            yield page_batch(pages[readable], content_array(pa.py_buffer(rows), len(rows), size), size)
        for lost in pages[~readable].tolist():
            yield Hole(lost * size, 1, "unreadable")

    def _gathered(self, runs: list[tuple[int, int, int]]) -> Iterator[pa.RecordBatch | Hole]:
        size = self.info.page_size
        parts, pages = [], []
        lost: list[int] = []
        for index, first, count in runs:
            page = np.arange(count) + int(self._extents.page[index]) + first
            pieces = self._extents.pieces.get(index)
            if pieces is None:
                rows, readable = read_rows(self._fd, int(self._extents.offset[index]) + first * size, count, size)
            else:
                rows, readable = self._joined(pieces)
            parts.append(rows)
            pages.append(page[readable])
            lost.extend(page[~readable].tolist())
        data = np.concatenate(parts)
        if len(data):
            yield page_batch(np.concatenate(pages), content_array(pa.py_buffer(data), len(data), size), size)
        for page_number in lost:
            yield Hole(page_number * size, 1, "unreadable")

    def _joined(self, pieces: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
        row = np.zeros((1, self.info.page_size), np.uint8)
        target = row.data.cast("B")
        at, readable = 0, True
        for offset, nbytes in pieces:
            readable = readable and _pread_into(self._fd, target[at : at + nbytes], offset)
            at += nbytes
        return row[: int(readable)], np.array([readable])


class StoredExtentImage:
    """An image whose pages are `extents` of an object in a store: read in blocks, several of them in flight."""

    def __init__(self, file: StoredFile, info: ImageInfo, extents: Extents, holes: tuple[Hole, ...] = ()) -> None:
        self._file = file
        self._extents = extents
        self._ends = np.cumsum(extents.count)
        self.info = info
        self.holes = holes

    def close(self) -> None:
        """Let the object go."""
        self._file.close()

    def find(self, address: np.ndarray) -> np.ndarray:
        """See Image.find."""
        return _find(self._extents, self._ends, self.info.page_size, address)

    def batches(self, start: int, end: int) -> Iterator[pa.RecordBatch | Hole]:
        """Pages [start, end) by address, a block to a batch; raises ImageError if the object changed meanwhile."""
        if start < end:
            yield from self._file.in_order(functools.partial(self._block, runs) for runs in self._blocks(start, end))
            self._file.checked()

    def take(self, pages: np.ndarray) -> Iterator[pa.RecordBatch | Hole]:
        """See Image.take: several requests in flight."""
        if len(pages):
            blocks = (block for span in runs_of(pages) for block in self._blocks(*span))
            yield from self._file.in_order(functools.partial(self._block, block) for block in blocks)
            self._file.checked()

    def _blocks(self, start: int, end: int) -> Iterator[list[tuple[int, int, int]]]:
        """The runs of pages [start, end), cut into blocks."""
        most = max(1, self._file.block_bytes // self.info.page_size)
        block: list[tuple[int, int, int]] = []
        room = most
        for index, first, count in _runs(self._extents, self._ends, start, end):
            while count:
                taken = min(count, room)
                block.append((index, first, taken))
                first, count, room = first + taken, count - taken, room - taken
                if not room:
                    yield block
                    block, room = [], most
        if block:
            yield block

    def _block(self, runs: list[tuple[int, int, int]], stop: Event) -> pa.RecordBatch:
        size = self.info.page_size
        spans: list[tuple[int, int]] = []
        pages = []
        for index, first, count in runs:
            pages.append(np.arange(count) + int(self._extents.page[index]) + first)
            pieces = self._extents.pieces.get(index)
            spans += pieces or [(int(self._extents.offset[index]) + first * size, count * size)]
        buffers = self._file.read_spans(spans, stop)
        data = buffers[0] if len(buffers) == 1 else pa.py_buffer(b"".join(buffers))
        numbers = np.concatenate(pages)
        return page_batch(numbers, content_array(data, len(numbers), size), size)


def extent_image(
    file: LocalFile | StoredFile, info: ImageInfo, extents: Extents, holes: tuple[Hole, ...] = ()
) -> Image:
    """The image whose pages are `extents` of this file."""
    if isinstance(file, LocalFile):
        return ExtentImage(file, info, extents, holes)
    return StoredExtentImage(file, info, extents, holes)
