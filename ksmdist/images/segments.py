"""Segments of an address space that lie in files: made disjoint, laid over each other, cut into pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ksmdist.errors import ImageError
from ksmdist.images.base import Hole, joined_ranges
from ksmdist.images.extents import PIECES, Extents

__all__ = ["MOST_RUNS", "Segments", "cut_pages", "holes_of", "in_holes", "overlaps", "uncovered", "without_file_holes"]

MOST_RUNS = 1 << 24
"""Most runs of pages between holes of a file: 1 GB and 5 s to find them."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Address ranges [start, end) in bytes, uint64[n], each with the file offset of its start, uint64[n]."""

    start: np.ndarray
    end: np.ndarray
    offset: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def disjoint(self) -> Segments:
        """The same addresses once each, ascending: what an earlier segment covers, later ones lose.

        Earlier is what starts lower; of those that start alike, what comes first.
        """
        order = np.argsort(self.start, kind="stable")
        start, end, offset = self.start[order], self.end[order], self.offset[order]
        if len(start) == 0:
            return self
        covered = np.concatenate((start[:1], np.maximum.accumulate(end)[:-1]))
        cut = np.maximum(start, covered)
        keep = cut < end
        return Segments(cut[keep], end[keep], (offset + (cut - start))[keep])

    def up_to(self, end: np.ndarray, page_size: int) -> Segments:
        """The segments as far as the file has them: to these addresses, uint64[n], none before its start.

        One that is cut off ends with its last whole page: what is left of a page must not be joined with bytes of
        another segment that has that page too.
        """
        floor = np.maximum(self.start, end - end % np.uint64(page_size))
        return Segments(self.start, np.where(end < self.end, floor, end), self.offset)

    def nbytes(self) -> int:
        """Bytes covered; of disjoint segments."""
        return int((self.end - self.start).sum())


def uncovered(whole: Segments, part: Segments) -> list[tuple[int, int]]:
    """Address ranges of `whole` that `part` does not cover; both disjoint and ascending."""
    edges = np.concatenate((whole.start, whole.end, part.start, part.end))
    step = np.repeat(np.array([1, -1, -2, 2]), [len(whole.start)] * 2 + [len(part.start)] * 2)
    order = np.argsort(edges, kind="stable")
    edges, level = edges[order], np.cumsum(step[order])
    # level 1: in whole, not in part
    spans = np.flatnonzero((level[:-1] == 1) & (edges[:-1] < edges[1:]))
    return list(zip(edges[spans].tolist(), edges[spans + 1].tolist(), strict=True))


