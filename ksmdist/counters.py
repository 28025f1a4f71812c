"""The kernel's counters and ours, for any settings, from what a scan found: no page is touched again.

Rules: mm/ksm.c of Linux 6.18; docs/ksm.md has them in words, with what differs before. A content
with N copies in frames of their own, M = max_page_sharing, q = N div M, r = N mod M, has q nodes,
one more if r >= 2, and a lone page if r = 1 (stable_tree_search: a full node takes no more; two
pages that find it full make the next one); the lone page is the last in scan order. What fork
shares, and the zero content, is followed by ksmd.settle().
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa

from ksmdist.groups import count_rows
from ksmdist.ksmd import OWN_FRAMES, Settled, Stretch, is_processed, processed_scans, settle
from ksmdist.settings import Settings
from ksmdist.sharing import Followed, Sharing
from ksmdist.tables import COUNTERS, KINDS, KSM_STAT
from ksmdist.tree import ALL_NODES

__all__ = [
    "LEFT",
    "RMAP_ITEM_BYTES",
    "Counters",
    "Prediction",
    "contents",
    "counters_table",
    "estimate",
    "exported",
    "ksm_stat_table",
    "predict",
    "summary",
]

RMAP_ITEM_BYTES = 64
"""sizeof(struct ksm_rmap_item) on 64-bit, from /sys/kernel/slab/ksm_rmap_item/object_size, 6.18."""
STABLE_NODE_BYTES = 64
"""sizeof(struct ksm_stable_node), likewise."""
MM_SLOT_BYTES = 48
"""sizeof(struct ksm_mm_slot), likewise."""

LEFT: tuple[str, ...] = ("unique", "full_chain", "fork_twin")
"""Why a candidate is not merged: no other has its content; its content's nodes are full and it alone is over; all
pages with its content are one frame already."""
_UNIQUE, _FULL_CHAIN, _FORK_TWIN = range(len(LEFT))

_ZERO = KINDS.index("zero")
_NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class Counters:
    """The kernel's counters, in pages unless tables.COUNTERS says otherwise, and ours.

    Those that the kernel of the settings does not have are there all the same: exported() hides them.
    """

    pages_shared: int
    pages_sharing: int
    pages_unshared: int
    pages_volatile: int
    pages_skipped: int
    pages_scanned: int | None
    ksm_zero_pages: int
    stable_node_chains: int
    stable_node_dups: int
    rmap_items: int
    general_profit: int
    zero_merges: int
    content_merges: int
    saved_bytes: int
    thp_zero_pages: int
    frames_saved: int | None
    physical_profit: int | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """Counters for some settings.

    rmap_items, zero_pages, merging_pages, nodes_within, thp_zero_pages: int64 by image, as in table ksm_stat
    splits_huge_pages: whether this kernel frees the zero pages of huge pages that it splits
    thp_kept:       zero pages of huge pages that stay whole all the same
    left:           int64[n, 4]: image, region or -1, reason (an index of LEFT), pages that are not merged
    scans:          full scans after which nothing changes, from the start
    candidates:     pages that each of the first scans visits
    nodes_bounds:   least and most pages_shared with the same pages merged, whatever came and went before
    """

    counters: Counters
    rmap_items: np.ndarray
    zero_pages: np.ndarray
    merging_pages: np.ndarray
    nodes_within: np.ndarray
    thp_zero_pages: np.ndarray
    thp_kept: tuple[Stretch, ...]
    splits_huge_pages: bool
    left: np.ndarray
    scans: int
    candidates: int
    nodes_bounds: tuple[int, int]


@dataclass(slots=True)
class _Tally:
    """Sums over contents, filled in by parts. Arrays are by image."""

    images: int
    nodes: int = 0
    merged: int = 0
    merged_zero: int = 0
    unshared: int = 0
    volatile: int = 0
    skipped: int = 0
    zero: int = 0
    chains: int = 0
    dups: int = 0
    frames: int = 0
    scans: int = 1
    least: int = 0
    merging: np.ndarray = field(init=False)
    within: np.ndarray = field(init=False)
    zero_pages: np.ndarray = field(init=False)
    dropped: np.ndarray = field(init=False)
    left: list[np.ndarray] = field(default_factory=list)
    kept: list[Stretch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.merging, self.within, self.zero_pages, self.dropped = (np.zeros(self.images, np.int64) for _ in range(4))


def predict(sharing: Sharing, settings: Settings) -> Prediction:
    """What these images show under these settings, system-wide and for each image."""
    images = len(sharing.images)
    volatile = sharing.of_images("volatile")
    candidates = sum(sharing.of_images(name) for name in ("zero", "zero_mapped_ksm", "duplicate", "unique"))
    assert isinstance(candidates, np.ndarray)
    tally = _Tally(images)
    _closed(sharing, settings, tally)
    for followed in sharing.followed if settings.merge_across_nodes else sharing.followed_by_node:
        _follow(followed, settings, tally)

    scans_done = settings.full_scans
    tally.volatile += int(volatile.sum())
    if scans_done is not None and settings.smart_scan:  # should_skip_rmap_item asks no checksum
        tally.skipped += int(volatile.sum()) * (scans_done - processed_scans(scans_done))
    zero_items = scans_done is not None and scans_done < 3  # the item of a page gone to the zero page goes a scan late
    gone = tally.dropped + (0 if zero_items else tally.zero_pages)
    rmap_items = candidates + volatile - gone
    items = int(rmap_items.sum())
    sharing_pages = tally.merged - tally.nodes
    total = int(candidates.sum()) + int(volatile.sum())
    scanned = None
    if scans_done is not None:
        visits = total * min(scans_done, 2) + max(0, scans_done - 2) * (total - int(tally.zero_pages.sum()))
        scanned = visits - tally.skipped - int(tally.dropped.sum()) * max(0, scans_done - 2)
    known = int(sharing.of_images("frames_known").sum()) == total - int(volatile.sum())
    frames_before = int((sharing.spectrum[:, 3] * sharing.spectrum[:, 4])[sharing.spectrum[:, 0] == ALL_NODES].sum())
    frames_saved = frames_before - tally.frames - tally.nodes if known else None
    physical = None
    if frames_saved is not None:
        registered = int(np.count_nonzero(candidates + volatile))
        kept = RMAP_ITEM_BYTES * items + STABLE_NODE_BYTES * (tally.nodes + tally.chains) + MM_SLOT_BYTES * registered
        physical = frames_saved * settings.page_size - kept
    saved = (sharing_pages + tally.zero) * settings.page_size
    counted = Counters(
        pages_shared=tally.nodes,
        pages_sharing=sharing_pages,
        pages_unshared=tally.unshared,
        pages_volatile=tally.volatile,
        pages_skipped=tally.skipped,
        pages_scanned=scanned,
        ksm_zero_pages=tally.zero,
        stable_node_chains=tally.chains,
        stable_node_dups=tally.dups,
        rmap_items=items,
        general_profit=saved - items * RMAP_ITEM_BYTES,
        zero_merges=tally.merged_zero + tally.zero,
        content_merges=tally.merged - tally.merged_zero,
        saved_bytes=saved,
        thp_zero_pages=int(tally.dropped.sum()),
        frames_saved=frames_saved,
        physical_profit=physical,
    )
    left = np.concatenate(tally.left) if tally.left else np.zeros((0, 4), np.int64)
    return Prediction(
        counters=counted,
        rmap_items=rmap_items,
        zero_pages=tally.zero_pages if tally.zero else np.zeros(images, np.int64),
        merging_pages=tally.merging,
        nodes_within=tally.within,
        thp_zero_pages=tally.dropped,
        thp_kept=tuple(tally.kept),
        splits_huge_pages=_frees_zero_pages(settings),
        left=left,
        scans=tally.scans,
        candidates=total,
        nodes_bounds=(tally.least, tally.merged),
    )


_CLOSED_ROWS = 1 << 17
"""Rows that are dealt with at a time: what they take stays in the processor's cache."""


