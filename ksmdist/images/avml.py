"""AVML v2: ranges of guest-physical memory as LiME has them, the bytes of each in frames of snappy.

Rules: AVML's src/image.rs and src/io/snappy.rs; snappy's framing_format.txt. Behind a header of LiME's form is a
stream of chunks that unpack to the range's bytes, 64 KiB each but for the last, then the length of that stream in 8
bytes. AVML leaves out blocks that are all zeros.

The chunks are found at opening, by their headers alone, and unpacked as their pages are read. A chunk that cannot be
unpacked, or has another checksum (CRC-32C) then, makes its pages holes.

Raises ImageError: no header or chunk where one should be, chunks that do not add up to their range, more or smaller
chunks than anything writes, or more than MOST_RANGES ranges.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ksmdist.errors import ImageError
from ksmdist.images.base import Format, Hole, Image, ImageInfo, joined_holes
from ksmdist.images.extents import PIECES, Extents, PackedExtentImage, check_forward, content_array
from ksmdist.images.files import ImageFile
from ksmdist.images.lime import AVML_ZEROS, HEADER_BYTES, MOST_RANGES, RUNNING, read_header
from ksmdist.images.segments import Segments, cut_pages, holes_of
from ksmdist.images.spans import clusters, read_spans
from ksmdist.images.windows import Window

__all__ = ["AVML"]

_MAGIC, _VERSION = b"AVML", 2
_STREAM_BYTES = 8  # behind each range: the length of its chunks
_CHUNK_BYTES = 64 << 10  # most that a chunk unpacks to
_MOST_PACKED = _CHUNK_BYTES + _CHUNK_BYTES // 6 + 32  # snappy's MaxCompressedLength of that
_RATIO = 22  # snappy makes 64 bytes of 3 at best
_SMALL_BYTES, _SMALL_CHUNKS = 4096, 64  # chunks of a range are larger than this, but for so many
_MOST_DAMAGED = 1000  # chunks whose length is not told
_HINT = "take it again, or check that it was copied whole"
_PACKED, _PLAIN, _LOST = range(3)  # kinds of chunks
_IDENTIFIER = b"\xff\6\0\0sNaPpY"  # the first chunk
_OPTIONAL = 0x80  # this type and those above may be passed over


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Chunks by the place of what they unpack to, all ranges end to end: where that is, int64[n + 1]; where each lies
    in the file and how long it is there, int64[n]; how it is packed, uint8[n]; its checksum, int64[n], -1 for none."""

    place: np.ndarray
    offset: np.ndarray
    nbytes: np.ndarray
    kind: np.ndarray
    checksum: np.ndarray


