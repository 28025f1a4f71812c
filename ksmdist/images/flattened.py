"""makedumpfile's flattened format: a file as the writes that made it, which QEMU sends its kdumps as.

Format: a header of 4096 bytes (makedumpfile.h struct makedumpfile_header: 16 bytes of signature, type, version),
then for each write {be64 offset, be64 nbytes, bytes}, until both are -1. The last writer of a byte wins.
"""

from __future__ import annotations

import functools
import heapq
import struct
from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise
from threading import Event

import numpy as np

from ksmdist.errors import ImageError
from ksmdist.images.base import joined_ranges
from ksmdist.images.files import ImageFile
from ksmdist.images.packed import PackedFile
from ksmdist.images.spans import clusters, read_spans
from ksmdist.images.stores import StoredFile

__all__ = ["FLATTENED", "FlattenedFile"]

FLATTENED = b"makedumpfile\0\0\0\0"
"""The first bytes of a flattened file."""

_HEADER_BYTES = 4096
_RECORD = struct.Struct(">qq")
_WINDOW = 4 << 20  # records are many and small, so their headers are looked for in what is read ahead
_AHEAD = 8  # windows at a time from a store
_MOST_OVERLAPPING = 1 << 20  # 2.3 s and 160 MB; makedumpfile writes a few headers again
_MOST_RECORDS = 1 << 26  # QEMU's are of 16 KiB: 1 TiB; their index takes 1.6 GB
_HINT = "rearrange it with `makedumpfile -R`, and scan what comes out"


