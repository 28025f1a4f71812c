"""Pages -> classes that need no other image, and one row for each content of a shard.

The order of the classes is in tables.CLASSES; which pages KSM considers at all is mm/ksm.c,
ksm_next_page_pmd_entry (6.18): present, anonymous, in a VM_MERGEABLE mapping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ksmdist.digests import fill_digest
from ksmdist.settings import Eligible
from ksmdist.tables import CLASSES, KINDS, PAGE_FLAGS, SHARD_CONTENT

__all__ = ["Classified", "classify", "combine", "digest_words", "new_groups"]

_CLASS = {name: code for code, name in enumerate(CLASSES)}
_DECIDED_LATER = len(CLASSES)


@dataclass(frozen=True, slots=True)
class Classified:
    """What is known of some pages by themselves.

    classes: int64[len(CLASSES)], pages; `duplicate` and `unique` are still 0
    kinds:   int64[len(KINDS)], pages
    content: `shard_content`, sorted
    """

    classes: np.ndarray
    kinds: np.ndarray
    content: pa.Table


def classify(page: pa.RecordBatch, image: int, eligible: Eligible, page_size: int) -> Classified:
    """A `page` batch of one image -> its pages by class and kind, and its contents combined.

    eligible `all`: every page that KSM could take were its mapping marked; never file pages or
    pages with neither bytes nor the zero page.
    """
    flags = page.column("flags").to_numpy()
    address = page.column("address").to_numpy()
    node = page.column("numa_node").to_numpy()
    digest, has_bytes = _digest_rows(page.column("digest"))
    word_column = page.column("fill_word")
    filled = word_column.is_valid().to_numpy(zero_copy_only=False)
    word = word_column.fill_null(0).to_numpy()

    def flag(name: str) -> np.ndarray:
        return np.asarray((flags & np.uint32(PAGE_FLAGS[name])) != 0)

    zero_mapped = flag("zero_mapped") & ~has_bytes
    could = (has_bytes | zero_mapped) & ~flag("file")
    may = could if eligible == "all" else could & flag("eligible")
    by_ksm = zero_mapped & flag("pte_dirty")
    zero = filled & (word == 0)
    code = np.select(
        [~may, zero_mapped & ~by_ksm, by_ksm, zero],
        [_CLASS["ineligible"], _CLASS["zero_mapped_fault"], _CLASS["zero_mapped_ksm"], _CLASS["zero"]],
        _DECIDED_LATER,
    )
    classes = np.bincount(code, minlength=_DECIDED_LATER + 1)[:_DECIDED_LATER].astype(np.int64)
    kinds = np.array([zero.sum(), (filled & ~zero).sum(), (has_bytes & ~filled).sum()], np.int64)
    assert len(kinds) == len(KINDS)

    placed = may & by_ksm  # was a zero page with a frame of its own before KSM took it
    if placed.any():
        digest = digest.copy()
        digest[placed] = np.frombuffer(fill_digest(0, page_size), np.uint8)
        filled = filled | placed
    keep = has_bytes | placed
    if not keep.all():
        digest, address, node, may, filled, word = (
            column[keep] for column in (digest, address, node, may, filled, word)
        )
    n = len(address)
    content = _combine(digest, np.full(n, image, np.int32), node, may, np.ones(n, np.int64), address, filled, word)
    return Classified(classes, kinds, content)


def combine(contents: Sequence[pa.Table]) -> pa.Table:
    """`shard_content` tables -> one, a row for each (digest, image, numa_node, eligible), sorted.

    Associative and commutative.
    """
    if not contents:
        return SHARD_CONTENT.schema.empty_table()
    table = pa.concat_tables(contents).combine_chunks()
    if len(contents) == 1 or len(table) == 0:
        return table
    digest, _ = _digest_rows(table.column("digest").combine_chunks())
    fill = table.column("fill_word")
    return _combine(
        digest,
        table.column("image").to_numpy(),
        table.column("numa_node").to_numpy(),
        table.column("eligible").to_numpy(),
        table.column("pages").to_numpy(),
        table.column("first_address").to_numpy(),
        fill.is_valid().to_numpy(),
        fill.fill_null(0).to_numpy(),
    )


def digest_words(digest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8[n, 16] digests -> their leading and trailing 64 bits, uint64[n], which sort as the bytes do."""
    words = np.ascontiguousarray(digest).view(">u8")
    return words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)


def new_groups(*columns: np.ndarray) -> np.ndarray:
    """bool[n]: where a row of these sorted columns differs from the row before it; the first does."""
    n = len(columns[0])
    new = np.zeros(n, bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return new


def _digest_rows(digest: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """A fixed_size_binary(16) array as uint8[n, 16], and bool[n] which are not null."""
    n = len(digest)
    if n == 0:
        return np.zeros((0, 16), np.uint8), np.zeros(0, bool)
    data = np.frombuffer(digest.buffers()[1], np.uint8, n * 16, digest.offset * 16).reshape(n, 16)
    if digest.null_count == 0:
        return data, np.ones(n, bool)
    return data, digest.is_valid().to_numpy(zero_copy_only=False)


def _sorted_by(high: np.ndarray, low: np.ndarray, rest: Sequence[np.ndarray]) -> np.ndarray:
    """The order by (high, low, *rest). One stable sort of 64 bits does it unless there are ties to break."""
    order = np.argsort(high, kind="stable")
    tied = high[order][1:] == high[order][:-1]
    for column in (low, *rest):
        if bool((tied & (column[order][1:] < column[order][:-1])).any()):
            return np.lexsort((*reversed(rest), low, high))
        tied &= column[order][1:] == column[order][:-1]
    return order


def _combine(
    digest: np.ndarray,
    image: np.ndarray,
    node: np.ndarray,
    eligible: np.ndarray,
    pages: np.ndarray,
    address: np.ndarray,
    filled: np.ndarray,
    word: np.ndarray,
) -> pa.Table:
    # A sort and reduceat: a third faster here than pyarrow's group_by, and it leaves sorted runs,
    # which make the merge's own sort nearly free (docs/design.md, decisions).
    if len(pages) == 0:
        return SHARD_CONTENT.schema.empty_table()
    high, low = digest_words(digest)
    order = _sorted_by(high, low, (image, node, eligible))
    starts = np.flatnonzero(new_groups(high[order], low[order], image[order], node[order], eligible[order]))
    first = order[starts]
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), len(first), [None, pa.py_buffer(np.ascontiguousarray(digest[first]))]
        ),
        pa.array(image[first]),
        pa.array(node[first]),
        pa.array(eligible[first]),
        pa.array(np.add.reduceat(pages[order], starts)),
        pa.array(np.minimum.reduceat(address[order], starts)),
        pa.array(word[first], mask=~filled[first]),
    ]
    return pa.Table.from_arrays(columns, schema=SHARD_CONTENT.schema)
