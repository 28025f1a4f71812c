"""Which pages an image has, as bits: a page's number among them, and the page of a number, by counting bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import numpy as np

from ksmdist.images.base import joined_ranges

__all__ = ["BLOCK_PAGES", "PageBitmap"]

BLOCK_PAGES = 1024
"""Pages counted together: 16 bytes of counts for 128 of bits."""

_BLOCK_BYTES = BLOCK_PAGES // 8
_AT_ONCE = 1 << 14  # blocks whose bits are spread out at a time: 16 MiB


class PageBitmap:
    """A set of page frame numbers: bits, of those blocks alone that have any.

    block: int64[m], numbers of blocks of BLOCK_PAGES, ascending; bits: uint8[m, 128], bit n % 8 of byte n // 8 is the
    n-th page of the block; before: int64[m + 1], pages in the blocks before.
    """

    def __init__(self, block: np.ndarray, bits: np.ndarray) -> None:
        has = bits.view(np.uint64).any(axis=1)
        if not has.all():
            block, bits = block[has], bits[has]
        if len(block) == 0:  # so that every page has a row to look in
            block, bits = np.zeros(1, np.int64), np.zeros((1, _BLOCK_BYTES), np.uint8)
        self.block = block
        self.bits = bits
        counts = np.bitwise_count(bits.view(np.uint64)).sum(axis=1, dtype=np.int64)
        self.before = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))

    @classmethod
    def of(cls, chunks: Iterable[tuple[int, bytes]]) -> Self:
        """From (byte of the bitmap, bytes), ascending, each at a multiple of 128 bytes."""
        blocks, kept = [np.zeros(0, np.int64)], [np.zeros((0, _BLOCK_BYTES), np.uint8)]
        for at, data in chunks:
            rows = np.frombuffer(data.ljust(-(-len(data) // _BLOCK_BYTES) * _BLOCK_BYTES, b"\0"), np.uint8)
            rows = rows.reshape(-1, _BLOCK_BYTES)
            has = np.flatnonzero(rows.view(np.uint64).any(axis=1))  # here, too: what is dropped takes no memory
            blocks.append(has + at // _BLOCK_BYTES)
            kept.append(rows[has])
        return cls(np.concatenate(blocks), np.concatenate(kept))

    def __len__(self) -> int:
        return int(self.before[-1])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PageBitmap):
            return NotImplemented
        return np.array_equal(self.block, other.block) and np.array_equal(self.bits, other.bits)

    __hash__ = None  # type: ignore[assignment]

    @property
    def end(self) -> int:
        """One past the highest page; 0 if there is none."""
        if not len(self):
            return 0
        return int(self.block[-1]) * BLOCK_PAGES + int(np.flatnonzero(_spread(self.bits[-1:]))[-1]) + 1

    def pages(self, number: np.ndarray) -> np.ndarray:
        """The page frame numbers that are number 0, 1 ... of the set; int64[n], ascending, both."""
        at = np.searchsorted(self.before, number, side="right") - 1
        found = []
        rows, start = np.unique(at, return_index=True)
        for low in range(0, len(rows), _AT_ONCE):
            some = rows[low : low + _AT_ONCE]
            first = int(start[low])
            last = int(start[low + _AT_ONCE]) if low + _AT_ONCE < len(rows) else len(number)
            place, page = np.divmod(np.flatnonzero(_spread(self.bits[some])), BLOCK_PAGES)
            page += self.block[some[place]] * BLOCK_PAGES
            counts = self.before[some + 1] - self.before[some]
            base = np.cumsum(counts) - counts - self.before[some]  # from a number to its place in `page`
            found.append(page[number[first:last] + base[np.searchsorted(some, at[first:last])]])
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def has(self, page: np.ndarray) -> np.ndarray:
        """bool[n]: whether these page frame numbers, int64[n], are in the set."""
        row, inside = self._rows(page)
        bit = page % BLOCK_PAGES
        found: np.ndarray = inside & ((self.bits[row, bit // 8] >> (bit % 8).astype(np.uint8)) & 1).astype(bool)
        return found

    def rank(self, page: np.ndarray) -> np.ndarray:
        """How many of the set are below each page frame number; int64[n] -> int64[n]."""
        found = np.zeros(len(page), np.int64)
        for low in range(0, len(page), _AT_ONCE):
            some = page[low : low + _AT_ONCE]
            found[low : low + _AT_ONCE] = self.before[np.searchsorted(self.block, some // BLOCK_PAGES)]
            row, inside = self._rows(some)
            byte, bit = np.divmod(some % BLOCK_PAGES, 8)
            counts = np.bitwise_count(self.bits[row])
            counts[np.arange(_BLOCK_BYTES) >= byte[:, None]] = 0
            below = np.bitwise_count(self.bits[row, byte] & ((1 << bit) - 1).astype(np.uint8))
            found[low : low + _AT_ONCE] += np.where(inside, counts.sum(axis=1, dtype=np.int64) + below, 0)
        return found

    def ranges(self) -> np.ndarray:
        """[start, end) of each run of pages, uint64[n, 2], ascending."""
        full = (self.bits == 0xFF).all(axis=1)
        starts, ends = [self.block[full] * BLOCK_PAGES], [(self.block[full] + 1) * BLOCK_PAGES]
        partial = np.flatnonzero(~full)
        for low in range(0, len(partial), _AT_ONCE):
            some = partial[low : low + _AT_ONCE]
            edge = np.diff(_spread(self.bits[some]).astype(np.int8), axis=1, prepend=0, append=0)
            base = self.block[some] * BLOCK_PAGES
            for sign, found in ((1, starts), (-1, ends)):
                row, at = np.nonzero(edge == sign)
                found.append(base[row] + at)
        start, end = np.concatenate(starts), np.concatenate(ends)
        order = np.argsort(start)
        return joined_ranges(start[order], end[order])

    def joined(self, other: PageBitmap) -> PageBitmap:
        """The pages of either."""
        block = np.union1d(self.block, other.block)
        bits = np.zeros((len(block), _BLOCK_BYTES), np.uint8)
        for part in (self, other):
            bits[np.searchsorted(block, part.block)] |= part.bits
        return PageBitmap(block, bits)

    def below(self, page: int) -> PageBitmap:
        """Those of the pages that are below `page`."""
        return self._part(page, slice(None, int(np.searchsorted(self.block * BLOCK_PAGES, page))))

    def from_page(self, page: int) -> PageBitmap:
        """Those that are not."""
        return self._part(page, slice(int(np.searchsorted(self.block, page // BLOCK_PAGES)), None), True)

    def _part(self, page: int, rows: slice, above: bool = False) -> PageBitmap:
        block, bits = self.block[rows], self.bits[rows].copy()
        cut = block == page // BLOCK_PAGES
        bits[cut] &= np.packbits((np.arange(BLOCK_PAGES) < page % BLOCK_PAGES) ^ above, bitorder="little")
        return PageBitmap(block, bits)

    def _rows(self, page: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row of each page's block, and bool[n] whether there is one."""
        block = page // BLOCK_PAGES
        row = np.minimum(np.searchsorted(self.block, block), len(self.block) - 1)
        return row, self.block[row] == block


def _spread(bits: np.ndarray) -> np.ndarray:
    """uint8[m, 128] -> bool[m, 1024]."""
    return np.unpackbits(bits, axis=1, bitorder="little").view(bool)
