"""Equal digests that may be of several contents: which pages must be looked at again, and what that shows.

The kernel merges by memcmp (mm/ksm.c, memcmp_pages); an equal digest alone is a claim. Contents that one word fills
are known by their bytes, so that only the others have to be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ksmdist.classes import digest_words, last_address
from ksmdist.columns import arrow, joined, present
from ksmdist.groups import group_any, group_starts, group_sum, order_by
from ksmdist.tables import CANDIDATE

__all__ = ["NO_DIGESTS", "Candidates", "Claims", "Confirmed", "candidates", "claims", "contradicted", "differ", "mixed"]

NO_DIGESTS = np.zeros((0, 16), np.uint8)


@dataclass(frozen=True, slots=True)
class Confirmed:
    """What was looked at. contents: digests; pages: read again for them; unread: of these, that could not be read.

    collided: uint8[m, 16], digests that turned out to be of several contents, in any order
    """

    contents: int = 0
    pages: int = 0
    unread: int = 0
    collided: np.ndarray = field(default_factory=NO_DIGESTS.copy)

    def __add__(self, other: Confirmed) -> Confirmed:
        return Confirmed(
            self.contents + other.contents,
            self.pages + other.pages,
            self.unread + other.unread,
            np.concatenate((self.collided, other.collided)),
        )

    def digests(self) -> frozenset[bytes]:
        """The digests that collided."""
        return frozenset(row.tobytes() for row in self.collided)

    def as_json(self) -> list[Any]:
        """As a mark keeps it."""
        return [self.contents, self.pages, self.unread, sorted(digest.hex() for digest in self.digests())]

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> Confirmed:
        """Read what as_json() gave, through JSON."""
        digests = b"".join(bytes.fromhex(digest) for digest in fields[3])
        contents, pages, unread = map(int, fields[:3])
        return cls(contents, pages, unread, np.frombuffer(digests, np.uint8).reshape(-1, 16))


@dataclass(frozen=True, slots=True)
class Claims:
    """Eligible rows of `shard_content` of digests that two or more pages have and no word fills, by digest.

    digest: uint8[n, 16]; group: int64[n], number of the digest, from 0; task, image: int64[n]; pages: int64[n];
    first, last: uint64[n], addresses of a row's first and last page; collided: uint8[m, 16], digests of which it is
    known without a look that they are several contents: a word fills some pages, and another or none the others
    """

    digest: np.ndarray
    group: np.ndarray
    task: np.ndarray
    image: np.ndarray
    pages: np.ndarray
    first: np.ndarray
    last: np.ndarray
    collided: np.ndarray

    @property
    def contents(self) -> int:
        """Digests."""
        return int(self.group[-1]) + 1 if len(self.group) else 0


def claims(tables: Sequence[pa.Table], tasks: Sequence[int], page_size: int) -> Claims:
    """`shard_content` rows of some digests, a table for each of these tasks, ascending -> what they claim."""
    if not any(map(len, tables)):
        return _none()
    may = joined(tables, "eligible")
    digest, image, pages, address, last, word = (
        joined(tables, name)[may] for name in ("digest", "image", "pages", "first_address", "last_page", "fill_word")
    )
    filled = np.concatenate([present(chunk) for table in tables for chunk in table.column("fill_word").chunks])[may]
    task = np.repeat(np.array(tasks, np.int64), list(map(len, tables)))[may]
    high, low = digest_words(digest)
    order = order_by(high, low)
    high, low = high[order], low[order]
    starts = group_starts(high, low)
    if len(starts) == 0:
        return _none()
    length = np.diff(starts, append=len(order))
    filled, word = filled[order], np.where(filled, word, 0)[order]
    several = group_sum(pages[order], starts) >= 2
    some_filled, some_not = group_any(filled, starts), group_any(~filled, starts)
    other_word = group_any(word != np.repeat(word[starts], length), starts)
    mixed = some_filled & (some_not | other_word)
    claimed = several & ~some_filled
    at = order[np.repeat(claimed, length)]
    return Claims(
        digest[at],
        np.repeat(np.arange(int(claimed.sum())), length[claimed]),
        task[at],
        image[at].astype(np.int64),
        pages[at],
        address[at],
        last_address(address[at], last[at], page_size),
        digest[order[starts[mixed]]],
    )


def mixed(tables: Sequence[pa.Table]) -> np.ndarray:
    """Digests, uint8[m, 16], that both pages have which a word fills and others; of `shard_content` rows as scanned.

    A look at the few digests of words, where claims() would sort all rows.
    """
    if not any(map(len, tables)):
        return NO_DIGESTS
    digest = joined(tables, "digest")
    filled = np.concatenate([present(chunk) for table in tables for chunk in table.column("fill_word").chunks])
    names = np.ascontiguousarray(digest).view("V16")[:, 0]
    words = np.unique(names[filled])
    if len(words) == 0:
        return NO_DIGESTS
    high = digest_words(digest)[0]
    like = np.flatnonzero(~filled & np.isin(high, digest_words(words.view(np.uint8).reshape(-1, 16))[0]))
    found = np.intersect1d(names[like], words)
    return found.view(np.uint8).reshape(-1, 16)


def _none() -> Claims:
    number, address = np.zeros(0, np.int64), np.zeros(0, np.uint64)
    return Claims(NO_DIGESTS, number, number, number, number, address, address, NO_DIGESTS)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The pages to look at: columns of table `candidate`, and task: int64[n], ascending.

    group: int64[n], number of the digest
    """

    digest: np.ndarray
    group: np.ndarray
    task: np.ndarray
    image: np.ndarray
    address: np.ndarray

    def table(self, which: np.ndarray | slice) -> pa.Table:
        """Rows of table `candidate`."""
        columns = [self.digest[which], self.image[which].astype(np.int32), self.address[which]]
        return pa.Table.from_arrays(
            [arrow(np.ascontiguousarray(column)) for column in columns], schema=CANDIDATE.schema
        )


