"""Which images share contents with which: contents by the set of images that hold them, then pairs of images.

Many contents are held by the same images, so they are added up by set before any pair is looked at;
pairs are then counted for some images at a time, so that memory never grows with images squared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ksmdist.columns import arrow, joined, strings
from ksmdist.groups import group_starts
from ksmdist.tables import IMAGE_SET, SHARING

__all__ = ["Pairs", "find_sets", "spread"]

_PAIRS_AT_ONCE = 1 << 20
_ROWS_A_TABLE = 1 << 18


def find_sets(content: np.ndarray, image: np.ndarray, pages: np.ndarray) -> pa.Table:
    """Contents and the images that hold them -> table `image_set`: a set of images once, as far as this is seen here.

    content, image, pages: int64, a row for each content and image that holds it, sorted by both.
    Contents of one image are left out. Sets in no order that means anything.
    """
    starts = group_starts(content)
    length = np.diff(starts, append=len(content))
    several = length >= 2
    starts, length = starts[several], length[several]
    if len(starts) == 0:
        return IMAGE_SET.schema.empty_table()
    # Equal sets come together by a sum of mixed numbers; whether they are equal is then looked at in full.
    rows = spread(starts, length)
    edges = np.cumsum(length) - length
    mixed = (image[rows].astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    order = np.lexsort((np.add.reduceat(mixed, edges), length))
    starts, length = starts[order], length[order]
    rows = spread(starts, length)
    edges = np.cumsum(length) - length
    members = image[rows]
    at = np.arange(len(rows)) - np.repeat(length, length)  # the same place in the set before, if it is as long
    same = np.logical_and.reduceat(members == members[np.maximum(at, 0)], edges)
    same[0] = False
    same[1:] &= length[1:] == length[:-1]
    first = np.flatnonzero(~same)
    number = np.cumsum(~same) - 1
    widths = length[first]
    into = np.cumsum(widths) - widths
    place = np.arange(len(rows)) - np.repeat(edges, length) + np.repeat(into[number], length)
    total = np.bincount(place, pages[rows], int(widths.sum())).astype(np.int64)  # exact below 2**53 pages
    kept = spread(edges[first], widths)
    columns = [
        np.repeat(np.arange(len(first)), widths).astype(np.int64),
        members[kept].astype(np.int32),
        total,
        np.repeat(np.bincount(number), widths).astype(np.int64),
    ]
    return pa.Table.from_arrays([arrow(column) for column in columns], schema=IMAGE_SET.schema)


def spread(starts: np.ndarray, length: np.ndarray) -> np.ndarray:
    """int64[sum(length)]: rows starts[0], starts[0] + 1 ..., length[0] of them, then those of the next, end to end."""
    return np.repeat(starts - (np.cumsum(length) - length), length) + np.arange(int(length.sum()))


@dataclass(slots=True)
class _Members:
    """Members of sets: image, pages and contents of each, and where its set ends."""

    image: np.ndarray
    pages: np.ndarray
    contents: np.ndarray
    end: np.ndarray


class Pairs:
    """What images [first, last) share with each image after them: three int64 matrices [last - first, images]."""

    def __init__(self, first: int, last: int, images: int) -> None:
        self._first, self._last = first, last
        self._sums = np.zeros((3, last - first, images), np.int64)

    def add(self, sets: pa.Table) -> None:
        """Add a table `image_set`."""
        if len(sets) == 0:
            return
        number, image, pages, contents = (joined([sets], name) for name in IMAGE_SET.schema.names)
        starts = group_starts(number)
        length = np.diff(starts, append=len(number))
        of = _Members(image.astype(np.int64), pages, contents, np.repeat(starts + length, length))
        mine = np.flatnonzero((of.image >= self._first) & (of.image < self._last))
        count = of.end[mine] - mine - 1  # members after it in its set
        cuts = np.searchsorted(np.cumsum(count), np.arange(_PAIRS_AT_ONCE, int(count.sum()), _PAIRS_AT_ONCE))
        for some, many in zip(np.split(mine, cuts), np.split(count, cuts), strict=True):
            self._add(of, some, many)

    def _add(self, of: _Members, one: np.ndarray, count: np.ndarray) -> None:
        other = spread(one + 1, count)
        one = np.repeat(one, count)
        at = (of.image[one] - self._first) * self._sums.shape[2] + of.image[other]
        for number, weight in enumerate((of.contents[one], of.pages[one], of.pages[other])):
            np.add.at(self._sums[number].reshape(-1), at, weight)

    def tables(self, image_ids: Sequence[str], within: np.ndarray) -> Iterator[pa.Table]:
        """The rows of table `sharing` of these images, some at a time: their names take more than their numbers.

        within: int64[images, 2], contents that an image holds twice or more, and its pages with them.
        """
        here = np.arange(self._first, self._last)
        for number, weight in enumerate((within[here, 0], within[here, 1], within[here, 1])):
            self._sums[number][here - self._first, here] = weight
        there = np.flatnonzero(self._sums[0])
        for at in np.split(there, range(_ROWS_A_TABLE, len(there), _ROWS_A_TABLE)):
            image, other = np.divmod(at, self._sums.shape[2])
            image += self._first
            columns = [
                arrow(image.astype(np.int32)),
                strings(image_ids, image),
                arrow(other.astype(np.int32)),
                strings(image_ids, other),
                *(arrow(sums.reshape(-1)[at]) for sums in self._sums),
            ]
            yield pa.Table.from_arrays(columns, schema=SHARING.schema)
