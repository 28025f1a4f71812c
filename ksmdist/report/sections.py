"""The sections of the report's page in their order, and what a reader has to know of the run itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ksmdist.report import page_findings, page_predictions
from ksmdist.report.markup import counted, listed, paragraph, plain, section, table
from ksmdist.report.page_data import PageInput
from ksmdist.report.terminal import confirmed_line, filtered_lines

__all__ = ["GUIDE", "filtered", "incomplete", "render_sections"]

_LISTED = 100  # rows of a list that grows with the input; the rest is in the run directory

GUIDE: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Owner of a fleet",
        (("policy", "policies"), ("whatif", "settings"), ("cumulative", "fleet size"), ("images", "each image")),
    ),
    (
        "Kernel developer",
        (("counters", "counters"), ("zero", "zero pages"), ("volatile", "changed pages"), ("huge", "huge pages")),
    ),
    (
        "Security analyst",
        (
            ("contents", "top contents"),
            ("sharing", "who shares with whom"),
            ("exposure", "tenants exposed"),
            ("policy", "what limits cost"),
        ),
    ),
    (
        "Everyone",
        (("spectrum", "spectrum"), ("holes", "holes and caveats"), ("checks", "checks"), ("settings", "settings")),
    ),
)
"""Who looks where: reader -> (id of a section, what it is called)."""

_CHANGED = {
    "use_zero_pages": "zero pages are mapped to the shared zero page",
    "max_page_sharing": "most pages that share one KSM page",
    "merge_across_nodes": "pages of different NUMA nodes may be merged",
    "eligible": "flagged: pages in mappings marked mergeable; all: as if all were",
    "kernel": "the Linux whose rules are followed",
    "full_scans": "scans done from the start",
    "smart_scan": "pages that found no partner are skipped for a while",
    "pages_to_scan": "for the estimate of time alone",
    "sleep_millisecs": "for the estimate of time alone",
    "zero_page_colors": "shared zero pages there are",
    "page_size": "bytes of a page",
    "contents": "rows of table contents",
    "checksums": "whether a later pass can be compared with this run",
}


def incomplete(page: PageInput) -> list[str]:
    """What is missing in the run, as sentences; none where every page of every image was read."""
    holes = page.manifest["summary"]["holes"]
    missing = []
    if holes["pages"]:
        where = f"{counted(holes['pages'], 'page')} in {counted(holes['ranges'], 'range')}"
        missing.append(f"{where} could not be read: not counted.")
    elif holes["ranges"] and not holes["images"]:
        missing.append(f"{counted(holes['ranges'], 'range')} could not be read: not counted.")
    if holes["images"]:
        names = ", ".join(plain(name) for name in holes["images"][:5])
        more = "" if len(holes["images"]) <= 5 else " and others"
        missing.append(
            f"{counted(len(holes['images']), 'image')} could not be reached: not counted ({names}{more}). What is "
            "shared with them is not known."
        )
    return missing


def filtered(page: PageInput) -> list[str]:
    """Which images are not the whole memory, as sentences; none where all are."""
    return [plain(line, None) for line in filtered_lines(page.manifest["summary"]["filtered"])]


def render_sections(page: PageInput) -> str:
    """All sections in the order of the page, as markup."""
    return "".join(
        part(page)
        for part in (
            page_findings.answer,
            page_findings.policy,
            page_findings.spectrum,
            page_findings.contents,
            page_findings.sharing,
            page_findings.exposure,
            page_findings.cumulative,
            page_predictions.whatif,
            page_predictions.zero,
            page_predictions.counters,
            page_predictions.volatile,
            page_findings.huge,
            page_findings.images,
            _holes,
            _checks,
            _settings,
        )
    )


def _holes(page: PageInput) -> str:
    holes = page.tables["holes"]
    parts = [paragraph(text, "warning") for text in [*incomplete(page), *filtered(page)]]
    if not len(holes):
        parts.append(paragraph("No holes: every page that should be in the images was read."))
    else:
        shown = [
            (plain(row["image_id"]), f"0x{row['address']:x}", row["reason"], row["pages"])
            for row in holes.slice(0, _LISTED).to_pylist()
        ]
        parts.append(table("Holes", ("image", "first address", "reason", "pages"), shown, texts=3, name="holes-table"))
        if len(holes) > _LISTED:
            parts.append(paragraph(f"{len(holes) - _LISTED:,} more are in holes.parquet."))
    caveats = [plain(text, None) for text in page.manifest["caveats"]]
    fixed = [
        "The counters hold for memory that does not change; ksmd on live memory merges less and later.",
        "A match of digests (xxh3, 128 bits) is taken as equality of pages.",
        "Who holds this page can confirm a guess of a content shown here by its digest.",
    ]
    parts += ["<h3>Caveats</h3>\n", listed([*caveats[:_LISTED], *fixed])]
    if len(caveats) > _LISTED:
        parts.append(paragraph(f"{len(caveats) - _LISTED:,} more caveats are in run.json."))
    return section("holes", "Holes and caveats", *parts)


def _checks(page: PageInput) -> str:
    checked: Sequence[Mapping[str, Any]] = page.manifest["identities"]
    held = sum(bool(row["holds"]) for row in checked)
    shown = [(row["name"], row["left"], row["right"], "holds" if row["holds"] else "FAILS") for row in checked]
    return section(
        "checks",
        "Identities checked",
        paragraph(
            f"{held:,} of {len(checked):,} sums that must come out twice the same do. Each side is counted in another "
            "way; one that fails ends the run."
        ),
        table(
            "Identities",
            ("identity", "one way", "the other way", "result"),
            shown,
            trailing_texts=1,
            name="checks-table",
        ),
    )


def _settings(page: PageInput) -> str:
    settings = page.manifest["settings"]
    first = [name for name in _CHANGED if name in settings]
    names = first + sorted(set(settings) - set(first))
    shown = [
        (
            name,
            _setting(settings[name], name),
            _CHANGED.get(name, "how the images are read and the work is cut; changes no count"),
        )
        for name in names
    ]
    engine = page.manifest["engine"]
    return section(
        "settings",
        "Settings",
        table("Settings of the run", ("setting", "value", "meaning"), shown, texts=3, name="settings-table"),
        paragraph(f"Contents: {confirmed_line(page.manifest['summary'])}."),
        paragraph(
            f"ksmdist {page.manifest['ksmdist']}; engine: {engine['name']} ({plain(str(engine['why']), None)}); "
            f"run directory: {plain(str(page.manifest['summary'].get('run', '')), None)}"
        ),
    )


def _setting(value: object, name: str) -> str:
    if value is None:
        return {"max_page_sharing": "unlimited", "full_scans": "as many as it takes"}.get(name, "not given")
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:,}" if isinstance(value, int) else plain(str(value))
