"""The sections of the report's page on what is merged, by whom and at what cost: text, and tables behind the plots."""

from __future__ import annotations

from collections.abc import Sequence

from ksmdist.classes import huge_page_bytes
from ksmdist.report.exposure import exposure_section
from ksmdist.report.markup import behind, chart, counted, escape, grid, listed, paragraph, section, table
from ksmdist.report.page_data import CELLS, PageInput, huge_buckets, split, variety
from ksmdist.report.terminal import format_bytes, headline, percent, zero_line

__all__ = ["answer", "bucket", "contents", "cumulative", "exposure", "huge", "images", "policy", "sharing", "spectrum"]

_KINDS = {"zero": "zero pages", "same_filled": "same-filled pages", "other": "other pages"}
_SCOPES = {"within": "within one image", "between": "between images"}
_POLICIES = {
    "never": "never",
    "zero": "zero pages only",
    "same_filled": "same-filled pages only, zero among them",
    "image": "within an image",
    "tenant": "within a tenant",
    "salt": "among images with one salt",
    "all": "all images",
}


def _answers(page: PageInput) -> list[tuple[str, str]]:
    """What everyone asks, and the answers."""
    merges, saved = page.manifest["summary"]["merges"], page.rows("policy")[-1]
    varied = variety(page.tables["spectrum"])
    merged = merges["zero"] + merges["content"]
    which = mostly = "Nothing is merged."
    if merged:
        which = (
            f"{counted(merged, 'page')} end up merged: {merges['zero']:,} are zero pages, {merges['content']:,} hold "
            f"something else. {saved['saved_pages']:,} of them ({format_bytes(saved['saved_bytes'])}) are saved; "
            f"{merged - saved['saved_pages']:,} are kept for all."
        )
        mostly = (
            f"{'Yes' if 2 * merges['zero'] > merged else 'No'}: {percent(merges['zero'], merged)} of the merged pages "
            f"are zero pages, and {percent(saved['saved_zero'], saved['saved_pages'])} of the saved ones."
        )
    rest = "No eligible page other than zero has a copy."
    if varied["contents"]:
        rest = (
            f"{varied['pages']:,} pages other than zero have a copy; they hold {varied['contents']:,} contents. "
            f"Half of these pages hold one of {counted(varied['half'], 'content')}, nine tenths one of "
            f"{varied['nine_tenths']:,}."
        )
    return [
        ("Which pages are merged?", which),
        ("Is it mostly the zero page?", mostly),
        ("How varied is the rest?", rest),
    ]


def answer(page: PageInput) -> str:
    """The question to lead with: which pages, is it the zero page, how varied is the rest."""
    summary, size = page.manifest["summary"], page.page_size
    parts = split(page.tables["policy"], size)
    cards = "".join(
        f"<div><dt>{escape(question)}</dt><dd>{escape(answer)}</dd></div>\n" for question, answer in _answers(page)
    )
    whole = sum(part["pages"] for part in parts)
    rows: list[Sequence[object]] = [
        (
            f"{_KINDS[part['kind']]}, {_SCOPES[part['scope']]}",
            part["pages"],
            format_bytes(part["bytes"]),
            percent(part["pages"], whole),
        )
        for part in parts
    ]
    rows.append(("all that is saved", whole, format_bytes(whole * size), percent(whole, whole)))
    label = "Bars: bytes saved, by kind of page, within one image and between images. The table below has the numbers."
    notes = [zero_line(summary["merges"], summary["pages"]["zero_mapped_fault"])]
    if page.manifest["settings"]["use_zero_pages"]:
        notes.append(
            "use_zero_pages is on: the zero page is the kernel's own, so mapping it shares nothing between images and "
            "counts as within."
        )
    frames = summary["physical"]["frames_saved"]
    notes.append(
        "Frames really freed: not known, since the images do not say which frames their pages are in."
        if frames is None
        else f"Frames really freed: {frames:,} ({format_bytes(frames * size)}), as the images say which frames are "
        "shared by fork already."
    )
    return section(
        "answer",
        "What is merged",
        paragraph(headline(summary), "headline"),
        f'<dl class="cards">\n{cards}</dl>\n',
        chart("split", label),
        table("What is saved, by kind and by where", ("saved", "pages", "bytes", "share"), rows, name="split-table"),
        paragraph(
            "Within one image is what merging in each image by itself would save; between images is what merging them "
            "together adds to that. KSM's own cost is not taken off here: see the counters."
        ),
        listed(notes),
    )


