"""The global stable tree, a digest range at a time: split() what shards found, merge() each range.

merge() is a function of the set of rows: in any order, in any grouping, the result is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ksmdist.classes import combine, digest_words
from ksmdist.columns import arrow, joined, present, strings, values
from ksmdist.groups import count_rows, group_any, group_min, group_starts, group_sum
from ksmdist.mappings import Patterns, find_patterns, shared_frames
from ksmdist.plan import Piece
from ksmdist.tables import KINDS, STABLE_TREE

__all__ = ["ALL_NODES", "RangeTree", "add_rows", "merge", "narrow", "split"]

_ZERO, _SAME_FILLED, _OTHER = range(len(KINDS))
_MANY = 255  # copies

ALL_NODES = -1
"""numa_node of rows that count a content over all nodes; below every node's number."""


@dataclass(frozen=True, slots=True)
class RangeTree:
    """One digest range, merged.

    stable:         `stable_tree`, sorted by digest
    spectrum:       int64[n, 5]: numa_node or ALL_NODES, kind, copies, frames, contents
    image_spectrum: int64[n, 7]: numa_node or ALL_NODES, image, copies, before, here, region or -1, contents
    patterns:       of the zero content and of contents that have a frame which fork shares
    split:          int64[n, 2]: image and number of huge pages with one zero page that merging contents here splits
    images:         int64[n, 5]: image, then its pages that are duplicate, unique, shared within,
                    shared with others; for images that have any
    one_node:       the node that all of its pages are on: image_spectrum then has no rows for it, which would be
                    those over all nodes again; None where there are several
    pages:          eligible pages that went in
    """

    stable: pa.Table
    spectrum: np.ndarray
    image_spectrum: np.ndarray
    patterns: Patterns
    split: np.ndarray
    images: np.ndarray
    one_node: int | None
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


def narrow(content: pa.Table, ranges: int, piece: Piece) -> pa.Table:
    """The rows of a range's sorted table that are of this piece of it."""
    number, bits, index = piece.range, piece.bits, piece.index
    if bits == 0 or len(content) == 0:
        return content
    high, _ = digest_words(joined([content], "digest"))
    width = 64 - (ranges.bit_length() - 1) - bits
    first = ((number << bits) | index) << width
    low = int(np.searchsorted(high, np.uint64(first), side="left"))
    end = first + (1 << width)
    up = len(high) if end >> 64 else int(np.searchsorted(high, np.uint64(end), side="left"))
    return content.slice(low, up - low)


