"""The global stable tree, a digest range at a time: split() what shards found, merge() each range.

merge() is a function of the set of rows: in any order, in any grouping, the result is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ksmdist.classes import combine, digest_words, huge_page_bytes, last_address
from ksmdist.columns import arrow, joined, present, strings, values
from ksmdist.exposure import Exposed, Held, find_exposed
from ksmdist.groups import count_rows, group_any, group_min, group_starts, group_sum
from ksmdist.huge import count_frames
from ksmdist.mappings import Patterns, find_patterns, shared_frames
from ksmdist.pairs import find_sets
from ksmdist.plan import Piece
from ksmdist.settings import Settings
from ksmdist.tables import HUGE_FRAME, IMAGE_SET, KINDS, SCOPES, STABLE_TREE

__all__ = ["ALL_NODES", "Owners", "RangeTree", "Top", "add_rows", "merge", "narrow", "split"]

_ZERO, _SAME_FILLED, _OTHER = range(len(KINDS))
_IMAGE, _TENANT, _SALT, _ALL = range(len(SCOPES))
_MANY = 255  # copies

ALL_NODES = -1
"""numa_node of rows that count a content over all nodes; below every node's number."""


@dataclass(frozen=True, slots=True)
class Owners:
    """Of each image by number, in scan order: its name, the host it was on (equal frame numbers are one frame on one
    host only), its tenant, the number of its salt's group (none: there are no salts)."""

    image_ids: Sequence[str]
    hosts: Sequence[str]
    tenants: Sequence[str]
    salts: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Top:
    """The contents with most copies, most first, of equals the lower digest: columns of `stable_tree` as arrays.

    digest: uint8[n, 16]; kind: index of KINDS; word: uint64, where filled; copies: int64; images, nodes, tenants:
    int32; image: number of the first that holds it; address: uint64, its lowest there.
    """

    digest: np.ndarray
    kind: np.ndarray
    word: np.ndarray
    filled: np.ndarray
    copies: np.ndarray
    images: np.ndarray
    nodes: np.ndarray
    tenants: np.ndarray
    image: np.ndarray
    address: np.ndarray

    @classmethod
    def most(cls, tops: Sequence[Top], top: int) -> Top:
        """The `top` with most copies of all of these, which are of disjoint sets of contents."""
        columns = [np.concatenate([getattr(one, name) for one in tops]) for name in cls.__slots__]
        high, low = digest_words(columns[0])
        order = np.lexsort((low, high, -columns[4]))[:top]
        return cls(*(column[order] for column in columns))


