"""A run's findings in Prometheus' text format: node_exporter's ksmd names where it has them, ksmdist_ where not.

Names, types and help of node_ksmd_ are those of node_exporter's collector/ksmd_linux.go. What
metrics.prom of the run directory says too has the same name and help here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ksmdist.tables import CLASSES

__all__ = ["expose"]

Labels = Mapping[str, str]
Metric = tuple[str, str, str, list[tuple[Labels, float | int | None]]]
"""Name, type, help, samples; a sample of None is left out."""

_OF_IMAGES = (*CLASSES, "absent", "unreadable")
_SHARED = ("shared_within", "shared_with_others")


def expose(found: Mapping[str, Any], images: pa.Table) -> str:
    """The metrics of a run. found: as summary.summarize() gives it; images: table `images`.

    A figure that is not known, or that the kernel of the settings does not have, has no sample. Where there are two
    rows of counters, node_ksmd_ is what the kernel would show: pages that changed are not merged.
    """
    kernel = next(row for row in found["counters"] if row["volatile"] == "excluded")
    metrics = [*_node(found, kernel), *_counters(found["counters"]), *_run(found), *_images(images)]
    return "".join(_text(metric) for metric in metrics)


def _node(found: Mapping[str, Any], kernel: Mapping[str, Any]) -> Iterable[Metric]:
    settings = found["settings"]
    for name, kind, doc, value in (
        (
            "full_scans_total",
            "counter",
            "How many times all mergeable areas have been scanned.",
            kernel["full_scans"] or found["estimate"]["full_scans"],  # of no number given: until nothing changes
        ),
        (
            "general_profit_bytes",
            "gauge",
            "How effective is KSM. ksm_saved_pages * sizeof(page) - (all_rmap_items) * sizeof(rmap_item)",
            kernel["general_profit"],
        ),
        (
            "merge_across_nodes",
            "gauge",
            "Specifies if pages from different NUMA nodes can be merged.",
            kernel["merge_across_nodes"],
        ),
        ("pages_shared", "gauge", "How many shared pages are being used.", kernel["pages_shared"]),
        (
            "pages_sharing",
            "gauge",
            "How many more sites are sharing them i.e. how much saved.",
            kernel["pages_sharing"],
        ),
        (
            "pages_to_scan",
            "gauge",
            "How many pages to scan before ksmd goes to sleep.",
            settings["pages_to_scan"],
        ),
        (
            "pages_unshared",
            "gauge",
            "How many pages unique but repeatedly checked for merging.",
            kernel["pages_unshared"],
        ),
        (
            "pages_volatile",
            "gauge",
            "How many pages changing too fast to be placed in a tree.",
            kernel["pages_volatile"],
        ),
        ("run", "gauge", "The status of ksmd. stopped = 0, running = 1", 1),
        (
            "sleep_seconds",
            "gauge",
            "How many seconds ksmd should sleep before next scan.",
            settings["sleep_millisecs"] / 1000,
        ),
    ):
        yield f"node_ksmd_{name}", kind, doc, [({}, value)]


_COUNTERS = (
    ("ksm_zero_pages", "ksm_zero_pages", "Pages mapped to the shared zero page by KSM."),
    ("zero_merges", "zero_merges", "Zero pages merged, with each other or with the shared zero page."),
    ("content_merges", "content_merges", "Other pages merged."),
    (
        "thp_zero_pages",
        "thp_zero_pages",
        "Zero pages freed as KSM splits their huge page, in no counter of the kernel.",
    ),
    ("saved_bytes", "saved_bytes", "Merged pages less the KSM pages kept for them; KSM's own cost not taken off."),
    ("frames_saved", "frames_saved", "Frames really freed, where frames are known."),
    ("physical_profit_bytes", "physical_profit", "Frames really freed, less all that KSM keeps."),
    ("stable_node_chains", "stable_node_chains", "Contents with more than one stable node."),
    ("stable_node_dups", "stable_node_dups", "Stable nodes in those chains."),
    ("rmap_items", "rmap_items", "Rmap items KSM keeps, 64 bytes each."),
    ("pages_skipped", "pages_skipped", "Visits left out by smart_scan."),
    ("pages_scanned", "pages_scanned", "Visits in all scans, without those skipped."),
)


def _counters(rows: Sequence[Mapping[str, Any]]) -> Iterable[Metric]:
    """Counters that node_exporter does not have; with pages that changed between passes left out, and counted in."""
    for name, column, doc in _COUNTERS:
        yield f"ksmdist_{name}", "gauge", doc, [({"volatile": row["volatile"]}, row[column]) for row in rows]


def _run(found: Mapping[str, Any]) -> Iterable[Metric]:
    holes, savings = found["holes"], found["savings"]
    yield (
        "ksmdist_run_pages",
        "gauge",
        "Pages scanned, by class.",
        [({"class": name}, count) for name, count in found["pages"].items()],
    )
    yield "ksmdist_run_holes", "gauge", "Ranges of pages that could not be read.", [({}, holes["ranges"])]
    yield (
        "ksmdist_run_images_out_of_reach",
        "gauge",
        "Images whose node was not in the cluster.",
        [({}, len(holes["images"]))],
    )
    yield (
        "ksmdist_run_images_filtered",
        "gauge",
        "Images that are not the whole memory: their producers left pages out.",
        [({}, len(found["filtered"]))],
    )
    yield (
        "ksmdist_excluded_pages",
        "gauge",
        "Pages that producers' filters left out, as far as images say.",
        [({}, sum(image["excluded"] for image in found["filtered"]))],
    )
    yield "ksmdist_unreadable_pages", "gauge", "Pages that could not be read.", [({}, holes["pages"])]
    yield (
        "ksmdist_same_filled_pages",
        "gauge",
        "Pages that repeat one word other than zero, merged or not.",
        [({}, found["kinds"]["same_filled"])],
    )
    yield (
        "ksmdist_contents",
        "gauge",
        "Contents other than zero; shared: with two copies or more.",
        [({"contents": name}, found["contents"][name]) for name in ("distinct", "shared")],
    )
    yield (
        "ksmdist_saved_pages",
        "gauge",
        "Pages saved, by kind and by whether one image holds the content or several do.",
        [
            ({"kind": kind, "where": where}, savings[f"{where}_images_saved_{kind}"])
            for kind in ("zero", "same_filled", "other")
            for where in ("within", "between")
        ],
    )
    yield (
        "ksmdist_policy_saved_bytes",
        "gauge",
        "Bytes saved where merging is allowed for no more than this.",
        [({"policy": row["policy"]}, row["saved_bytes"]) for row in found["policy"]],
    )
    huge = found["huge"]
    yield (
        "ksmdist_huge_frames",
        "gauge",
        "Aligned frames of the size of a huge page; mergeable: with a page that is zero or has a copy elsewhere.",
        [
            ({"frames": "all"}, huge["frames"]),
            ({"frames": "mergeable"}, huge["mergeable_frames"]),
            ({"frames": "zero"}, huge["zero_frames"]),
        ],
    )
    yield (
        "ksmdist_identities",
        "gauge",
        "Identities checked in the run.",
        [({}, len(found["identities"]))],
    )
    yield (
        "ksmdist_identities_holding",
        "gauge",
        "Identities that hold, of those checked.",
        [({}, sum(identity["holds"] for identity in found["identities"]))],
    )
    yield (
        "ksmdist_settings_info",
        "gauge",
        "The settings of KSM, as labels.",
        [
            (
                {
                    name: "unlimited" if found["settings"][name] is None else _label(found["settings"][name])
                    for name in ("use_zero_pages", "max_page_sharing", "eligible", "kernel", "page_size")
                },
                1,
            )
        ],
    )


def _label(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _images(images: pa.Table) -> Iterable[Metric]:
    rows = images.to_pylist()
    yield (
        "ksmdist_image_pages",
        "gauge",
        "Pages of an image, by class.",
        [({"image_id": row["image_id"], "class": name}, row[name]) for row in rows for name in _OF_IMAGES],
    )
    yield (
        "ksmdist_image_shared_pages",
        "gauge",
        "Non-zero eligible pages whose content this image holds twice or more, or another image holds too.",
        [
            ({"image_id": row["image_id"], "where": name.removeprefix("shared_")}, row[name])
            for row in rows
            for name in _SHARED
        ],
    )


def _text(metric: Metric) -> str:
    """One metric in the exposition format; nothing where it has no sample."""
    name, kind, doc, samples = metric
    lines = [f"{name}{_labels(labels)} {_number(value)}" for labels, value in samples if value is not None]
    if not lines:
        return ""
    escaped = doc.replace("\\", "\\\\").replace("\n", "\\n")
    return "\n".join((f"# HELP {name} {escaped}", f"# TYPE {name} {kind}", *lines)) + "\n"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    pairs = []
    for name, value in labels.items():
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        pairs.append(f'{name}="{escaped}"')
    return f"{{{','.join(pairs)}}}"


def _number(value: float | int) -> str:
    """All digits: bytes of a fleet have more than a float's %g shows."""
    return str(int(value)) if isinstance(value, int) else repr(value)
