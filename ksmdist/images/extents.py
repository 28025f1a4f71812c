"""Images whose pages lie uncompressed in files: runs of pages, and reading them with no copy."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ksmdist.errors import ImageError
from ksmdist.images.base import BATCH_BYTES, Hole, Image, ImageInfo, joined_holes, joined_ranges, page_batch, runs_of
from ksmdist.images.files import ImageFile, LocalFile, Resumable
from ksmdist.images.flattened import FlattenedFile
from ksmdist.images.joined import Stretch, join_pages
from ksmdist.images.packed import PackedFile
from ksmdist.images.stores import StoredFile

__all__ = [
    "FILLED",
    "PIECES",
    "ExtentImage",
    "Extents",
    "PackedExtentImage",
    "StoredExtentImage",
    "check_forward",
    "content_array",
    "extent_image",
    "find_in_runs",
]


@dataclass(frozen=True, slots=True)
class Extents:
    """Runs of pages, ascending and disjoint: page[i] + k is at byte offset[i] + k * page_size of file file[i].

    page, count, offset: int64[n], in pages, pages, bytes. offset PIECES: the one page of this run is made of
    `pieces[i]`, a list of (file offset, nbytes) laid end to end; offset FILLED - b: all bytes are b.
    file: int32[n], places in the image's list of files; None: all are in the first.
    flags: uint32[n], `memory_image.flags` of all pages of the run; None: they are eligible.
    region: int32[n], places in ImageInfo.regions, -1 for none; None: none has one.
    """

    page: np.ndarray
    count: np.ndarray
    offset: np.ndarray
    pieces: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    file: np.ndarray | None = None
    flags: np.ndarray | None = None
    region: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.page)

    @property
    def pages(self) -> int:
        """Pages in all runs."""
        return int(self.count.sum())


PIECES = -1
FILLED = -2
"""Extents.offset of a run full of zeros; FILLED - b of one full of the byte b."""


def content_array(data: pa.Buffer, count: int, page_size: int) -> pa.Array:
    """`count` pages that lie back to back in `data` as a binary array, with no copy."""
    offsets = np.arange(0, (count + 1) * page_size, page_size, dtype=np.int32)
    return pa.BinaryArray.from_buffers(pa.binary(), count, [None, pa.py_buffer(offsets), data])


def find_in_runs(page: np.ndarray, count: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Numbers of pages among those of runs, int64[n], -1 for those of none.

    page, count: int64[runs], ascending and disjoint; wanted: uint64[n], page numbers of the address space
    """
    if len(page) == 0:
        return np.full(len(wanted), -1, np.int64)
    asked = wanted.astype(np.int64)
    run = np.searchsorted(page, asked, side="right") - 1
    inside = run >= 0
    run = np.maximum(run, 0)
    at = asked - page[run]
    return np.where(inside & (at < count[run]), np.cumsum(count)[run] - count[run] + at, -1)


class _Run(NamedTuple):
    """`pages` pages of extent `extent`, from its page `first` on."""

    extent: int
    first: int
    pages: int