def merge(tables: Sequence[pa.Table], image_ids: Sequence[str], hosts: Sequence[str]) -> RangeTree:
    """`shard_content` tables of one range -> that range of the stable tree, and what it counts.

    Only eligible pages enter the tree. image_ids, hosts: by image number, in scan order; equal frame
    numbers are one frame on one host only.
    """
    content = combine(tables)
    digest, image, node, may, huge, pages, address, region = (
        joined([content], name) for name in content.column_names[:-2]
    )
    frame, fill = (content.column(name).combine_chunks() for name in ("frame", "fill_word"))
    framed, number, filled, word = present(frame), values(frame), present(fill), values(fill)
    if not may.all():
        digest, image, node, huge, pages, address, region, framed, number, filled, word = (
            column[may] for column in (digest, image, node, huge, pages, address, region, framed, number, filled, word)
        )
    if len(pages) == 0:
        none = [np.zeros((0, width), np.int64) for width in (5, 7, 2, 5)]
        return RangeTree(STABLE_TREE.schema.empty_table(), none[0], none[1], {}, none[2], none[3], None, 0)

    high, low = digest_words(digest)
    starts = group_starts(high, low)  # a group a content: the rows of the images and nodes that hold it
    length = np.diff(starts, append=len(pages))
    content_of = np.repeat(np.arange(len(starts)), length)
    copies = group_sum(pages, starts)
    word, filled = word[starts], filled[starts]
    kind = np.where(filled, np.where(word == 0, _ZERO, _SAME_FILLED), _OTHER).astype(np.int8)

    pairs = group_starts(content_of, image)  # a group a content and image
    opens = np.zeros(len(pages), bool)
    opens[starts] = True
    first_pair = np.flatnonzero(opens[pairs])
    images = np.diff(first_pair, append=len(pairs)).astype(np.int32)
    here = group_sum(pages, pairs)
    lowest = group_min(address, pairs)[first_pair]

    host = np.unique(np.array(hosts, object), return_inverse=True)[1] if framed.any() else np.zeros(len(hosts), int)
    shared = shared_frames(content_of, host[image], number, framed)
    forked = group_any(shared >= 0, starts)
    ordered = forked | (kind == _ZERO)
    rows = _Rows(content_of, image, node, pages, address, region, huge)
    spectrum, image_spectrum = _spectra(rows, shared, kind, ordered)
    nodes = _nodes(content_of, node, len(starts))
    chosen = np.flatnonzero(ordered[content_of])
    zeros_of = np.where(kind[content_of] == _ZERO, huge, 0)
    patterns = find_patterns(
        content_of[chosen],
        kind,
        *(column[chosen] for column in (image, region, node, zeros_of, shared, pages, address)),
    )

    frames = _frames(copies, starts, shared)
    splits = np.flatnonzero((huge > 0) & (kind[content_of] != _ZERO) & (frames[content_of] >= 2))
    split, _ = count_rows([image[splits], huge[splits]])

    several = np.flatnonzero(copies >= 2)
    stable = pa.Table.from_arrays(
        [
            arrow(digest[starts[several]]),
            strings(KINDS, kind[several]),
            arrow(word[several], null=~filled[several]),
            arrow(copies[several]),
            arrow(images[several]),
            arrow(nodes[several]),
            strings(image_ids, image[starts[several]]),
            arrow(lowest[several]),
        ],
        schema=STABLE_TREE.schema,
    )
    of_pair = content_of[pairs]
    here[kind[of_pair] == _ZERO] = 0
    facts = (copies[of_pair] >= 2, copies[of_pair] == 1, here >= 2, images[of_pair] >= 2)
    per_image = _per_image(image[pairs], here, facts)
    one_node = int(node[0]) if (node == node[0]).all() else None
    splits_of = np.stack(split, axis=1)
    return RangeTree(stable, spectrum, image_spectrum, patterns, splits_of, per_image, one_node, int(pages.sum()))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Eligible rows of `shard_content`, sorted by content, image, node, huge, address; content: its number."""

    content: np.ndarray
    image: np.ndarray
    node: np.ndarray
    pages: np.ndarray
    address: np.ndarray
    region: np.ndarray
    huge: np.ndarray


def _per_image(image: np.ndarray, pages: np.ndarray, facts: Sequence[np.ndarray]) -> np.ndarray:
    """RangeTree.images: the sum of `pages` by image, for the rows where each of these facts is true."""
    totals = [np.bincount(image[fact], pages[fact], int(image.max()) + 1) for fact in facts]
    table = np.stack(totals, axis=1).astype(np.int64)  # sums of doubles, exact below 2**53 pages
    held = np.flatnonzero(table.any(axis=1))
    return np.concatenate((held[:, None], table[held]), axis=1)


def _nodes(content: np.ndarray, node: np.ndarray, contents: int) -> np.ndarray:
    """int32[contents]: the NUMA nodes that hold each content."""
    if (node == node[0]).all():
        return np.ones(contents, np.int32)
    (which, _), _ = count_rows([content, node])
    return np.bincount(which, minlength=contents).astype(np.int32)


def _spectra(rows: _Rows, shared: np.ndarray, kind: np.ndarray, ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RangeTree.spectrum and image_spectrum, over all nodes and for each; image_spectrum without `ordered` contents."""
    one_node = bool((rows.node == rows.node[0]).all())
    mixed = not one_node or bool(rows.huge.any())
    spectra, by_image = [], []
    for node in [ALL_NODES] if one_node else [ALL_NODES, *np.unique(rows.node).tolist()]:
        at = np.arange(len(rows.node)) if node == ALL_NODES else np.flatnonzero(rows.node == node)
        content, pages = (rows.content, rows.pages) if node == ALL_NODES else (rows.content[at], rows.pages[at])
        starts = group_starts(content)
        copies, which = group_sum(pages, starts), content[starts]
        frames = _frames(copies, starts, shared[at])
        few = ordered[which] | (copies > _MANY)
        for some in (~few, few):  # apart, the many small numbers are counted without a sort
            spectra.append(_table(node, *count_rows([kind[which][some], copies[some], frames[some]])))
        by_image.append(_image_rows(node, rows, at[~ordered[content]], mixed))
    if one_node:
        node = int(rows.node[0])
        spectra += [_with_node(table, node) for table in spectra]
    return np.concatenate(spectra), np.concatenate(by_image)


