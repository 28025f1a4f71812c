"""What of a run `ksmdist publish` hands on: for each table and column, kept, replaced or left out, and why.

An allow-list: what is not named here is not published, and a test fails until it is decided. Names, addresses,
digests and whatever an image says in words are never kept; numbers are, unless they place something.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import pyarrow as pa

from ksmdist.schema import Column, Table
from ksmdist.settings import KERNELS
from ksmdist.tables.findings import (
    CONTENTS,
    CUMULATIVE,
    EXPOSURE,
    HUGE,
    PASSES,
    POLICIES,
    POLICY,
    POLICY_SPECTRUM,
    SCOPES,
    SHARING,
    SPECTRUM_BUCKETS,
    WHATS,
)
from ksmdist.tables.predictions import ACCOUNTINGS, COUNTERS, KSM_STAT, WHATIF
from ksmdist.tables.scans import CLASSES, HOLES, IMAGES, KINDS, PASSED_OVER, REASONS, REGIONS, SPECTRUM, STABLE_TREE
from ksmdist.tables.scans import ZERO_COLORS as COLORS

__all__ = [
    "PUBLISHED",
    "REGION_CLASSES",
    "SETTINGS",
    "UNPUBLISHED",
    "UNPUBLISHED_SETTINGS",
    "WORDS",
    "Publication",
    "Rule",
    "Taken",
    "render_decisions",
]

REGION_CLASSES: tuple[str, ...] = ("anonymous", "heap", "stack", "file", "shared", "kernel", "ram", "other")
"""All that is said of a region: its name may be a file's, or free text (prctl PR_SET_VMA_ANON_NAME)."""


class Rule(Enum):
    """How a published column comes of a run's. The value says it in words, for the documents."""

    KEEP = "kept"
    WORD = "kept where it is a word of ksmdist's own, else `other`"
    IMAGE = "the image's number, drawn at random"
    IMAGE_ID = "`image-N`, N its number; the name with --keep images"
    HOST = "`host-N`, N drawn at random; the name with --keep hosts; empty if unknown"
    TENANT = "`tenant-N`, N drawn at random; the name with --keep tenants; empty if unknown"
    REGION = "its class: " + ", ".join(REGION_CLASSES)
    FILL_WORD = "kept where many systems have it (zero, poison of kernels, allocators, compilers), else null"
    CONTENT = (
        "an opaque number in place of the digest: its row in stable_tree, whose order is drawn at random; null where "
        "it has none, and for contents with fewest copies of a table contents that was cut off"
    )
    RANK = "counted anew: equals stand in random order"
    HOLDER = "as image_id; null where several images hold it, whose order it would tell, unless --keep order"
    ORDER = "null; kept with --keep order (it may be the order of the names)"
    SALT = "a group's number, drawn at random; 0 stays"
    FILTERED = "whether it says anything"


@dataclass(frozen=True, slots=True)
class Taken:
    """A published column: its name, the rule, and the column of the run that it comes of."""

    name: str
    rule: Rule
    source: str


