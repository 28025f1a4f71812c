"""Mappings in scan order, for the contents where the order counts: zero, and those that fork shares.

Contents alike in it are one pattern; which shard found a row does not show in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ksmdist.groups import count_rows, group_starts, group_sum

__all__ = [
    "PATTERN_COLUMNS",
    "Patterns",
    "add_patterns",
    "find_patterns",
    "mark_split",
    "pattern_rows",
    "shared_frames",
]

Patterns = Mapping[bytes, int]
"""A pattern -> contents that have it. The key is opaque; pattern_rows() reads it."""

PATTERN_COLUMNS = ("image", "region", "numa_node", "huge", "frame", "pages")
"""Columns of a pattern's rows; region and frame -1 for none."""

_KEY = np.dtype(">i8")
_IMAGE, _HUGE = PATTERN_COLUMNS.index("image"), PATTERN_COLUMNS.index("huge")


def shared_frames(content: np.ndarray, host: np.ndarray, frame: np.ndarray, framed: np.ndarray) -> np.ndarray:
    """int64[n]: a number for each frame that two rows of a content share, -1 for all other rows.

    content, host, frame: of each row, a row a page where framed. Numbers are unique in these rows.
    """
    shared = np.full(len(content), -1, np.int64)
    at = np.flatnonzero(framed)
    if len(at) == 0:
        return shared
    order = at[np.lexsort((frame[at], host[at], content[at]))]
    starts = group_starts(content[order], host[order], frame[order])
    length = np.diff(starts, append=len(order))
    number = np.where(length > 1, np.arange(len(starts)), -1)
    shared[order] = np.repeat(number, length)
    return shared


def find_patterns(
    content: np.ndarray,
    kind: np.ndarray,
    image: np.ndarray,
    region: np.ndarray,
    node: np.ndarray,
    huge: np.ndarray,
    shared: np.ndarray,
    pages: np.ndarray,
    address: np.ndarray,
) -> Patterns:
    """Rows of some contents -> their patterns. kind: by content; shared: as shared_frames() gives it.

    huge: number of the huge page of a zero page, 0 for none. Neighbours with frames of their own, of
    one image, are alike to KSM: those of one node are one row.
    """
    if len(content) == 0:
        return {}
    order = np.lexsort((address, image, content))
    content, image, region, node, huge, shared, pages = (
        column[order] for column in (content, image, region, node, huge, shared, pages)
    )
    huge = _lone_zeros(content, image, huge, pages)
    joint = shared >= 0
    # Between two rows with a shared frame, in one image, only how many there are of a node counts.
    cut: np.ndarray = np.cumsum(joint) - joint
    order = np.lexsort((huge, node, image, joint, cut, content))
    content, image, region, node, huge, shared, pages, cut, joint = (
        column[order] for column in (content, image, region, node, huge, shared, pages, cut, joint)
    )
    rows = group_starts(content, cut, joint, image, node, huge)
    last = np.append(rows[1:], len(content)) - 1
    content, pages = content[rows], group_sum(pages, rows)
    columns = [image[rows], region[last], node[rows], huge[rows], _renumber(content, shared[rows])]
    return _count(content, kind, [*columns, pages])


def _lone_zeros(content: np.ndarray, image: np.ndarray, huge: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """int64[n]: 0 outside huge pages; the number of the huge page + 1 for its one zero page, where no page of the
    content is outside huge pages; 1 for all others in huge pages."""
    at = np.flatnonzero(huge)
    code: np.ndarray = np.minimum(huge, 1)
    at = at[~np.isin(content[at], content[huge == 0])]
    if len(at):
        order = at[np.lexsort((huge[at], image[at], content[at]))]
        starts = group_starts(content[order], image[order], huge[order])
        zeros = np.repeat(group_sum(pages[order], starts), np.diff(starts, append=len(order)))
        code[order] = np.where(zeros == 1, huge[order] + 1, 1)
    return code


def mark_split(patterns: Patterns, split: np.ndarray) -> dict[bytes, int]:
    """Patterns in which the one zero page of a huge page that is split anyway counts as one of several.

    split: int64[n, 2], image and number of huge pages that KSM splits for another content.
    """
    pairs = set(map(tuple, split.tolist()))
    marked: dict[bytes, int] = {}
    for key, contents in patterns.items():
        kind, rows = pattern_rows(key)
        lone = rows[:, _HUGE] > 1
        if pairs and lone.any():
            rows = rows.copy()
            for at in np.flatnonzero(lone).tolist():
                if (int(rows[at, _IMAGE]), int(rows[at, _HUGE]) - 1) in pairs:
                    rows[at, _HUGE] = 1
            key = np.concatenate(([kind], rows.reshape(-1))).astype(_KEY).tobytes()
        marked[key] = contents
    return marked


def _renumber(content: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Frame numbers from 0 on in each content, in the order in which they come; -1 stays."""
    at = np.flatnonzero(shared >= 0)
    renumbered = np.full(len(shared), -1, np.int64)
    if len(at) == 0:
        return renumbered
    _, first, inverse = np.unique(shared[at], return_index=True, return_inverse=True)
    by_place = np.argsort(first)
    owner = content[at[first[by_place]]]
    starts = group_starts(owner)
    rank = np.arange(len(owner)) - np.repeat(starts, np.diff(starts, append=len(owner)))
    number = np.empty(len(first), np.int64)
    number[by_place] = rank
    renumbered[at] = number[inverse]
    return renumbered


def _count(content: np.ndarray, kind: np.ndarray, columns: Sequence[np.ndarray]) -> Patterns:
    """Alike contents counted; those with as many rows are compared as rows of one matrix."""
    starts = group_starts(content)
    length = np.diff(starts, append=len(content))
    found: dict[bytes, int] = {}
    for rows in np.unique(length):
        these = starts[length == rows]
        at = these[:, None] + np.arange(rows)
        wide = [kind[content[these]]] + [column[at[:, row]] for row in range(int(rows)) for column in columns]
        if len(these) == 1:
            distinct, counts = [np.asarray(column, np.int64) for column in wide], np.ones(1, np.int64)
        else:
            distinct, counts = count_rows(wide)
        keys = np.stack(distinct, axis=1).astype(_KEY)
        for key, contents in zip(keys, counts.tolist(), strict=True):
            found[key.tobytes()] = contents
    return found


def add_patterns(patterns: Sequence[Patterns]) -> dict[bytes, int]:
    """Patterns of disjoint sets of contents -> their sum, sorted."""
    total: dict[bytes, int] = {}
    for some in patterns:
        for key, contents in some.items():
            total[key] = total.get(key, 0) + contents
    return dict(sorted(total.items()))


def pattern_rows(key: bytes) -> tuple[int, np.ndarray]:
    """A pattern's kind, and its rows in scan order: int64[n, len(PATTERN_COLUMNS)]."""
    numbers = np.frombuffer(key, _KEY).astype(np.int64)
    return int(numbers[0]), numbers[1:].reshape(-1, len(PATTERN_COLUMNS))
