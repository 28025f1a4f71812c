"""Equal rows: an order that brings them together, where each group starts, sums and minima of groups.

Sorting and then reducing is faster here than pyarrow's group_by, and it leaves sorted runs
(docs/design.md, decisions).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["count_rows", "group_any", "group_min", "group_starts", "group_sum", "order_by"]

_COUNTED_BITS = 20  # keys up to here are counted, not sorted: 8 MiB of counters at the most


def order_by(first: np.ndarray, *rest: np.ndarray) -> np.ndarray:
    """intp[n], stable: the order by (first, *rest). first: uint64[n], spread evenly (a part of a digest).

    The row's number takes the place of the lowest bits of `first`, so that one sort of integers
    (vectorised in numpy) gives the order; the few rows that differ only below are put right after.
    """
    n = len(first)
    if n < 2:
        return np.arange(n)
    mask = np.uint64((1 << (n - 1).bit_length()) - 1)
    key = (first & ~mask) | np.arange(n, dtype=np.uint64)
    key.sort()
    order = (key & mask).astype(np.intp)
    tied = np.flatnonzero((key[1:] ^ key[:-1]) <= mask)
    before, after = order[tied], order[tied + 1]
    falls = np.zeros(len(tied), bool)
    equal = np.ones(len(tied), bool)
    for column in (first, *rest):
        one, other = column[before], column[after]
        falls |= equal & (other < one)
        equal &= one == other
    if falls.any():
        run = np.zeros(n, np.intp)  # number of the run of rows that agree in the bits that were sorted
        run[1:] = np.cumsum((key[1:] ^ key[:-1]) > mask)
        wrong = np.zeros(int(run[-1]) + 1, bool)
        wrong[run[tied[falls]]] = True
        at = np.flatnonzero(wrong[run])
        rows = order[at]
        order[at] = rows[np.lexsort([column[rows] for column in (*reversed(rest), first)])]
    return order


def group_starts(*columns: np.ndarray) -> np.ndarray:
    """intp[groups]: rows of these sorted columns that differ from the row before; the first does."""
    n = len(columns[0])
    new = np.zeros(n, bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(new)


def group_sum(column: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sum of each group."""
    return _reduce(np.add, column, starts)


def group_min(column: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Lowest value of each group."""
    return _reduce(np.minimum, column, starts)


def group_any(column: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Whether a bool column is true anywhere in each group."""
    return _reduce(np.logical_or, column, starts)


def count_rows(columns: Sequence[np.ndarray], weight: np.ndarray | None = None) -> tuple[list[np.ndarray], np.ndarray]:
    """Distinct rows of these integer columns, ascending, and how many there are of each, or their sum of weight.

    columns: integers of n rows each, below 2**62 in size; returned as int64.
    """
    wide = [column.astype(np.int64) for column in columns]
    if len(wide[0]) == 0:
        return wide, np.zeros(0, np.int64)
    low = [int(column.min()) for column in wide]
    width = [(int(column.max()) - least).bit_length() for column, least in zip(wide, low, strict=True)]
    if sum(width) > 63:
        order = np.lexsort(wide[::-1])
        wide = [column[order] for column in wide]
        starts = group_starts(*wide)
        sums = np.diff(starts, append=len(order)) if weight is None else group_sum(weight[order], starts)
        return [column[starts] for column in wide], sums
    key = np.zeros(len(wide[0]), np.int64)
    for column, least, bits in zip(wide, low, width, strict=True):
        if bits:
            key = (key << bits) | (column - least)
    if weight is None and sum(width) <= _COUNTED_BITS:
        sums = np.bincount(key)
        key = np.flatnonzero(sums)
        sums = sums[key]
    else:
        order = np.argsort(key, kind="stable")
        key = key[order]
        starts = group_starts(key)
        sums = np.diff(starts, append=len(key)) if weight is None else group_sum(weight[order], starts)
        key = key[starts]
    distinct = []
    for least, bits in zip(low[::-1], width[::-1], strict=True):
        distinct.append((key & ((1 << bits) - 1)) + least)
        key = key >> bits
    return distinct[::-1], sums


def _reduce(how: np.ufunc, column: np.ndarray, starts: np.ndarray) -> np.ndarray:
    # reduceat costs 20 ns a group however short it is, and nearly all groups are one row
    reduced: np.ndarray = column[starts]
    length = np.diff(starts, append=len(column))
    several = length > 1
    if several.any():
        length = length[several]
        rows = np.repeat(starts[several] - (np.cumsum(length) - length), length) + np.arange(length.sum())
        reduced[several] = how.reduceat(column[rows], np.cumsum(length) - length)
    return reduced
