"""Every table, defined once: columns, types, units, meaning, sort order, version.

`schemas/*.json` and `ksmdist schema` are rendered from here; nothing else defines a column.
A version number rises when a column goes, changes its name, type or meaning; adding a nullable
column does not raise it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pyarrow as pa

__all__ = [
    "CLASSES",
    "COUNTERS",
    "HOLES",
    "IMAGES",
    "KINDS",
    "MEMORY_IMAGE",
    "PAGE",
    "PAGE_FLAGS",
    "PASSED_OVER",
    "SHARD_CONTENT",
    "SPECTRUM",
    "STABLE_TREE",
    "TABLES",
    "Column",
    "Key",
    "Table",
    "render",
]

PAGE_FLAGS: Mapping[str, int] = {
    "eligible": 1 << 0,
    "zero_mapped": 1 << 1,
    "pte_dirty": 1 << 2,
    "ksm": 1 << 3,
    "file": 1 << 4,
    "huge": 1 << 5,
    "swapped": 1 << 6,
    "locked": 1 << 7,
    "exclusive": 1 << 8,
    "unreadable": 1 << 9,
}
"""Bits of `memory_image.flags`."""

PASSED_OVER: tuple[str, ...] = (
    "untouched",
    "not_anonymous",
    "shared_mapping",
    "hugetlb",
    "special",
)
"""Why a page of an image's address space has no row, where its producer says so (ksmdist.passed_over)."""

CLASSES: tuple[str, ...] = (
    "ineligible",
    "zero_mapped_fault",
    "zero_mapped_ksm",
    "volatile",
    "zero",
    "duplicate",
    "unique",
)
"""Classes of a present page, exclusive, in the order in which they are decided."""

