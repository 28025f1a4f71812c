"""What changed between passes of an image, by the kernel's own test: a page's checksum is another.

mm/ksm.c, cmp_and_merge_page: a page whose checksum is not the one of the visit before enters no tree; a page
visited for the first time has the checksum 0 (ksm_rmap_item.oldchecksum).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ksmdist.columns import arrow, joined
from ksmdist.tables import CHECKSUMS, PASSES

__all__ = ["Compared", "Pass", "checksums_table", "compare", "passes_table"]


@dataclass(slots=True)
class Compared:
    """Pages of an image compared with the pass before, added up: int64 each.

    pages: with bytes of their own; matched: of them, those that the pass before has; changed: of the matched, those
    whose checksum differs; stable: those with the same checksum in every pass so far; lost: that could not be read
    """

    pages: int = 0
    matched: int = 0
    changed: int = 0
    stable: int = 0
    lost: int = 0

    def add(self, other: Compared) -> None:
        """Add what another task found."""
        self.pages += other.pages
        self.matched += other.matched
        self.changed += other.changed
        self.stable += other.stable
        self.lost += other.lost


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass of an image: its number, what was found of it, and pages of the pass before; None for the first."""

    image: int
    number: int
    compared: Compared
    before: int | None


def compare(
    address: np.ndarray, checksum: np.ndarray, has_bytes: np.ndarray, earlier: pa.Table | None, passes: int
) -> tuple[np.ndarray, np.ndarray, Compared]:
    """Pages of an image, in order of address -> bool[n], which are volatile; int32[n], their age; and what to add up.

    address: uint64[n]; checksum: uint32[n], of those that has_bytes; earlier: rows of `checksums` of the pass before
    that have these addresses, by address, None where there is no pass before; passes: how many were before.
    """
    age = np.zeros(len(address), np.int32)
    pages = int(has_bytes.sum())
    if earlier is None:
        return np.zeros(len(address), bool), age, Compared(pages=pages, stable=pages)
    known, sums, ages = (joined([earlier], name) for name in ("address", "checksum", "age"))
    at = np.searchsorted(known, address)
    matched = has_bytes & (at < len(known))
    at = np.minimum(at, max(0, len(known) - 1))
    before = np.zeros(len(address), np.uint32)
    if len(known):
        matched &= known[at] == address
        before[matched] = sums[at[matched]]
        same = matched & (before == checksum)
        age[same] = ages[at[same]] + 1
    changed = has_bytes & (before != checksum)
    found = Compared(
        pages, int(matched.sum()), int((changed & matched).sum()), int((has_bytes & (age == passes)).sum())
    )
    return changed, age, found


def checksums_table(
    image: int, address: np.ndarray, checksum: np.ndarray, age: np.ndarray, has_bytes: np.ndarray
) -> pa.Table:
    """Rows of table `checksums` of pages of an image."""
    count = int(has_bytes.sum())
    columns = [np.full(count, image, np.int32), *(column[has_bytes] for column in (address, checksum, age))]
    return pa.Table.from_arrays([arrow(column) for column in columns], schema=CHECKSUMS.schema)


def passes_table(passes: Sequence[Pass], earlier: Sequence[Mapping[str, Any]], image_ids: Sequence[str]) -> pa.Table:
    """The `passes` table. earlier: rows of passes that another run has counted, with this run's numbers of images."""
    rows = [dict(row) for row in earlier]
    for one in passes:
        compared = one.compared
        rows.append(
            {
                "image": one.image,
                "image_id": image_ids[one.image],
                "pass": one.number,
                "pages": compared.pages,
                "changed": None if one.before is None else compared.changed,
                "appeared": None if one.before is None else compared.pages - compared.matched,
                "gone": None if one.before is None else one.before - compared.matched,
                "stable": compared.stable,
            }
        )
    rows.sort(key=lambda row: (row["image"], row["pass"]))
    return pa.Table.from_pylist(rows, schema=PASSES.schema)
