"""The global stable tree, a digest range at a time: split() what shards found, merge() each range.

merge() is a function of the set of rows: in any order, in any grouping, the result is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ksmdist.classes import combine, digest_words, new_groups
from ksmdist.tables import KINDS, SPECTRUM, STABLE_TREE

__all__ = ["RangeTree", "add_spectra", "merge", "split"]

_ZERO, _SAME_FILLED, _OTHER = range(len(KINDS))


@dataclass(frozen=True, slots=True)
class RangeTree:
    """One digest range, merged.

    stable:   `stable_tree`, sorted by digest
    spectrum: `spectrum` of this range's contents
    images:   int64[n, 5]: image, then its pages that are duplicate, unique, shared within,
              shared with others; for images that have any
    pages:    eligible pages that went in
    """

    stable: pa.Table
    spectrum: pa.Table
    images: np.ndarray
    pages: int


def split(content: pa.Table, ranges: int) -> list[pa.Table]:
    """Cut a sorted `shard_content` table by the leading bits of its digests into `ranges` tables.

    ranges: a power of two; range i holds the digests whose leading log2(ranges) bits are i.
    """
    if ranges == 1:
        return [content]
    digest = content.column("digest").combine_chunks()
    high = np.frombuffer(digest.buffers()[1], ">u8", len(digest) * 2, digest.offset * 16)[::2].astype(np.uint64)
    width = 64 - (ranges.bit_length() - 1)
    bounds = np.arange(1, ranges, dtype=np.uint64) << np.uint64(width)
    cuts = [0, *np.searchsorted(high, bounds, side="left").tolist(), len(content)]
    return [content.slice(start, end - start) for start, end in itertools.pairwise(cuts)]


def merge(tables: Sequence[pa.Table], image_ids: Sequence[str]) -> RangeTree:
    """`shard_content` tables of one range -> that range of the stable tree, and what it counts.

    Only eligible pages enter the tree. image_ids: names by image number, ascending.
    """
    content = combine(tables)
    may = content.column("eligible").combine_chunks()
    if may.false_count:
        content = content.filter(may).combine_chunks()
    n = len(content)
    if n == 0:
        empty = np.zeros((0, 5), np.int64)
        return RangeTree(STABLE_TREE.schema.empty_table(), SPECTRUM.schema.empty_table(), empty, 0)

    digest_array = content.column("digest").combine_chunks()
    digest = np.frombuffer(digest_array.buffers()[1], np.uint8, n * 16, digest_array.offset * 16).reshape(n, 16)
    high, low = digest_words(digest)
    image = content.column("image").to_numpy()
    node = content.column("numa_node").to_numpy()
    pages = content.column("pages").to_numpy()
    address = content.column("first_address").to_numpy()
    fill = content.column("fill_word").combine_chunks()

    is_new = new_groups(high, low)
    starts = np.flatnonzero(is_new)
    row_content = np.cumsum(is_new) - 1  # which content each row belongs to
    copies = np.add.reduceat(pages, starts)
    pair_new = is_new | new_groups(image)
    pair_starts = np.flatnonzero(pair_new)
    images = np.add.reduceat(pair_new.astype(np.int32), starts, dtype=np.int32)
    pair_address = np.minimum.reduceat(address, pair_starts)
    first_address = pair_address[np.searchsorted(pair_starts, starts)]

    filled = fill.is_valid().to_numpy(zero_copy_only=False)[starts]
    word = fill.fill_null(0).to_numpy()[starts]
    kind = np.where(filled, np.where(word == 0, _ZERO, _SAME_FILLED), _OTHER).astype(np.int8)

    one_node = not bool((node != node[0]).any())
    if one_node:
        nodes = np.ones(len(starts), np.int32)
        by_node = [_spectrum(kind, copies, int(node[0]))]
    else:
        order = np.lexsort((node, row_content))
        node_new = new_groups(row_content[order], node[order])
        node_starts = np.flatnonzero(node_new)
        nodes = np.add.reduceat(node_new.astype(np.int32), starts, dtype=np.int32)
        there, where = np.add.reduceat(pages[order], node_starts), node[order][node_starts]
        what = kind[row_content[order][node_starts]]
        by_node = [_spectrum(what[where == number], there[where == number], number) for number in np.unique(where)]

    shared = copies >= 2
    names = pa.array(image_ids, pa.string())
    stable = pa.Table.from_arrays(
        [
            pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(16), int(shared.sum()), [None, pa.py_buffer(np.ascontiguousarray(digest[starts[shared]]))]
            ),
            pa.array(KINDS, pa.string()).take(pa.array(kind[shared])),
            pa.array(word[shared], mask=~filled[shared]),
            pa.array(copies[shared]),
            pa.array(images[shared]),
            pa.array(nodes[shared]),
            names.take(pa.array(image[starts[shared]])),
            pa.array(first_address[shared]),
        ],
        schema=STABLE_TREE.schema,
    )
    return RangeTree(
        stable,
        add_spectra([_spectrum(kind, copies, None), *by_node]),
        _per_image(image, pages, pair_starts, row_content, copies, images, kind),
        int(pages.sum()),
    )


def _per_image(
    image: np.ndarray,
    pages: np.ndarray,
    pair_starts: np.ndarray,
    row_content: np.ndarray,
    copies: np.ndarray,
    images: np.ndarray,
    kind: np.ndarray,
) -> np.ndarray:
    """RangeTree.images: non-zero pages only."""
    content = row_content[pair_starts]
    here = np.add.reduceat(pages, pair_starts)
    counted = kind[content] != _ZERO
    content, here, who = content[counted], here[counted], image[pair_starts][counted]
    duplicate = copies[content] >= 2
    facts = np.stack([duplicate, ~duplicate, here >= 2, images[content] >= 2], axis=1) * here[:, None]
    present, place = np.unique(who, return_inverse=True)
    totals = np.zeros((len(present), 4), np.int64)
    for column in range(4):
        totals[:, column] = np.bincount(place, weights=facts[:, column], minlength=len(present))
    return np.concatenate((present[:, None].astype(np.int64), totals), axis=1)


def _spectrum(kind: np.ndarray, copies: np.ndarray, node: int | None) -> pa.Table:
    # copies < 2**60, so (kind, copies) fits one sortable integer
    packed, contents = np.unique((kind.astype(np.int64) << 60) | copies, return_counts=True)
    return pa.Table.from_arrays(
        [
            pa.nulls(len(packed), pa.int16()) if node is None else pa.array(np.full(len(packed), node, np.int16)),
            pa.array(KINDS, pa.string()).take(pa.array(packed >> 60)),
            pa.array(packed & ((1 << 60) - 1)),
            pa.array(contents.astype(np.int64)),
        ],
        schema=SPECTRUM.schema,
    )


def add_spectra(spectra: Sequence[pa.Table]) -> pa.Table:
    """Spectra of disjoint sets of contents -> their sum, sorted: no node first, then by node, kind, copies."""
    totals: dict[tuple[bool, int, str, int], int] = {}
    for spectrum in spectra:
        for row in spectrum.to_pylist():
            node = row["numa_node"]
            key = (node is not None, node or 0, row["kind"], row["copies"])
            totals[key] = totals.get(key, 0) + row["contents"]
    rows = [
        {"numa_node": node if known else None, "kind": kind, "copies": copies, "contents": contents}
        for (known, node, kind, copies), contents in sorted(totals.items())
    ]
    return pa.Table.from_pylist(rows, schema=SPECTRUM.schema)
