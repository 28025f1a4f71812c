"""What other settings and other ways to account for zero pages would show: arithmetic on what a scan found.

The five accountings are those of the kernel list's debate on zero pages that KSM places, 2022 and
2023: mm/ksm.c before and after e2942062e01d ("ksm: count all zero pages placed by KSM", Linux 6.6),
the series up to v6 (zero_pages_sharing, kept in rmap items), and the two proposals of its review.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from ksmdist.counters import RMAP_ITEM_BYTES, Prediction, predict
from ksmdist.settings import Settings
from ksmdist.sharing import Sharing
from ksmdist.tables import WHATIF

__all__ = ["MAX_PAGE_SHARINGS", "accounting_of", "best", "grid", "present", "profit"]

MAX_PAGE_SHARINGS: tuple[int | None, ...] = (2, 16, 64, 256, 1024, 16384, None)
"""Values of max_page_sharing in the grid; None: unlimited. The run's own comes with them."""


def accounting_of(settings: Settings) -> str:
    """How the kernel of these settings accounts for zero pages: one of tables.ACCOUNTINGS."""
    if not settings.use_zero_pages:
        return "stable_tree"
    return "untracked" if settings.kernel == "6.1" else "pte_dirty"


def grid(sharing: Sharing, settings: Settings) -> pa.Table:
    """The `whatif` table: every combination of knobs and accounting, converged, for this run's images."""
    settings = replace(settings, full_scans=None, smart_scan=False)
    limits = sorted({*MAX_PAGE_SHARINGS, settings.max_page_sharing}, key=lambda limit: (limit is None, limit or 0))
    fault = int(sharing.of_images("zero_mapped_fault").sum())
    rows = []
    for use_zero_pages in (False, True):
        names = ["all_zero_mappings", "pte_dirty", "rmap_tracked", "untracked"] if use_zero_pages else ["stable_tree"]
        predicted = {}
        for limit in limits:
            knobs = replace(settings, use_zero_pages=use_zero_pages, max_page_sharing=limit, merge_across_nodes=True)
            apart = replace(knobs, merge_across_nodes=False)
            predicted[knobs] = predict(sharing, knobs)
            predicted[apart] = predicted[knobs] if sharing.one_node else predict(sharing, apart)
        for name in names:
            for knobs, prediction in predicted.items():
                row = _account(name, prediction, knobs, fault)
                rows.append(row | {"present": name == accounting_of(settings) and knobs == settings})
    return pa.Table.from_pylist(rows, schema=WHATIF.schema)


def _account(accounting: str, prediction: Prediction, settings: Settings, fault: int) -> dict[str, object]:
    """A row of the grid. fault: pages that read faults mapped to the zero page, in mappings KSM may merge."""
    counters, size = prediction.counters, settings.page_size
    placed = counters.ksm_zero_pages
    tracked = placed if accounting == "rmap_tracked" else 0  # the series kept the rmap item of each
    items = counters.rmap_items + tracked
    counted = {"stable_tree": 0, "untracked": None, "all_zero_mappings": placed + fault}.get(accounting, placed)
    mapped = {"stable_tree": 0, "untracked": 0, "all_zero_mappings": placed + fault}.get(accounting, placed)
    physical = counters.physical_profit
    return {
        "accounting": accounting,
        "use_zero_pages": settings.use_zero_pages,
        "max_page_sharing": settings.max_page_sharing,
        "merge_across_nodes": settings.merge_across_nodes,
        "pages_shared": counters.pages_shared,
        "pages_sharing": counters.pages_sharing,
        "pages_unshared": counters.pages_unshared,
        "pages_volatile": counters.pages_volatile + tracked,
        "stable_node_chains": counters.stable_node_chains,
        "stable_node_dups": counters.stable_node_dups,
        "rmap_items": items,
        "rmap_item_bytes": items * RMAP_ITEM_BYTES,
        "zero_merges": counters.zero_merges,
        "content_merges": counters.content_merges,
        "zero_pages_counted": counted,
        "general_profit": (counters.pages_sharing + (counted or 0)) * size - items * RMAP_ITEM_BYTES,
        "frames_kept": counters.pages_shared,
        "saved_bytes": counters.saved_bytes,
        "profit": counters.saved_bytes - items * RMAP_ITEM_BYTES,
        "physical_profit": None if physical is None else physical - tracked * RMAP_ITEM_BYTES,
        "zero_pages_given_back": counters.zero_merges if accounting == "stable_tree" else mapped,
        "unmerge_frames": counters.pages_sharing + mapped,
    }


Row = Mapping[str, Any]
_KNOBS = ("use_zero_pages", "max_page_sharing", "merge_across_nodes")


def present(rows: Sequence[Row]) -> Row:
    """The row of the run's own settings."""
    return next(row for row in rows if row["present"])


def best(rows: Sequence[Row], settings: Settings) -> Row:
    """The row of most profit among those that the kernel of these settings can have.

    Of equals the nearest to the run's own. Profit is physical where frames are known.
    """
    possible = [
        row
        for row in rows
        if row["accounting"] == accounting_of(replace(settings, use_zero_pages=row["use_zero_pages"]))
    ]
    now = present(rows)
    return max(possible, key=lambda row: (profit(row), sum(row[knob] == now[knob] for knob in _KNOBS)))


def profit(row: Row) -> int:
    """What a row really wins: in frames where they are known, in merged pages where not."""
    value = row["profit"] if row["physical_profit"] is None else row["physical_profit"]
    return int(value)