class _ExtentPages:
    """What all images made of extents have: numbers of pages, where they are, batches of them."""

    def __init__(self, files: Sequence[ImageFile], info: ImageInfo, extents: Extents, holes: tuple[Hole, ...]) -> None:
        self._files = files
        self._extents = extents
        self._ends = np.cumsum(extents.count)
        self.info = info
        self.holes = holes

    def close(self) -> None:
        """Let the files go."""
        for file in self._files:
            file.close()

    def ranges(self) -> np.ndarray:
        """See Image.ranges."""
        extents = self._extents
        return joined_ranges(extents.page, extents.page + extents.count) * np.uint64(self.info.page_size)

    def find(self, address: np.ndarray) -> np.ndarray:
        """See Image.find."""
        return find_in_runs(self._extents.page, self._extents.count, address // np.uint64(self.info.page_size))

    def _runs(self, start: int, end: int) -> Iterator[_Run]:
        """The runs that make up pages [start, end)."""
        extents, ends = self._extents, self._ends
        index = int(np.searchsorted(ends, start, side="right"))
        while start < end:
            base = int(ends[index] - extents.count[index])
            stop = min(end, int(ends[index]))
            yield _Run(index, start - base, stop - start)
            start = stop
            index += 1

    def _pages(self, runs: Sequence[_Run]) -> np.ndarray:
        """Page numbers of address order, int64."""
        return np.concatenate([np.arange(run.pages) + int(self._extents.page[run.extent]) + run.first for run in runs])

    def _batch(
        self, pages: np.ndarray, content: pa.Array, runs: Sequence[_Run], keep: np.ndarray | None = None
    ) -> pa.RecordBatch:
        """A batch of the pages of some runs. keep: bool, of all these pages, which are in it; None: all."""
        named = []
        for column in (self._extents.flags, self._extents.region):
            if column is not None:
                column = np.repeat(column[[run.extent for run in runs]], [run.pages for run in runs])
                column = column if keep is None else column[keep]
            named.append(column)
        return page_batch(pages, content, self.info.page_size, named[0], named[1], self.info.regions)

    def _source(self, run: _Run) -> tuple[int, int]:
        """(place of the file, byte offset) of the first page of a run; the offset may be PIECES or FILLED - b."""
        offset = int(self._extents.offset[run.extent])
        file = 0 if self._extents.file is None else int(self._extents.file[run.extent])
        return file, offset if offset < 0 else offset + run.first * self.info.page_size

    def _blocks(self, start: int, end: int, most: int) -> Iterator[list[_Run]]:
        """The runs of pages [start, end), cut into blocks of at most `most` pages."""
        block: list[_Run] = []
        room = most
        for index, first, count in self._runs(start, end):
            while count:
                taken = min(count, room)
                block.append(_Run(index, first, taken))
                first, count, room = first + taken, count - taken, room - taken
                if not room:
                    yield block
                    block, room = [], most
        if block:
            yield block


_NEAR = 64
"""Pages that are taken from anywhere are mapped with all between them where one in so many is wanted.

Measured, pages in the page cache: 13 us for each that is read alone, 30 ns for each that is only mapped.
"""


class ExtentImage(_ExtentPages):
    """An image whose pages are `extents` of files on this host."""

    def __init__(
        self, files: Sequence[LocalFile], info: ImageInfo, extents: Extents, holes: tuple[Hole, ...] = ()
    ) -> None:
        super().__init__(files, info, extents, holes)
        self._fds = [file.fd for file in files]

    def batches(self, start: int, end: int) -> Iterator[pa.RecordBatch | Hole]:
        """Pages [start, end) by address; long runs as views of the mapped file, short ones copied."""
        for block in self._blocks(start, end, max(1, BATCH_BYTES // self.info.page_size)):
            yield from self._joined(block)

    def take(self, pages: np.ndarray) -> Iterator[pa.RecordBatch | Hole]:
        """See Image.take: together, since a batch for each page would cost more than to read it."""
        most = max(1, BATCH_BYTES // self.info.page_size)
        for at in range(0, len(pages), most):
            some = pages[at : at + most]
            if len(some) * _NEAR < int(some[-1] - some[0]):
                yield from self._joined([run for span in runs_of(some) for run in self._runs(*span)])
                continue
            first = int(some[0])
            for block in self._blocks(first, int(some[-1]) + 1, most):
                end = first + sum(run.pages for run in block)
                wanted = np.zeros(end - first, bool)
                wanted[some[slice(*np.searchsorted(some, (first, end)))] - first] = True
                if wanted.any():
                    yield from self._joined(block, wanted)
                first = end

    def _joined(self, runs: list[_Run], wanted: np.ndarray | None = None) -> Iterator[pa.RecordBatch | Hole]:
        """The pages of runs, or those of them that are wanted, bool[pages]."""
        size = self.info.page_size
        stretches: list[Stretch] = []
        for run in runs:
            file, offset = self._source(run)
            if offset <= FILLED:
                stretches.append(Stretch(-1, FILLED - offset, run.pages * size))
            elif offset == PIECES:
                stretches += [Stretch(self._fds[file], *piece) for piece in self._extents.pieces[run.extent]]
            else:
                stretches.append(Stretch(self._fds[file], offset, run.pages * size))
        data, readable = join_pages(stretches, size)
        pages = self._pages(runs)
        if wanted is None and readable.all():
            yield self._batch(pages, content_array(pa.py_buffer(data), len(pages), size), runs)
            return
        lost = pages[~readable] if wanted is None else pages[wanted & ~readable]
        readable &= True if wanted is None else wanted
        if readable.any():
            rows = np.frombuffer(data, np.uint8).reshape(-1, size)[readable]
            yield self._batch(pages[readable], content_array(pa.py_buffer(rows), len(rows), size), runs, readable)
        yield from joined_holes(lost, size, "unreadable")


class StoredExtentImage(_ExtentPages):
    """An image whose pages are `extents` of objects in a store: read in blocks, several of them in flight."""

    def __init__(
        self, files: Sequence[StoredFile], info: ImageInfo, extents: Extents, holes: tuple[Hole, ...] = ()
    ) -> None:
        super().__init__(files, info, extents, holes)
        self._objects = files

    def batches(self, start: int, end: int) -> Iterator[pa.RecordBatch | Hole]:
        """Pages [start, end) by address, a block to a batch; raises ImageError if an object changed meanwhile."""
        if start < end:
            yield from self._in_flight(self._blocks(start, end, self._most))

    def take(self, pages: np.ndarray) -> Iterator[pa.RecordBatch | Hole]:
        """See Image.take: several requests in flight."""
        if len(pages):
            yield from self._in_flight(block for span in runs_of(pages) for block in self._blocks(*span, self._most))

    @property
    def _most(self) -> int:
        return max(1, self._objects[0].block_bytes // self.info.page_size)

    def _in_flight(self, blocks: Iterator[list[_Run]]) -> Iterator[pa.RecordBatch | Hole]:
        yield from self._objects[0].in_order(functools.partial(self._block, runs) for runs in blocks)
        for file in self._objects:
            file.checked()

    def _block(self, runs: list[_Run], stop: Event) -> pa.RecordBatch:
        size = self.info.page_size
        spans: list[list[tuple[int, int]]] = [[] for _ in self._objects]
        parts: list[tuple[int, int, int]] = []  # place of the file, of the span; or -1, a byte, nbytes
        for run in runs:
            file, offset = self._source(run)
            if offset <= FILLED:
                parts.append((-1, FILLED - offset, run.pages * size))
                continue
            wanted = self._extents.pieces[run.extent] if offset == PIECES else [(offset, run.pages * size)]
            for span in wanted:
                parts.append((file, len(spans[file]), 0))
                spans[file].append(span)
        found = [file.read_spans(some, stop) if some else [] for file, some in zip(self._objects, spans, strict=True)]
        buffers = [bytes([at]) * nbytes if file < 0 else found[file][at] for file, at, nbytes in parts]
        data = pa.py_buffer(buffers[0]) if len(buffers) == 1 else pa.py_buffer(b"".join(buffers))
        pages = self._pages(runs)
        return self._batch(pages, content_array(data, len(pages), size), runs)


_UNPACKED_BYTES = 4 << 20  # of a file that is unpacked as it is read


class PackedExtentImage(_ExtentPages):
    """An image whose pages are `extents` of files that are unpacked as they are read, from their starts on."""

    def batches(self, start: int, end: int) -> Iterator[pa.RecordBatch | Hole]:
        """Pages [start, end) by address, copied; what cannot be unpacked is a hole."""
        yield from self._each(self._blocks(start, end, max(1, _UNPACKED_BYTES // self.info.page_size)))

    def take(self, pages: np.ndarray) -> Iterator[pa.RecordBatch | Hole]:
        """See Image.take."""
        most = max(1, _UNPACKED_BYTES // self.info.page_size)
        parts = (runs_of(pages[at : at + most]) for at in range(0, len(pages), most))
        yield from self._each([run for span in some for run in self._runs(*span)] for some in parts)

    def _each(self, blocks: Iterator[list[_Run]]) -> Iterator[pa.RecordBatch | Hole]:
        read = False
        for block in blocks:
            read = True
            yield from self._read(block)
        if read:
            for file in self._files:
                file.checked()

    def _read(self, runs: list[_Run]) -> Iterator[pa.RecordBatch | Hole]:
        size = self.info.page_size
        parts: list[bytes | memoryview] = []
        keep = np.ones(sum(run.pages for run in runs), bool)
        at = 0
        for run in runs:
            file, offset = self._source(run)
            nbytes = run.pages * size
            if offset <= FILLED:
                parts.append(bytes([FILLED - offset]) * nbytes)
            elif offset == PIECES:
                data = b"".join(self._files[file].read(*piece) for piece in self._extents.pieces[run.extent])
                keep[at] = len(data) == size
                parts.append(data if keep[at] else b"")
            else:
                parts += self._whole_pages(self._files[file], offset, keep[at : at + run.pages])
            at += run.pages
        pages = self._pages(runs)
        if keep.any():
            joined = parts[0] if len(parts) == 1 else b"".join(parts)  # a join of one would copy it
            content = content_array(pa.py_buffer(joined), int(keep.sum()), size)
            yield self._batch(pages[keep], content, runs, keep)
        yield from joined_holes(pages[~keep], size, "damaged")

    def _whole_pages(self, file: ImageFile, offset: int, keep: np.ndarray) -> Iterator[bytes | memoryview]:
        """The bytes of those pages that are readable, of len(keep) at `offset`; the others are made False in `keep`.

        What follows a page that is not is asked for again: wherever a batch ends, the same pages are readable.
        """
        size, at = self.info.page_size, 0
        while at < len(keep):
            start, nbytes = offset + at * size, (len(keep) - at) * size
            data = file.view(start, nbytes) if isinstance(file, PackedFile) else file.read(start, nbytes)
            whole = len(data) // size
            if whole:
                yield data if len(data) == whole * size else data[: whole * size]
            at += whole
            if at < len(keep):
                start = offset + at * size
                on = file.resume(start) if isinstance(file, Resumable) else start
                # The page with the byte that reading goes on at has others before it.
                after = max(at + 1, -(-(on - offset) // size))
                keep[at:after] = False
                at = after


_JUMPS = 64


def check_forward(file: ImageFile, extents: Extents, number: int = 0) -> None:
    """Raises ImageError where pages lie in a compressed file, number `number` of theirs, in another order than by
    address: it is unpacked from its start on for each that lies before the last."""
    if isinstance(file, (LocalFile, StoredFile)) or (isinstance(file, FlattenedFile) and not file.forwards):
        return
    here = np.ones(len(extents), bool) if extents.file is None else extents.file == number
    whole = np.flatnonzero(here & (extents.offset >= 0))
    pieces = [(i, offset) for i, parts in extents.pieces.items() if here[i] for offset, _ in parts]
    run = np.concatenate((whole, np.array([i for i, _ in pieces], np.int64)))
    offset = np.concatenate((extents.offset[whole], np.array([offset for _, offset in pieces], np.int64)))
    if int((np.diff(offset[np.argsort(run, kind="stable")]) < 0).sum()) > _JUMPS:
        raise ImageError(
            "is compressed, and its pages do not lie in it by address: each would be unpacked from its start on",
            file.path,
            "unpack it, and scan what comes out",
        )


def extent_image(files: Sequence[ImageFile], info: ImageInfo, extents: Extents, holes: tuple[Hole, ...] = ()) -> Image:
    """The image whose pages are `extents` of these files, which it takes over.

    Raises ImageError for compressed files whose pages lie in them in another order than by address.
    """
    local = [file for file in files if isinstance(file, LocalFile)]
    if len(local) == len(files):
        return ExtentImage(local, info, extents, holes)
    stored = [file for file in files if isinstance(file, StoredFile)]
    if len(stored) == len(files):
        return StoredExtentImage(stored, info, extents, holes)
    for number, file in enumerate(files):
        check_forward(file, extents, number)
    return PackedExtentImage(files, info, extents, holes)
