"""Tables that answer what analysts ask of a run: what is merged, by whom, under which policy, at what cost."""

from __future__ import annotations

import pyarrow as pa

from ksmdist.schema import Column, Table, count, pages
from ksmdist.tables.scans import DIGEST, FILL_WORD, IMAGE_COLUMN, NODE_OR_ALL

__all__ = [
    "CONTENTS",
    "CUMULATIVE",
    "DIFF_CONTENTS",
    "DIFF_IMAGES",
    "EXPOSURE",
    "HUGE",
    "HUGE_FRAME",
    "IMAGE_SET",
    "PASSES",
    "POLICIES",
    "POLICY",
    "POLICY_SPECTRUM",
    "RARE_CONTENT",
    "SCOPES",
    "SHARING",
    "SPECTRUM_BUCKETS",
    "TENANT_SET",
    "WHATS",
]

_IMAGE_ID = Column("image_id", pa.string(), "name of the image")

WHATS: tuple[str, ...] = (
    "zero",
    "fill_word",
    "elf",
    "page_table",
    "text",
    "code",
    "low_entropy",
    "high_entropy",
    "data",
)
"""What a content is, decided in this order (contents.py)."""

CONTENTS = Table(
    name="contents",
    version=1,
    doc=(
        "The contents with most copies among the eligible pages, and what each is: the setting `contents` says how "
        "many. Its first page is read again for that, and its digest compared; no page bytes are kept."
    ),
    file="contents.parquet",
    sort=("rank",),
    columns=(
        Column("rank", pa.int32(), "place by copies, from 1; of equals the lower digest first", unit="index"),
        DIGEST,
        Column("kind", pa.string(), "zero | same_filled | other"),
        FILL_WORD,
        Column(
            "what",
            pa.string(),
            "what it looks like: "
            + " | ".join(WHATS)
            + " (a guess for all but zero and fill_word); null: another, whose page could not be read again",
            nullable=True,
        ),
        Column("meaning", pa.string(), "what is known of it, in words; null: nothing more", nullable=True),
        pages("copies", "eligible pages with this content, in all images and on all nodes"),
        Column("images", pa.int32(), "images that hold it", unit="images"),
        Column("tenants", pa.int32(), "tenants whose images hold it", unit="tenants"),
        Column("nodes", pa.int32(), "NUMA nodes that hold it", unit="nodes"),
        Column("first_image", pa.string(), "image_id of the first image, in scan order, that holds it"),
        Column("first_address", pa.uint64(), "its lowest address in that image", unit="bytes"),
        Column(
            "region", pa.string(), "mapping that address is in; null: it has no name, or was not read", nullable=True
        ),
    ),
)

SHARING = Table(
    name="sharing",
    version=1,
    doc=(
        "Who shares with whom: a row for each two images that hold a content both, other than zero, and one for each "
        "image that holds a content twice (image = other). Pairs that share nothing have no row. A content held by "
        "three images is in three rows: do not add rows."
    ),
    file="sharing.parquet",
    sort=("image", "other"),
    columns=(
        IMAGE_COLUMN,
        _IMAGE_ID,
        Column("other", pa.int32(), "scan_order of the other image, never lower than image", unit="index"),
        Column("other_id", pa.string(), "name of the other image"),
        Column(
            "contents", pa.int64(), "contents that both hold; of image = other: that it holds twice", unit="contents"
        ),
        pages("pages", "the image's pages with these contents"),
        pages("other_pages", "the other image's pages with these contents"),
    ),
)

SCOPES: tuple[str, ...] = ("image", "tenant", "salt", "all")
"""Among whose pages a content is merged: of an image, a tenant, the images with one salt, all."""

POLICY_SPECTRUM = Table(
    name="policy_spectrum",
    version=2,
    doc=(
        "The sharing spectrum where pages merge only within an image, within a tenant, among the images with one salt, "
        "or all: how many contents of one image (or tenant, or salt) have n copies there. Contents of table mappings "
        "(zero, those that fork shares) are not in it: their mappings name the image. numa_node as in spectrum."
    ),
    file="policy_spectrum.parquet",
    sort=("numa_node", "scope", "kind", "copies"),
    columns=(
        NODE_OR_ALL,
        Column("scope", pa.string(), " | ".join(SCOPES)),
        Column("kind", pa.string(), "same_filled | other"),
        pages("copies", "copies in one image (or tenant, or salt, or all)"),
        Column(
            "contents",
            pa.int64(),
            "contents with that many, counted in each image (or tenant, or salt)",
            unit="contents",
        ),
    ),
)