def policy(page: PageInput) -> str:
    """The ladder of policies."""
    rows = page.policy
    whole = rows[-1]["saved_bytes"]
    told = {image["tenant"] for image in page.manifest["images"]}
    note = (
        "No image has a tenant: they all count as one, and within a tenant is the same as all images."
        if told <= {""}
        else f"The images are of {len(told):,} tenants; images without one are one tenant."
    )
    shown = [
        (
            _POLICIES[row["policy"]],
            row["merged_pages"],
            row["frames_kept"],
            row["saved_zero"],
            row["saved_same_filled"],
            row["saved_other"],
            row["saved_pages"],
            format_bytes(row["saved_bytes"]),
            percent(row["saved_bytes"], whole),
            f"{row['cost_gib']:,.3f}",
        )
        for row in rows
    ]
    headings = (
        "merging allowed",
        "merged",
        "frames kept",
        "saved, zero",
        "saved, same-filled",
        "saved, other",
        "saved",
    )
    salts = page.exposure["salts"]
    note += (
        f" They have {salts:,} salts, those without one among them as a salt of its own; Linux knows none, ESX does."
        if salts > 1
        else ""
    )
    saved = {row["policy"]: row["saved_bytes"] for row in rows}
    steps = [
        f"Merging across the images of a tenant adds {format_bytes(saved['tenant'] - saved['image'])} to what merging "
        "within each image saves.",
        f"Merging across tenants adds {format_bytes(saved['all'] - saved['tenant'])} to that.",
    ]
    return section(
        "policy",
        "What each policy would save",
        paragraph(
            "Page deduplication can be observed from the side. This is what is left if it is limited, under the "
            f"settings of the run. {note}"
        ),
        listed(steps),
        chart("policy", "Bars: bytes saved under each policy. The table below has the numbers."),
        table(
            "Saved under each policy, in pages", (*headings, "bytes", "of all", "costs GiB"), shown, name="policy-table"
        ),
    )


def bucket(copies: int, most: int | None = None) -> str:
    """A bucket of powers of two by its first number: `1`, `2-3`, `4-7`. most: the greatest number there can be."""
    last = 2 * copies - 1 if most is None else min(2 * copies - 1, most)
    return f"{copies:,}" if last <= copies else f"{copies:,}-{last:,}"


def spectrum(page: PageInput) -> str:
    """How many copies contents have."""
    rows = [
        (
            bucket(row["copies"]),
            row["kind"],
            row["contents"],
            format_bytes(row["contents_bytes"]),
            row["pages"],
            format_bytes(row["pages_bytes"]),
        )
        for row in page.rows("spectrum_buckets")
    ]
    if not rows:
        return section("spectrum", "How many copies contents have", paragraph("No page is eligible: there is none."))
    headings = ("copies", "kind", "contents", "bytes of contents", "pages", "bytes of pages")
    return section(
        "spectrum",
        "How many copies contents have",
        paragraph(
            "Eligible pages, by how many copies their content has in all images, in buckets of powers of two (zdb -S "
            "prints reference counts so). What stands at 1 has no copy to merge with, though a lone zero page goes to "
            "the kernel's own with use_zero_pages; far to the right are few contents with very many copies."
        ),
        chart(
            "spectrum",
            "Bars: pages by number of copies of their content, a row a kind. The table behind it has the numbers.",
        ),
        behind(
            "The numbers: sharing spectrum", table("Sharing spectrum", headings, rows, texts=2, name="spectrum-table")
        ),
    )


def contents(page: PageInput) -> str:
    """The contents with most copies."""
    count = len(page.tables["contents"])
    if not count:
        return section(
            "contents", "The most merged contents", paragraph("No content has two copies: this table is empty.")
        )
    guessed = sum(what is None for what in page.tables["contents"].column("what").to_pylist())
    held = page.manifest["summary"]["contents"]["shared"]
    notes = [
        f"Contents other than zero with two copies or more: {held:,}. The table has the {count:,} contents with most "
        "copies."
    ]
    if guessed:
        notes.append(f"{guessed:,} could not be read again: what they are is not known, and shown as a question mark.")
    return section(
        "contents",
        "The most merged contents",
        paragraph(
            "What a content looks like is a guess, for all but zero and fill words. The page shows no bytes of it; who "
            "has the key can recognise a page by its digest."
        ),
        listed(notes),
        grid("contents", "Contents with most copies", "contents.parquet"),
    )