def _closed(sharing: Sharing, settings: Settings, tally: _Tally) -> None:
    """Contents other than zero in frames of their own, by arithmetic."""
    table = sharing.by_image(settings.merge_across_nodes)
    left = []
    for at in range(0, max(1, len(table)), _CLOSED_ROWS):
        left += _closed_rows(table[at : at + _CLOSED_ROWS], settings, tally)
    if left:
        keys, pages = count_rows(list(np.concatenate(left)[:, :3].T), np.concatenate(left)[:, 3])
        tally.left.append(np.stack([*keys, pages], axis=1))


def _closed_rows(table: np.ndarray, settings: Settings, tally: _Tally) -> list[np.ndarray]:
    """Some rows of image_spectrum; returns what is left over, int64[n, 4]."""
    last = table[table[:, 3] + table[:, 4] == table[:, 2]]  # a row a content: of the image that has its last copy
    copies, contents = last[:, 2], last[:, 6]
    scans = settings.full_scans
    if scans == 1:  # the first visit records a checksum, no more
        tally.volatile += int((copies * contents).sum())
        tally.frames += int((copies * contents).sum())
        return []
    limit = settings.max_page_sharing or _NO_LIMIT
    full, rest = np.divmod(copies, limit)
    nodes = full + (rest >= 2)
    lone = int(contents[rest == 1].sum())
    chained = nodes >= 2
    tally.nodes += int((nodes * contents).sum())
    tally.merged += int(((copies - (rest == 1)) * contents).sum())
    tally.chains += int(contents[chained].sum())
    tally.dups += int((nodes * contents)[chained].sum())
    tally.least = tally.nodes
    tally.frames += lone
    tally.scans = 2 if len(copies) else tally.scans
    _wait(lone, settings, tally)

    image, copies, before, here, region, contents = table.T[1:]
    ends = before + here
    waits = (ends == copies) & (copies % limit == 1)
    merged = copies - (copies % limit == 1)
    count = -(-merged // limit)
    first = -(-before // limit)  # nodes are filled in scan order: node j has copies [j * M, (j + 1) * M)
    inside = np.where(ends >= merged, count, ends // limit) - first
    tally.merging += _by_image(image, (here - waits) * contents, tally.images)
    tally.within += _by_image(image, np.maximum(inside, 0) * contents, tally.images)
    image, region, copies, contents = (column[waits] for column in (image, region, copies, contents))
    reason = np.where(copies == 1, _UNIQUE, _FULL_CHAIN)
    keys, pages = count_rows([image, region, reason], contents)
    return [np.stack([*keys, pages], axis=1)]


def _wait(lone: int, settings: Settings, tally: _Tally) -> None:
    """Pages that found no partner: in the unstable tree in a scan that looks at them, in none in one that skips."""
    scans = settings.full_scans
    if scans is None or not settings.smart_scan:
        tally.unshared += lone
        return
    tally.skipped += lone * (scans - processed_scans(scans))
    if is_processed(scans):
        tally.unshared += lone
    else:
        tally.volatile += lone


def _follow(followed: Followed, settings: Settings, tally: _Tally) -> None:
    """Contents whose mappings are alike, by the kernel's procedure."""
    contents, kind, rows, scans = followed.contents, followed.kind, followed.whole, settings.full_scans
    if len(followed.stretches) < len(rows) and _frees_zero_pages(settings):
        rows = _unsplit(followed, settings)
        for stretch in followed.whole:
            tally.dropped[stretch.image] += contents * stretch.pages
        for stretch in rows:
            tally.dropped[stretch.image] -= contents * stretch.pages
        if not followed.stretches:
            tally.kept += rows
        tally.scans = max(tally.scans, 4)
    pages = sum(stretch.pages for stretch in rows)
    if pages == 0:
        return
    if kind == _ZERO and settings.use_zero_pages:
        tally.scans = max(tally.scans, 3)
        if scans == 1:
            tally.volatile += pages * contents
            tally.frames += contents * _frames(rows)
            return
        tally.volatile += pages * contents if scans == 2 else 0
        tally.zero += pages * contents
        for stretch in rows:
            tally.zero_pages[stretch.image] += stretch.pages * contents
        return
    done = settle(rows, settings.max_page_sharing, scans, settings.smart_scan)
    tally.nodes += done.nodes * contents
    tally.merged += done.merged_pages * contents
    tally.merged_zero += done.merged_pages * contents if kind == _ZERO else 0
    tally.unshared += done.unshared * contents
    tally.volatile += (done.left_pages - done.unshared) * contents
    tally.skipped += done.skipped * contents
    if done.nodes >= 2:
        tally.chains += contents
        tally.dups += done.nodes * contents
    tally.frames += done.frames * contents
    tally.scans = max(tally.scans, done.scans)
    tally.least += min(done.nodes, 1 if any(row.frame != OWN_FRAMES for row in rows) else done.nodes) * contents
    for image, merged in done.merged.items():
        tally.merging[image] += merged * contents
    for image, nodes in done.within.items():
        tally.within[image] += nodes * contents
    reason = _why_left(done, pages)
    tally.left.append(
        np.array([(row.image, row.region, reason, row.pages * contents) for row in done.left], np.int64).reshape(-1, 4)
    )


def _why_left(done: Settled, pages: int) -> int:
    if done.nodes:
        return _FULL_CHAIN
    return _UNIQUE if pages == 1 else _FORK_TWIN


def _frees_zero_pages(settings: Settings) -> bool:
    return settings.full_scans != 1 and settings.kernel not in ("6.1", "6.6")


def _unsplit(followed: Followed, settings: Settings) -> tuple[Stretch, ...]:
    """The zero pages left once KSM has split the huge pages that have any.

    mm/huge_memory.c, RMP_USE_SHARED_ZEROPAGE, Linux 6.12: splitting an anonymous huge page maps its
    zero pages to the shared zero page, unless it is locked. Two zero pages in one split it; one is
    split as it meets a zero page outside, or the zero page of a huge page that came before. So where
    there is none outside, the first huge page with one zero page stays whole (measured on 6.18).
    """
    if followed.stretches or settings.use_zero_pages or not followed.lone_huge:
        return followed.stretches
    first = followed.lone_huge[0]
    if first.frame == OWN_FRAMES:
        return (first._replace(pages=1),)
    return tuple(stretch for stretch in followed.whole if stretch.frame == first.frame)


def _frames(rows: Sequence[Stretch]) -> int:
    own = sum(row.pages for row in rows if row.frame == OWN_FRAMES)
    return own + len({row.frame for row in rows if row.frame != OWN_FRAMES})


def _by_image(image: np.ndarray, pages: np.ndarray, images: int) -> np.ndarray:
    return np.bincount(image, pages, images).astype(np.int64)  # sums of doubles, exact below 2**53 pages


def contents(sharing: Sharing) -> dict[str, int]:
    """Non-zero contents of eligible pages: how many, how many with two copies or more, most copies."""
    rows = sharing.spectrum
    rows = rows[(rows[:, 0] == ALL_NODES) & (rows[:, 1] != _ZERO)]
    copies, count = rows[:, 2], rows[:, 4]
    return {
        "distinct": int(count.sum()),
        "shared": int(count[copies >= 2].sum()),
        "max_copies": int(copies.max()) if len(copies) else 0,
    }


def exported(counters: Counters, settings: Settings) -> dict[str, int | None]:
    """The counters by name, None for those that the kernel of the settings does not have.

    pages_scanned and ksm_zero_pages came with Linux 6.6, pages_skipped with 6.7, general_profit with 6.4.
    """
    shown: dict[str, int | None] = asdict(counters)
    if settings.kernel == "6.1":
        shown |= dict.fromkeys(("ksm_zero_pages", "general_profit", "pages_scanned"))
    if settings.kernel in ("6.1", "6.6"):
        shown["pages_skipped"] = None
    return shown


def estimate(prediction: Prediction, settings: Settings) -> dict[str, int | float | None]:
    """About how long KSM takes to converge: the time ksmd sleeps, its own work on the pages not counted.

    Returns scans, pages_per_scan, and seconds, None where pages_to_scan is 0 and ksmd never scans.
    """
    seconds = None
    if settings.pages_to_scan:
        wakeups = -(-prediction.candidates // settings.pages_to_scan)
        seconds = prediction.scans * wakeups * settings.sleep_millisecs / 1000
    return {"full_scans": prediction.scans, "pages_per_scan": prediction.candidates, "seconds": seconds}


def summary(prediction: Prediction, settings: Settings) -> dict[str, object]:
    """What `--json` prints of a prediction: merges, counters, bounds, physical, estimate.

    bounds: least and most, where pages came and went before: ksmd never packs its nodes anew.
    """
    counted = prediction.counters
    shown = exported(counted, settings)
    merges = {
        "zero": "zero_merges",
        "content": "content_merges",
        "saved_bytes": "saved_bytes",
        "thp_zero": "thp_zero_pages",
    }
    physical = {"frames_saved": shown.pop("frames_saved"), "profit": shown.pop("physical_profit")}
    least, most = prediction.nodes_bounds
    merged = counted.pages_shared + counted.pages_sharing
    return {
        "merges": {name: shown.pop(column) for name, column in merges.items()},
        "counters": shown | {"pages_unshared_and_volatile": counted.pages_unshared + counted.pages_volatile},
        "bounds": {"pages_shared": [least, most], "pages_sharing": [merged - most, merged - least]},
        "physical": physical,
        "estimate": estimate(prediction, settings),
    }


def counters_table(counters: Counters, settings: Settings, volatile: str) -> pa.Table:
    """A row of the `counters` table. volatile: excluded or included."""
    row = settings.as_dict() | exported(counters, settings) | {"volatile": volatile}
    return pa.Table.from_pylist([{name: row[name] for name in COUNTERS.schema.names}], schema=COUNTERS.schema)


def ksm_stat_table(prediction: Prediction, sharing: Sharing, settings: Settings) -> pa.Table:
    """The `ksm_stat` table: a row for each image, as /proc/PID/ksm_stat and smaps would show."""
    zero, merging, items = prediction.zero_pages, prediction.merging_pages, prediction.rmap_items
    profit = (merging + zero) * settings.page_size - items * RMAP_ITEM_BYTES
    hidden = pa.nulls(len(items), pa.int64())
    old = settings.kernel == "6.1"
    columns = {
        "image": np.arange(len(items), dtype=np.int32),
        "image_id": sharing.images.column("image_id"),
        "ksm_rmap_items": items,
        "ksm_zero_pages": hidden if old else zero,
        "ksm_merging_pages": merging,
        "ksm_process_profit": hidden if old else profit,
        "smaps_ksm_pages": merging,
        "nodes_within": prediction.nodes_within,
    }
    return pa.Table.from_pydict(columns, schema=KSM_STAT.schema)
