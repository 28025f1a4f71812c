"""The bytes of a stream in a file, forwards: small pieces of its structure, and wide windows of its pages."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

from ksmdist.images.files import ImageFile, LocalFile
from ksmdist.images.stores import StoredFile

__all__ = ["Ended", "StreamBytes", "StreamWindow"]

_FIRST_BYTES, _WINDOW_BYTES = 1 << 16, 1 << 22  # what is read at once: it doubles while reading goes on


class Ended(Exception):  # noqa: N818  # no error: what it ends is told by who catches it
    """The file ends before the bytes that were asked for."""


class StreamWindow(NamedTuple):
    """Some bytes of a file: `data` begins at byte `start` of it, and is good up to the next call of StreamBytes."""

    data: memoryview
    start: int


class StreamBytes:
    """A file from `at` on. at: the byte that comes next. Raises Ended, and ImageReadError as the file does.

    Local files are read into one buffer again and again: measured 20 GB/s cached, 2 into a new one each time.
    """

    def __init__(self, file: ImageFile, at: int) -> None:
        self._file = file
        self.at = at
        self._window = StreamWindow(memoryview(b""), at)
        self._buffer = bytearray()
        self._piece = _FIRST_BYTES
        self._end = -1  # where the last read ended
        self._ahead: Iterator[bytes] | None = None  # of an object: pieces from self._end on, several in flight

    def close(self) -> None:
        """Stop reading ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()  # type: ignore[attr-defined]  # in_order() is a generator

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        data, start = self.window(nbytes)
        found = bytes(data[self.at - start : self.at - start + nbytes])
        if len(found) < nbytes:
            raise Ended
        self.at += nbytes
        return found

    def number(self, nbytes: int) -> int:
        """The next big-endian number of so many bytes."""
        return int.from_bytes(self.take(nbytes), "big")

    def text(self) -> bytes:
        """The next string: a byte with its length, and that many bytes."""
        return self.take(self.number(1))

    def peek(self) -> int:
        """The next byte, which stays the next; -1 at the end of the file."""
        data, start = self.window(1)
        return data[self.at - start] if self.at - start < len(data) else -1

    def skip(self, nbytes: int) -> None:
        """Leave out bytes that the file has."""
        if self.at + nbytes > self._file.nbytes:
            raise Ended
        self.at += nbytes

    def window(self, nbytes: int) -> StreamWindow:
        """A window in which the next `nbytes` bytes are, or as many as there are."""
        data, start = self._window
        left = data[max(0, self.at - start) :] if self.at >= start else data[:0]
        while len(left) < nbytes:
            more = self.at + len(left)
            goes_on = more == self._end
            self._piece = min(2 * self._piece, _WINDOW_BYTES) if goes_on else _FIRST_BYTES
            longer = self._longer(left, more, max(self._piece, nbytes - len(left)), goes_on)
            self._end = self.at + len(longer)
            self._window = StreamWindow(longer, self.at)
            if len(longer) == len(left):
                break
            left = longer
        return self._window

    def _longer(self, left: memoryview, start: int, nbytes: int, goes_on: bool) -> memoryview:
        """Bytes that are there, and those from `start` on that follow."""
        file = self._file
        if not isinstance(file, LocalFile):
            data = (
                self._stored(file, start, nbytes, goes_on) if isinstance(file, StoredFile) else file.read(start, nbytes)
            )
            return memoryview(b"".join((left, data)))
        kept = bytes(left)
        if len(self._buffer) < len(kept) + nbytes:
            self._buffer = bytearray(len(kept) + nbytes)
        self._buffer[: len(kept)] = kept
        target = memoryview(self._buffer)[len(kept) : len(kept) + nbytes]
        try:
            got = os.preadv(file.fd, [target], start)
        except OSError:
            data = file.read(start, nbytes)  # which raises, and says why; if not, it has what is there
            got = len(data)
            target[:got] = data
        return memoryview(self._buffer)[: len(kept) + got]

    def _stored(self, file: StoredFile, start: int, nbytes: int, goes_on: bool) -> bytes:
        """A small piece where reading jumps; where it goes on, blocks are asked for ahead."""
        if not goes_on:
            self.close()
            return file.read(start, nbytes)
        if self._ahead is None:
            block = file.block_bytes
            self._ahead = file.in_order(
                functools.partial(file.read_exactly, at, min(block, file.nbytes - at))
                for at in range(start, file.nbytes, block)
            )
        return next(self._ahead, b"")
