"""Sums that must come out twice the same, checked in every run and kept in run.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ksmdist.counters import RMAP_ITEM_BYTES, Prediction
from ksmdist.errors import IdentityError
from ksmdist.mappings import PATTERN_COLUMNS
from ksmdist.schema import Table
from ksmdist.settings import Settings
from ksmdist.sharing import Sharing
from ksmdist.tables import CLASSES, CUMULATIVE, HUGE, KINDS, POLICY, SPECTRUM_BUCKETS
from ksmdist.tree import ALL_NODES

__all__ = ["Identity", "check"]


@dataclass(frozen=True, slots=True)
class Identity:
    """A sum that must come out twice the same."""

    name: str
    left: int
    right: int

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.left == self.right


def check(
    sharing: Sharing,
    prediction: Prediction,
    settings: Settings,
    stable_copies: int,
    planned_pages: int,
    lost_pages: int,
    tables: Mapping[str, pa.Table],
) -> list[Identity]:
    """The identities of docs/design.md, from independent sums; raises IdentityError if one fails.

    stable_copies: sum of `copies` over all stable_tree files; planned_pages: pages in all shards;
    lost_pages: those of them that could not be read; tables: policy, spectrum_buckets, cumulative and huge, by name.
    """
    classes = {name: int(sharing.of_images(name).sum()) for name in CLASSES}
    spectrum = sharing.spectrum[sharing.spectrum[:, 0] == ALL_NODES]
    kind, copies, count = spectrum[:, 1], spectrum[:, 2], spectrum[:, 4]
    lone_zero = int(count[(kind == KINDS.index("zero")) & (copies == 1)].sum())
    present = sum(classes.values())
    outside = sum(classes[name] for name in ("ineligible", "zero_mapped_fault", "volatile", "unique")) + lone_zero
    candidates = sum(classes[name] for name in ("zero", "zero_mapped_ksm", "duplicate", "unique"))
    by_image = sharing.by_image(True)
    in_patterns = sum(
        pattern.contents * int(pattern.rows[:, PATTERN_COLUMNS.index("pages")].sum()) for pattern in sharing.patterns
    )
    counters, size = prediction.counters, settings.page_size
    merged = counters.zero_merges + counters.content_merges
    process_profit = (prediction.merging_pages + prediction.zero_pages) * size - prediction.rmap_items * RMAP_ITEM_BYTES
    items = counters.pages_shared + counters.pages_sharing + counters.pages_unshared + counters.pages_volatile
    identities = [
        Identity("pages = sum of classes", int(sharing.of_images("total").sum()), present),
        Identity("pages in shards = pages classified + pages unreadable", planned_pages, present + lost_pages),
        Identity("pages = copies in the stable tree + classes outside it", present, stable_copies + outside),
        Identity("candidates by class = copies in the spectrum", candidates, int((copies * count).sum())),
        Identity(
            "candidates by class = copies by image + copies in patterns",
            candidates,
            int((by_image[:, 4] * by_image[:, 6]).sum()) + in_patterns,
        ),
        Identity(
            "merged = zero merges + content merges",
            counters.pages_shared + counters.pages_sharing + counters.ksm_zero_pages,
            merged,
        ),
        Identity("saved = merged - frames kept", counters.saved_bytes, (merged - counters.pages_shared) * size),
        Identity("rmap items = pages in both trees + volatile pages", counters.rmap_items, items),
        Identity(
            "general_profit as the kernel computes it",
            counters.general_profit,
            (counters.pages_sharing + counters.ksm_zero_pages) * size - items * RMAP_ITEM_BYTES,
        ),
        Identity("rmap items = sum over processes", counters.rmap_items, int(prediction.rmap_items.sum())),
        Identity(
            "pages merged = sum of ksm_merging_pages over processes",
            counters.pages_shared + counters.pages_sharing,
            int(prediction.merging_pages.sum()),
        ),
        Identity(
            "general_profit + a page for each KSM page = sum of ksm_process_profit over processes",
            counters.general_profit + counters.pages_shared * size,
            int(process_profit.sum()),
        ),
    ]
    identities += _of_tables(tables, candidates, int(count.sum()), counters.saved_bytes)
    if settings.full_scans is None:
        left = int(prediction.left[:, 3].sum()) + classes["volatile"]
        identities.append(
            Identity("pages not merged = sum of reasons", counters.pages_unshared + counters.pages_volatile, left)
        )
    _raise_unless_all_hold(identities)
    return identities


def _of_tables(tables: Mapping[str, pa.Table], candidates: int, contents: int, saved_bytes: int) -> list[Identity]:
    """Those of what analysts open. candidates, contents: pages and contents of the spectrum."""

    def column(table: Table, name: str) -> np.ndarray:
        return np.asarray(tables[table.name].column(name).to_numpy())

    last = slice(-1, None)
    return [
        Identity("saved by policy all = saved", int(column(POLICY, "saved_bytes")[last].sum()), saved_bytes),
        Identity("pages in buckets = candidates", int(column(SPECTRUM_BUCKETS, "pages").sum()), candidates),
        Identity("contents in buckets = contents", int(column(SPECTRUM_BUCKETS, "contents").sum()), contents),
        Identity("pages added image by image = candidates", int(column(CUMULATIVE, "pages").sum()), candidates),
        Identity("contents added image by image = contents", int(column(CUMULATIVE, "contents_added").sum()), contents),
        Identity("pages in huge frames = candidates", int(column(HUGE, "pages").sum()), candidates),
    ]


def _raise_unless_all_hold(identities: Sequence[Identity]) -> None:
    for identity in identities:
        if not identity.holds:
            raise IdentityError(
                f"{identity.left} is not {identity.right}", identity.name, "this is a bug in ksmdist: please report it"
            )