class _Walk:
    """Finds the chunks of one range after another."""

    def __init__(self, window: Window, path: str) -> None:
        self._window, self._path = window, path
        self.place, self.offset, self.nbytes = array("q", [0]), array("q"), array("q")
        self.checksum = array("q")
        self.kind = bytearray()
        self._damaged = 0

    def stream(self, at: int, nbytes: int, end: int) -> int:
        """The chunks from byte `at` of the file on that unpack to `nbytes`; the byte behind them, `end` if they are
        cut off there. 2 us a chunk, 32 ms a GiB."""
        begin = self.place[-1]
        place, steps = begin, 0
        while place < begin + nbytes:
            if steps > _SMALL_CHUNKS + (place - begin) // _SMALL_BYTES:
                raise ImageError(f"has more chunks at byte {at} than anything writes", self._path, _HINT)
            steps += 1
            head = self._window.read(at, 11)  # of a chunk's header, checksum, and snappy's own length
            if len(head) < 4:
                return end
            if steps == 1 and not _IDENTIFIER.startswith(head[: len(_IDENTIFIER)]):
                raise ImageError(f"has no snappy stream at byte {at}, where one should be", self._path, _HINT)
            kind, length = head[0], int.from_bytes(head[1:4], "little")
            if kind > 3:
                if kind < _OPTIONAL:
                    raise ImageError(f"has a chunk of unknown type {kind} at byte {at}", self._path, _HINT)
                at += 4 + length
                continue
            summed = 0 if kind & 2 else 4
            body = length - summed
            if body <= 0 or body > _MOST_PACKED or (kind & 1 and body > _CHUNK_BYTES):
                raise ImageError(f"has a chunk of {length} bytes at byte {at}", self._path, _HINT)
            if at + 4 + length > end:
                return end
            packing = _PLAIN if kind & 1 else _PACKED
            unpacked = body if kind & 1 else _preamble(head[4 + summed :], body)
            if unpacked < 0:  # then it is as long as all but the last are
                unpacked = min(_CHUNK_BYTES, begin + nbytes - place)
                packing = _LOST
                self._damaged += 1
                if self._damaged > _MOST_DAMAGED:
                    raise ImageError(f"is damaged: byte {at} and before", self._path, _HINT)
            place += unpacked
            if place > begin + nbytes:
                raise ImageError(f"has chunks up to byte {at} that hold more than their range", self._path, _HINT)
            self.place.append(place)
            self.offset.append(at + 4 + summed)
            self.nbytes.append(body)
            self.kind.append(packing)
            self.checksum.append(int.from_bytes(head[4:8], "little") if summed else -1)
            at += 4 + length
        return at

    def found(self) -> _Chunks:
        """What it found."""
        place, offset, nbytes, checksum = (
            np.frombuffer(column, np.int64) for column in (self.place, self.offset, self.nbytes, self.checksum)
        )
        return _Chunks(place, offset, nbytes, np.frombuffer(self.kind, np.uint8), checksum)


def _preamble(head: bytes, body: int) -> int:
    """Bytes that a snappy block of `body` bytes unpacks to, as it says itself; -1 where that cannot be."""
    value = shift = 0
    for byte in head[:3]:
        value |= (byte & 127) << shift
        if byte < 128:
            return value if 0 < value <= min(_CHUNK_BYTES, _RATIO * body) else -1
        shift += 7
    return -1


