"""Records of pages in a QEMU migration stream: a header of 8 bytes, then a page, or the byte it is full of.

Rules: QEMU, migration/ram.c (save_page_header, save_zero_page, ram_load_precopy). Offset and flags share the header;
without CONTINUE the name of the block follows it. A page may be sent again: the last time counts.
"""

from __future__ import annotations

import struct

import numpy as np

from ksmdist.errors import ImageError
from ksmdist.images.extents import FILLED
from ksmdist.images.qemu_blocks import RamBlock
from ksmdist.images.qemu_bytes import StreamWindow
from ksmdist.images.scattered import PageRuns, RunIndex

__all__ = ["CONTINUE", "PAGE", "ZERO", "PageRecords"]

ZERO, PAGE, CONTINUE = 0x02, 0x08, 0x20
"""RAM_SAVE_FLAG_ZERO, _PAGE, _CONTINUE."""

_FEW = 32  # records alike in a row: then a stretch of them is guessed
_STRETCH = 256  # guessed first; doubled as long as all are
_PENDING = 1 << 18  # records that go to the index together
_HEADER = struct.Struct(">Q")


class PageRecords:
    """The pages that records have. blocks: by their names in the stream."""

    def __init__(self, path: str, page_size: int, blocks: dict[bytes, RamBlock]) -> None:
        self._path, self._size, self._blocks = path, page_size, blocks
        self._bits = page_size.bit_length() - 1
        self._index = RunIndex(8 + page_size, path)
        self._block = RamBlock("", 0, 0)  # that of the last record, which others CONTINUE
        self._keys: list[int] = []  # of records walked one by one
        self._lies: list[int] = []
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []  # of those before them
        self._records = 0

    def runs(self) -> PageRuns:
        """All pages, ascending, each once; PageRuns.page: RamBlock.key of its block + its number in it."""
        self._index_pending()
        return self._index.runs()

    def walk(self, window: StreamWindow, at: int) -> int:
        """Read the records from byte `at` of the file on that are whole in a window; where they end.

        The loop takes 0.4 us a record, a third of what copying its page takes; stretches of one kind are not walked.
        """
        data, shift = window
        size, bits, low = self._size, self._bits, self._size - 1
        keys, lies, header = self._keys, self._lies, _HEADER.unpack_from
        key, nbytes = self._block.key, self._block.nbytes
        p, last = at - shift, len(data) - 9
        kind = alike = 0
        while p <= last:
            (head,) = header(data, p)
            flags = head & low
            body = p + 8
            if flags in (PAGE, ZERO):
                body += 1 + data[body]
                if body >= len(data):
                    break
                name = bytes(data[p + 9 : body])
                if name not in self._blocks:
                    # What it calls a name may be of a page, where records before it are damaged: not shown.
                    raise self._broken("a page of a block that it does not list", shift + p)
                self._block = self._blocks[name]
                key, nbytes = self._block.key, self._block.nbytes
            elif flags not in (PAGE | CONTINUE, ZERO | CONTINUE):
                break
            if flags & PAGE and body + size > len(data):
                break
            if head >= nbytes:
                raise self._outside(shift + p)
            keys.append(key + (head >> bits))
            if flags & PAGE:
                lies.append(shift + body)
                p = body + size
            else:
                lies.append(FILLED - data[body])
                p = body + 1
            alike = alike + 1 if flags == kind else 1
            kind = flags
            if alike == _FEW and flags & CONTINUE:
                p, alike = self._stretch(window, p, flags), 0
        self._hand_over()
        return shift + p

    def _stretch(self, window: StreamWindow, p: int, flags: int) -> int:
        """Records from data[p] on, as long as they have these flags; where they end."""
        self._hand_over()
        data, shift = window
        step = 8 + self._size if flags & PAGE else 9
        left, guess = (len(data) - p) // step, _STRETCH
        while left:
            guess = min(guess, left)
            heads = np.ndarray((guess,), ">u8", data, p, (step,)).astype(np.uint64)
            others = np.flatnonzero(heads & np.uint64(self._size - 1) != np.uint64(flags))
            good = int(others[0]) if len(others) else guess
            heads = heads[:good]
            if bool((heads >= np.uint64(self._block.nbytes)).any()):
                raise self._outside(shift + p)
            if flags & PAGE:
                lies = np.arange(good, dtype=np.int64) * step + (shift + p + 8)
            else:
                lies = FILLED - np.ndarray((good,), np.uint8, data, p + 8, (9,)).astype(np.int64)
            self._pend((heads >> np.uint64(self._bits)).astype(np.int64) + self._block.key, lies)
            p += good * step
            left -= good
            if good < guess:
                break
            guess *= 2
        return p

    def _hand_over(self) -> None:
        if self._keys:
            self._pend(np.array(self._keys, np.int64), np.array(self._lies, np.int64))
            self._keys.clear()
            self._lies.clear()

    def _pend(self, keys: np.ndarray, lies: np.ndarray) -> None:
        self._pending.append((keys, lies))
        self._records += len(keys)
        if self._records >= _PENDING:
            self._index_pending()

    def _index_pending(self) -> None:
        if self._pending:
            keys, lies = zip(*self._pending, strict=True)
            self._index.add(np.concatenate(keys), np.concatenate(lies))
        self._pending, self._records = [], 0

    def _outside(self, at: int) -> ImageError:
        return self._broken(f"a page outside of its block {self._block.name!r}", at)

    def _broken(self, what: str, at: int) -> ImageError:
        return ImageError(
            f"has {what}, at byte {at} or soon after",
            self._path,
            "copy it again, or migrate the guest to a file again",
        )
