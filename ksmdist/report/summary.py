"""What a run found, as one object: what `ksmdist report --json` prints and the terminal shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ksmdist.classes import huge_page_bytes
from ksmdist.columns import values
from ksmdist.report.exposure import summarize_exposure
from ksmdist.report.terminal import headline
from ksmdist.tables import CONTENTS, COUNTERS, HUGE, PASSES, POLICY, SPECTRUM_BUCKETS

__all__ = ["SUMMARY_TABLES", "summarize", "top_pairs"]

SUMMARY_TABLES: tuple[str, ...] = tuple(
    table.name for table in (COUNTERS, POLICY, SPECTRUM_BUCKETS, CONTENTS, HUGE, PASSES)
)
"""Tables of a run that summarize() takes, whole: none grows with pages."""

_TOP = 10


def summarize(
    run: str,
    manifest: Mapping[str, Any],
    tables: Mapping[str, pa.Table],
    sharing: Iterable[pa.RecordBatch],
    exposure: Iterable[pa.RecordBatch],
) -> dict[str, Any]:
    """The findings of a run, plain JSON values. Keys are a promise: they are added to, none goes.

    run: where it is; manifest: run.json; tables: SUMMARY_TABLES by name; sharing, exposure: these tables in batches,
    read once. Digests are hexadecimal. `top_contents` and `top_pairs` have at most ten rows; sizes are in bytes.
    """
    summary = manifest["summary"]
    counters = tables[COUNTERS.name].to_pylist()
    return {
        "run": run,
        "ksmdist": manifest["ksmdist"],
        "complete": not (summary["holes"]["ranges"] or summary["holes"]["images"]),
        "headline": headline(summary),
        "images": len(manifest["images"]),
        **{
            name: summary[name]
            for name in ("pages", "kinds", "contents", "merges", "physical", "estimate", "settings", "holes")
        },
        "filtered": summary["filtered"],
        "counters": counters,
        "savings": _savings(tables[POLICY.name]),
        "policy": tables[POLICY.name].to_pylist(),
        "spectrum_buckets": tables[SPECTRUM_BUCKETS.name].to_pylist(),
        "top_contents": [
            row | {"digest": row["digest"].hex()} for row in tables[CONTENTS.name].slice(0, _TOP).to_pylist()
        ],
        "top_pairs": top_pairs(sharing, _TOP),
        "exposure": summarize_exposure(manifest, exposure, _TOP),
        "huge": _huge(tables[HUGE.name], summary["settings"]["page_size"]),
        "passes": _passes(tables[PASSES.name], counters),
        "identities": manifest["identities"],
        "caveats": manifest["caveats"],
    }


def _savings(policy: pa.Table) -> dict[str, int]:
    """What is saved, in pages and bytes, by kind and by whether one image or several hold what is merged."""
    rows = {row["policy"]: row for row in policy.to_pylist()}
    all_, within = rows["all"], rows["image"]
    names = ("saved_pages", "saved_zero", "saved_same_filled", "saved_other", "saved_bytes")
    return (
        {name: all_[name] for name in names}
        | {f"within_images_{name}": within[name] for name in names}
        | {f"between_images_{name}": all_[name] - within[name] for name in names}
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    """A row of table sharing that may be among those with most pages."""

    weight: int
    row: Mapping[str, Any]


def top_pairs(sharing: Iterable[pa.RecordBatch], count: int) -> list[dict[str, Any]]:
    """The `count` pairs of two images that share most pages, both sides added; rows of table `sharing`.

    Of equals the one that comes first in the table. No more than `count` rows are kept.
    """
    kept: list[_Pair] = []
    for batch in sharing:
        image, other, pages, other_pages = (
            values(batch.column(name)) for name in ("image", "other", "pages", "other_pages")
        )
        weight = np.where(image == other, 0, pages + other_pages)
        order = np.argsort(-weight, kind="stable")[:count]
        order = order[weight[order] > 0]
        if kept and len(kept) == count:
            order = order[weight[order] > kept[-1].weight]
        kept += [_Pair(int(weight[at]), batch.slice(at, 1).to_pylist()[0]) for at in order.tolist()]
        kept = sorted(kept, key=lambda pair: -pair.weight)[:count]  # stable: of equals the earlier batch's
    return [dict(pair.row) for pair in kept]


def _huge(huge: pa.Table, page_size: int) -> dict[str, int]:
    """Aligned frames of the size of a huge page, over all images; mergeable: with a page that is zero or has a copy."""
    total: Counter[str] = Counter()
    for row in huge.to_pylist():
        for name in ("frames", "huge_frames", "zero_frames", "pages", "mergeable_pages"):
            total[name] += row[name]
        if row["mergeable"]:
            total["mergeable_frames"] += row["frames"]
            total["mergeable_huge_frames"] += row["huge_frames"]
    names = ("frames", "mergeable_frames", "huge_frames", "mergeable_huge_frames", "zero_frames")
    found = {name: total[name] for name in (*names, "pages", "mergeable_pages")}
    return found | {"frame_bytes": huge_page_bytes(page_size)}


def _passes(passes: pa.Table, counters: list[dict[str, Any]]) -> dict[str, int] | None:
    """What changed from the last pass but one to the last, over all images; None where there was one pass."""
    rows = passes.to_pylist()
    if not rows:
        return None
    last = {row["image"]: row for row in rows}  # by image and pass
    names = ("pages", "changed", "appeared", "gone", "stable")
    saved = {row["volatile"]: row["saved_bytes"] for row in counters}
    return {name: sum(row[name] or 0 for row in last.values()) for name in names} | {
        "passes": max(Counter(row["image"] for row in rows).values()),  # images number their passes each by itself
        "images": len(last),
        "saved_bytes_lost": saved.get("included", saved["excluded"]) - saved["excluded"],
    }