def _masked(checksum: int) -> int:
    """A CRC-32C as chunks have it: framing_format.txt, 3."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


class _AvmlImage(PackedExtentImage):
    """Pages in chunks; the extents' offsets are places in what these unpack to."""

    def __init__(
        self, file: ImageFile, info: ImageInfo, extents: Extents, holes: tuple[Hole, ...], chunks: _Chunks
    ) -> None:
        super().__init__([file], info, extents, holes)
        self._chunks = chunks
        self._codec = pa.Codec("snappy")

    def _read(self, runs: Sequence[Any]) -> Iterator[pa.RecordBatch | Hole]:
        size, place = self.info.page_size, self._chunks.place
        pages = self._pages(runs)
        # Pieces of pages: where they are, how long, and the place in the batch that they go to.
        pieces: list[tuple[int, int, int]] = []
        to = 0
        for run in runs:
            _, offset = self._source(run)
            if offset == PIECES:
                for at, length in self._extents.pieces[run.extent]:
                    pieces.append((at, length, to))
                    to += length
            else:
                pieces.append((offset, run.pages * size, to))
                to += run.pages * size
        start, nbytes, to_batch = np.array(pieces, np.int64).reshape(-1, 3).T
        low = np.searchsorted(place, start, side="right") - 1
        high = np.searchsorted(place, start + nbytes, side="left")
        count = high - low
        within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        wanted = np.unique(np.repeat(low, count) + within)

        data, good = self._unpacked(wanted)
        row = np.searchsorted(wanted, low)  # chunks of one piece are neighbours in `wanted`, too
        ends = np.concatenate((np.zeros(1, np.int64), np.cumsum(place[wanted + 1] - place[wanted])))
        source = ends[row] + start - place[low]
        keep = np.ones(len(pages), bool)
        if not good.all():
            bad = wanted[~good]
            first, last = place[bad], place[bad + 1]
            lost_low = np.searchsorted(last, start, side="right")
            lost = np.maximum(np.searchsorted(first, start + nbytes, side="left") - lost_low, 0)
            piece = np.repeat(np.arange(len(start)), lost)
            chunk = np.arange(len(piece)) - np.repeat(np.cumsum(lost) - lost - lost_low, lost)
            begin = (to_batch[piece] + np.maximum(first[chunk] - start[piece], 0)) // size
            end = -(-(to_batch[piece] + np.minimum(last[chunk] - start[piece], nbytes[piece])) // size)
            steps = np.zeros(len(pages) + 1, np.int64)
            np.add.at(steps, begin, 1)
            np.add.at(steps, end, -1)
            keep = np.cumsum(steps)[:-1] == 0
        if len(pieces) == 1:
            content = pa.py_buffer(data).slice(int(source[0]), int(nbytes[0]))
        else:
            spans = zip(source.tolist(), (source + nbytes).tolist(), strict=True)
            content = pa.py_buffer(np.concatenate([data[first:last] for first, last in spans]))
        if not keep.all():
            content = pa.py_buffer(np.frombuffer(content, np.uint8).reshape(-1, size)[keep])
        if keep.any():
            yield self._batch(pages[keep], content_array(content, int(keep.sum()), size), runs, keep)
        yield from joined_holes(pages[~keep], size, "damaged")

    def _unpacked(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What these chunks, int64[n], ascending, unpack to, end to end, uint8; bool[n], which could be unpacked."""
        from google_crc32c import value  # here, and not above: few files need it

        chunks = self._chunks
        spans, which = clusters(chunks.offset[wanted], chunks.nbytes[wanted])
        packed = read_spans(self._files[0], spans)
        sizes = chunks.place[wanted + 1] - chunks.place[wanted]
        data = np.zeros(int(sizes.sum()), np.uint8)
        good = np.ones(len(wanted), bool)
        at = 0
        columns = (wanted, which, sizes, *(of[wanted] for of in (chunks.offset, chunks.nbytes, chunks.kind)))
        columns = (*columns, chunks.checksum[wanted])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for number, row in enumerate(rows):  # 19 us a chunk, 10 of them snappy
            _, span, size, offset, nbytes, kind, checksum = row
            first = offset - spans[span][0]
            body = packed[span][first : first + nbytes]
            try:
                if kind == _LOST or len(body) < nbytes:
                    raise OSError
                plain = bytes(body) if kind == _PLAIN else self._codec.decompress(body, size)
                if checksum >= 0 and _masked(value(plain)) != checksum:
                    raise ValueError
                data[at : at + size] = np.frombuffer(plain, np.uint8)
            except (OSError, ValueError):
                good[number] = False
            at += size
        return data, good


def _open(file: ImageFile, page_size: int) -> Image:
    path = file.path
    window = Window(file)
    walk = _Walk(window, path)
    ranges: list[tuple[int, int, int, int]] = []
    caveats = [RUNNING]
    at = 0
    while at < file.nbytes:
        header = read_header(window, at, _MAGIC, _VERSION, path)
        if header.start == header.end:
            caveats.append(f"is cut off at byte {at}: what came after is not counted")
            break
        if len(ranges) == MOST_RANGES:
            raise ImageError(f"has more than {MOST_RANGES} ranges, more than anything writes", path, _HINT)
        place = walk.place[-1]
        at = walk.stream(at + HEADER_BYTES, header.end - header.start, file.nbytes) + _STREAM_BYTES
        ranges.append((header.start, header.end, place, header.start + walk.place[-1] - place))
    start, end, offset, there = np.array(ranges, np.uint64).reshape(-1, 4).T

    dumped = Segments(start, end, offset)
    available = dumped.up_to(there, page_size).disjoint()
    extents, partial = cut_pages(available, page_size)
    holes = holes_of(dumped.disjoint(), available, partial, page_size)
    info = ImageInfo.of(
        file,
        "avml",
        "guest",
        page_size,
        extents.pages,
        0,
        producer="AVML",
        filter_level=AVML_ZEROS,
        caveats=tuple(caveats),
    )
    check_forward(file, extents)
    return _AvmlImage(file, info, extents, tuple(holes), walk.found())


AVML = Format("avml", lambda head: head.startswith(_MAGIC), _open)
"""AVML's compressed format; its other one is LiME's."""
