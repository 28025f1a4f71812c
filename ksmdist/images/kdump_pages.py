"""The pages of one file of a kdump: their descriptors, and unpacking what these point at.

A descriptor is struct page_desc of makedumpfile's diskdump_mod.h: {i64 offset, u32 size, u32 flags, u64 page_flags}.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event

import numpy as np
import pyarrow as pa

from ksmdist.errors import ImageReadError
from ksmdist.images.files import ImageFile
from ksmdist.images.flattened import FlattenedFile
from ksmdist.images.kdump_header import DESCRIPTOR_BYTES, KdumpHeader, holds
from ksmdist.images.packed import PackedFile
from ksmdist.images.spans import clusters, read_spans
from ksmdist.images.stores import StoredFile

__all__ = ["REASONS", "KdumpPiece"]

REASONS = ("", "truncated", "damaged", "unreadable", "missing")
"""Why a page has no content; places in it are what KdumpPiece.read() gives."""

_TRUNCATED, _DAMAGED, _UNREADABLE = 1, 2, 3
_ZLIB, _LZO, _SNAPPY, _ZSTD = 0x1, 0x2, 0x4, 0x20
_DESCRIPTOR = [("offset", "u8"), ("size", "u4"), ("flags", "u4"), ("page_flags", "u8")]
_AHEAD = 1 << 20  # descriptors read at once from a file that is unpacked from its start on: 4 GiB of pages
_SHARED = 8  # contents kept that many pages have: makedumpfile and QEMU write one zero page for all

Unpack = Callable[[memoryview], "bytes | None"]


@dataclass(slots=True)
class KdumpPiece:
    """One file of a kdump, or the only one.

    first: the rank, among all dumped pages, of the first whose descriptor is in it; count: descriptors in it; sure: of
    these, how many there are at least, where not all is known (read_bitmaps)
    """

    file: ImageFile
    header: KdumpHeader
    first: int
    count: int
    sure: int
    _ahead: tuple[int, np.ndarray] | None = None
    _shared: dict[tuple[int, int, int], bytes] = field(default_factory=dict)

    @property
    def data_at(self) -> int:
        """No page's data lies before: where the descriptors end."""
        return self.header.descriptors_at + DESCRIPTOR_BYTES * self.sure

    @property
    def stored(self) -> StoredFile | None:
        """The object it is read from, if it can be read from at any place."""
        file = self.file.stored if isinstance(self.file, FlattenedFile) else self.file
        return file if isinstance(file, StoredFile) else None

    @property
    def _forwards(self) -> bool:
        return isinstance(self.file, PackedFile) or (isinstance(self.file, FlattenedFile) and self.file.forwards)

    def read(self, rank: np.ndarray, stop: Event | None = None) -> tuple[list[bytes | memoryview], np.ndarray]:
        """The pages of these ranks, int64[n], ascending: the bytes of those that can be read, end to end, in parts,
        and uint8[n]: why the others cannot, a place in REASONS.

        Raises ImageReadError only where a store does not answer.
        """
        size = self.header.block_size
        offset, nbytes, flags, reason = self._described(rank - self.first, stop)
        good = np.flatnonzero(reason == 0)
        order = good[np.lexsort((flags[good], nbytes[good], offset[good]))]
        key = np.column_stack((offset[order], nbytes[order], flags[order]))
        opens = np.concatenate(([True], (key[1:] != key[:-1]).any(axis=1)))[: len(order)]
        content = np.full(len(rank), -1, np.int64)  # of each page, its place among the different ones
        content[order] = np.cumsum(opens) - 1
        first = order[opens]
        found = self._contents(offset[first], nbytes[first], flags[first], stop)
        self._keep(key[opens], np.diff(np.append(np.flatnonzero(opens), len(order))), found)
        reason[good] = found.why[content[good]]

        left = content[reason == 0]  # of each page that can be read, its place among the different ones
        as_it_is = found.buffer[left] >= 0
        # A run of pages that lie unpacked and back to back is one part.
        follows = as_it_is[1:] & as_it_is[:-1] & (found.buffer[left[1:]] == found.buffer[left[:-1]])
        follows &= found.start[left[1:]] == found.start[left[:-1]] + size
        starts = np.flatnonzero(np.concatenate(([True], ~follows)))[: len(left)]
        parts: list[bytes | memoryview] = []
        for low, pages in zip(starts.tolist(), np.diff(np.append(starts, len(left))).tolist(), strict=True):
            place = left[low]
            if as_it_is[low]:
                at = int(found.start[place])
                parts.append(found.buffers[found.buffer[place]][at : at + pages * size])
            else:
                parts.append(found.contents[place])
        return parts, reason

    def _described(
        self, index: np.ndarray, stop: Event | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of descriptors, int64[n] ascending: offset, size, flags, int64[n], and why there is no page, uint8[n]."""
        size = self.header.block_size
        found, reason = self._descriptors(index, stop)
        wide = found["offset"]
        nbytes, flags = found["size"].astype(np.int64), found["flags"].astype(np.int64)
        reason[(reason == 0) & (wide == 0)] = _TRUNCATED  # never written: crash's diskdump.c, PAGE_INCOMPLETE
        wrong = (wide < self.data_at) | (wide > np.uint64((1 << 63) - 1 - (1 << 32)))
        wrong |= (nbytes == 0) | (nbytes > size) | ~np.isin(flags, (0, _ZLIB, _LZO, _SNAPPY, _ZSTD))
        wrong |= (flags == 0) & (nbytes != size)
        reason[(reason == 0) & wrong] = _DAMAGED
        offset = np.where(reason == 0, wide, 0).astype(np.int64)
        reason[(reason == 0) & ~holds(self.file, offset, nbytes)] = _TRUNCATED
        return offset, nbytes, flags, reason

    def _descriptors(self, index: np.ndarray, stop: Event | None) -> tuple[np.ndarray, np.ndarray]:
        kind = np.dtype([(name, self.header.order + form) for name, form in _DESCRIPTOR])
        found, reason = np.zeros(len(index), kind), np.zeros(len(index), np.uint8)
        at = self.header.descriptors_at + DESCRIPTOR_BYTES * index
        reason[~holds(self.file, at, DESCRIPTOR_BYTES)] = _TRUNCATED
        left = np.flatnonzero(reason == 0)
        if self._forwards:
            return self._read_ahead(index, found, reason)
        spans, which = clusters(at[left], np.full(len(left), DESCRIPTOR_BYTES))
        for number, data in enumerate(self._read(spans, stop)):
            some = left[which == number] if len(spans) > 1 else left
            if data is None and len(some) > 1:  # the disk has failed here: each is asked for alone
                for one in some.tolist():
                    (single,) = self._read([(int(at[one]), DESCRIPTOR_BYTES)], stop)
                    if single is None or len(single) < DESCRIPTOR_BYTES:
                        reason[one] = _UNREADABLE if single is None else _DAMAGED
                    else:
                        found[one] = np.frombuffer(single, kind)[0]
                continue
            if data is None:
                reason[some] = _UNREADABLE
                continue
            table = np.frombuffer(data, kind, len(data) // DESCRIPTOR_BYTES)
            place = (at[some] - spans[number][0]) // DESCRIPTOR_BYTES
            there = place < len(table)
            found[some[there]] = table[place[there]]
            reason[some[~there]] = _DAMAGED
        return found, reason

    def _read_ahead(self, index: np.ndarray, found: np.ndarray, reason: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """_descriptors() of a file where to go back is to begin again."""
        window = index // _AHEAD
        for number in np.unique(window[reason == 0]).tolist():
            if self._ahead is None or self._ahead[0] != number:
                low = number * _AHEAD
                data = self.file.read(
                    self.header.descriptors_at + DESCRIPTOR_BYTES * low,
                    DESCRIPTOR_BYTES * min(_AHEAD, self.count - low),
                )
                self._ahead = number, np.frombuffer(data, found.dtype, len(data) // DESCRIPTOR_BYTES)
            table = self._ahead[1]
            some = np.flatnonzero((window == number) & (reason == 0))
            place = index[some] - number * _AHEAD
            there = place < len(table)
            found[some[there]] = table[place[there]]
            reason[some[~there]] = _DAMAGED
        return found, reason

    def _read(self, spans: list[tuple[int, int]], stop: Event | None) -> list[memoryview | None]:
        """The bytes of each (offset, nbytes); None for what the disk does not give."""
        try:
            return list(read_spans(self.file, spans, stop))
        except ImageReadError:
            if self.stored is not None:
                raise
        found: list[memoryview | None] = []
        for span in spans:
            try:
                found += read_spans(self.file, [span], stop)
            except ImageReadError:
                found.append(None)
        return found

    def _contents(self, offset: np.ndarray, nbytes: np.ndarray, flags: np.ndarray, stop: Event | None) -> _Contents:
        """What different descriptors, by offset, point at.

        Pages are unpacked in a loop, each a stream of its own. Measured for 4 KiB: zlib 8.6 us, lzo 4.7, snappy 2.5,
        zstd 13.
        """
        known = [self._shared.get(key) for key in zip(offset.tolist(), nbytes.tolist(), flags.tolist(), strict=True)]
        found = _Contents([content or b"" for content in known], np.zeros(len(offset), np.uint8))
        left = np.flatnonzero([content is None for content in known])
        spans, which = clusters(offset[left], nbytes[left])
        buffers = self._read(spans, stop)
        found.buffers = [memoryview(b"") if buffer is None else buffer for buffer in buffers]
        start = offset[left] - np.array([at for at, _ in spans], np.int64)[which]
        for group in [group for group, buffer in enumerate(buffers) if buffer is None]:  # the disk has failed there
            for place in np.flatnonzero(which == group).tolist():
                (single,) = self._read([(int(offset[left[place]]), int(nbytes[left[place]]))], stop)
                which[place], start[place] = len(found.buffers), 0
                found.buffers.append(memoryview(b"") if single is None else single)
                found.why[left[place]] = _UNREADABLE if single is None else 0
        ends = np.array([len(buffer) for buffer in found.buffers], np.int64)[which]
        found.why[left[(start + nbytes[left] > ends) & (found.why[left] == 0)]] = _DAMAGED
        found.buffer[left], found.start[left] = which, start
        for flag in np.unique(flags[left]).tolist():
            if flag:
                self._unpack(found, left[(flags[left] == flag) & (found.why[left] == 0)], nbytes, flag)
        return found

    def _unpack(self, found: _Contents, places: np.ndarray, nbytes: np.ndarray, flag: int) -> None:
        unpack = _unpacker(flag, self.header.block_size)
        ends = found.start[places] + nbytes[places]
        for place, number, start, end in zip(
            places.tolist(), found.buffer[places].tolist(), found.start[places].tolist(), ends.tolist(), strict=True
        ):
            content = unpack(found.buffers[number][start:end])
            if content is None:
                found.why[place] = _DAMAGED
            else:
                found.contents[place] = content
        found.buffer[places] = -1

    def _keep(self, key: np.ndarray, count: np.ndarray, found: _Contents) -> None:
        """Keep what many pages of a batch have: it lies far from what the next batch reads."""
        room = _SHARED - len(self._shared)
        if room <= 0:  # less: threads that read a store keep some at the same time
            return
        size = self.header.block_size
        for place in np.flatnonzero((count > 1) & (found.why == 0)).tolist()[:room]:
            data: bytes | memoryview = found.contents[place]
            if found.buffer[place] >= 0:
                start = int(found.start[place])
                data = found.buffers[found.buffer[place]][start : start + size]
            at, nbytes, flags = key[place].tolist()
            self._shared[at, nbytes, flags] = bytes(data)


@dataclass(slots=True)
class _Contents:
    """Pages: unpacked, or bytes [start, start + page size) of a buffer, where `buffer` is not -1. why: see REASONS."""

    contents: list[bytes]
    why: np.ndarray
    buffer: np.ndarray = field(init=False)
    start: np.ndarray = field(init=False)
    buffers: list[memoryview] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.buffer = np.full(len(self.why), -1, np.int64)
        self.start = np.zeros(len(self.why), np.int64)


def _unpacker(flag: int, size: int) -> Unpack:
    """What gives a page of `size` bytes from its packed bytes, None for what is no such page."""
    return {_ZLIB: _of_zlib, _LZO: _of_lzo, _SNAPPY: _of_snappy, _ZSTD: _of_zstd}[flag](size)


def _of_zlib(size: int) -> Unpack:
    from isal import isal_zlib  # here, and not above: few images need it

    begin, wrong = isal_zlib.decompressobj, isal_zlib.error

    def unpack(data: memoryview) -> bytes | None:
        stream = begin(15)
        try:
            page = stream.decompress(data, size + 1)  # one more than there may be: then the end is seen, too
        except wrong:  # type: ignore[misc]  # its stubs have it as a type of any kind
            return None
        return page if stream.eof and len(page) == size else None

    return unpack


def _of_lzo(size: int) -> Unpack:
    import lzallright

    stream = lzallright.LZOCompressor()

    def unpack(data: memoryview) -> bytes | None:
        try:  # it does not stop at `size`, but 255 bytes for one is all that LZO1X can say, and `data` is no longer
            page: bytes = stream.decompress(bytes(data), size)
        except (lzallright.LZOError, lzallright.InputNotConsumed):
            return None
        return page if len(page) == size else None

    return unpack


def _of_snappy(size: int) -> Unpack:
    codec, start = pa.Codec("snappy"), _varint(size)

    def unpack(data: memoryview) -> bytes | None:
        # It says its length first; of a shorter one pyarrow would give the rest of the buffer as it finds it.
        if data[: len(start)] != start:
            return None
        return _unpacked(codec, data, size)

    return unpack


def _of_zstd(size: int) -> Unpack:
    codec = pa.Codec("zstd")
    return lambda data: _unpacked(codec, data, size)


def _unpacked(codec: pa.Codec, data: memoryview, size: int) -> bytes | None:
    try:
        page: bytes = codec.decompress(data, size, asbytes=True)
    except (OSError, pa.ArrowInvalid):
        return None
    return page


def _varint(value: int) -> bytes:
    found = []
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
