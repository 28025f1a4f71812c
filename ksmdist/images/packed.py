"""Compressed files, unpacked as they are read, forwards: gzip, zstd, xz, lz4. Nothing is written anywhere.

Sequential reading goes on where the last one ended; what lies before starts again at the frame it is in, or at the
start. Raises ImageError: damaged or truncated data where the size is not known, more bytes than a file says it
holds, than MOST_BYTES or than claims.py allows. Memory: one piece, and the decompressor's window, 128 MiB at most.

Formats: RFC 1952 (gzip), RFC 8878 (zstd), the .xz file format 1.2, LZ4 frame format 1.6.
"""

from __future__ import annotations

import lzma
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, pairwise
from operator import itemgetter

import numpy as np
import pyarrow as pa

from ksmdist.errors import ImageError
from ksmdist.images.claims import FREE_BYTES, MOST_RATIO, most_claimed
from ksmdist.images.files import ImageFile, LocalFile
from ksmdist.images.frames import SKIPPABLE, lz4_frames, xz_size, zstd_frames

__all__ = ["MOST_BYTES", "PackedFile", "codec_of"]

MOST_BYTES = 1 << 44
"""Most bytes a compressed file may hold: 16 TiB, what x86-64 addressed with four levels of tables."""

_PIECE = 1 << 20  # unpacked at a time
_GROUP_BYTES = 4 << 20  # frames at least this far apart are entered by themselves
_PIECE_ARROW = 4 << 20  # the same by pyarrow, with no turn of the interpreter: a third faster than by 1 MiB
_PIECES_AHEAD = 4
_FED = 1 << 20  # of the file, to the decompressor
_FED_STORED = 8 << 20  # of an object, for which each read is a request
_WINDOW = 1 << 27  # most memory of a decompressor: what `zstd -d` and `xz -9` take without being told
_MAGIC = {"gzip": b"\x1f\x8b\x08", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ\0", "lz4": b"\x04\x22\x4d\x18"}
_Damage = (OSError, EOFError, ValueError, lzma.LZMAError)


def codec_of(head: bytes) -> str:
    """How a file is compressed, by its first bytes; "" if it is not."""
    if len(head) >= 4 and int.from_bytes(head[:4], "little") in SKIPPABLE:
        return "zstd"  # pzstd and the seekable format begin so
    return next((codec for codec, magic in _MAGIC.items() if head.startswith(magic)), "")


class PackedFile:
    """What a compressed file holds, as a file.

    codec: of codec_of(); unpacked: bytes it holds, where that was counted before, else 0.
    """

    def __init__(self, file: ImageFile, codec: str, unpacked: int = 0) -> None:
        self._file = file
        self._codec = codec
        self.path = file.path
        self.fingerprint = file.fingerprint
        self.disk_nbytes = file.disk_nbytes
        self._starts: list[tuple[int, int]] = [(0, 0)]  # (byte, byte in the file) of frames that stand for themselves
        self._pieces: Iterator[memoryview] = iter(())
        self._left = memoryview(b"")
        self._at = -1  # byte that self._left begins with; -1: nothing was begun
        self._damaged: list[int] = []  # ascending: bytes that could not be unpacked, nor what follows in their frames
        self._most = min(MOST_BYTES, most_claimed(file.path, file.disk_nbytes))
        self.nbytes = unpacked or self._known() or self._counted()
        self.unpacked = self.nbytes
        if self.nbytes > self._most:
            raise ImageError(
                f"holds more than {self._most} bytes, the most that a compressed file of {self.disk_nbytes} may hold: "
                f"{FREE_BYTES}, and {MOST_RATIO} times what is stored of it, up to {MOST_BYTES}",
                self.path,
                "it is damaged, or made to mislead; if it is right, unpack it, and scan that",
            )

    def checked(self) -> None:
        """As of the file it is in."""
        self._file.checked()

    def close(self) -> None:
        """Let it go."""
        self._pieces, self._left = iter(()), memoryview(b"")
        self._file.close()

    def data_extents(self) -> np.ndarray:
        """Byte ranges that are not holes: int64[n, 2]. A compressed file knows of no holes."""
        return np.array([(0, self.nbytes)] if self.nbytes else [], np.int64).reshape(-1, 2)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes from `offset` on: `nbytes`, or as many as can be unpacked."""
        return bytes(self.view(offset, nbytes))

    def view(self, offset: int, nbytes: int) -> bytes | memoryview:
        """As read(), with no copy where they are in one piece."""
        end = min(offset + nbytes, self.nbytes)
        if offset >= end:
            return b""
        start, at = self._starts[bisect_right(self._starts, (offset, self._file.nbytes)) - 1]
        end = min([end, *self._damaged[(first := bisect_left(self._damaged, start)) : first + 1]])
        if offset >= end:
            return b""
        if not start <= self._at <= offset:
            self._pieces, self._left, self._at = _ahead(self._unpack(at)), memoryview(b""), start
        found: list[bytes | memoryview] = []
        try:
            while self._at < end:
                if not self._left:
                    self._left = next(self._pieces)
                    continue
                wanted = self._left[max(0, offset - self._at) : end - self._at]
                if wanted:
                    found.append(wanted)
                used = min(len(self._left), end - self._at)
                self._left, self._at = self._left[used:], self._at + used
            if end == self.nbytes and (self._left or any(self._pieces)):
                raise ImageError("holds more bytes than it says", self.path, "take it again, or unpack it")
        except (StopIteration, *_Damage):
            insort(self._damaged, self._at)
            self._at = -1
        return found[0] if len(found) == 1 else b"".join(found)

    def resume(self, offset: int) -> int:
        """See Resumable: the start of the next frame."""
        after = bisect_right(self._starts, (offset, self._file.nbytes))
        return self._starts[after][0] if after < len(self._starts) else self.nbytes

    def _unpack(self, at: int) -> Iterator[memoryview]:
        """Pieces of what is held from the frame at byte `at` of the file on. Raises _Damage."""
        if self._codec == "gzip":
            return _held_back(_gunzip(self._file, at))
        if self._codec == "xz":
            return _held_back(_unxz(self._file, at))
        return self._groups(at)

    def _groups(self, at: int) -> Iterator[memoryview]:
        """The same of a zstd or lz4 file. Each start is begun at anew: what can be unpacked of damaged data must not
        depend on where reading began."""
        number = bisect_left(self._starts, at, key=itemgetter(1))
        ends = [(-1, self._file.nbytes)]
        for (byte, place), (end, after) in pairwise(chain(islice(self._starts, number, None), ends)):
            done = byte
            for piece in _held_back(_decompressed(self._file, place, after - place, self._codec)):
                done += len(piece)
                yield piece
            if done != end and end >= 0:
                raise ValueError("a frame holds more or fewer bytes than it says")

    def _counted(self) -> int:
        """Bytes in it, by unpacking it once; raises ImageError where it is damaged."""
        total = 0
        try:
            for piece in self._unpack(0):
                total += len(piece)
                if total > self._most:
                    break
        except _Damage as error:
            said = " ".join(str(error).split())[:200]
            raise ImageError(
                f"is {self._codec}-compressed, and damaged or truncated after {total} bytes unpacked: {said}",
                self.path,
                "copy it again; what can be unpacked of it may be scanned as a file of its own",
            ) from None
        return total

    def _known(self) -> int:
        """Bytes in it as the file says itself; 0 where it does not say."""
        if self._codec == "xz":
            return xz_size(self._file)
        if self._codec == "gzip" or not isinstance(self._file, LocalFile):
            return 0
        frames = zstd_frames if self._codec == "zstd" else lz4_frames
        size, starts = frames(self._file, _GROUP_BYTES)
        self._starts = starts or self._starts
        return size


class _Feed:
    """The bytes of a file from `at` on, as pyarrow reads a Python file."""

    closed = False

    def __init__(self, file: ImageFile, at: int) -> None:
        self._file, self._at = file, at
        self._ahead = _FED if isinstance(file, LocalFile) else _FED_STORED
        self._left = memoryview(b"")

    def read(self, nbytes: int = -1) -> bytes:
        if not self._left:
            self._left = memoryview(self._file.read(self._at, self._ahead))
            self._at += len(self._left)
        wanted = len(self._left) if nbytes < 0 else nbytes
        data, self._left = bytes(self._left[:wanted]), self._left[wanted:]
        return data

    def close(self) -> None:
        self.closed = True

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


def _ahead(pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    """The pieces, the next ones unpacked by a thread while one is used: decompressors let the interpreter go."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="ksmdist-unpack")
    try:
        coming = deque(pool.submit(next, pieces, None) for _ in range(_PIECES_AHEAD))
        while (piece := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, pieces, None))
            yield piece
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _gunzip(file: ImageFile, at: int) -> Iterator[memoryview]:
    """The members of a gzip file; zeros after the last are a tape's padding."""
    from isal import isal_zlib  # here, and not above: few files need it

    feed = _Feed(file, at)
    data = feed.read(_FED)
    while data:
        unpack = isal_zlib.decompressobj(wbits=31)
        while not unpack.eof:
            data = data or feed.read(_FED)
            if not data:
                raise EOFError("it ends within a gzip member")
            try:
                piece = unpack.decompress(data, _PIECE)
            except isal_zlib.error as error:  # type: ignore[misc]  # its stubs have it as a type of any kind
                raise ValueError(error) from None
            data = unpack.unconsumed_tail
            if piece:
                yield memoryview(piece)
        data = unpack.unused_data.lstrip(b"\0") or feed.read(_FED).lstrip(b"\0")