def _frames(copies: np.ndarray, starts: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Distinct frames of each content: its copies, less those whose frame an earlier row has."""
    if not (shared >= 0).any():
        return copies
    at = np.flatnonzero(shared >= 0)
    content = np.searchsorted(starts, at, side="right") - 1
    (of, _), users = count_rows([content, shared[at]])
    return copies - np.bincount(of, users - 1, len(starts)).astype(np.int64)


def _image_rows(node: int, rows: _Rows, at: np.ndarray, mixed: bool) -> np.ndarray:
    """image_spectrum rows of the contents that rows `at` hold; mixed: they are not by address in an image."""
    if len(at) == 0:
        return np.zeros((0, 7), np.int64)
    if mixed:
        at = at[np.lexsort((rows.address[at], rows.image[at], rows.content[at]))]
    new = np.ones(len(at) + 1, bool)
    new[1:-1] = np.diff(rows.content[at]) != 0
    lone = new[1:] & new[:-1] & (rows.pages[at] == 1)  # a content's one page
    single, rest = at[lone], at[~lone]
    (image, region), contents = count_rows([rows.image[single], rows.region[single]])
    ones = np.ones(len(contents), np.int64)
    tables = [_table(node, [image, ones, ones - 1, ones, region], contents)]
    if len(rest):
        tables.append(_table(node, *count_rows(_places(rows, rest))))
    return np.concatenate(tables)


def _places(rows: _Rows, at: np.ndarray) -> list[np.ndarray]:
    """image, copies, before, here, region or -1, for each content and image that rows `at` are of."""
    content, image, pages, region = rows.content[at], rows.image[at], rows.pages[at], rows.region[at]
    pairs = group_starts(content, image)
    starts = group_starts(content)
    last = np.append(pairs[1:], len(at)) - 1  # the row of the pair's last page
    here = group_sum(pages, pairs)
    first_pair = np.searchsorted(pairs, starts)
    length = np.diff(first_pair, append=len(pairs))
    copies = np.repeat(group_sum(pages, starts), length)
    running = np.cumsum(here) - here
    before = running - np.repeat(running[first_pair], length)
    return [image[pairs], copies, before, here, np.where(before + here == copies, region[last], -1)]


def _table(node: int, columns: Sequence[np.ndarray], counts: np.ndarray) -> np.ndarray:
    return np.stack([np.full(len(counts), node, np.int64), *columns, counts], axis=1)


def _with_node(table: np.ndarray, node: int) -> np.ndarray:
    table = table.copy()
    table[:, 0] = node
    return table


def add_rows(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Tables int64[n, k] of disjoint sets of contents -> their sum: the last column added up, rows ascending."""
    whole = np.concatenate(tables)
    columns, sums = count_rows(list(whole.T[:-1]), whole[:, -1])
    return np.stack([*columns, sums], axis=1)