POLICIES: tuple[str, ...] = ("never", "zero", "same_filled", "image", "tenant", "salt", "all")
"""The ladder of what may be merged: of `never`, `zero`, `same_filled`, `all` each is a superset of the one before, and
`image` is a subset of `tenant` and of `salt`. A tenant's images may have several salts: these two have no order."""

POLICY = Table(
    name="policy",
    version=2,
    doc=(
        "What is saved if merging is allowed never, for zero pages only, for pages filled with one word only (zero "
        "among them), within an image, within a tenant (images without a tenant are one tenant), among the images with "
        "one salt as ESX has it (images without a salt are one group), or all; for this run's settings. The last is "
        "counters.saved_bytes. With use_zero_pages the zero page is the kernel's own, so that mapping it shares "
        "nothing between images."
    ),
    file="policy.parquet",
    sort=("level",),
    columns=(
        Column("level", pa.int32(), "step of the ladder, from 0", unit="index"),
        Column("policy", pa.string(), " | ".join(POLICIES)),
        pages("merged_pages", "pages that end up merged, the first of each KSM page too"),
        Column("frames_kept", pa.int64(), "KSM pages kept for them", unit="frames"),
        pages("saved_pages", "merged pages less frames kept"),
        pages("saved_zero", "of them, zero pages"),
        pages("saved_same_filled", "of them, pages filled with one word other than zero"),
        pages("saved_other", "of them, all other pages"),
        Column("saved_bytes", pa.int64(), "saved pages in bytes; KSM's own cost is not taken off", unit="bytes"),
        Column("saved_gib", pa.float64(), "saved_bytes / 2^30", unit="GiB"),
        Column(
            "cost_bytes",
            pa.int64(),
            "what the policy costs: saved_bytes of `all` less its own; below 0 where fork's frames make more merge",
            unit="bytes",
        ),
        Column("cost_gib", pa.float64(), "cost_bytes / 2^30", unit="GiB"),
    ),
)

EXPOSURE = Table(
    name="exposure",
    version=1,
    doc=(
        "What each two tenants would have on the same KSM pages: a row for two tenants and a kind of which both hold a "
        "content that may merge, under this run's settings and once nothing changes any more. Images without a tenant "
        "are one tenant, of empty name; with fewer than two tenants there is no row. With merge_across_nodes off a "
        "content counts once for each NUMA node that both hold it on; with use_zero_pages there is no row for zero "
        "pages. A content of three tenants is in three rows, so rows must not be added, but for the columns rare_*. "
        "docs/exposure.md says what each number is worth to an attacker."
    ),
    file="exposure.parquet",
    sort=("tenant", "other"),
    columns=(
        Column("tenant", pa.string(), "a tenant, as images.tenant has it; empty: the images without one"),
        Column("other", pa.string(), "the other, whose name is greater (by code points)"),
        Column("kind", pa.string(), "zero | same_filled | other, in this order"),
        count("contents", "contents that both hold", "contents"),
        pages("pages", "the tenant's pages with these contents"),
        pages("other_pages", "the other's pages with these contents"),
        count(
            "near_contents",
            "of contents, those of whose pages, all tenants together, max_page_sharing leaves one over once at most an "
            "eighth of max_page_sharing more are there: (1 - copies) mod max_page_sharing <= max_page_sharing / 8",
            "contents",
        ),
        count("rare_contents", "of contents, those that no third tenant holds", "contents"),
        pages("rare_pages", "the tenant's pages with these"),
        pages("rare_other_pages", "the other's pages with these"),
        count(
            "rare_looked_at",
            "of rare_contents, those whose entropy was asked for: all, or those with the lowest digests of all rows "
            "where there are more than 16,384 of kind other; the sum of the next four",
            "contents",
        ),
        count("rare_low", "of these, contents below 4 bits of entropy a byte", "contents"),
        count("rare_middle", "from 4 bits a byte to 7.2", "contents"),
        count("rare_high", "from 7.2 bits a byte on: compressed, encrypted, random, keys among them", "contents"),
        count("rare_unknown", "those whose first page could not be read again", "contents"),
        pages("salt_pages", "of pages, those that merge with the other's even if only images with one salt merge"),
        pages("salt_other_pages", "of other_pages, those that merge with the tenant's even so"),
    ),
)

