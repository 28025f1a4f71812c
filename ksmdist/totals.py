"""The sum of what merges found, added up as they end, in whatever order: what the driver keeps of them.

Of all that is counted only `image_spectrum` grows with the number of images and of ways to share;
it is kept in blocks of images, so that adding up needs little more memory than the sum itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ksmdist.mappings import Patterns, add_patterns, mark_split
from ksmdist.tree import ALL_NODES, RangeTree, Top, add_rows

__all__ = ["Merged", "Packed", "Totals", "pack"]

_BLOCK_IMAGES = 16
_COLUMNS = 7
_FOLD_ROWS = 1 << 15  # rows of a block that are kept, at least, before they are added up


Packed = tuple[np.ndarray, ...]
"""Columns of an int64 matrix, each in the narrowest type that holds it: a quarter of the size."""


def pack(rows: np.ndarray) -> Packed:
    """int64[n, k] -> its columns, narrow."""
    return tuple(_narrow(column) for column in rows.T)


def _narrow(column: np.ndarray) -> np.ndarray:
    low, high = (int(column.min()), int(column.max())) if len(column) else (0, 0)
    for narrow in (np.int8, np.int16, np.int32):
        if np.iinfo(narrow).min <= low and high <= np.iinfo(narrow).max:
            return column.astype(narrow)
    return column.astype(np.int64)


def _unpacked(parts: list[Packed], node: int | None = None) -> np.ndarray:
    whole = np.empty((sum(len(part[0]) for part in parts), _COLUMNS), np.int64)
    at = 0
    for part in parts:
        for number, column in enumerate(part):
            whole[at : at + len(column), number] = column
        at += len(part[0])
    if node is not None:
        whole[:, 0] = node
    return whole


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge tells the driver of its piece: small, whatever the piece's size.

    Arrays as in tree.RangeTree, image_spectrum packed.
    stable_copies: copies in its part of the stable tree
    """

    spectrum: np.ndarray
    image_spectrum: Packed
    patterns: Patterns
    split: np.ndarray
    images: np.ndarray
    scopes: np.ndarray
    top: Top
    one_node: int | None
    stable_copies: int

    @classmethod
    def of(cls, merged: RangeTree) -> Merged:
        """What of a merged range the driver is told."""
        return cls(
            merged.spectrum,
            pack(merged.image_spectrum),
            merged.patterns,
            merged.split,
            merged.images,
            merged.scopes,
            merged.top,
            merged.one_node,
            int(np.sum(merged.stable.column("copies").to_numpy())),
        )


class Totals:
    """Sums over pieces. shares: int64[images, 5], as the columns of RangeTree.images after the first.

    top: the contents with most copies, at most `most`; None before the first piece.
    """

    def __init__(self, image_count: int, most: int) -> None:
        self.shares = np.zeros((image_count, 5), np.int64)
        self.stable_copies = 0
        self.top: Top | None = None
        self._most = most
        self._scopes: list[np.ndarray] = []
        self._patterns: dict[bytes, int] = {}
        self._spectra: list[np.ndarray] = []
        # By (node, block of images, whether the piece has no other node): the sum so far, and what was added.
        self._blocks: dict[tuple[int, int, bool], list[Packed]] = {}
        self._split: list[np.ndarray] = []
        self._nodes: set[int] = set()

    def add(self, merged: Merged) -> None:
        """Add a piece."""
        self.shares[merged.images[:, 0]] += merged.images[:, 1:]
        self.stable_copies += merged.stable_copies
        if merged.patterns:
            self._patterns = add_patterns([self._patterns, merged.patterns])
        self._split.append(merged.split)
        # Of the spectrum: what has no rows in image_spectrum, such as zero pages, may be on another node.
        self._nodes |= set(np.unique(merged.spectrum[:, 0]).tolist()) - {ALL_NODES}
        self.top = merged.top if self.top is None else Top.most([self.top, merged.top], self._most)
        self._scopes = [add_rows([*self._scopes, merged.scopes])]
        self._spectra = [add_rows([*self._spectra, merged.spectrum])]
        node, image = merged.image_spectrum[:2]
        if merged.one_node is not None:
            node = np.full(len(node), merged.one_node, np.int16)
        block = image // _BLOCK_IMAGES
        order = np.lexsort((block, node))
        edges = np.flatnonzero(np.diff(node[order], prepend=-2) | np.diff(block[order], prepend=-1))
        for at in np.split(order, edges[1:]) if len(order) else []:
            key = (int(node[at[0]]), int(block[at[0]]), merged.one_node is not None)
            parts = self._blocks.setdefault(key, [])
            parts.append(tuple(column[at] for column in merged.image_spectrum))
            if sum(len(part[0]) for part in parts[1:]) > max(_FOLD_ROWS, len(parts[0][0]) // 4):
                parts[:] = [pack(add_rows([_unpacked(parts)]))]

    def spectrum(self) -> np.ndarray:
        """Sharing.spectrum."""
        return add_rows(self._spectra)

    def scopes(self) -> np.ndarray:
        """Rows of table `policy_spectrum`: numa_node or ALL_NODES, scope, kind, copies, contents."""
        return add_rows(self._scopes)

    def image_spectrum(self) -> np.ndarray:
        """Sharing.image_spectrum; this object has it no longer.

        Rows for each node are wanting where all pages are on one: they would repeat those over all nodes.
        """
        one_node = len(self._nodes) == 1
        wanted: dict[tuple[int, int], list[tuple[list[Packed], int]]] = {}
        for (node, block, single), parts in self._blocks.items():
            for number in [ALL_NODES, node] if single and not one_node else [ALL_NODES] if single else [node]:
                wanted.setdefault((number, block), []).append((parts, number))
        self._blocks = {}
        folded: dict[tuple[int, int], Packed] = {}
        for key in sorted(wanted):
            folded[key] = pack(add_rows([_unpacked(parts, number) for parts, number in wanted.pop(key)]))
        return _unpacked([folded[key] for key in sorted(folded)])

    def patterns(self) -> dict[bytes, int]:
        """Patterns, those marked that meet in a huge page which another content splits."""
        return mark_split(self._patterns, np.concatenate(self._split))