def sharing(page: PageInput) -> str:
    """Who shares with whom."""
    count = len(page.tables["images"])
    if count < 2:
        return section("sharing", "Who shares with whom", paragraph("There is one image: it has none to share with."))
    cell = (
        "A cell is the number of pages of the row's image whose content the column's image holds too; on the diagonal, "
        "those whose content the image holds twice."
        if count <= CELLS
        else f"There are more than {CELLS} images, so neighbours in scan order are one cell: the mean, over all pairs "
        "of different images in it, of the pages of the row's image whose content the column's holds too."
    )
    return section(
        "sharing",
        "Who shares with whom",
        paragraph(
            f"Contents other than zero. {cell} A content held by three images is in three pairs, so cells must not be "
            "added up. Where there is no colour nothing is shared."
        ),
        '<p id="heat-note" class="script"></p>\n',
        chart("heat", "Map of images: pages that each two of them share. The tables behind it have the numbers."),
        behind(
            "The numbers: pairs of images that share most", grid("pairs", "Pairs that share most", "sharing.parquet")
        ),
        behind("The numbers: cells of the map", grid("cells", "Cells of the map", "sharing.parquet")),
    )


def exposure(page: PageInput) -> str:
    """What tenants are exposed to."""
    return exposure_section(page.exposure, page.policy)


def cumulative(page: PageInput) -> str:
    """Images added one after the other."""
    if not len(page.tables["cumulative"]):
        return section("cumulative", "Images added one after the other", paragraph("There is no image."))
    return section(
        "cumulative",
        "Images added one after the other",
        paragraph(
            "Eligible pages and different contents as images are added in scan order, a content kept once whatever "
            "max_page_sharing is. The gap between the lines is what merging saves; a lower line that gets flat says "
            "that more images like these cost little."
        ),
        chart(
            "cumulative",
            "Two lines: pages and contents over the number of images. The table behind it has the numbers.",
        ),
        behind(
            "The numbers: images added in scan order",
            grid("cumulative", "Images added in scan order", "cumulative.parquet"),
        ),
    )


def huge(page: PageInput) -> str:
    """What breaking huge pages costs."""
    title = "What breaking huge pages costs"
    rows = huge_buckets(page.tables["huge"])
    if not rows:
        return section("huge", title, paragraph("No eligible page: this table is empty."))
    frames, marked = (sum(row[name] for row in rows) for name in ("frames", "huge_frames"))
    broken = sum(row["frames"] for row in rows if row["mergeable"])
    broken_huge = sum(row["huge_frames"] for row in rows if row["mergeable"])
    pages = sum(row["mergeable_pages"] for row in rows)
    full = sum(row["zero_frames"] for row in rows)
    nbytes = huge_page_bytes(page.page_size)
    size, most = format_bytes(nbytes), nbytes // page.page_size
    notes = [
        f"{broken:,} of {frames:,} aligned frames of {size} ({percent(broken, frames)}) have a page that is zero or "
        f"has a copy elsewhere, {pages / broken:,.1f} of them on average."
        if broken
        else f"None of {frames:,} aligned frames of {size} has a page that is zero or has a copy elsewhere.",
        f"{full:,} are full of zero pages.",
        f"{broken_huge:,} of {marked:,} frames that the images mark as huge pages have such a page."
        if marked
        else "The images mark no frame as a huge page; dumps of guests and raw images cannot. The table counts every "
        "aligned frame.",
    ]
    shown = [
        (
            bucket(row["mergeable"], most),
            row["frames"],
            row["huge_frames"],
            row["zero_frames"],
            row["mergeable_pages"],
            row["zero_pages"],
            f"{row['mergeable_pages'] / row['frames']:,.1f}" if row["frames"] else "",
        )
        for row in rows
    ]
    headings = (
        "zero or with a copy",
        "frames",
        "marked huge",
        "full of zero",
        "zero or with a copy, in all",
        "zero pages",
        "a frame",
    )
    return section(
        "huge",
        title,
        paragraph(
            "KSM splits a huge page as soon as one page of it merges. Frames by how many of their pages are zero or "
            "have a copy elsewhere: those at the top of the table are split for little, if at all. A zero page that is "
            "the only one, and copies on other NUMA nodes with merge_across_nodes off, count here and do not merge."
        ),
        listed(notes),
        chart(
            "huge",
            "Bars: frames by the number of their pages that are zero or have a copy elsewhere. The table below has the "
            "numbers.",
        ),
        table("Frames by pages that are zero or have a copy elsewhere", headings, shown, name="huge-table"),
    )


def images(page: PageInput) -> str:
    """Each image."""
    return section(
        "images",
        "Each image",
        paragraph(
            "Pages by class, what the image shares, and what /proc/PID/ksm_stat would show of its process. Columns "
            "that are empty for all images are left out."
        ),
        grid("images", "Images in scan order", "images.parquet and ksm_stat.parquet")
        if len(page.tables["images"])
        else paragraph("There is no image."),
    )