SPECTRUM_BUCKETS = Table(
    name="spectrum_buckets",
    version=1,
    doc=(
        "The sharing spectrum in buckets of powers of two, as `zdb -S` prints reference counts: contents with `copies` "
        "to 2 x copies - 1 copies, over all nodes."
    ),
    file="spectrum_buckets.parquet",
    sort=("copies",),
    columns=(
        pages("copies", "fewest copies in the bucket: 1, 2, 4, 8 ..."),
        Column("kind", pa.string(), "zero | same_filled | other"),
        Column("contents", pa.int64(), "contents in it (zdb: allocated)", unit="contents"),
        pages("pages", "pages with these contents (zdb: referenced)"),
        Column("contents_bytes", pa.int64(), "contents x page size", unit="bytes"),
        Column("pages_bytes", pa.int64(), "pages x page size", unit="bytes"),
    ),
)

CUMULATIVE = Table(
    name="cumulative",
    version=1,
    doc=(
        "Images added one after the other in scan order: what each adds. Pages are eligible pages; a content is kept "
        "once, whatever max_page_sharing is."
    ),
    file="cumulative.parquet",
    sort=("image",),
    columns=(
        IMAGE_COLUMN,
        _IMAGE_ID,
        pages("pages", "eligible pages of the image, zero pages too"),
        pages("zero", "of them, zero pages"),
        Column("contents_added", pa.int64(), "contents that no image before it holds", unit="contents"),
        pages("pages_known", "its pages whose content an image before it holds"),
        pages("total_pages", "pages of all images so far"),
        Column("total_contents", pa.int64(), "contents of all images so far", unit="contents"),
        pages("saved_pages", "total_pages less total_contents"),
        Column("saved_bytes", pa.int64(), "saved_pages in bytes", unit="bytes"),
    ),
)

HUGE = Table(
    name="huge",
    version=1,
    doc=(
        "Aligned frames of the size of a huge page (2 MiB where pages are 4 KiB), by how many of their pages are zero "
        "or have a copy somewhere, which may merge: KSM splits a huge page as soon as one page of it does. A zero page "
        "that is the only one, or copies on several NUMA nodes with merge_across_nodes off, count here and do not "
        "merge. A row for each image and bucket of powers of two."
    ),
    file="huge.parquet",
    sort=("image", "mergeable"),
    columns=(
        IMAGE_COLUMN,
        _IMAGE_ID,
        pages("mergeable", "fewest pages of a frame in this bucket that may merge: 0, 1, 2, 4 ... all of it"),
        Column("frames", pa.int64(), "frames with so many, of those with an eligible page", unit="huge pages"),
        Column("huge_frames", pa.int64(), "of them, frames that the image marks as huge pages", unit="huge pages"),
        Column("zero_frames", pa.int64(), "of them, frames that are full of zero pages", unit="huge pages"),
        pages("pages", "eligible pages in these frames"),
        pages("mergeable_pages", "of them, zero pages and pages whose content has two copies or more"),
        pages("zero_pages", "of them, zero pages"),
    ),
)

IMAGE_SET = Table(
    name="image_set",
    version=1,
    doc=(
        "Between merge and relate: contents other than zero by the set of images that hold them, a row a member. The "
        "same set may come several times. Kept in files of an unfinished run only."
    ),
    file="",
    sort=("set", "image"),
    columns=(
        Column("set", pa.int64(), "number of the set in this file", unit="index"),
        IMAGE_COLUMN,
        pages("pages", "the image's pages with these contents"),
        Column("contents", pa.int64(), "contents held by just these images", unit="contents"),
    ),
)

TENANT_SET = Table(
    name="tenant_set",
    version=1,
    doc=(
        "Between merge and expose: contents by the set of tenants that hold them, a row a member. The same set may "
        "come several times. Kept in files of an unfinished run only."
    ),
    file="",
    sort=("set", "tenant"),
    columns=(
        Column("set", pa.int64(), "number of the set in this file", unit="index"),
        Column("tenant", pa.int32(), "number of the tenant, by name", unit="index"),
        pages("pages", "the tenant's pages with these contents"),
        Column("contents", pa.int64(), "contents held by just these tenants", unit="contents"),
        Column("kind", pa.int8(), "0 zero, 1 same_filled, 2 other", unit="index"),
        Column("near", pa.bool_(), "their copies come near max_page_sharing: exposure.near_contents"),
        Column("salted", pa.bool_(), "a content is one for each salt; false: one whatever the salts"),
    ),
)