@dataclass(frozen=True, slots=True)
class RangeTree:
    """One digest range, merged.

    stable:         `stable_tree`, sorted by digest
    spectrum:       int64[n, 5]: numa_node or ALL_NODES, kind, copies, frames, contents
    image_spectrum: int64[n, 7]: numa_node or ALL_NODES, image, copies, before, here, region or -1, contents
    patterns:       of the zero content and of contents that have a frame which fork shares
    split:          int64[n, 2]: image and number of huge pages with one zero page that merging contents here splits
    images:         int64[n, 6]: image, then its pages that are duplicate, unique, shared within,
                    shared with others, and contents shared within; for images that have any
    scopes:         int64[n, 5]: numa_node or ALL_NODES, scope, kind, copies, contents: table `policy_spectrum`
    sets:           `image_set`
    frames:         `huge_frame`
    top:            the contents with most copies
    exposed:        which contents tenants share: empty where it was not asked for, or there is but one tenant
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
    scopes: np.ndarray
    sets: pa.Table
    frames: pa.Table
    top: Top
    exposed: Exposed
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


def merge(
    tables: Sequence[pa.Table],
    owners: Owners,
    page_size: int,
    top: int,
    with_volatile: bool = False,
    exposed_under: Settings | None = None,
) -> RangeTree:
    """`shard_content` tables of one range -> that range of the stable tree, and what it counts.

    Only eligible pages enter the tree; those that changed between passes do with_volatile only.
    top: most rows of RangeTree.top; exposed_under: settings that RangeTree.exposed is for, None for none.
    """
    content = combine(tables, page_size)
    digest, image, node, may, huge, thp, volatile, pages, address, last, region = (
        joined([content], name) for name in content.column_names[:-2]
    )
    ends = last_address(address, last, page_size)
    frame, fill = (content.column(name).combine_chunks() for name in ("frame", "fill_word"))
    framed, number, filled, word = present(frame), values(frame), present(fill), values(fill)
    if not with_volatile:
        may = may & ~volatile
    if not may.all():
        digest, image, node, huge, thp, pages, address, ends, region, framed, number, filled, word = (
            column[may]
            for column in (digest, image, node, huge, thp, pages, address, ends, region, framed, number, filled, word)
        )
    if len(pages) == 0:
        return _nothing()

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

    host = _numbers(owners.hosts) if framed.any() else np.zeros(len(owners.hosts), int)
    shared = shared_frames(content_of, host[image], number, framed)
    forked = group_any(shared >= 0, starts)
    ordered = forked | (kind == _ZERO)
    rows = _Rows(content_of, image, node, pages, ends, region, huge)
    spectrum, image_spectrum = _spectra(rows, shared, kind, ordered)
    nodes = _nodes(content_of, node, len(starts))
    chosen = np.flatnonzero(ordered[content_of])
    zeros_of = np.where(kind[content_of] == _ZERO, huge, 0)
    patterns = find_patterns(
        content_of[chosen],
        kind,
        *(column[chosen] for column in (image, region, node, zeros_of, shared, pages, ends)),
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
            strings(owners.image_ids, image[starts[several]]),
            arrow(lowest[several]),
        ],
        schema=STABLE_TREE.schema,
    )
    tenant = _numbers(owners.tenants)
    salt = np.array(owners.salts or np.zeros(len(tenant)), np.int64)
    chosen = several[_most(copies[several], top)]
    first = starts[chosen]
    tenants = np.ones(len(chosen), np.int32)
    if tenant.any():
        held = np.isin(content_of[pairs], chosen)
        (of, _), _ = count_rows([content_of[pairs][held], tenant[image[pairs][held]]])
        tenants = np.bincount(of, minlength=len(starts))[chosen].astype(np.int32)
    most = Top(
        digest[first],
        kind[chosen],
        word[chosen],
        filled[chosen],
        copies[chosen],
        images[chosen],
        nodes[chosen],
        tenants,
        image[first],
        lowest[chosen],
    )

    zeros, mergeable = kind == _ZERO, (copies >= 2) | (kind == _ZERO)
    block = address // np.uint64(huge_page_bytes(page_size))
    counted = count_frames(image, block, pages, mergeable[content_of], zeros[content_of], thp)
    of_pair, of_image = content_of[pairs], image[pairs]
    scopes = _scopes(rows, (of_pair, of_image, here), copies, {_TENANT: tenant, _SALT: salt}, kind, ordered)
    exposed = Exposed.nothing()
    if exposed_under is not None:
        eligible = Held(content_of, image, node, pages, address, kind, digest[starts])
        exposed = find_exposed(eligible, tenant, salt, exposed_under)
    here[kind[of_pair] == _ZERO] = 0
    facts = (copies[of_pair] >= 2, copies[of_pair] == 1, here >= 2, images[of_pair] >= 2)
    nonzero = here > 0
    return RangeTree(
        stable,
        spectrum,
        image_spectrum,
        patterns,
        np.stack(split, axis=1),
        _per_image(of_image, here, facts),
        scopes,
        find_sets(of_pair[nonzero], of_image[nonzero], here[nonzero]),
        counted,
        most,
        exposed,
        int(node[0]) if (node == node[0]).all() else None,
        int(pages.sum()),
    )


def _nothing() -> RangeTree:
    none = [np.zeros((0, width), np.int64) for width in (5, 7, 2, 6, 5)]
    stable, sets, frames = (
        schema.empty_table() for schema in (STABLE_TREE.schema, IMAGE_SET.schema, HUGE_FRAME.schema)
    )
    words, counts, numbers = (np.zeros(0, kind) for kind in (np.uint64, np.int64, np.int32))
    filled, kind = np.zeros(0, bool), np.zeros(0, np.int8)
    top = Top(np.zeros((0, 16), np.uint8), kind, words, filled, counts, numbers, numbers, numbers, numbers, words)
    held = none[2], none[3], none[4], sets, frames, top, Exposed.nothing()
    return RangeTree(stable, none[0], none[1], {}, *held, None, 0)


def _numbers(names: Sequence[str]) -> np.ndarray:
    """A number for each distinct name, int64[n], from 0."""
    return np.unique(np.array(names, object), return_inverse=True)[1]


def _most(copies: np.ndarray, top: int) -> np.ndarray:
    """Rows with most copies, at most `top`, most first; of equals the first."""
    if len(copies) > top:
        least = -np.partition(-copies, top - 1)[top - 1]
        at = np.flatnonzero(copies >= least)
        return at[np.argsort(-copies[at], kind="stable")][:top]
    return np.argsort(-copies, kind="stable")


@dataclass(frozen=True, slots=True)
class _Rows:
    """Eligible rows of `shard_content`, sorted by content, image, node, huge, end; content: its number.

    end: address of the row's last page
    """

    content: np.ndarray
    image: np.ndarray
    node: np.ndarray
    pages: np.ndarray
    end: np.ndarray
    region: np.ndarray
    huge: np.ndarray


def _per_image(image: np.ndarray, pages: np.ndarray, facts: Sequence[np.ndarray]) -> np.ndarray:
    """RangeTree.images: the sum of `pages` by image, for the rows where each of these facts is true.

    Then the number of rows where the third is.
    """
    size = int(image.max()) + 1
    totals = [np.bincount(image[fact], pages[fact], size) for fact in facts]
    totals.append(np.bincount(image[facts[2]], minlength=size))
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


def _scopes(
    rows: _Rows,
    by_image: tuple[np.ndarray, np.ndarray, np.ndarray],
    copies: np.ndarray,
    owner: Mapping[int, np.ndarray],
    kind: np.ndarray,
    ordered: np.ndarray,
) -> np.ndarray:
    """RangeTree.scopes, over all nodes and for each, without `ordered` contents.

    by_image: content, image and pages of each content and image; copies, kind, ordered: by content; owner: by scope,
    the number of each image's tenant, or salt.
    """
    tables = _scopes_of(ALL_NODES, by_image, np.arange(len(copies)), copies, owner, kind, ordered)
    if (rows.node == rows.node[0]).all():
        tables += [_with_node(table, int(rows.node[0])) for table in tables]
        return np.concatenate(tables)
    for node in np.unique(rows.node).tolist():
        at = np.flatnonzero(rows.node == node)
        content, image, pages = rows.content[at], rows.image[at], rows.pages[at]
        pairs, whole = group_starts(content, image), group_starts(content)
        of_node = content[pairs], image[pairs], group_sum(pages, pairs)
        tables += _scopes_of(node, of_node, content[whole], group_sum(pages, whole), owner, kind, ordered)
    return np.concatenate(tables)


def _scopes_of(
    node: int,
    by_image: tuple[np.ndarray, np.ndarray, np.ndarray],
    content: np.ndarray,
    copies: np.ndarray,
    owner: Mapping[int, np.ndarray],
    kind: np.ndarray,
    ordered: np.ndarray,
) -> list[np.ndarray]:
    """The rows of one node. content, copies: of all its images together."""
    of_pair, image, here = by_image

    def counted(scope: int, of: np.ndarray, count: np.ndarray) -> list[np.ndarray]:
        kept = ~ordered[of]
        few = count <= _MANY  # apart, the many small numbers are counted without a sort
        tables = []
        for some in (kept & few, kept & ~few):
            (kinds, number), contents = count_rows([kind[of[some]], count[some]])
            tables.append(_table(node, [np.full(len(number), scope), kinds, number], contents))
        return tables

    images, whole = counted(_IMAGE, of_pair, here), counted(_ALL, content, copies)
    tables = [*images, *whole]
    for scope, of in owner.items():
        several = len(np.unique(of))
        if several in (1, len(of)):  # one tenant; or one for each image
            same = [table.copy() for table in (whole if several == 1 else images)]
            for table in same:
                table[:, 1] = scope
            tables += same
        else:
            (which, _), sums = count_rows([of_pair, of[image]], here)
            tables += counted(scope, which, sums)
    return tables


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
        at = at[np.lexsort((rows.end[at], rows.image[at], rows.content[at]))]
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
