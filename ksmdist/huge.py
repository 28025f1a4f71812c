"""Aligned frames of the size of a huge page: how many of their pages KSM would merge, and so split them for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ksmdist.columns import arrow, joined, strings
from ksmdist.groups import group_starts, group_sum
from ksmdist.tables import HUGE, HUGE_FRAME

__all__ = ["HugeFrames", "count_frames"]

_COUNTS = ("pages", "mergeable_pages", "zero_pages", "thp_pages")
_CHUNK = 512  # frames whose counts lie together: an address space is sparse, its parts are not


def count_frames(
    image: np.ndarray, number: np.ndarray, pages: np.ndarray, mergeable: np.ndarray, zero: np.ndarray, thp: np.ndarray
) -> pa.Table:
    """Rows of pages -> table `huge_frame`, sorted by image and number: a row for each frame that has some.

    image, number: which frame, as address / size of a huge page; pages: int64; mergeable, zero, thp: bool, of all of
    the row's pages.
    """
    number = number.astype(np.int64)
    if len(number) == 0:
        return HUGE_FRAME.schema.empty_table()
    low, span = int(number.min()), int(number.max()) - int(number.min()) + 1
    key = image.astype(np.int64) * span + (number - low)
    counts = (pages if of is None else pages * of for of in (None, mergeable, zero, thp))  # one at a time
    if span * (int(image.max()) + 1) <= 4 * len(key) + (1 << 16):  # counted where that is no waste, else sorted
        sums = [np.bincount(key, count).astype(np.int64) for count in counts]
        key = np.flatnonzero(sums[0])
        sums = [column[key] for column in sums]
    else:
        order = np.argsort(key, kind="stable")
        starts = group_starts(key[order])
        sums = [group_sum(count[order], starts) for count in counts]
        key = key[order[starts]]
    columns = [(key // span).astype(np.int32), key % span + low, *(column.astype(np.int32) for column in sums)]
    return pa.Table.from_arrays([arrow(column) for column in columns], schema=HUGE_FRAME.schema)


class HugeFrames:
    """Sums of `huge_frame` tables of images [first, last), kept in chunks of neighbouring frames."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last = first, last
        self._chunks = np.zeros(0, np.int64)  # numbers of the chunks that are there, ascending
        self._row = np.zeros(0, np.int64)  # the row of each in self._counts
        self._counts = np.zeros((len(_COUNTS), 0, _CHUNK), np.int32)

    def add(self, frames: pa.Table) -> None:
        """Add a `huge_frame` table of these images."""
        if len(frames) == 0:
            return
        image, number = (joined([frames], name).astype(np.int64) for name in ("image", "number"))
        chunk = ((image - self._first) << 48) | (number // _CHUNK)
        new = np.setdiff1d(chunk[group_starts(chunk)], self._chunks)
        if len(new):
            self._grow(new)
        row = self._row[np.searchsorted(self._chunks, chunk)]
        at = row * _CHUNK + number % _CHUNK
        for which, name in enumerate(_COUNTS):
            np.add.at(self._counts[which].reshape(-1), at, joined([frames], name))

    def _grow(self, new: np.ndarray) -> None:
        used = len(self._chunks)
        if used + len(new) > self._counts.shape[1]:
            room = max(2 * self._counts.shape[1], used + len(new))
            counts = np.zeros((len(_COUNTS), room, _CHUNK), np.int32)
            counts[:, :used] = self._counts[:, :used]
            self._counts = counts
        chunks = np.concatenate((self._chunks, new))
        rows = np.concatenate((self._row, np.arange(used, used + len(new))))
        order = np.argsort(chunks)
        self._chunks, self._row = chunks[order], rows[order]

    def table(self, image_ids: Sequence[str], frame_pages: int) -> pa.Table:
        """The rows of table `huge` of these images. frame_pages: pages in a huge page."""
        counts = self._counts[:, self._row]
        image = np.repeat(self._chunks >> 48, _CHUNK)
        pages, mergeable, zero, thp = counts.reshape(len(_COUNTS), -1).astype(np.int64)
        there = pages > 0
        image, pages, mergeable, zero, thp = (column[there] for column in (image, pages, mergeable, zero, thp))
        # 0, then powers of two: bit_length of the count is the number of its bucket
        bucket = np.where(mergeable == 0, 0, np.frexp(mergeable.astype(np.float64))[1])
        buckets = frame_pages.bit_length() + 1
        key = image * buckets + bucket
        weights = (None, thp > 0, zero == frame_pages, pages, mergeable, zero)
        size = (self._last - self._first) * buckets
        sums = [np.bincount(key, weight, size).astype(np.int64) for weight in weights]
        at = np.flatnonzero(sums[0])
        of, bucket = at // buckets + self._first, at % buckets
        columns = [
            arrow(of.astype(np.int32)),
            strings(image_ids, of),
            arrow(np.where(bucket == 0, 0, 1 << np.maximum(bucket - 1, 0)).astype(np.int64)),
            *(arrow(column[at]) for column in sums),
        ]
        return pa.Table.from_arrays(columns, schema=HUGE.schema)