class FlattenedFile:
    """What a flattened file holds, as a file. Bytes that no write gave are zeros, as in any sparse file.

    truncated: it has no end, so that writes are missing: bytes that no write gave are then not known, and read()
    ends before them. Raises ImageError: another version of the format, too many records.
    """

    def __init__(self, file: ImageFile) -> None:
        self._file = file
        self.path: str = file.path
        self.fingerprint: str = file.fingerprint
        self.disk_nbytes, self.unpacked = file.disk_nbytes, file.unpacked
        if isinstance(file, FlattenedFile):
            raise ImageError("is flattened twice over", self.path, _HINT)
        self.stored = file if isinstance(file, StoredFile) else None
        self.forwards = isinstance(file, PackedFile)
        head = file.read(0, _HEADER_BYTES)
        if len(head) < _HEADER_BYTES:
            raise ImageError("is a flattened file, cut off in its header", file.path, "copy it again")
        if _RECORD.unpack_from(head, len(FLATTENED)) != (1, 1):
            raise ImageError("is a flattened file of an unknown type or version", file.path, _HINT)
        offset, nbytes, at, self.truncated = self._records()
        self._offset, self._nbytes, self._at = _last_writers(offset, nbytes, at, self.path)
        self._end = self._offset + self._nbytes
        self.nbytes = int(self._end[-1]) if len(self._end) else 0
        runs = joined_ranges(self._offset, self._end).astype(np.int64)
        self._run_start, self._run_end = runs[:, 0].copy(), runs[:, 1].copy()

    def checked(self) -> None:
        """As of the file it is in."""
        self._file.checked()

    def close(self) -> None:
        """Let it go."""
        self._file.close()

    def data_extents(self) -> np.ndarray:
        """Byte ranges that are not holes: int64[n, 2], ascending."""
        return np.column_stack((self._run_start, self._run_end))

    def holds(self, offset: np.ndarray, nbytes: np.ndarray | int) -> np.ndarray:
        """bool[n]: whether all of these bytes are known, int64[n] each."""
        if not self.truncated or len(self._run_start) == 0:
            return (offset <= self.nbytes - nbytes) & (not self.truncated)
        run = np.searchsorted(self._run_start, offset, side="right") - 1
        return (run >= 0) & (self._run_end[np.maximum(run, 0)] - nbytes >= offset)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes from `offset` on: `nbytes`, or as many as are known."""
        end = min(offset + nbytes, self.nbytes)
        if self.truncated:
            run = int(np.searchsorted(self._run_start, offset, side="right")) - 1
            end = min(end, int(self._run_end[run])) if run >= 0 else offset
        return bytes(self.read_spans([(offset, end - offset)])[0]) if offset < end else b""

    def resume(self, offset: int) -> int:
        """See Resumable: past what no record has."""
        run = int(np.searchsorted(self._run_end, offset, side="right"))
        return max(offset, int(self._run_start[run])) if run < len(self._run_start) else self.nbytes

    def read_spans(self, spans: Sequence[tuple[int, int]], stop: Event | None = None) -> list[memoryview]:
        """The bytes of each (offset, nbytes), not known ones as zeros; see holds()."""
        start = np.array([offset for offset, _ in spans], np.int64)
        end = np.minimum(start + np.array([nbytes for _, nbytes in spans], np.int64), self.nbytes)
        first = np.searchsorted(self._end, start, side="right")
        count = np.maximum(0, np.searchsorted(self._offset, end) - first)
        of = np.repeat(np.arange(len(spans)), count)  # the span that a piece of a record is for
        record = np.arange(len(of)) + np.repeat(first - (np.cumsum(count) - count), count)
        low = np.maximum(self._offset[record], start[of])
        nbytes = np.minimum(self._end[record], end[of]) - low
        at = self._at[record] + low - self._offset[record]
        order = np.argsort(at, kind="stable")
        groups, group = clusters(at[order], nbytes[order])
        buffers = read_spans(self._file, groups, stop)
        pieces = [memoryview(b"")] * len(of)
        skip = at[order] - np.array([where for where, _ in groups], np.int64)[group]
        for piece, number, begin, stop_at in zip(
            order.tolist(), group.tolist(), skip.tolist(), (skip + nbytes[order]).tolist(), strict=True
        ):
            pieces[piece] = buffers[number][begin:stop_at]
        found, done = [], 0
        for offset, stop_at, n in zip(start.tolist(), end.tolist(), count.tolist(), strict=True):
            some = zip(
                low[done : done + n].tolist(), nbytes[done : done + n].tolist(), pieces[done : done + n], strict=True
            )
            found.append(_joined(offset, stop_at, some))
            done += n
        return found

    def _records(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """Offset, bytes and place in the file of each record, int64[n], and whether the end record is missing.

        A loop over all: each says where the next is. Measured: 0.5 us a record, 3 s for 100 GB of QEMU's.
        """
        offsets, sizes, places = array("q"), array("q"), array("q")
        windows: dict[int, bytes] = {}
        number, data, base = -1, b"", 0
        at, cut_off, whole = _HEADER_BYTES, False, self._file.nbytes
        unpack = _RECORD.unpack_from
        while True:
            if not base <= at < base + _WINDOW or not data:
                number = at // _WINDOW
                data, base = self._window(number, windows), number * _WINDOW
            if at + _RECORD.size > base + len(data):
                cut_off = True
                break
            offset, size = unpack(data, at - base)
            if offset < 0 or size <= 0 or offset > (1 << 63) - 1 - size:
                cut_off = (offset, size) != (-1, -1)  # damaged: what follows cannot be found
                break
            at += _RECORD.size
            if at + size > whole:
                size, cut_off = whole - at, True
            if size:
                offsets.append(offset)
                sizes.append(size)
                places.append(at)
            if cut_off:
                break
            if len(places) > _MOST_RECORDS:
                raise ImageError(f"is a flattened file of more than {_MOST_RECORDS} records", self.path, _HINT)
            at += size
        return np.array(offsets, np.int64), np.array(sizes, np.int64), np.array(places, np.int64), cut_off

    def _window(self, number: int, windows: dict[int, bytes]) -> bytes:
        """Bytes from number * _WINDOW on: as many, and a record's header more. windows: what was read ahead."""
        if number in windows:
            return windows[number]
        count = _AHEAD if self.stored is not None and number - 1 in windows else 1
        windows.clear()
        nbytes = _WINDOW + _RECORD.size
        if count == 1 or self.stored is None:
            windows[number] = self._file.read(number * _WINDOW, nbytes)
            return windows[number]
        starts = range(number, min(number + count, -(-self._file.nbytes // _WINDOW)))
        reads = (functools.partial(_read, self.stored, at * _WINDOW, nbytes) for at in starts)
        windows.update(zip(starts, self.stored.in_order(reads), strict=True))
        return windows.get(number, b"")


def _read(file: StoredFile, offset: int, nbytes: int, stop: Event) -> bytes:
    return file.read_exactly(offset, max(0, min(nbytes, file.nbytes - offset)), stop)


def _joined(offset: int, end: int, pieces: Iterable[tuple[int, int, memoryview]]) -> memoryview:
    """Bytes [offset, end) of pieces (offset, nbytes, bytes), zeros between them; cut short where bytes are too few."""
    parts: list[memoryview | bytes] = []
    for low, nbytes, data in pieces:
        if offset < low:
            parts.append(bytes(low - offset))
        parts.append(data)
        if len(data) < nbytes:
            break
        offset = low + nbytes
    else:
        if offset < end:
            parts.append(bytes(end - offset))
    return memoryview(parts[0] if len(parts) == 1 else b"".join(parts))


def _last_writers(
    offset: np.ndarray, nbytes: np.ndarray, at: np.ndarray, path: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Records in the order of writing -> ascending, disjoint ones: of each byte the last that wrote it.

    Raises ImageError for too many that lie over each other. path: of the file, for that.
    """
    order = np.argsort(offset, kind="stable")
    start, end = offset[order], (offset + nbytes)[order]
    if len(start) == 0:
        return offset, nbytes, at
    reach = np.maximum.accumulate(end)
    opens = np.concatenate(([True], start[1:] >= reach[:-1]))
    alone = opens & np.append(opens[1:], True)
    if alone.all():
        return start, end - start, at[order]
    number = order[~alone]
    if len(number) > _MOST_OVERLAPPING:
        raise ImageError(f"is a flattened file with {len(number)} records that lie over each other", path, _HINT)
    pieces = np.array(_overlaid(start[~alone].tolist(), end[~alone].tolist(), number.tolist()), np.int64)
    first = np.concatenate((start[alone], pieces[:, 0]))
    last = np.concatenate((end[alone], pieces[:, 1]))
    place = np.concatenate((at[order][alone], at[pieces[:, 2]] + pieces[:, 0] - offset[pieces[:, 2]]))
    order = np.argsort(first)
    return first[order], (last - first)[order], place[order]


def _overlaid(start: list[int], end: list[int], number: list[int]) -> list[tuple[int, int, int]]:
    """Ranges by start, the one of the highest number on top -> disjoint (start, end, number), ascending.

    A loop, since few overlap: makedumpfile writes its headers again. Measured: 2 us a range.
    """
    found: list[tuple[int, int, int]] = []
    open_: list[tuple[int, int]] = []  # (-number, end), the top one first
    edges = sorted({*start, *end})
    at = 0
    for low, high in pairwise(edges):
        while at < len(start) and start[at] == low:
            heapq.heappush(open_, (-number[at], end[at]))
            at += 1
        while open_ and open_[0][1] <= low:
            heapq.heappop(open_)
        if not open_:
            continue
        top = -open_[0][0]
        if found and found[-1][1:] == (low, top):
            found[-1] = (found[-1][0], high, top)
        else:
            found.append((low, high, top))
    return found