@dataclass(frozen=True, slots=True)
class Publication:
    """What is published of a table.

    taken:      its columns, in order; left_out: the run's columns that nothing is published of, and why
    sort:       of the published rows; None: the run's own
    pairs:      published columns of one and of the other of two images or tenants; where the first of them come out
                the wrong way round, all change places
    with_order: published with --keep order only, since its rows tell the order of the images
    table:      the definition of what is published: another table than the run's, by its name, so that nothing reads
                a publication as a run
    """

    source: Table
    taken: tuple[Taken, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    sort: tuple[str, ...] | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    with_order: bool = False
    table: Table = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        of = {column.name: column for column in self.source.columns}
        table = Table(
            name=f"published_{self.source.name}",
            version=1,
            doc=f"Table {self.source.name} of a run, published. {self.source.doc}",
            file=self.source.file.replace("/*", ""),
            sort=self.source.sort if self.sort is None else self.sort,
            columns=tuple(_column(taken, of[taken.source]) for taken in self.taken),
        )
        object.__setattr__(self, "table", table)


def _column(taken: Taken, source: Column) -> Column:
    """The definition of a published column."""
    if taken.rule in (Rule.KEEP, Rule.WORD):
        return source
    nullable = source.nullable or taken.rule in (Rule.HOLDER, Rule.ORDER)
    kind, unit = source.type, source.unit
    if taken.rule is Rule.CONTENT:
        kind, unit, nullable = pa.int64(), "index", True
    if taken.rule is Rule.FILTERED:
        kind = pa.bool_()
    doc = taken.rule.value if taken.rule in (Rule.IMAGE, Rule.CONTENT) else f"{source.doc}. Here: {taken.rule.value}"
    return replace(source, name=taken.name, type=kind, unit=unit, nullable=nullable, doc=doc)


def _each(rule: Rule, *names: str) -> tuple[Taken, ...]:
    return tuple(Taken(name, rule, name) for line in names for name in line.split())


def _kept(*names: str) -> tuple[Taken, ...]:
    return _each(Rule.KEEP, *names)


_ADDRESS = "an address"
_TREE = (
    "pages_shared pages_sharing pages_unshared pages_volatile stable_node_chains stable_node_dups rmap_items",
    "zero_merges content_merges saved_bytes physical_profit general_profit",
)
_KNOBS = "use_zero_pages max_page_sharing merge_across_nodes"
_BY_IMAGE = (*_each(Rule.IMAGE, "image"), *_each(Rule.IMAGE_ID, "image_id"))

_PUBLISHED = (
    Publication(
        COUNTERS,
        (
            *_each(Rule.WORD, "volatile"),
            *_kept("page_size"),
            *_each(Rule.WORD, "kernel"),
            *_kept(_KNOBS, "smart_scan full_scans", *_TREE),
            *_kept("pages_skipped pages_scanned ksm_zero_pages thp_zero_pages frames_saved"),
        ),
    ),
    Publication(
        WHATIF,
        (
            *_each(Rule.WORD, "accounting"),
            *_kept(_KNOBS, *_TREE, "rmap_item_bytes zero_pages_counted frames_kept profit"),
            *_kept("zero_pages_given_back unmerge_frames present"),
        ),
    ),
    Publication(
        IMAGES,
        (
            Taken("image", Rule.IMAGE, "scan_order"),
            *_each(Rule.IMAGE_ID, "image_id"),
            *_each(Rule.ORDER, "scan_order"),
            *_each(Rule.WORD, "kind format"),
            Taken("filtered", Rule.FILTERED, "filter_level"),
            *_each(Rule.HOST, "host"),
            *_each(Rule.TENANT, "tenant"),
            *_each(Rule.SALT, "salt"),
            *_kept("total bytes absent excluded unreadable", *CLASSES, *(f"kind_{name}" for name in KINDS)),
            *_kept("shared_within shared_with_others frames_known"),
        ),
        {"producer": "free text of the image"},
        sort=("image",),
    ),
    Publication(
        KSM_STAT,
        (
            *_BY_IMAGE,
            *_kept("ksm_rmap_items ksm_zero_pages ksm_merging_pages ksm_process_profit smaps_ksm_pages nodes_within"),
        ),
    ),
    Publication(
        REGIONS,
        (
            *_each(Rule.IMAGE, "image"),
            *_each(Rule.REGION, "region"),
            *_kept(*PASSED_OVER, "absent", *REASONS),
        ),
    ),
    Publication(
        HOLES,
        (*_each(Rule.IMAGE_ID, "image_id"), *_kept("pages"), *_each(Rule.WORD, "reason")),
        {"address": _ADDRESS},
        sort=("image_id", "reason", "pages"),
    ),
    Publication(
        STABLE_TREE,
        (
            Taken("content", Rule.CONTENT, "digest"),
            *_each(Rule.WORD, "kind"),
            *_each(Rule.FILL_WORD, "fill_word"),
            *_kept("copies images nodes"),
            *_each(Rule.HOLDER, "first_image"),
        ),
        {"first_address": _ADDRESS},
        sort=("content",),
    ),
    Publication(
        CONTENTS,
        (
            *_each(Rule.RANK, "rank"),
            Taken("content", Rule.CONTENT, "digest"),
            *_each(Rule.WORD, "kind"),
            *_each(Rule.FILL_WORD, "fill_word"),
            *_each(Rule.WORD, "what"),
            *_kept("meaning copies images tenants nodes"),
            *_each(Rule.HOLDER, "first_image"),
            *_each(Rule.REGION, "region"),
        ),
        {"first_address": _ADDRESS},
    ),
    Publication(
        SHARING,
        (
            *_BY_IMAGE,
            *_each(Rule.IMAGE, "other"),
            *_each(Rule.IMAGE_ID, "other_id"),
            *_kept("contents pages other_pages"),
        ),
        pairs=(("image", "other"), ("image_id", "other_id"), ("pages", "other_pages")),
    ),
    Publication(
        EXPOSURE,
        (
            *_each(Rule.TENANT, "tenant other"),
            *_each(Rule.WORD, "kind"),
            *_kept("contents pages other_pages near_contents rare_contents rare_pages rare_other_pages"),
            *_kept("rare_looked_at rare_low rare_middle rare_high rare_unknown salt_pages salt_other_pages"),
        ),
        sort=("tenant", "other"),  # and its kinds as they are
        pairs=(
            ("tenant", "other"),
            ("pages", "other_pages"),
            ("rare_pages", "rare_other_pages"),
            ("salt_pages", "salt_other_pages"),
        ),
    ),
    Publication(
        POLICY,
        (
            *_kept("level"),
            *_each(Rule.WORD, "policy"),
            *_kept("merged_pages frames_kept saved_pages saved_zero saved_same_filled saved_other"),
            *_kept("saved_bytes saved_gib cost_bytes cost_gib"),
        ),
    ),
    Publication(POLICY_SPECTRUM, (*_kept("numa_node"), *_each(Rule.WORD, "scope kind"), *_kept("copies contents"))),
    Publication(SPECTRUM, (*_kept("numa_node"), *_each(Rule.WORD, "kind"), *_kept("copies frames contents"))),
    Publication(
        SPECTRUM_BUCKETS,
        (*_kept("copies"), *_each(Rule.WORD, "kind"), *_kept("contents pages contents_bytes pages_bytes")),
    ),
    Publication(
        CUMULATIVE,
        (
            Taken("scan_order", Rule.ORDER, "image"),
            *_BY_IMAGE,
            *_kept("pages zero contents_added pages_known total_pages total_contents saved_pages saved_bytes"),
        ),
        sort=("scan_order",),
        with_order=True,
    ),
    Publication(
        HUGE,
        (*_BY_IMAGE, *_kept("mergeable frames huge_frames zero_frames pages mergeable_pages zero_pages")),
    ),
    Publication(PASSES, (*_BY_IMAGE, *_kept("pass pages changed appeared gone stable"))),
    Publication(COLORS, _kept("color zero zero_mapped_fault")),
)

PUBLISHED: Mapping[str, Publication] = {publication.source.name: publication for publication in _PUBLISHED}
"""What is published, by the name of the run's table."""

UNPUBLISHED: Mapping[str, str] = {
    "memory_image": "is pages",
    "page": "is in no run directory",
    "shard_content": "is in no run directory",
    "image_set": "is in no run directory",
    "huge_frame": "is in no run directory",
    "tenant_set": "is in no run directory",
    "rare_content": "is in no run directory",
    "candidate": "is in no run directory",
    "witness": "is in no run directory",
    "explain": "is in no run directory",
    "unmerge": "is in no run directory",
    "diff_contents": "is in no run directory",
    "diff_images": "is in no run directory",
    "checksums": "unkeyed checksums of all pages, with their addresses: they confirm a guess",
    "image_spectrum": "tells the order of the images, for predictions that need a run; whatif has what comes of it",
    "mappings": "addresses of huge pages and the order of the images, for predictions that need a run",
}
"""Tables of which nothing is published, and why."""

WORDS: Mapping[str, tuple[str, ...]] = {
    "volatile": ("excluded", "included"),
    "kernel": KERNELS,
    "accounting": ACCOUNTINGS,
    "images.kind": ("guest", "process", "container", "kernel"),
    "kind": KINDS,
    "format": ("arrow", "elf", "kdump", "lime", "avml", "qemu", "criu", "vmware", "raw"),
    "reason": ("truncated", "unreadable", "partial_page", "damaged", "missing", "no_node"),
    "what": WHATS,
    "policy": POLICIES,
    "scope": SCOPES,
}
"""The words that a column of Rule.WORD may have, by column or by table.column."""

SETTINGS: tuple[str, ...] = (
    "page_size",
    "use_zero_pages",
    "max_page_sharing",
    "merge_across_nodes",
    "eligible",
    "kernel",
    "full_scans",
    "smart_scan",
    "pages_to_scan",
    "sleep_millisecs",
    "zero_page_colors",
    "contents",
    "verify",
)
"""Settings of the run that publication.json names."""

UNPUBLISHED_SETTINGS: tuple[str, ...] = ("format", "shard_pages", "ranges", "task_memory", "checksums", "fan_in")
"""Settings that it does not: of the machines, and none that counts depend on."""


def render_decisions() -> str:
    """All of the above as Markdown, for docs/publish.md."""
    lines = ["| table | column | published as |", "| --- | --- | --- |"]
    for publication in _PUBLISHED:
        name, of = publication.source.name, publication.source
        for column in of.columns:
            taken = [one for one in publication.taken if one.source == column.name]
            said = "; ".join(_heading(one) + one.rule.value for one in taken)
            lines.append(f"| {name} | {column.name} | {said or f'left out: {publication.left_out[column.name]}'} |")
        if publication.with_order:
            lines.append(f"| {name} | | only with --keep order: its rows tell the order of the images |")
    lines += [f"| {name} | | left out: {why} |" for name, why in UNPUBLISHED.items()]
    return "\n".join(lines) + "\n"


def _heading(taken: Taken) -> str:
    return "" if taken.name == taken.source else f"`{taken.name}`: "