def candidates(found: Claims, within: bool) -> Candidates:
    """The pages of each digest to look at, by task, image and address.

    within: for `hash`: the first page in each image of each task; where that is one, the last too. Without it, the
    first in each task, of digests that several have: a task has compared its pages itself.
    """
    new = np.ones(len(found.group), bool)
    new[1:] = (np.diff(found.group) != 0) | (np.diff(found.task) != 0)
    if within:
        new[1:] |= np.diff(found.image) != 0
    tasks = np.bincount(found.group[new], minlength=found.contents)
    lone = tasks[found.group] == 1
    firsts = np.flatnonzero(new & (~lone | within))
    ends = np.ones(len(found.group), bool)
    ends[:-1] = new[1:]
    lasts = np.flatnonzero(ends & lone) if within else firsts[:0]
    at = np.concatenate((firsts, lasts))
    address = np.concatenate((found.first[firsts], found.last[lasts]))
    order = np.lexsort((address, found.image[at], found.task[at]))
    at, address = at[order], address[order]
    return Candidates(found.digest[at], found.group[at], found.task[at], found.image[at], address)


def contradicted(digest: np.ndarray, witness: np.ndarray, read: np.ndarray) -> np.ndarray:
    """Digests, uint8[m, 16], whose pages have several witnesses.

    digest, witness: uint8[n, 16], in any order; read: bool[n], rows whose page could be read: others say nothing.
    """
    digest, witness = digest[read], witness[read]
    if len(digest) == 0:
        return NO_DIGESTS
    high, low = digest_words(digest)
    order = order_by(high, low)
    high, low, said = high[order], low[order], np.ascontiguousarray(witness).view("V16")[:, 0][order]
    starts = group_starts(high, low)
    first = np.repeat(said[starts], np.diff(starts, append=len(order)))
    return np.asarray(digest[order[starts[group_any(said != first, starts)]]])


def differ(rows: np.ndarray, others: np.ndarray, which: np.ndarray) -> np.ndarray:
    """bool[n]: pages, uint8[n, page_size], that are not the same as others[which]."""
    unlike = np.zeros(len(rows), bool)
    words, other = rows.view("<u8"), others.view("<u8")
    for some in _pieces(len(rows)):
        unlike[some] = np.bitwise_or.reduce(words[some] ^ other[which[some]], axis=1) != 0
    return unlike


def _pieces(n: int) -> Iterator[slice]:
    """64 rows at a time: what they are gathered into stays in the cache."""
    return (slice(at, min(at + 64, n)) for at in range(0, n, 64))