RARE_CONTENT = Table(
    name="rare_content",
    version=1,
    doc=(
        "Between merge and expose: contents of kind other that just two tenants hold, those with the lowest digests of "
        "a range. Kept in files of an unfinished run only."
    ),
    file="",
    sort=("digest",),
    columns=(
        DIGEST,
        IMAGE_COLUMN,
        Column("address", pa.uint64(), "its lowest address in that image, the first that holds it", unit="bytes"),
        Column("tenant", pa.int32(), "number of the one tenant, by name", unit="index"),
        Column("other", pa.int32(), "number of the other, greater", unit="index"),
    ),
)

HUGE_FRAME = Table(
    name="huge_frame",
    version=1,
    doc=(
        "Between merge and relate: aligned frames of the size of a huge page, a row for each that has eligible pages "
        "in a range of digests. Kept in files of an unfinished run only."
    ),
    file="",
    sort=("image", "number"),
    columns=(
        IMAGE_COLUMN,
        Column("number", pa.int64(), "address / size of a huge page", unit="index"),
        Column("pages", pa.int32(), "eligible pages in it", unit="pages"),
        Column("mergeable_pages", pa.int32(), "of them, zero pages and pages with two copies or more", unit="pages"),
        Column("zero_pages", pa.int32(), "of them, zero pages", unit="pages"),
        Column("thp_pages", pa.int32(), "of them, pages that the image marks as part of a huge page", unit="pages"),
    ),
)

PASSES = Table(
    name="passes",
    version=1,
    doc=(
        "A row for each pass of an image of which there are several: what changed since the pass before, by the "
        "kernel's own test (mm/ksm.c, calc_checksum: xxh64 of the page, its low 32 bits). Pages are those with bytes "
        "of their own, eligible or not. The first pass has nothing to compare."
    ),
    file="passes.parquet",
    sort=("image", "pass"),
    columns=(
        IMAGE_COLUMN,
        _IMAGE_ID,
        Column("pass", pa.int32(), "number of the pass; the last one is what the run counts", unit="index"),
        pages("pages", "pages in this pass"),
        pages("changed", "pages whose checksum differs from the pass before", nullable=True),
        pages("appeared", "pages that the pass before does not have", nullable=True),
        pages("gone", "pages of the pass before that this one does not have", nullable=True),
        pages("stable", "pages with the same checksum in every pass so far"),
    ),
)

_DIFF_CHANGE = Column(
    "change",
    pa.string(),
    "came: held twice or more in B, not in A | went: the other way | gained | lost: copies | moved: as many copies, "
    "other images or another first place",
)

DIFF_CONTENTS = Table(
    name="diff_contents",
    version=1,
    doc=(
        "What `ksmdist diff A B` finds of contents: a row for each that is in the stable tree of A or of B and is not "
        "alike in both. A content with one copy is in no stable tree: null stands for one copy or none."
    ),
    file="diff_contents.parquet",
    sort=("digest",),
    columns=(
        DIGEST,
        Column("kind", pa.string(), "zero | same_filled | other"),
        FILL_WORD,
        _DIFF_CHANGE,
        pages("copies_a", "copies in A; null: one or none", nullable=True),
        pages("copies_b", "copies in B; null: one or none", nullable=True),
        count("images_a", "images of A that hold it; null: not known", "images", nullable=True),
        count("images_b", "images of B that hold it; null: not known", "images", nullable=True),
        Column("first_image", pa.string(), "first image that holds it, in B; in A where it went"),
        Column("first_address", pa.uint64(), "its lowest address there", unit="bytes"),
    ),
)

_BOTH = ("total", "zero", "duplicate", "unique", "volatile", "shared_within", "shared_with_others")

DIFF_IMAGES = Table(
    name="diff_images",
    version=1,
    doc="What `ksmdist diff A B` finds of images: a row for each image_id of A or B, null where one does not have it.",
    file="diff_images.parquet",
    sort=("image_id",),
    columns=(
        _IMAGE_ID,
        Column("change", pa.string(), "came | went | changed | same: in the pages below"),
        *(
            pages(f"{name}_{run}", f"images.{name} in {run.upper()}", nullable=True)
            for name in _BOTH
            for run in ("a", "b")
        ),
    ),
)