def overlaps(
    start: np.ndarray, end: np.ndarray, other_start: np.ndarray, other_end: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which of ascending, disjoint ranges meet which of others of that kind: int64[m] places in each, ascending."""
    low = np.searchsorted(other_end, start, side="right")
    high = np.searchsorted(other_start, end, side="left")
    count = np.maximum(high - low, 0)
    first = np.repeat(np.arange(len(start)), count)
    within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    return first, low[first] + within


def cut_pages(segments: Segments, page_size: int) -> tuple[Extents, np.ndarray]:
    """Disjoint segments -> runs of whole pages, and int64 numbers of pages only partly covered."""
    size = np.uint64(page_size)
    first = (segments.start // size).astype(np.int64) + (segments.start % size != 0)
    last = (segments.end // size).astype(np.int64)
    whole = first < last
    skip = first[whole].astype(np.uint64) * size - segments.start[whole]
    page, count = first[whole], (last - first)[whole]
    offset = (segments.offset[whole] + skip).astype(np.int64)
    joined, partial = _joined(segments, page_size)
    pages = np.concatenate((page, np.fromiter(joined, np.int64, len(joined))))
    counts = np.concatenate((count, np.ones(len(joined), np.int64)))
    offsets = np.concatenate((offset, np.full(len(joined), PIECES, np.int64)))
    order = np.argsort(pages, kind="stable")
    pages, counts, offsets = pages[order], counts[order], offsets[order]
    if len(pages):  # runs that go on in the file where they go on in memory are one
        ends, file_ends = pages + counts, offsets + counts * page_size
        goes_on = (ends[:-1] == pages[1:]) & (file_ends[:-1] == offsets[1:]) & (offsets[:-1] >= 0)
        opens = np.flatnonzero(np.concatenate(([True], ~goes_on)))
        counts = np.add.reduceat(counts, opens)
        pages, offsets = pages[opens], offsets[opens]
    pieces = {int(i): joined[int(pages[i])] for i in np.flatnonzero(offsets < 0)}
    return Extents(pages, counts, offsets, pieces), partial


def _joined(segments: Segments, page_size: int) -> tuple[dict[int, tuple[tuple[int, int], ...]], np.ndarray]:
    """Pages that are whole in several pieces, each with these as (file offset, nbytes); int64 numbers of others of
    which segments have a part."""
    size = np.uint64(page_size)
    ragged = (segments.start % size != 0) | (segments.end % size != 0)
    start, end, offset = segments.start[ragged], segments.end[ragged], segments.offset[ragged]
    in_first = np.minimum(end - start, size - start % size)
    last = (end - np.uint64(1)) // size
    in_last = np.where(last > start // size, end - last * size, np.uint64(0))
    page = np.concatenate((start // size, last)).astype(np.int64)
    nbytes = np.concatenate((in_first, in_last)).astype(np.int64)
    at = np.concatenate((offset, offset + (end - start) - in_last)).astype(np.int64)
    address = np.concatenate((start, last * size))
    order = np.lexsort((address, page))
    order = order[(nbytes[order] > 0) & (nbytes[order] < page_size)]
    page, nbytes, at = page[order], nbytes[order], at[order]
    if len(page) == 0:
        return {}, np.zeros(0, np.int64)
    opens = np.flatnonzero(np.concatenate(([True], page[1:] != page[:-1])))
    whole = np.add.reduceat(nbytes, opens) == page_size
    closes = np.append(opens[1:], len(page))
    joined = {}
    for first, behind in zip(opens[whole].tolist(), closes[whole].tolist(), strict=True):  # 2 us a page
        pieces = zip(at[first:behind].tolist(), nbytes[first:behind].tolist(), strict=True)
        joined[int(page[first])] = tuple(pieces)
    return joined, page[opens[~whole]]


def holes_of(dumped: Segments, available: Segments, partial: np.ndarray, page_size: int) -> list[Hole]:
    """Holes of what was dumped and is past the end of the file, and of pages of which only a part was, by address.

    dumped, available: disjoint and ascending; partial: as cut_pages() of `available` has it.
    """
    cut_off: list[int] = []
    holes: list[Hole] = []
    reached = 0
    for start, end in uncovered(dumped, available):
        first, last = max(reached, start // page_size), -(-end // page_size)
        if first < last:
            holes.append(Hole(first * page_size, last - first, "truncated"))
            reached = last
        cut_off += [start // page_size, last - 1]
    rest = np.setdiff1d(partial, np.array(cut_off, np.int64))
    holes += [
        Hole(first * page_size, last - first, "partial_page") for first, last in joined_ranges(rest, rest + 1).tolist()
    ]
    return sorted(holes, key=lambda hole: hole.address)


def in_holes(start: np.ndarray, end: np.ndarray, data: np.ndarray) -> np.ndarray:
    """bool[n]: whether byte ranges [start, end) of a file lie in its holes. data: ranges that are none, int64[m, 2]."""
    after = np.searchsorted(data[:, 1], start, side="right")
    begins = np.append(data[:, 0], np.iinfo(np.int64).max)
    return np.asarray(begins[after] >= end)


def without_file_holes(extents: Extents, data: np.ndarray, page_size: int, path: str) -> Extents:
    """Leave out pages all of whose bytes lie in holes of the file (`data`: byte ranges, int64[n, 2]).

    Raises ImageError for more than MOST_RUNS of them, of segments that all lie in the same bytes. path: for that.
    """
    whole = extents.offset >= 0
    offset, count = extents.offset, extents.count
    low = np.searchsorted(data[:, 1], offset, side="right")
    high = np.searchsorted(data[:, 0], offset + count * page_size, side="left")
    meets = np.where(whole, np.maximum(high - low, 0), 1)  # a page of pieces stays
    total = int(meets.sum())
    if total > MOST_RUNS:
        raise ImageError(
            f"has its pages in {total} runs, more than an index of them may take of memory", path, "take the dump again"
        )
    of = np.repeat(np.arange(len(extents)), meets)
    at = low[of] + np.arange(total) - np.repeat(np.cumsum(meets) - meets, meets)
    first, last = np.zeros(total, np.int64), count[of]
    here = whole[of]
    start, end = data[at[here]].T
    first[here] = np.maximum(0, (start - offset[of[here]]) // page_size)
    last[here] = np.minimum(count[of[here]], -(-(end - offset[of[here]]) // page_size))
    # Two ranges of bytes may end and begin in one page: the first has it.
    goes_on = of[1:] == of[:-1]
    first[1:] = np.where(goes_on, np.maximum(first[1:], last[:-1]), first[1:])
    keep = first < last
    of, first, last, here = of[keep], first[keep], last[keep], here[keep]
    pieces = {int(i): extents.pieces[int(of[i])] for i in np.flatnonzero(~here)}
    offsets = np.where(here, offset[of] + first * page_size, offset[of])
    return Extents(extents.page[of] + first, last - first, offsets, pieces)
