"""Why pages are not merged, counted: by image, region and reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pyarrow as pa

from ksmdist.counters import LEFT, Prediction
from ksmdist.sharing import Sharing
from ksmdist.tables import EXPLAIN

__all__ = ["ADVICE", "explain"]

ADVICE: Mapping[str, str] = {
    "merged": "shares a KSM page, or is one, or goes to the shared zero page (use_zero_pages)",
    "zero_mapped_fault": "on the shared zero page since a read fault: costs no memory",
    "thp_zero": "goes to the shared zero page as KSM splits its huge page: freed, in no counter",
    "unique": "no other page has its content",
    "full_chain": "its content's KSM pages are full (max_page_sharing), and it is the one that is over",
    "fork_twin": "shares its frame by fork, and no second frame has this content: nothing to win",
    "changing": "changed between two passes",
    "not_marked": "anonymous, not marked (MADV_MERGEABLE, PR_SET_MEMORY_MERGE); `run --eligible all` counts it",
    "untouched": "never touched: costs no memory",
    "not_anonymous": "a file's page, in the page cache: KSM takes anonymous pages only",
    "shared_mapping": "in a shared mapping (MAP_SHARED, memfd): MADV_MERGEABLE silently does nothing",
    "hugetlb": "in hugetlbfs: MADV_MERGEABLE silently does nothing",
    "special": "in a mapping that KSM refuses (VM_IO, VM_PFNMAP, VM_MIXEDMAP, VM_DONTEXPAND, VM_DROPPABLE)",
    "swapped": "swapped out: KSM does not bring it back",
    "absent": "not in the image: never touched, left out by its producer, or a hole",
}
"""Every reason, in the order in which they are shown, and what it means."""

_FROM_REGIONS = {
    "untouched": "untouched",
    "not_anonymous": "not_anonymous",
    "file": "not_anonymous",
    "shared_mapping": "shared_mapping",
    "hugetlb": "hugetlb",
    "special": "special",
    "absent": "absent",
    "swapped": "swapped",
    "not_marked": "not_marked",
    "zero_mapped_fault": "zero_mapped_fault",
    "volatile": "changing",
}


def explain(sharing: Sharing, regions: pa.Table, prediction: Prediction) -> pa.Table:
    """The `explain` table: every page of the address space once, from table `regions` and a converged prediction."""
    ids = sharing.images.column("image_id").to_pylist()
    left: dict[tuple[int, str | None], Counter[str]] = {}
    for image, region, reason, pages in prediction.left.tolist():
        name = sharing.region_names[region] if region >= 0 else None
        left.setdefault((image, name), Counter())[LEFT[reason]] += pages
    kept: Counter[tuple[int, str | None]] = Counter()
    for stretch in prediction.thp_kept:
        kept[stretch.image, sharing.region_names[stretch.region] if stretch.region >= 0 else None] += stretch.pages
    splits = prediction.splits_huge_pages
    counts: Counter[tuple[str, str | None, str]] = Counter()
    for row in regions.to_pylist():
        image, region = row["image"], row["region"]
        key = (ids[image], region)
        for column, reason in _FROM_REGIONS.items():
            counts[*key, reason] += row[column]
        candidates = row["candidates"] + row["zero_mapped_ksm"]
        stays = kept[image, region] if splits else row["huge_zero"]
        counts[*key, "thp_zero"] += row["huge_zero"] - stays
        candidates += stays
        for reason, pages in left.pop((image, region), Counter()).items():
            counts[*key, reason] += pages
            candidates -= pages
        counts[*key, "merged"] += candidates
    assert not left, "a region that is left over is in no row of regions"
    rows = [
        {"image_id": image, "region": region, "reason": reason, "pages": pages}
        for (image, region, reason), pages in sorted(counts.items(), key=lambda item: (*map(str, item[0]),))
        if pages
    ]
    return pa.Table.from_pylist(rows, schema=EXPLAIN.schema)