def _unxz(file: ImageFile, at: int) -> Iterator[memoryview]:
    """The streams of an xz file, which may have zeros between them."""
    feed = _Feed(file, at)
    data = feed.read(_FED)
    while data:
        unpack = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_WINDOW)
        while not unpack.eof:
            if unpack.needs_input and not data:
                data = feed.read(_FED)
                if not data:
                    raise EOFError("it ends within an xz stream")
            piece = unpack.decompress(data, _PIECE)
            data = b""
            if piece:
                yield memoryview(piece)
        data = unpack.unused_data.lstrip(b"\0") or feed.read(_FED).lstrip(b"\0")


def _decompressed(file: ImageFile, at: int, nbytes: int, codec: str) -> Iterator[memoryview]:
    """The frames in `nbytes` bytes of a zstd or lz4 file."""
    if isinstance(file, LocalFile):  # read with no turn of the interpreter: 2.1 GB/s of zstd without, 2.6 with it
        source = pa.OSFile(f"/proc/self/fd/{file.fd}").get_stream(at, nbytes)
    else:
        source = pa.PythonFile(_Feed(file, at), "r")
    stream = pa.CompressedInputStream(source, codec)
    # Not read(): where that raises, pyarrow keeps its buffer for ever.
    while len(piece := stream.read_buffer(_PIECE_ARROW)):
        yield memoryview(piece)


def _held_back(pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    """The pieces, each when the next has come, or the end: what a checksum there denies is not all given before."""
    held = next(pieces, None)
    for piece in pieces:
        assert held is not None
        yield held
        held = piece
    if held is not None:
        yield held
