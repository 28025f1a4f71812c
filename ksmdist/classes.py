"""Pages -> classes that need no other image, and one row for each content of a shard.

The order of the classes is in tables.CLASSES; which pages KSM considers at all is mm/ksm.c,
ksm_next_page_pmd_entry (6.18): present, anonymous, in a VM_MERGEABLE mapping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from ksmdist.columns import arrow, joined, present, values
from ksmdist.digests import fill_digest
from ksmdist.groups import group_min, group_starts, group_sum, order_by
from ksmdist.settings import Eligible
from ksmdist.tables import CLASSES, KINDS, PAGE_FLAGS, SHARD_CONTENT

__all__ = ["Classified", "classify", "combine", "digest_words"]

_CLASS = {name: code for code, name in enumerate(CLASSES)}
_DECIDED_LATER = len(CLASSES)


@dataclass(frozen=True, slots=True)
class Classified:
    """What is known of some pages by themselves.

    classes: int64[len(CLASSES)], pages; `duplicate` and `unique` are still 0
    kinds:   int64[len(KINDS)], pages
    content: `shard_content` rows, a row a page but for zero pages; combine() makes the table of them
    """

    classes: np.ndarray
    kinds: np.ndarray
    content: pa.Table


def classify(page: pa.RecordBatch, image: int, eligible: Eligible, page_size: int) -> Classified:
    """A `page` batch of one image -> its pages by class and kind, and what they hold.

    eligible `all`: every page that KSM could take were its mapping marked; never file pages or
    pages with neither bytes nor the zero page.
    """
    address, flags, node, digest, word = (values(column) for column in page.columns)
    has_bytes = present(page.column("digest"))
    filled = present(page.column("fill_word"))

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

    # A page that KSM mapped to the zero page was a zero page with a frame of its own before.
    first, zeros = _zero_rows(zero | (may & by_ksm), may, node)
    other = np.flatnonzero(has_bytes & ~zero)
    n = len(first)
    rows = _Rows(
        digest=np.concatenate((np.tile(np.frombuffer(fill_digest(0, page_size), np.uint8), (n, 1)), digest[other])),
        image=np.full(n + len(other), image, np.int32),
        node=np.concatenate((node[first], node[other])),
        eligible=np.concatenate((may[first], may[other])),
        pages=np.concatenate((zeros, np.ones(len(other), np.int64))),
        address=np.concatenate((address[first], address[other])),
        filled=np.concatenate((np.ones(n, bool), filled[other])),
        word=np.concatenate((np.zeros(n, np.uint64), word[other])),
    )
    return Classified(classes, kinds, rows.table())


def combine(contents: Sequence[pa.Table]) -> pa.Table:
    """`shard_content` rows -> the table: a row for each (digest, image, numa_node, eligible), sorted.

    Associative and commutative.
    """
    if not any(map(len, contents)):
        return SHARD_CONTENT.schema.empty_table()
    digest, image, node, may, pages, address, word = (joined(contents, name) for name in SHARD_CONTENT.schema.names)
    filled = np.concatenate([present(chunk) for table in contents for chunk in table.column("fill_word").chunks])
    rows = _Rows(digest, image, node, may, pages, address, filled, word)
    high, low = digest_words(rows.digest)
    order = order_by(high, low, rows.image, rows.node, rows.eligible)
    rows = rows.take(order)
    starts = group_starts(high[order], low[order], rows.image, rows.node, rows.eligible)
    combined = rows if len(starts) == len(order) else rows.take(starts)
    return replace(combined, pages=group_sum(rows.pages, starts), address=group_min(rows.address, starts)).table()


def digest_words(digest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8[n, 16] digests -> their leading and trailing 64 bits, uint64[n], which sort as the bytes do."""
    words = np.ascontiguousarray(digest).view(">u8")
    return words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The columns of `shard_content`; `filled` says where `word` is not null."""

    digest: np.ndarray
    image: np.ndarray
    node: np.ndarray
    eligible: np.ndarray
    pages: np.ndarray
    address: np.ndarray
    filled: np.ndarray
    word: np.ndarray

    def take(self, at: np.ndarray) -> _Rows:
        digest = self.digest.view("V16")[:, 0][at].view(np.uint8).reshape(-1, 16)
        return _Rows(
            digest,
            self.image[at],
            self.node[at],
            self.eligible[at],
            self.pages[at],
            self.address[at],
            self.filled[at],
            self.word[at],
        )

    def table(self) -> pa.Table:
        columns = [self.digest, self.image, self.node, self.eligible, self.pages, self.address]
        return pa.Table.from_arrays(
            [*map(arrow, columns), arrow(self.word, null=~self.filled)], schema=SHARD_CONTENT.schema
        )


def _zero_rows(zero: np.ndarray, may: np.ndarray, node: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Zero pages by (node, eligible): the first row of each, and how many pages."""
    at = np.flatnonzero(zero)
    low = int(node.min(initial=0))
    key = (node[at].astype(np.intp) - low) * 2 + may[at]
    pages = np.bincount(key)
    first = np.zeros(len(pages), np.intp)
    first[key[::-1]] = at[::-1]  # the last that is written stays: the first row
    kept = np.flatnonzero(pages)
    return first[kept], pages[kept]
