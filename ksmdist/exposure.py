"""Which contents tenants would have on the same KSM pages: by the set of tenants that hold them, then by pair.

As in pairs.py contents are added up by set before any pair is looked at, and pairs are counted for some tenants at a
time: memory grows with the tenants of a group, never with tenants squared. docs/exposure.md says what attacks need.

Images without a tenant are one tenant, of empty name: theirs is memory of somebody, and what is left out reads as fine.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ksmdist.columns import arrow, joined, strings
from ksmdist.groups import count_rows, group_min, group_starts, group_sum
from ksmdist.pairs import find_sets, spread
from ksmdist.settings import Settings
from ksmdist.tables import EXPOSURE, KINDS, RARE_CONTENT, TENANT_SET

__all__ = ["MOST_RARE", "Exposed", "Held", "TenantPairs", "find_exposed", "is_near", "tenant_groups"]

MOST_RARE = 1 << 14
"""Most rare contents of a run whose first page is read again: 64 MiB of 4 KiB pages, and a few seconds of requests
where they are in an object store."""

_ZERO, _SAME_FILLED, _OTHER = range(len(KINDS))
_PAIRS_AT_ONCE = 1 << 20
_GROUP_CELLS = 1 << 17  # of a tenant of a group, any tenant and a kind: 9 numbers each, 9 MiB


@dataclass(frozen=True, slots=True)
class Held:
    """Eligible pages: a row for each content, image and node at the least, sorted by content, image.

    content: its number, ascending by digest; address: uint64, the row's lowest. By content: kind, index of KINDS;
    digest: uint8[contents, 16]
    """

    content: np.ndarray
    image: np.ndarray
    node: np.ndarray
    pages: np.ndarray
    address: np.ndarray
    kind: np.ndarray
    digest: np.ndarray


@dataclass(frozen=True, slots=True)
class Exposed:
    """Of some contents: sets, `tenant_set`; rare, `rare_content`, at most MOST_RARE rows, by digest."""

    sets: pa.Table
    rare: pa.Table

    @classmethod
    def nothing(cls) -> Exposed:
        """No content that tenants share."""
        return cls(TENANT_SET.schema.empty_table(), RARE_CONTENT.schema.empty_table())


def is_near(copies: np.ndarray, max_page_sharing: int | None) -> np.ndarray:
    """bool[n]: whether so many copies come near max_page_sharing, so that a few more leave one over.

    A page that finds all nodes of its content full is not merged until a second one does (mm/ksm.c,
    stable_node_dup, is_page_sharing_candidate): with copies = 1 mod max_page_sharing one page is left over, and its
    owner sees that, by a write that is fast. Who can guess a content adds copies of his own, one a scan, until his
    last is left over, and then knows how many there were before, modulo max_page_sharing. Near is where that takes at
    most an eighth of max_page_sharing copies.
    """
    if max_page_sharing is None:
        return np.zeros(len(copies), bool)
    near: np.ndarray = (1 - copies) % max_page_sharing <= max_page_sharing // 8
    return near


def find_exposed(held: Held, tenant: np.ndarray, salt: np.ndarray, settings: Settings) -> Exposed:
    """Which contents two tenants or more hold, and could merge under these settings. tenant, salt: int64, by image.

    With use_zero_pages mapping a zero page shares nothing; without merge_across_nodes a content is one for each node.
    """
    if len(tenant) == 0 or (tenant == tenant[0]).all():
        return Exposed.nothing()
    unit, at = _units(held, settings)
    owner = tenant[held.image[at]]
    starts = group_starts(unit)
    shared = group_min(owner, starts) != -group_min(-owner, starts)
    rows = np.flatnonzero(np.repeat(shared, np.diff(starts, append=len(unit))))
    if len(rows) == 0:
        return Exposed.nothing()
    at, owner = at[rows], owner[rows]
    unit = np.repeat(np.arange(int(shared.sum())), np.diff(starts, append=len(unit))[shared])
    starts = group_starts(unit)
    pages, image, content = held.pages[at], held.image[at], held.content[at[starts]]
    kind = held.kind[content]
    near = is_near(group_sum(pages, starts), settings.max_page_sharing)

    (of, member), sums = count_rows([unit, owner], pages)
    tables = [
        _sets(of, member, sums, (kind[of] == number) & (near[of] == is_close), number, is_close, False)
        for number, is_close in itertools.product(range(len(KINDS)), (False, True))
    ]
    if (salt != salt[0]).any():
        (of_unit, of_salt, salted), weight = count_rows([unit, salt[image], owner], pages)
        alike = np.zeros(len(of_unit), np.int64)  # a number for each unit and salt
        alike[group_starts(of_unit, of_salt)] = 1
        alike = np.cumsum(alike)
        tables += [
            _sets(alike, salted, weight, kind[of_unit] == number, number, False, True) for number in range(len(KINDS))
        ]

    first = group_starts(of)
    two = np.diff(first, append=len(of)) == 2
    rare = np.flatnonzero(two & (kind == _OTHER))[:MOST_RARE]
    pairs = group_starts(unit, image)
    columns = [
        np.ascontiguousarray(held.digest[content[rare]]),
        image[starts[rare]].astype(np.int32),
        group_min(held.address[at], pairs)[np.searchsorted(pairs, starts[rare])],
        member[first[rare]].astype(np.int32),
        member[first[rare] + 1].astype(np.int32),
    ]
    return Exposed(
        _numbered(tables), pa.Table.from_arrays([arrow(column) for column in columns], schema=RARE_CONTENT.schema)
    )


def _units(held: Held, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of what may be one KSM page, from 0 and ascending by digest, and the rows they are of, by image.

    A content, or a content on a node.
    """
    at = np.arange(len(held.content))
    if settings.use_zero_pages:
        at = at[held.kind[held.content] != _ZERO]
    if settings.merge_across_nodes or (held.node == held.node[0]).all():
        return held.content[at], at
    at = at[np.lexsort((held.image[at], held.node[at], held.content[at]))]
    new = np.zeros(len(at), np.int64)
    new[group_starts(held.content[at], held.node[at])[1:]] = 1
    return np.cumsum(new), at