KINDS: tuple[str, ...] = ("zero", "same_filled", "other")
"""Kinds of content; they cut across the classes. A page without bytes of its own has none."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column: Arrow type, meaning, unit (None for what is not a number), nullability, flag bits."""

    name: str
    type: pa.DataType
    doc: str
    unit: str | None = None
    nullable: bool = False
    bits: Mapping[str, int] | None = None

    @property
    def field(self) -> pa.Field:
        """The Arrow field, with `doc` and `unit` as its metadata."""
        metadata = {"doc": self.doc} | ({} if self.unit is None else {"unit": self.unit})
        return pa.field(self.name, self.type, nullable=self.nullable, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a table's schema metadata (UTF-8 text); `default` None means it must be given."""

    name: str
    doc: str
    default: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table: where it is kept, in which order its rows stand, and its columns.

    schema: the Arrow schema, with the metadata keys ksmdist.table and ksmdist.version
    """

    name: str
    version: int
    doc: str
    file: str
    sort: tuple[str, ...]
    columns: tuple[Column, ...]
    keys: tuple[Key, ...] = ()
    schema: pa.Schema = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        metadata = {"ksmdist.table": self.name, "ksmdist.version": str(self.version)}
        schema = pa.schema([column.field for column in self.columns], metadata=metadata)
        object.__setattr__(self, "schema", schema)


def _type_name(type_: pa.DataType) -> str:
    """Arrow's own name of a type, without what only Arrow's C++ library adds to it."""
    if pa.types.is_dictionary(type_):
        return f"dictionary<{_type_name(type_.index_type)}, {_type_name(type_.value_type)}>"
    return str(type_)


def render(table: Table) -> dict[str, object]:
    """The published form of a table's schema: plain JSON values, no Arrow and no Python in it."""
    columns = []
    for column in table.columns:
        rendered: dict[str, object] = {
            "name": column.name,
            "type": _type_name(column.type),
            "nullable": column.nullable,
            "unit": column.unit,
            "doc": column.doc,
        }
        if column.bits is not None:
            rendered["bits"] = dict(column.bits)
        columns.append(rendered)
    keys = [
        {"key": key.name, "required": key.default is None, "default": key.default, "doc": key.doc} for key in table.keys
    ]
    return {
        "name": table.name,
        "version": table.version,
        "doc": table.doc,
        "file": table.file,
        "sort": list(table.sort),
        "metadata": keys,
        "columns": columns,
    }


def _pages(name: str, doc: str) -> Column:
    return Column(name, pa.int64(), doc, unit="pages")


_NODE_DOC = "NUMA node of the page's frame, 0 where unknown"

MEMORY_IMAGE = Table(
    name="memory_image",
    version=1,
    doc=(
        "One memory image: a row for each page that is present. No row means absent (never touched, excluded "
        "by the dump's filter, a hole), which is not the same as zero. The file is an Arrow IPC file (random "
        "access format) whose schema metadata has the keys below. Record batches of about 64 MiB, their bodies "
        "not compressed, are read with no copy; a null content has length 0."
    ),
    file="X.arrow",
    sort=("address",),
    columns=(
        Column(
            "address",
            pa.uint64(),
            "page-aligned address in the image's own address space (guest-physical or virtual), ascending, unique",
            unit="bytes",
        ),
        Column(
            "content",
            pa.binary(),
            "the page's bytes, exactly page_size of them; null where the page has none of its own (mapped to the "
            "zero page, swapped)",
            nullable=True,
        ),
        Column(
            "flags",
            pa.uint32(),
            "bits: eligible = KSM may merge it (anonymous private page of a MADV_MERGEABLE mapping, any page of a "
            "guest's RAM); zero_mapped = mapped to the shared zero page; pte_dirty = its page table entry is dirty "
            "(with zero_mapped: KSM placed it, Linux 6.6 and up); ksm = already a KSM page; file = page cache page of "
            "a file mapping; huge = part of a transparent huge page; swapped = swapped out; locked = in a locked "
            "(VM_LOCKED) mapping; exclusive = no other page table entry maps its frame (pagemap bit 56); unreadable = "
            "it was there, and reading it failed (content is null; the run counts it as a hole)",
            unit="bits",
            bits=PAGE_FLAGS,
        ),
        Column("numa_node", pa.int16(), _NODE_DOC, unit="node number"),
        Column(
            "frame",
            pa.uint64(),
            "host page frame number, where known: two rows with one frame already share memory (fork)",
            unit="page frame number",
            nullable=True,
        ),
        Column(
            "region",
            pa.dictionary(pa.int32(), pa.string()),
            "name of the mapping: [heap], [stack], a path, a guest's RAM block",
            nullable=True,
        ),
    ),
    keys=(
        Key("ksmdist.table", "memory_image"),
        Key("ksmdist.version", "1"),
        Key("ksmdist.page_size", "bytes in a page, decimal"),
        Key("ksmdist.image_id", "name of the image, unique in a run; without it the file's name is taken", ""),
        Key("ksmdist.kind", "guest, process, container or kernel", "guest"),
        Key("ksmdist.host", "host the image was taken on", ""),
        Key("ksmdist.tenant", "owner of the image, for sharing between and within tenants", ""),
        Key("ksmdist.captured_at", "when it was taken, RFC 3339", ""),
        Key("ksmdist.pass", "number of the pass, where one image is taken several times, decimal", "0"),
        Key(
            "ksmdist.source",
            'what it was made from, a JSON object {"format", "producer", "filter_level"}; filter_level names what '
            "the producer left out, empty if nothing",
            "{}",
        ),
        Key("ksmdist.pages_absent", "pages of the address space that have no row, decimal", "0"),
        Key(
            "ksmdist.scan_order",
            "place among the images in the order in which KSM scans them, decimal: a process's start in clock ticks "
            "since boot, as KSM takes processes in the order in which they were marked. Alike: by image_id",
            "0",
        ),
        Key(
            "ksmdist.passed_over",
            'pages that have no row, by mapping: a JSON array of objects {"region", "reason", "pages"}; reason is '
            "untouched (private mapping, never written or read), not_anonymous (a file's page), shared_mapping, "
            "hugetlb or special (VM_IO, VM_PFNMAP, VM_MIXEDMAP, VM_DONTEXPAND, VM_DROPPABLE: KSM refuses them)",
            "[]",
        ),
        Key(
            "ksmdist.ksm_stat",
            "a process's /proc/PID/ksm_stat when the image was taken, a JSON object of names and numbers or texts",
            "{}",
        ),
    ),
)

_DIGEST = Column("digest", pa.binary(16), "xxh3_128 of the page's bytes, seed 0, big-endian (canonical form)")
_FILL_WORD = Column(
    "fill_word",
    pa.uint64(),
    "the little-endian 64-bit word that fills the page, 0 for zero pages; null if it is not same-filled",
    unit="word",
    nullable=True,
)

PAGE = Table(
    name="page",
    version=1,
    doc="A row for each page of an image, as it comes out of hashing. Kept in memory only.",
    file="",
    sort=("address",),
    columns=(
        Column("address", pa.uint64(), "page-aligned address in the image", unit="bytes"),
        Column("flags", pa.uint32(), "as in memory_image", unit="bits", bits=PAGE_FLAGS),
        Column("numa_node", pa.int16(), _NODE_DOC, unit="node number"),
        replace(_DIGEST, nullable=True, doc=_DIGEST.doc + "; null where the page has no bytes of its own"),
        _FILL_WORD,
    ),
)

SHARD_CONTENT = Table(
    name="shard_content",
    version=1,
    doc=(
        "What travels from scan to merge: a row for each (digest, image, NUMA node, eligible) of the pages scanned "
        "together. Kept in memory and in Ray's object store only; never page bytes."
    ),
    file="",
    sort=("digest", "image", "numa_node", "eligible"),
    columns=(
        _DIGEST,
        Column("image", pa.int32(), "place of the image in the run's list, sorted by image id", unit="index"),
        Column("numa_node", pa.int16(), _NODE_DOC, unit="node number"),
        Column("eligible", pa.bool_(), "whether KSM may merge these pages"),
        _pages("pages", "pages with this content"),
        Column("first_address", pa.uint64(), "lowest address of them", unit="bytes"),
        _FILL_WORD,
    ),
)

STABLE_TREE = Table(
    name="stable_tree",
    version=1,
    doc=(
        "A row for each content that two or more eligible pages hold: what KSM's stable tree can hold. One file a "
        "range of digests; the files in the order of their names are the whole tree."
    ),
    file="stable_tree/*.parquet",
    sort=("digest",),
    columns=(
        _DIGEST,
        Column("kind", pa.string(), "zero | same_filled (one 64-bit word repeated) | other"),
        _FILL_WORD,
        _pages("copies", "eligible pages with this content, in all images and on all nodes"),
        Column("images", pa.int32(), "images that hold it", unit="images"),
        Column("nodes", pa.int32(), "NUMA nodes that hold it", unit="nodes"),
        Column("first_image", pa.string(), "image_id of the first image, by image_id, that holds it"),
        Column("first_address", pa.uint64(), "its lowest address in that image", unit="bytes"),
    ),
)

SPECTRUM = Table(
    name="spectrum",
    version=1,
    doc=(
        "The sharing spectrum: how many contents have n copies among the eligible pages. All counters follow from "
        "it. Rows with numa_node null count a content over all nodes (merge_across_nodes=1); rows with a node count "
        "it there alone (merge_across_nodes=0). Do not add the two."
    ),
    file="spectrum.parquet",
    sort=("numa_node", "kind", "copies"),
    columns=(
        Column("numa_node", pa.int16(), "NUMA node, null: all nodes together", unit="node number", nullable=True),
        Column("kind", pa.string(), "zero | same_filled | other"),
        _pages("copies", "copies that each of these contents has"),
        Column("contents", pa.int64(), "contents with that many copies", unit="contents"),
    ),
)

_CLASS_DOCS = {
    "ineligible": "KSM may not merge it: not marked, not anonymous, or swapped out",
    "zero_mapped_fault": "mapped to the shared zero page by a read fault; costs no memory",
    "zero_mapped_ksm": "mapped to the shared zero page by KSM; counted as a zero page in every prediction",
    "volatile": "changed between two passes; 0 where there was one pass",
    "zero": "full of zeros, in a frame of its own",
    "duplicate": "not zero; some other eligible page of the run has the same content",
    "unique": "not zero; no other eligible page of the run has this content",
}
_KIND_DOCS = {
    "zero": "pages with bytes of their own, all zero",
    "same_filled": "pages with bytes of their own that repeat one 64-bit word other than zero",
    "other": "all other pages with bytes of their own",
}

IMAGES = Table(
    name="images",
    version=1,
    doc="A row for each image: its pages by class and kind, and what it shares.",
    file="images.parquet",
    sort=("image_id",),
    columns=(
        Column("image_id", pa.string(), "name of the image, unique in the run"),
        Column("kind", pa.string(), "guest | process | container | kernel"),
        Column("format", pa.string(), "format it was read from"),
        Column("host", pa.string(), "host it was taken on, empty if unknown"),
        Column("tenant", pa.string(), "its owner, empty if unknown"),
        _pages("total", "pages present and read: the sum of the classes below"),
        _pages("absent", "pages with no bytes in the image: never touched, left out by the dump, a hole in the file"),
        _pages("unreadable", "pages that should be in the image but could not be read: the sum over its holes"),
        *(_pages(name, _CLASS_DOCS[name]) for name in CLASSES),
        *(_pages(f"kind_{name}", _KIND_DOCS[name]) for name in KINDS),
        _pages("shared_within", "non-zero eligible pages whose content this image holds twice or more"),
        _pages("shared_with_others", "non-zero eligible pages whose content another image holds too"),
    ),
)

HOLES = Table(
    name="holes",
    version=1,
    doc="A row for each range of addresses that should be in an image but could not be read.",
    file="holes.parquet",
    sort=("image_id", "address"),
    columns=(
        Column("image_id", pa.string(), "name of the image"),
        Column("address", pa.uint64(), "first address of the range, page-aligned", unit="bytes"),
        _pages("pages", "length of the range"),
        Column(
            "reason",
            pa.string(),
            "truncated: the file ends before it | unreadable: reading it failed | partial_page: the image has only "
            "some of the page's bytes",
        ),
    ),
)

COUNTERS = Table(
    name="counters",
    version=1,
    doc=(
        "One row: the kernel's counters for this run's settings, as /sys/kernel/mm/ksm would show them once KSM has "
        "converged on static memory, and ours."
    ),
    file="counters.parquet",
    sort=(),
    columns=(
        Column("page_size", pa.int64(), "size of a page", unit="bytes"),
        Column("use_zero_pages", pa.bool_(), "setting: zero pages are mapped to the shared zero page"),
        Column("max_page_sharing", pa.int64(), "setting: most pages that share one KSM page", unit="pages"),
        Column("merge_across_nodes", pa.bool_(), "setting: pages of different NUMA nodes may be merged"),
        _pages("pages_shared", "KSM pages (stable nodes) in use"),
        _pages("pages_sharing", "pages that share them beyond the first of each: frames saved"),
        _pages("pages_unshared", "pages scanned but with no partner"),
        _pages("pages_volatile", "pages that changed between passes"),
        _pages("ksm_zero_pages", "pages mapped to the shared zero page by KSM"),
        Column("stable_node_chains", pa.int64(), "contents with more than one stable node", unit="contents"),
        Column("stable_node_dups", pa.int64(), "stable nodes in those chains", unit="stable nodes"),
        Column("rmap_items", pa.int64(), "rmap items KSM keeps, 64 bytes each", unit="rmap items"),
        Column(
            "general_profit",
            pa.int64(),
            "(pages_sharing + ksm_zero_pages) x page_size - rmap_items x 64, with its sign",
            unit="bytes",
        ),
        _pages("zero_merges", "zero pages that end up merged, with each other or with the zero page"),
        _pages("content_merges", "other pages that end up merged"),
        Column(
            "saved_bytes",
            pa.int64(),
            "merged pages less the frames kept for them, in bytes; KSM's own cost not taken off",
            unit="bytes",
        ),
    ),
)

TABLES: Mapping[str, Table] = {
    table.name: table for table in (MEMORY_IMAGE, PAGE, SHARD_CONTENT, STABLE_TREE, SPECTRUM, IMAGES, HOLES, COUNTERS)
}
"""All tables by name."""
