"""Tables of what KSM shows and wins, for some settings."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from ksmdist.schema import Column, Table, count, pages
from ksmdist.tables.scans import IMAGE_COLUMN

__all__ = ["ACCOUNTINGS", "COUNTERS", "EXPLAIN", "KSM_STAT", "UNMERGE", "WHATIF"]

KSM_STAT = Table(
    name="ksm_stat",
    version=1,
    doc="A row for each image: what /proc/PID/ksm_stat would show of its process, for this run's settings.",
    file="ksm_stat.parquet",
    sort=("image",),
    columns=(
        IMAGE_COLUMN,
        Column("image_id", pa.string(), "name of the image"),
        Column("ksm_rmap_items", pa.int64(), "rmap items of the process", unit="rmap items"),
        replace(pages("ksm_zero_pages", "its pages mapped to the zero page by KSM; null: not shown"), nullable=True),
        pages("ksm_merging_pages", "its pages that are merged, the first of each node too"),
        Column(
            "ksm_process_profit",
            pa.int64(),
            "(ksm_merging_pages + ksm_zero_pages) x page_size - ksm_rmap_items x 64; null: not shown",
            unit="bytes",
            nullable=True,
        ),
        pages("smaps_ksm_pages", "sum of KSM: in its smaps, in pages; zero pages are not in it"),
        pages("nodes_within", "KSM pages that only this image maps: free again if it alone is unmerged"),
    ),
)

_KNOBS = (
    Column("use_zero_pages", pa.bool_(), "setting: zero pages are mapped to the shared zero page"),
    Column(
        "max_page_sharing",
        pa.int64(),
        "setting: most pages that share one KSM page; null: unlimited",
        unit="pages",
        nullable=True,
    ),
    Column("merge_across_nodes", pa.bool_(), "setting: pages of different NUMA nodes may be merged"),
)
_TREE_COUNTERS = (
    pages("pages_shared", "KSM pages (stable nodes) in use"),
    pages("pages_sharing", "pages that share them beyond the first of each"),
    pages("pages_unshared", "pages in the unstable tree: looked at in the last scan, with no partner"),
    pages("pages_volatile", "pages with an rmap item in neither tree: changed, skipped, or a fork twin of one waiting"),
    Column("stable_node_chains", pa.int64(), "contents with more than one stable node", unit="contents"),
    Column("stable_node_dups", pa.int64(), "stable nodes in those chains", unit="stable nodes"),
    Column("rmap_items", pa.int64(), "rmap items KSM keeps, 64 bytes each", unit="rmap items"),
)
_SAVED = Column(
    "saved_bytes",
    pa.int64(),
    "merged pages less the KSM pages kept for them, in bytes, as if each had a frame of its own before; KSM's own cost "
    "not taken off",
    unit="bytes",
)
_PHYSICAL_PROFIT = Column(
    "physical_profit",
    pa.int64(),
    "frames that are really freed, in bytes, less all that KSM keeps (rmap items and stable nodes of 64 bytes, an "
    "mm_slot of 48 for each image); null where frames are not known",
    unit="bytes",
    nullable=True,
)

COUNTERS = Table(
    name="counters",
    version=2,
    doc=(
        "One row, or two where images have several passes: the kernel's counters for this run's settings, as "
        "/sys/kernel/mm/ksm would show them on static memory, and ours. Null: this kernel does not have the counter, "
        "or no number of scans was given."
    ),
    file="counters.parquet",
    sort=("volatile",),
    columns=(
        Column(
            "volatile",
            pa.string(),
            "excluded: pages that changed between passes are not merged, as KSM would have it; included: counted as if "
            "they had not changed. One row, excluded, where there was one pass",
        ),
        Column("page_size", pa.int64(), "size of a page", unit="bytes"),
        Column("kernel", pa.string(), "setting: the Linux whose rules are followed"),
        *_KNOBS,
        Column("smart_scan", pa.bool_(), "setting: skip pages that found no partner for a while"),
        replace(count("full_scans", "setting: scans done; null: as many as it takes", "scans"), nullable=True),
        *_TREE_COUNTERS,
        replace(pages("pages_skipped", "visits left out by smart_scan"), nullable=True),
        replace(pages("pages_scanned", "visits in all these scans, without those skipped"), nullable=True),
        replace(pages("ksm_zero_pages", "pages mapped to the shared zero page by KSM"), nullable=True),
        Column(
            "general_profit",
            pa.int64(),
            "(pages_sharing + ksm_zero_pages) x page_size - rmap_items x 64, with its sign",
            unit="bytes",
            nullable=True,
        ),
        pages("zero_merges", "zero pages that end up merged, with each other or with the zero page"),
        pages("content_merges", "other pages that end up merged"),
        _SAVED,
        pages(
            "thp_zero_pages",
            "zero pages that go to the shared zero page as KSM splits their huge page (Linux 6.12 and up): freed, and "
            "in no counter of the kernel",
        ),
        replace(pages("frames_saved", "frames that are really freed; null where frames are not known"), nullable=True),
        _PHYSICAL_PROFIT,
    ),
)

EXPLAIN = Table(
    name="explain",
    version=1,
    doc="Why pages are merged or not, by image and region, for some settings. Printed by `ksmdist explain`, not kept.",
    file="",
    sort=("image_id", "region", "reason"),
    columns=(
        Column("image_id", pa.string(), "name of the image"),
        Column("region", pa.string(), "name of the mapping; null where the image names none", nullable=True),
        Column("reason", pa.string(), "merged, or why not: a name of docs/ksm.md, explain"),
        pages("pages", "pages of which this is so"),
    ),
)

UNMERGE = Table(
    name="unmerge",
    version=1,
    doc="What MADV_UNMERGEABLE of one image, or of all, brings back. Printed by `ksmdist unmerge`, not kept.",
    file="",
    sort=("image_id",),
    columns=(
        Column(
            "image_id", pa.string(), "name of the image unmerged by itself; null: all together (run=2)", nullable=True
        ),
        pages("pages_unshared", "pages that get a frame of their own again"),
        pages("zero_pages_given_back", "of them, pages that were on the shared zero page; 0 before Linux 6.6"),
        pages("zero_pages_kept", "pages that stay on the shared zero page, because this kernel does not know of them"),
        pages("frames_freed", "KSM pages that nobody maps any more"),
        pages("frames_needed", "frames needed: pages unshared less KSM pages freed"),
        Column("bytes_needed", pa.int64(), "frames needed, in bytes", unit="bytes"),
    ),
)

ACCOUNTINGS: tuple[str, ...] = ("stable_tree", "untracked", "rmap_tracked", "all_zero_mappings", "pte_dirty")
"""Ways to account for zero pages that KSM places, as the kernel had or discussed them (docs/ksm.md)."""

WHATIF = Table(
    name="whatif",
    version=1,
    doc=(
        "A row for each combination of use_zero_pages, max_page_sharing, merge_across_nodes and way to account for "
        "zero pages (stable_tree is use_zero_pages off; the other four are ways to have it on): what the kernel would "
        "show, what it would really save, and what unmerging gives back."
    ),
    file="whatif.parquet",
    sort=("use_zero_pages", "accounting", "max_page_sharing", "merge_across_nodes"),
    columns=(
        Column("accounting", pa.string(), " | ".join(ACCOUNTINGS)),
        *_KNOBS,
        *_TREE_COUNTERS,
        Column("rmap_item_bytes", pa.int64(), "memory the rmap items take", unit="bytes"),
        pages("zero_merges", "zero pages that end up merged, with each other or with the zero page"),
        pages("content_merges", "other pages that end up merged"),
        replace(
            pages(
                "zero_pages_counted",
                "what the counter of zero pages shows: those KSM placed; with all_zero_mappings those of read faults "
                "too; null where nothing counts them",
            ),
            nullable=True,
        ),
        Column(
            "general_profit",
            pa.int64(),
            "as a kernel with this accounting computes it from its own counters, with its sign",
            unit="bytes",
        ),
        pages("frames_kept", "KSM pages: frames kept for what is merged; the shared zero page is not KSM's"),
        _SAVED,
        Column("profit", pa.int64(), "saved_bytes less rmap_item_bytes, with its sign", unit="bytes"),
        _PHYSICAL_PROFIT,
        pages("zero_pages_given_back", "zero pages that get frames of their own from MADV_UNMERGEABLE or run=2"),
        pages("unmerge_frames", "frames that unmerging everything needs"),
        Column("present", pa.bool_(), "whether these are the run's own settings and its kernel's accounting"),
    ),
)