def _sets(
    content: np.ndarray,
    member: np.ndarray,
    pages: np.ndarray,
    some: np.ndarray,
    kind: int,
    near: bool,
    salted: bool,
) -> pa.Table:
    """The `tenant_set` of some rows, a row for each content and member."""
    found = find_sets(content[some], member[some], pages[some])
    n = len(found)
    of_set, tenant, sums, contents = found.columns
    columns = [of_set, tenant, sums, contents, arrow(np.full(n, kind, np.int8))]
    columns += [pa.array(np.full(n, is_so)) for is_so in (near, salted)]
    return pa.Table.from_arrays(columns, schema=TENANT_SET.schema)


def _numbered(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables `tenant_set` end to end, their sets numbered on."""
    numbers, base = [], 0
    for table in tables:
        number = joined([table], "set")
        numbers.append(number + base)
        base += int(number[-1]) + 1 if len(number) else 0
    whole = pa.concat_tables(tables).combine_chunks()
    return whole.set_column(0, TENANT_SET.schema.field("set"), arrow(np.concatenate(numbers)))


def tenant_groups(tenants: int) -> list[int]:
    """The first tenant of each group whose pairs are counted by one task, and the number of tenants.

    A function of their number alone: so many that what each shares with all others takes some 30 MiB.
    """
    return [*range(0, tenants, max(1, _GROUP_CELLS // max(1, tenants))), tenants]


@dataclass(slots=True)
class _Members:
    """Members of sets of one weight: tenant, kind, contents and pages of each, and where its set ends."""

    tenant: np.ndarray
    kind: np.ndarray
    contents: np.ndarray
    pages: np.ndarray
    end: np.ndarray


_CONTENTS, _PAGES, _OTHER_PAGES, _NEAR, _RARE, _RARE_PAGES, _RARE_OTHER_PAGES, _SALT, _SALT_OTHER = range(9)


class TenantPairs:
    """What tenants [first, last) share with each tenant after them. salted: whether there is more than one salt."""

    def __init__(self, first: int, last: int, tenants: int, salted: bool) -> None:
        self._first, self._last, self._tenants, self._salted = first, last, tenants, salted
        self._sums = np.zeros((9, last - first, tenants, len(KINDS)), np.int64)

    def add(self, sets: pa.Table) -> None:
        """Add a table `tenant_set`."""
        if len(sets) == 0:
            return
        number, tenant, pages, contents, kind, near, salted = (joined([sets], name) for name in TENANT_SET.schema.names)
        starts = group_starts(number)
        length = np.diff(starts, append=len(number))
        size = np.repeat(length, length)
        end = np.repeat(starts + length, length)
        of = _Members(tenant.astype(np.int64), kind.astype(np.int64), contents, pages, end)
        whole = ~salted
        self._add(of, whole, (_CONTENTS, _PAGES, _OTHER_PAGES))
        self._add(of, whole & near, (_NEAR, None, None))
        self._add(of, whole & (size == 2), (_RARE, _RARE_PAGES, _RARE_OTHER_PAGES))
        self._add(of, salted if self._salted else whole, (None, _SALT, _SALT_OTHER))

    def _add(self, of: _Members, some: np.ndarray, into: Sequence[int | None]) -> None:
        """Add contents, pages and the other's pages of each two members of some sets to these sums."""
        mine = np.flatnonzero(some & (of.tenant >= self._first) & (of.tenant < self._last))
        count = of.end[mine] - mine - 1  # members after it in its set
        cuts = np.searchsorted(np.cumsum(count), np.arange(_PAIRS_AT_ONCE, int(count.sum()), _PAIRS_AT_ONCE))
        for rows, many in zip(np.split(mine, cuts), np.split(count, cuts), strict=True):
            other, one = spread(rows + 1, many), np.repeat(rows, many)
            at = ((of.tenant[one] - self._first) * self._tenants + of.tenant[other]) * len(KINDS) + of.kind[one]
            for number, weight in zip(into, (of.contents[one], of.pages[one], of.pages[other]), strict=True):
                if number is not None:
                    np.add.at(self._sums[number].reshape(-1), at, weight)

    def table(self, names: Sequence[str], entropy: np.ndarray) -> pa.Table:
        """The rows of table `exposure` of these tenants.

        names: of all tenants, by number; entropy: int64[n, 6], of pairs that have rare contents of kind other which
        were looked at: the two tenants, then how many are low, middle, high, unknown.
        """
        at = np.flatnonzero(self._sums[_CONTENTS])
        pair, kind = np.divmod(at, len(KINDS))
        tenant, other = np.divmod(pair, self._tenants)
        tenant += self._first
        sums = self._sums.reshape(9, -1)[:, at]
        looks = np.zeros((len(at), 4), np.int64)
        looks[:, 0] = np.where(kind == _OTHER, 0, sums[_RARE])  # one word of eight bytes: 3 bits a byte at the most
        mine = entropy[(entropy[:, 0] >= self._first) & (entropy[:, 0] < self._last)]
        place = ((mine[:, 0] - self._first) * self._tenants + mine[:, 1]) * len(KINDS) + _OTHER
        looks[np.searchsorted(at, place)] = mine[:, 2:]
        columns = [
            strings(names, tenant),
            strings(names, other),
            strings(KINDS, kind),
            *(arrow(np.ascontiguousarray(column)) for column in sums[: _RARE_OTHER_PAGES + 1]),
            arrow(looks.sum(axis=1)),
            *(arrow(np.ascontiguousarray(column)) for column in looks.T),
            *(arrow(np.ascontiguousarray(column)) for column in sums[_SALT:]),
        ]
        return pa.Table.from_arrays(columns, schema=EXPOSURE.schema)
