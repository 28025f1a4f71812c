"""The kernel's counters and ours, from the sharing spectrum alone.

Rules: mm/ksm.c of Linux 6.18, pages static and not fork-shared, read after a whole scan with
nothing skipped. A content with N copies, M = max_page_sharing, q = N div M, r = N mod M, has
q nodes, one more if r >= 2, and a lone page if r = 1 (stable_tree_search: a full node takes no
more; two pages that find it full make the next one). See docs/design.md, counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from ksmdist.errors import IdentityError
from ksmdist.settings import Settings
from ksmdist.tables import CLASSES, COUNTERS

__all__ = ["RMAP_ITEM_BYTES", "Counters", "Identity", "check", "contents", "counters_table", "ksm_counters"]

RMAP_ITEM_BYTES = 64
"""sizeof(struct ksm_rmap_item) on 64-bit, from /sys/kernel/slab/ksm_rmap_item/object_size, 6.18."""


@dataclass(frozen=True, slots=True)
class Counters:
    """The kernel's counters once converged, in pages unless tables.COUNTERS says otherwise, and ours."""

    pages_shared: int
    pages_sharing: int
    pages_unshared: int
    pages_volatile: int
    ksm_zero_pages: int
    stable_node_chains: int
    stable_node_dups: int
    rmap_items: int
    general_profit: int
    zero_merges: int
    content_merges: int
    saved_bytes: int


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


def _columns(spectrum: pa.Table, by_node: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(is zero, copies, contents) of the rows for single nodes, or of those for all nodes together."""
    node_known = np.array([node is not None for node in spectrum.column("numa_node").to_pylist()], bool)
    chosen = node_known if by_node else ~node_known
    kind = np.array(spectrum.column("kind").to_pylist(), dtype=object)
    copies = spectrum.column("copies").to_numpy()
    contents = spectrum.column("contents").to_numpy()
    return (kind == "zero")[chosen].astype(bool), copies[chosen], contents[chosen]


def ksm_counters(spectrum: pa.Table, settings: Settings, volatile: int = 0) -> Counters:
    """A whole `spectrum` table -> the counters for these settings.

    volatile: pages that change between scans; they keep an rmap item and are in no tree.
    """
    zero, copies, contents = _columns(spectrum, by_node=not settings.merge_across_nodes)
    ksm_zero_pages = 0
    if settings.use_zero_pages:
        ksm_zero_pages = int((copies * contents)[zero].sum())
        zero, copies, contents = zero[~zero], copies[~zero], contents[~zero]
    full, rest = np.divmod(copies, settings.max_page_sharing)
    nodes = full + (rest >= 2)
    merged = copies - (rest == 1)
    shared = int((nodes * contents).sum())
    merged_pages = int((merged * contents).sum())
    lone = int(contents[rest == 1].sum())
    chained = nodes >= 2
    sharing = merged_pages - shared
    rmap_items = merged_pages + lone + volatile
    zero_merges = int((merged * contents)[zero].sum()) + ksm_zero_pages
    return Counters(
        pages_shared=shared,
        pages_sharing=sharing,
        pages_unshared=lone,
        pages_volatile=volatile,
        ksm_zero_pages=ksm_zero_pages,
        stable_node_chains=int(contents[chained].sum()),
        stable_node_dups=int((nodes * contents)[chained].sum()),
        rmap_items=rmap_items,
        general_profit=(sharing + ksm_zero_pages) * settings.page_size - rmap_items * RMAP_ITEM_BYTES,
        zero_merges=zero_merges,
        content_merges=merged_pages + ksm_zero_pages - zero_merges,
        saved_bytes=(sharing + ksm_zero_pages) * settings.page_size,
    )


def contents(spectrum: pa.Table) -> dict[str, int]:
    """Non-zero contents of eligible pages: how many, how many with two copies or more, most copies."""
    zero, copies, count = _columns(spectrum, by_node=False)
    copies, count = copies[~zero], count[~zero]
    return {
        "distinct": int(count.sum()),
        "shared": int(count[copies >= 2].sum()),
        "max_copies": int(copies.max()) if len(copies) else 0,
    }


def counters_table(counters: Counters, settings: Settings) -> pa.Table:
    """The `counters` table: one row."""
    knobs = {name: getattr(settings, name) for name in ("page_size", "use_zero_pages", "max_page_sharing")}
    row = knobs | {"merge_across_nodes": settings.merge_across_nodes} | asdict(counters)
    return pa.Table.from_pylist([row], schema=COUNTERS.schema)


def check(
    images: pa.Table,
    spectrum: pa.Table,
    stable_copies: int,
    planned_pages: int,
    lost_pages: int,
    counters: Counters,
    settings: Settings,
) -> list[Identity]:
    """The identities of docs/design.md, from independent sums; raises IdentityError if one fails.

    stable_copies: sum of `copies` over all stable_tree files; planned_pages: pages in all shards;
    lost_pages: those of them that could not be read.
    """

    def total(column: str) -> int:
        return int(np.sum(images.column(column).to_numpy()))

    classes = {name: total(name) for name in CLASSES}
    zero, copies, count = _columns(spectrum, by_node=False)
    lone_zero = int(count[zero & (copies == 1)].sum())
    present = sum(classes.values())
    outside = sum(classes[name] for name in ("ineligible", "zero_mapped_fault", "volatile", "unique")) + lone_zero
    merged = counters.zero_merges + counters.content_merges
    kept = counters.pages_shared
    candidates = int((copies * count).sum())
    identities = [
        Identity("pages = sum of classes", total("total"), present),
        Identity("pages in shards = pages classified + pages unreadable", planned_pages, present + lost_pages),
        Identity("pages = copies in the stable tree + classes outside it", present, stable_copies + outside),
        Identity(
            "kinds of eligible pages = copies in the spectrum",
            classes["zero"] + classes["zero_mapped_ksm"] + classes["duplicate"] + classes["unique"],
            candidates,
        ),
        Identity(
            "merged = zero merges + content merges",
            counters.pages_shared + counters.pages_sharing + counters.ksm_zero_pages,
            merged,
        ),
        Identity("saved = merged - frames kept", counters.saved_bytes, (merged - kept) * settings.page_size),
        Identity(
            "general_profit as the kernel computes it",
            counters.general_profit,
            (counters.pages_sharing + counters.ksm_zero_pages) * settings.page_size
            - (counters.pages_shared + counters.pages_sharing + counters.pages_unshared + counters.pages_volatile)
            * RMAP_ITEM_BYTES,
        ),
    ]
    _raise_unless_all_hold(identities)
    return identities


def _raise_unless_all_hold(identities: Sequence[Identity]) -> None:
    for identity in identities:
        if not identity.holds:
            raise IdentityError(
                f"{identity.left} is not {identity.right}", identity.name, "this is a bug in ksmdist: please report it"
            )
