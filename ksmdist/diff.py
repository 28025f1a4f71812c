"""What changed from one run to another: contents of their stable trees, and images. Rows in, rows out.

Both trees are sorted by digest, so they are read side by side: memory does not grow with them. A
content with one copy is in no stable tree, so that null stands for one copy or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ksmdist.columns import values
from ksmdist.errors import IdentityError, RunDirectoryError
from ksmdist.tables import DIFF_CONTENTS, DIFF_IMAGES, SPECTRUM, STABLE_TREE

__all__ = ["CHANGES", "TREE_COLUMNS", "Difference", "Sums", "check", "diff_contents", "diff_images"]

CHANGES: tuple[str, ...] = ("came", "went", "gained", "lost", "moved", "alike")
"""What can become of a content; those alike are counted and have no row."""

TREE_COLUMNS: tuple[str, ...] = (
    "digest",
    "kind",
    "fill_word",
    "copies",
    "images",
    "first_image",
    "first_address",
)
"""Columns of table stable_tree that diff_contents() takes, in this order."""

_IMAGE_PAGES = tuple(name.removesuffix("_a") for name in DIFF_IMAGES.schema.names if name.endswith("_a"))


@dataclass(frozen=True, slots=True)
class Sums:
    """Contents, and their copies in run A and in run B; of one copy or none: 0."""

    contents: int = 0
    copies_a: int = 0
    copies_b: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.contents + other.contents, self.copies_a + other.copies_a, self.copies_b + other.copies_b)

    @property
    def gained(self) -> int:
        """Copies more in B than in A."""
        return self.copies_b - self.copies_a


@dataclass(slots=True)
class Difference:
    """What diff_contents() found, added up as it goes.

    sums: of each of CHANGES; largest: rows of table diff_contents with most copies gained or lost, most first
    """

    keep: int = 10
    sums: dict[str, Sums] = field(default_factory=lambda: dict.fromkeys(CHANGES, Sums()))
    largest: pa.Table = field(default_factory=DIFF_CONTENTS.schema.empty_table)

    def add(self, rows: pa.Table, alike: Sums) -> pa.Table:
        """Add what a stretch of digests gave; returns its rows."""
        change = np.asarray(rows.column("change").to_pylist(), dtype=object)
        copies_a, copies_b = (_filled(rows.column(name)) for name in ("copies_a", "copies_b"))
        for name in CHANGES[:-1]:
            of = change == name
            self.sums[name] += Sums(int(of.sum()), int(copies_a[of].sum()), int(copies_b[of].sum()))
        self.sums["alike"] += alike
        both = pa.concat_tables([self.largest, rows])
        moved = np.abs(_filled(both.column("copies_b")) - _filled(both.column("copies_a")))
        # Rows come by digest and those kept came before them: a stable sort leaves the lower digest first.
        order = np.argsort(-moved, kind="stable")[: self.keep]
        self.largest = both.take(pa.array(order[moved[order] > 0]))
        return rows


def diff_contents(a: Iterable[pa.RecordBatch], b: Iterable[pa.RecordBatch], found: Difference) -> Iterator[pa.Table]:
    """The contents that are not alike in two stable trees, as pieces of table `diff_contents`; adds to `found`.

    a, b: TREE_COLUMNS of table stable_tree in batches of any length, from the first to the last. Raises
    RunDirectoryError where digests do not ascend.
    """
    one, two = _Side(a), _Side(b)
    while one.fill() | two.fill():  # both, not the first that has rows
        ends = [side.last for side in (one, two) if not side.ended]
        end = min(ends) if ends else None
        yield found.add(*_joined(one.take(end), two.take(end)))


class _Side:
    """One of two trees: rows that were read and not yet taken, never more than a batch."""

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self._batches = iter(batches)
        self._rows = pa.schema([STABLE_TREE.schema.field(name) for name in TREE_COLUMNS]).empty_table()
        self._before: bytes | None = None
        self.ended = False

    def fill(self) -> bool:
        """Read on where no row is left; False at the end."""
        while not len(self._rows) and not self.ended:
            batch = next(self._batches, None)
            if batch is None:
                self.ended = True
            else:
                self._rows = pa.Table.from_batches([batch])
                self._check(_digests(self._rows))
        return len(self._rows) > 0

    def _check(self, digests: np.ndarray) -> None:
        """Raise RunDirectoryError unless digests ascend, from the batch before on."""
        if not len(digests):
            return
        first = _bytes(self._rows, 0)
        before, self._before = self._before, _bytes(self._rows, -1)
        if not (digests[1:] > digests[:-1]).all() or (before is not None and first <= before):
            raise RunDirectoryError(
                f"has digests that do not ascend, from {first.hex()} on", STABLE_TREE.file, "run the images again"
            )

    @property
    def last(self) -> bytes:
        """The last digest that was read and not taken."""
        return _bytes(self._rows, -1)

    def take(self, end: bytes | None) -> pa.Table:
        """The rows up to the digest `end`, itself too; all with None."""
        count = len(self._rows)
        if end is not None and count:
            count = int(np.searchsorted(_digests(self._rows), np.array([end], "S16"), side="right")[0])
        taken, self._rows = self._rows.slice(0, count), self._rows.slice(count)
        return taken


def _bytes(rows: pa.Table, at: int) -> bytes:
    return bytes(rows.column("digest")[at].as_py())


def _digests(rows: pa.Table) -> np.ndarray:
    """S16[n]: numpy orders byte strings of one length as memcmp does; a NUL at the end is the lowest byte."""
    column = rows.column("digest").combine_chunks()
    return np.ascontiguousarray(values(column)).view("S16").reshape(-1) if len(column) else np.zeros(0, "S16")


def _filled(column: pa.ChunkedArray) -> np.ndarray:
    """int64[n] of a column, 0 for null."""
    return np.asarray(pc.fill_null(column, 0).to_numpy(), np.int64)


def _joined(one: pa.Table, two: pa.Table) -> tuple[pa.Table, Sums]:
    """Rows of one stretch of digests in both trees, side by side; those alike are summed up."""
    a, b = _digests(one), _digests(two)
    at = np.searchsorted(b, a)
    shared = np.zeros(len(a), bool)
    inside = at < len(b)
    shared[inside] = b[at[inside]] == a[inside]
    alone = np.ones(len(b), bool)
    alone[at[shared]] = False
    of_a = np.concatenate((np.arange(len(a)), np.full(int(alone.sum()), -1)))
    of_b = np.concatenate((np.where(shared, at, -1), np.flatnonzero(alone)))
    order = np.argsort(np.concatenate((a, b[alone])), kind="stable")
    of_a, of_b = of_a[order], of_b[order]
    left = one.take(pa.array(of_a, mask=of_a < 0))
    right = two.take(pa.array(of_b, mask=of_b < 0))

    both = (of_a >= 0) & (of_b >= 0)
    copies_a, copies_b = _filled(left.column("copies")), _filled(right.column("copies"))
    same = both & (copies_a == copies_b)
    for name in ("images", "first_image", "first_address"):
        equal = pc.fill_null(pc.equal(left.column(name), right.column(name)), False)
        same &= np.asarray(equal.to_numpy(), bool)
    change = np.select(
        [of_a < 0, of_b < 0, copies_b > copies_a, copies_b < copies_a], ["came", "went", "gained", "lost"], "moved"
    )
    columns = {
        "change": pa.array(change, pa.string()),
        "copies_a": left.column("copies"),
        "copies_b": right.column("copies"),
        "images_a": left.column("images").cast(pa.int64()),
        "images_b": right.column("images").cast(pa.int64()),
    }
    for name in ("digest", "kind", "fill_word", "first_image", "first_address"):
        # As it is in B; in A where it went. A fill word is null for both where there is none.
        columns[name] = pc.if_else(pa.array(of_b >= 0), right.column(name), left.column(name))
    rows = pa.Table.from_arrays([columns[name] for name in DIFF_CONTENTS.schema.names], schema=DIFF_CONTENTS.schema)
    alike = Sums(int(same.sum()), int(copies_a[same].sum()), int(copies_b[same].sum()))
    return rows.filter(pa.array(~same)), alike


def diff_images(a: pa.Table, b: pa.Table) -> pa.Table:
    """Table `diff_images` of two tables `images`."""
    sides = [{row["image_id"]: row for row in table.to_pylist()} for table in (a, b)]
    rows = []
    for image_id in sorted(sides[0] | sides[1]):
        one, two = (side.get(image_id) for side in sides)
        row: dict[str, object] = {"image_id": image_id}
        for name in _IMAGE_PAGES:
            row |= {f"{name}_a": None if one is None else one[name], f"{name}_b": None if two is None else two[name]}
        if one is None or two is None:
            row["change"] = "came" if one is None else "went"
        else:
            row["change"] = "same" if all(one[name] == two[name] for name in _IMAGE_PAGES) else "changed"
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=DIFF_IMAGES.schema)


def check(found: Difference, spectrum_a: pa.Table, spectrum_b: pa.Table) -> None:
    """Check that the copies of all changes add up to both tables `spectrum`; raises IdentityError."""
    total = Sums()
    for sums in found.sums.values():
        total += sums
    for run, spectrum, left in (("A", spectrum_a, total.copies_a), ("B", spectrum_b, total.copies_b)):
        right = sum(
            row["copies"] * row["contents"]
            for row in spectrum.to_pylist()
            if row["numa_node"] is None and row["copies"] > 1
        )
        if left != right:
            raise IdentityError(
                f"{left} is not {right}",
                f"copies over all changes = copies in table {SPECTRUM.name} of run {run}",
                "the run directory is damaged, or this is a bug in ksmdist: please report it",
            )
