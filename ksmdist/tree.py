"""The global stable tree, a digest range at a time: split() what shards found, merge() each range.

merge() is a function of the set of rows: in any order, in any grouping, the result is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ksmdist.classes import combine, digest_words
from ksmdist.columns import arrow, joined, present, strings, values
from ksmdist.groups import group_min, group_starts, group_sum
from ksmdist.tables import KINDS, SPECTRUM, STABLE_TREE

__all__ = ["RangeTree", "add_spectra", "merge", "split"]

_ZERO, _SAME_FILLED, _OTHER = range(len(KINDS))
_FEW = 1 << 16  # (copies, kind) up to here are counted, not sorted: nearly all


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
    high, _ = digest_words(joined([content], "digest"))
    width = 64 - (ranges.bit_length() - 1)
    bounds = np.arange(1, ranges, dtype=np.uint64) << np.uint64(width)
    cuts = [0, *np.searchsorted(high, bounds, side="left").tolist(), len(content)]
    return [content.slice(start, end - start) for start, end in itertools.pairwise(cuts)]


def merge(tables: Sequence[pa.Table], image_ids: Sequence[str]) -> RangeTree:
    """`shard_content` tables of one range -> that range of the stable tree, and what it counts.

    Only eligible pages enter the tree. image_ids: names by image number, ascending.
    """
    content = combine(tables)
    digest, image, node, may, pages, address = (joined([content], name) for name in content.column_names[:-1])
    fill = content.column("fill_word").combine_chunks()
    filled, word = present(fill), values(fill)
    if not may.all():
        digest, image, node, pages, address, filled, word = (
            column[may] for column in (digest, image, node, pages, address, filled, word)
        )
    if len(pages) == 0:
        empty = np.zeros((0, 5), np.int64)
        return RangeTree(STABLE_TREE.schema.empty_table(), SPECTRUM.schema.empty_table(), empty, 0)

    high, low = digest_words(digest)
    starts = group_starts(high, low)  # a group a content: the rows of the images and nodes that hold it
    copies = group_sum(pages, starts)
    word, filled = word[starts], filled[starts]
    kind = np.where(filled, np.where(word == 0, _ZERO, _SAME_FILLED), _OTHER).astype(np.int8)

    pairs = group_starts(high, low, image)  # a group a content and image
    content_of = np.searchsorted(starts, pairs, side="right") - 1
    first_pair = np.searchsorted(pairs, starts)
    images = np.diff(first_pair, append=len(pairs)).astype(np.int32)

    if (node == node[0]).all():
        nodes = np.ones(len(starts), np.int32)
        whole = _spectrum(kind, copies)
        spectra = [_spectrum_table(whole, None), _spectrum_table(whole, int(node[0]))]
    else:
        nodes, spectra = _by_node(np.searchsorted(starts, np.arange(len(node)), side="right") - 1, node, pages, kind)
        spectra.append(_spectrum_table(_spectrum(kind, copies), None))

    shared = np.flatnonzero(copies >= 2)
    stable = pa.Table.from_arrays(
        [
            arrow(digest[starts[shared]]),
            strings(KINDS, kind[shared]),
            arrow(word[shared], null=~filled[shared]),
            arrow(copies[shared]),
            arrow(images[shared]),
            arrow(nodes[shared]),
            strings(image_ids, image[starts[shared]]),
            arrow(group_min(address, pairs)[first_pair[shared]]),
        ],
        schema=STABLE_TREE.schema,
    )
    here = group_sum(pages, pairs)
    here[kind[content_of] == _ZERO] = 0
    facts = (copies[content_of] >= 2, copies[content_of] == 1, here >= 2, images[content_of] >= 2)
    return RangeTree(stable, add_spectra(spectra), _per_image(image[pairs], here, facts), int(pages.sum()))


def _per_image(image: np.ndarray, pages: np.ndarray, facts: Sequence[np.ndarray]) -> np.ndarray:
    """RangeTree.images: the sum of `pages` by image, for the rows where each of these facts is true."""
    totals = [np.bincount(image[fact], pages[fact], int(image.max()) + 1) for fact in facts]
    table = np.stack(totals, axis=1).astype(np.int64)  # sums of doubles, exact below 2**53 pages
    held = np.flatnonzero(table.any(axis=1))
    return np.concatenate((held[:, None], table[held]), axis=1)


def _by_node(
    content_of: np.ndarray, node: np.ndarray, pages: np.ndarray, kind: np.ndarray
) -> tuple[np.ndarray, list[pa.Table]]:
    """For each content the number of its nodes, and a spectrum for each node. content_of: by row, ascending."""
    order = np.lexsort((node, content_of))
    content, where, count = content_of[order], node[order], pages[order]
    starts = group_starts(content, where)
    content, where, count = content[starts], where[starts], group_sum(count, starts)
    nodes = np.bincount(content).astype(np.int32)
    there = [(int(number), where == number) for number in np.unique(where)]
    return nodes, [_spectrum_table(_spectrum(kind[content[at]], count[at]), number) for number, at in there]


def _spectrum(kind: np.ndarray, copies: np.ndarray) -> dict[tuple[int, int], int]:
    """(kind, copies) -> contents."""
    packed = copies * len(KINDS) + kind
    few = packed < _FEW
    counts = np.bincount(packed[few])
    found = {divmod(int(at), len(KINDS)): int(counts[at]) for at in np.flatnonzero(counts)}
    for at, contents in zip(*np.unique(packed[~few], return_counts=True), strict=True):
        found[divmod(int(at), len(KINDS))] = int(contents)
    return {(which, number): contents for (number, which), contents in found.items()}


def _spectrum_table(spectrum: Mapping[tuple[int, int], int], node: int | None) -> pa.Table:
    rows = [
        {"numa_node": node, "kind": KINDS[kind], "copies": copies, "contents": contents}
        for (kind, copies), contents in spectrum.items()
    ]
    return pa.Table.from_pylist(rows, schema=SPECTRUM.schema)


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
