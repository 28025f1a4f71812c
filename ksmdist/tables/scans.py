"""Tables of images, and of what a scan finds in them: the same for any settings of KSM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa

from ksmdist.schema import Column, Key, Table, pages

__all__ = [
    "CANDIDATE",
    "CHECKSUMS",
    "CLASSES",
    "DIGEST",
    "FILL_WORD",
    "HOLES",
    "IMAGES",
    "IMAGE_COLUMN",
    "IMAGE_SPECTRUM",
    "KINDS",
    "MAPPINGS",
    "MEMORY_IMAGE",
    "NODE_OR_ALL",
    "PAGE",
    "PAGE_FLAGS",
    "PASSED_OVER",
    "REASONS",
    "REGIONS",
    "SHARD_CONTENT",
    "SPECTRUM",
    "STABLE_TREE",
    "WITNESS",
    "ZERO_COLORS",
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


NODE_OR_ALL = Column("numa_node", pa.int16(), "NUMA node, null: all nodes together", unit="node number", nullable=True)
IMAGE_COLUMN = Column("image", pa.int32(), "the image's scan_order in table images", unit="index")
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
        Key("ksmdist.salt", "images with another salt share nothing with it under policy salt; empty: none", ""),
        Key("ksmdist.captured_at", "when it was taken, RFC 3339", ""),
        Key("ksmdist.pass", "number of the pass, where one image is taken several times, decimal", "0"),
        Key(
            "ksmdist.source",
            'what it was made from, a JSON object {"format", "producer", "filter_level", "pages_excluded", "span", '
            '"caveats"}; filter_level names what the producer left out, empty if nothing; pages_excluded: of '
            "pages_absent, those; span: size of a raw file, 0 of others; caveats: what its counts do not show",
            "{}",
        ),
        Key("ksmdist.pages_absent", "pages of the address space that have no row, decimal", "0"),
        Key(
            "ksmdist.scan_order",
            "place among the images in the order in which KSM scans them, decimal: processes by when they were marked, "
            "for which their starts stand. Alike: by image_id",
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

DIGEST = Column(
    "digest",
    pa.binary(16),
    "xxh3_128 of the page's bytes, big-endian (canonical form), with the seed that the site key gives (run.json: key; "
    "0 without one). Of contents whose digests collide, the last half is BLAKE2b's",
)
FILL_WORD = Column(
    "fill_word",
    pa.uint64(),
    "the little-endian 64-bit word that fills the page, 0 for zero pages; null if it is not same-filled",
    unit="word",
    nullable=True,
)

_REGION = Column("region", pa.int32(), "place in the image's list of regions, -1 for none", unit="index")

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
        Column(
            "frame",
            pa.uint64(),
            "as in memory_image, where other page table entries may map it too; null where it is exclusive, unknown or "
            "a KSM page's, which counts as a page of its own again",
            unit="page frame number",
            nullable=True,
        ),
        _REGION,
        replace(DIGEST, nullable=True, doc=DIGEST.doc + "; null where the page has no bytes of its own"),
        FILL_WORD,
    ),
)

SHARD_CONTENT = Table(
    name="shard_content",
    version=2,
    doc=(
        "What travels from scan to merge: a row for each (digest, image, NUMA node, eligible, huge, volatile, aligned "
        "frame of the size of a huge page) of the pages scanned together; a row for each page of a content that has a "
        "frame here which fork may share. Kept in files of an unfinished run only; never page bytes."
    ),
    file="",
    sort=("digest", "image", "numa_node", "eligible", "huge", "volatile", "first_address"),
    columns=(
        DIGEST,
        IMAGE_COLUMN,
        Column("numa_node", pa.int16(), _NODE_DOC, unit="node number"),
        Column("eligible", pa.bool_(), "whether KSM may merge these pages"),
        Column(
            "huge",
            pa.int64(),
            "number of the transparent huge page, not locked, that these pages are part of: address / size of a huge "
            "page, from 1; 0: of none, and for other contents in huge pages that have no or several zero pages",
            unit="index",
        ),
        Column("thp", pa.bool_(), "whether the image marks these pages as part of a transparent huge page"),
        Column("volatile", pa.bool_(), "whether these pages changed since the pass before"),
        pages("pages", "pages with this content, in one aligned frame of the size of a huge page"),
        Column("first_address", pa.uint64(), "lowest address of them", unit="bytes"),
        Column("last_page", pa.uint16(), "the last of them by address, as pages into that aligned frame", unit="pages"),
        replace(_REGION, doc="region of the last of them by address, as a place in the image's list; -1 for none"),
        Column(
            "frame",
            pa.uint64(),
            "the frame of the one page, where others may map it too",
            unit="page frame number",
            nullable=True,
        ),
        FILL_WORD,
    ),
)

CANDIDATE = Table(
    name="candidate",
    version=1,
    doc=(
        "Pages that are to be looked at again: of each content that two or more eligible pages seem to hold, a page of "
        "each task that holds it. Kept in files of an unfinished run only."
    ),
    file="",
    sort=("digest", "image", "address"),
    columns=(
        DIGEST,
        IMAGE_COLUMN,
        Column("address", pa.uint64(), "of the page", unit="bytes"),
    ),
)

WITNESS = Table(
    name="witness",
    version=1,
    doc=(
        "What another hash says of candidates: rows of one digest and several witnesses are several contents. Kept in "
        "files of an unfinished run only."
    ),
    file="",
    sort=("digest",),
    columns=(
        DIGEST,
        Column(
            "witness",
            pa.binary(16),
            "mmh3_x64_128 of the page's bytes, with the seed that the site key gives; null: it could not be read again",
            nullable=True,
        ),
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
        DIGEST,
        Column("kind", pa.string(), "zero | same_filled (one 64-bit word repeated) | other"),
        FILL_WORD,
        pages("copies", "eligible pages with this content, in all images and on all nodes"),
        Column("images", pa.int32(), "images that hold it", unit="images"),
        Column("nodes", pa.int32(), "NUMA nodes that hold it", unit="nodes"),
        Column("first_image", pa.string(), "image_id of the first image, in scan order, that holds it"),
        Column("first_address", pa.uint64(), "its lowest address in that image", unit="bytes"),
    ),
)


_PASSED_OVER_DOCS = {
    "untouched": "pages of private mappings that were never touched: no memory, no row",
    "not_anonymous": "pages of a file in private mappings, not written to: not anonymous",
    "shared_mapping": "resident pages of shared mappings (MAP_SHARED, memfd): MADV_MERGEABLE does nothing there",
    "hugetlb": "resident pages of hugetlbfs mappings: KSM refuses them",
    "special": "pages of mappings that KSM refuses (VM_IO, VM_PFNMAP, VM_MIXEDMAP, VM_DONTEXPAND, VM_DROPPABLE)",
}
REASONS: tuple[str, ...] = (
    "file",
    "swapped",
    "not_marked",
    "zero_mapped_fault",
    "zero_mapped_ksm",
    "volatile",
    "huge_zero",
    "candidates",
)
"""What a page that has a row is to KSM, by itself."""
_REASON_DOCS = {
    "file": "pages with a row that are a file's: not anonymous",
    "swapped": "pages swapped out, or that have no bytes in the image and do not say why",
    "not_marked": "anonymous pages in mappings that are not marked mergeable",
    "zero_mapped_fault": "mapped to the shared zero page by a read fault: they cost no memory",
    "zero_mapped_ksm": "mapped to the shared zero page by KSM: counted as zero pages in every prediction",
    "volatile": "changed between two passes",
    "huge_zero": "zero pages in a transparent huge page that is not locked: candidates until KSM splits it",
    "candidates": "all other pages that KSM compares",
}

SPECTRUM = Table(
    name="spectrum",
    version=1,
    doc=(
        "The sharing spectrum: how many contents have n copies among the eligible pages. All counters follow from "
        "it. Rows with numa_node null count a content over all nodes (merge_across_nodes=1); rows with a node count "
        "it there alone (merge_across_nodes=0). Do not add the two."
    ),
    file="spectrum.parquet",
    sort=("numa_node", "kind", "copies", "frames"),
    columns=(
        NODE_OR_ALL,
        Column("kind", pa.string(), "zero | same_filled | other"),
        pages("copies", "copies that each of these contents has"),
        Column(
            "frames",
            pa.int64(),
            "distinct frames those copies have: fewer where fork shares some",
            unit="frames",
        ),
        Column("contents", pa.int64(), "contents with that many copies", unit="contents"),
    ),
)

IMAGE_SPECTRUM = Table(
    name="image_spectrum",
    version=2,
    doc=(
        "Where the copies of a content lie in scan order: for contents other than zero that fork does not share, how "
        "many have `copies` copies, of which `here` are this image's, after `before` of images scanned earlier. With "
        "spectrum and mappings, all that a prediction for each process needs. numa_node as in spectrum; "
        "where all pages are on one node, only rows over all nodes are there."
    ),
    file="image_spectrum.parquet",
    sort=("numa_node", "image", "copies", "before", "here", "region"),
    columns=(
        NODE_OR_ALL,
        IMAGE_COLUMN,
        pages("copies", "copies that each of these contents has, in all images"),
        pages("before", "copies in images scanned before this one"),
        pages("here", "copies in this image"),
        Column(
            "region",
            pa.string(),
            "region of the content's last copy, where that is this image's; null elsewhere or where it has no name",
            nullable=True,
        ),
        Column("contents", pa.int64(), "contents of which this is true", unit="contents"),
    ),
)

MAPPINGS = Table(
    name="mappings",
    version=1,
    doc=(
        "The mappings, in scan order, of the zero content and of each content that has a frame which fork shares: what "
        "KSM makes of these depends on their order. Contents that are alike in it are one pattern. Neighbours in scan "
        "order that have frames of their own are one row."
    ),
    file="mappings.parquet",
    sort=("pattern",),
    columns=(
        Column("pattern", pa.int32(), "number of the pattern; its rows stand in scan order", unit="index"),
        Column("contents", pa.int64(), "contents with this pattern", unit="contents"),
        Column("kind", pa.string(), "zero | same_filled | other"),
        IMAGE_COLUMN,
        Column("region", pa.string(), "region of the last of these pages; null for none", nullable=True),
        Column("numa_node", pa.int16(), _NODE_DOC, unit="node number"),
        Column(
            "huge",
            pa.int64(),
            "zero pages in a transparent huge page that is not locked: its number (address / size, from 1) + 1 where "
            "it has no other zero page, no other content splits it, and all zero pages are in huge pages; else 1. "
            "0: all other pages",
            unit="code",
        ),
        Column(
            "frame",
            pa.int32(),
            "number, within the pattern, of the frame that they share with other rows; null: frames of their own",
            unit="index",
            nullable=True,
        ),
        pages("pages", "mappings in this row"),
    ),
)

REGIONS = Table(
    name="regions",
    version=1,
    doc="A row for each image and region: why pages are not merged, as far as no other page is needed to say so.",
    file="regions.parquet",
    sort=("image", "region"),
    columns=(
        IMAGE_COLUMN,
        Column("region", pa.string(), "name of the mapping; null where the image names none", nullable=True),
        *(pages(name, _PASSED_OVER_DOCS[name]) for name in PASSED_OVER),
        pages("absent", "pages without a row for which the image gives no reason: untouched, filtered out, a hole"),
        *(pages(name, _REASON_DOCS[name]) for name in REASONS),
    ),
)

ZERO_COLORS = Table(
    name="zero_colors",
    version=1,
    doc=(
        "Zero pages by the colour of the shared zero page that their address chooses, (address / page_size) modulo the "
        "number of colours (arch/s390/include/asm/pgtable.h, ZERO_PAGE); one row where there is one zero page."
    ),
    file="zero_colors.parquet",
    sort=("color",),
    columns=(
        Column("color", pa.int32(), "number of the zero page", unit="index"),
        pages("zero", "eligible pages full of zeros in frames of their own, and those KSM had placed"),
        pages("zero_mapped_fault", "pages that a read fault has mapped to it"),
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

CHECKSUMS = Table(
    name="checksums",
    version=1,
    doc=(
        "Each page's checksum as ksmd computes it (mm/ksm.c, calc_checksum), of every page with bytes of its own: kept "
        "where a run has --checksums or an earlier pass, so that a later one can say what changed. One file a task."
    ),
    file="checksums/*.parquet",
    sort=("image", "address"),
    columns=(
        IMAGE_COLUMN,
        Column("address", pa.uint64(), "page-aligned address in the image", unit="bytes"),
        Column("checksum", pa.uint32(), "low 32 bits of xxh64 of the page's bytes, seed 0", unit="checksum"),
        Column("age", pa.int32(), "passes in a row, before this one, that had the same checksum", unit="passes"),
    ),
)

IMAGES = Table(
    name="images",
    version=5,
    doc="A row for each image: its pages by class and kind, and what it shares.",
    file="images.parquet",
    sort=("scan_order",),
    columns=(
        Column(
            "scan_order",
            pa.int32(),
            "place in the order in which KSM scans the images: as they say themselves, alike by image_id",
            unit="index",
        ),
        Column("image_id", pa.string(), "name of the image, unique in the run"),
        Column("kind", pa.string(), "guest | process | container | kernel"),
        Column("format", pa.string(), "format it was read from"),
        Column("producer", pa.string(), "what wrote the image, as far as it says; empty if unknown"),
        Column(
            "filter_level",
            pa.string(),
            "what the producer left out or made up, so that the counts are not of the whole memory; empty if nothing",
        ),
        Column("host", pa.string(), "host it was taken on, empty if unknown"),
        Column("tenant", pa.string(), "its owner, empty if unknown"),
        Column(
            "salt",
            pa.int32(),
            "group of the images with its salt, from 1 in scan order; 0: it has none. The salt itself is not kept",
            unit="index",
        ),
        pages("total", "pages present and read: the sum of the classes below"),
        Column("bytes", pa.int64(), "total, in bytes", unit="bytes"),
        pages("absent", "pages with no bytes in the image: never touched, left out by the dump, a hole in the file"),
        pages("excluded", "of the absent ones, pages that the producer's filter left out, as far as the image says"),
        pages(
            "unreadable",
            "pages that should be in the image but could not be read: the sum over its holes; null if the whole image "
            "was out of reach, so that its size is not known",
            nullable=True,
        ),
        *(pages(name, _CLASS_DOCS[name]) for name in CLASSES),
        *(pages(f"kind_{name}", _KIND_DOCS[name]) for name in KINDS),
        pages("shared_within", "non-zero eligible pages whose content this image holds twice or more"),
        pages("shared_with_others", "non-zero eligible pages whose content another image holds too"),
        pages("frames_known", "eligible pages with bytes of their own whose frame the image names"),
    ),
)

HOLES = Table(
    name="holes",
    version=3,
    doc="A row for each range of addresses that should be in an image but could not be read.",
    file="holes.parquet",
    sort=("image_id", "address"),
    columns=(
        Column("image_id", pa.string(), "name of the image"),
        Column("address", pa.uint64(), "first address of the range, page-aligned", unit="bytes"),
        pages("pages", "length of the range; null for a whole image whose size is not known", nullable=True),
        Column(
            "reason",
            pa.string(),
            "truncated: the file ends before it | unreadable: reading it failed | partial_page: the image has only "
            "some of the page's bytes | damaged: its bytes cannot be unpacked | missing: another file that has it is "
            "not there | no_node: the node that has the image is not in the cluster",
        ),
    ),
)
