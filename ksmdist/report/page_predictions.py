"""The sections of the report's page on what the kernel would show, now and under other settings."""

from __future__ import annotations

from typing import Any

from ksmdist.report.markup import behind, chart, escape, listed, paragraph, section, table
from ksmdist.report.page_data import PageInput
from ksmdist.report.terminal import estimate_line, format_bytes, knobs, percent
from ksmdist.settings import Settings
from ksmdist.tables import COUNTERS
from ksmdist.whatif import best, present

__all__ = ["counters", "volatile", "whatif", "zero"]

_ACCOUNTINGS = {
    "stable_tree": "use_zero_pages off: zero pages are merged as any other",
    "untracked": "placed and not counted (Linux 6.1 to 6.5)",
    "rmap_tracked": "each with an rmap item (proposed in 2022, not in Linux)",
    "all_zero_mappings": "all mappings of the zero page counted (proposed in 2023, not in Linux)",
    "pte_dirty": "marked dirty and counted (Linux 6.6 and later)",
}


def whatif(page: PageInput) -> str:
    """Other settings."""
    rows = page.rows("whatif")
    settings = Settings(**page.manifest["settings"])
    most = best(rows, settings)
    grid = []
    for row in rows:
        mark = ", ".join(name for name, is_it in (("now", row["present"]), ("best", row is most)) if is_it)
        grid.append(
            (
                row["accounting"],
                "on" if row["use_zero_pages"] else "off",
                _limit(row["max_page_sharing"]),
                "on" if row["merge_across_nodes"] else "off",
                *(row[name] for name in _GRID_NUMBERS),
                mark,
            )
        )
    marked = ["now" if row["present"] else "best" if row is most else "" for row in rows]
    headings = ("accounting", "use_zero_pages", "max_page_sharing", "merge_across_nodes", *_GRID_NUMBERS, "marked")
    controls = (
        '<form class="controls script" id="whatif-controls" aria-label="Settings to try">\n'
        '<p><label for="limit">max_page_sharing</label> '
        '<input type="range" id="limit" min="0" max="0" value="0" step="1" aria-describedby="limit-shown">'
        ' <output id="limit-shown" for="limit"></output></p>\n'
        '<p><label><input type="checkbox" id="use-zero-pages"> use_zero_pages</label> '
        '<label><input type="checkbox" id="merge-across-nodes"> merge_across_nodes</label></p>\n'
        '<p><label for="accounting">zero pages are</label> <select id="accounting">'
        + "".join(f'<option value="{name}">{escape(text)}</option>' for name, text in _ACCOUNTINGS.items())
        + '</select></p>\n<p><button type="button" id="to-present">settings of the run</button> '
        '<button type="button" id="to-best">best for this kernel</button></p>\n</form>\n'
        '<p id="whatif-nodes" class="script"></p>\n'
        '<p class="script answer"><output id="whatif-said" for="limit use-zero-pages merge-across-nodes accounting" '
        'aria-live="polite"></output></p>\n'
        '<div class="scroll script" tabindex="0" role="group" aria-label="Counters under these settings">'
        '<table id="whatif-now"><caption>Counters under these settings</caption><thead><tr><th scope="col">figure</th>'
        '<th scope="col" class="number">tried</th><th scope="col" class="number">settings of the run</th>'
        '<th scope="col" class="number">difference</th></tr></thead><tbody></tbody></table></div>\n'
    )
    return section(
        "whatif",
        "What other settings would show",
        paragraph(
            "Counters for other settings, computed with the run, as they are once nothing changes any more. Profit is "
            "what is saved less the memory of rmap items; general_profit is what the kernel would show, which leaves "
            "out what it does not count."
        ),
        paragraph(f"Settings of the run: {knobs(page.manifest['settings'])}.")
        if settings.full_scans is None
        else paragraph(f"The run itself stops after {settings.full_scans} scans; this table does not."),
        controls,
        chart(
            "whatif",
            "Lines: profit over max_page_sharing, with use_zero_pages on and off. The table behind it has the numbers.",
        ),
        behind(
            "The numbers: all settings",
            table("All settings", headings, grid, texts=4, trailing_texts=1, marked=marked, name="whatif-table"),
        ),
    )


def _limit(limit: int | None) -> str:
    return "unlimited" if limit is None else f"{limit:,}"


_GRID_NUMBERS = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "zero_pages_counted",
    "rmap_items",
    "general_profit",
    "saved_bytes",
    "profit",
    "physical_profit",
    "unmerge_frames",
)


def zero(page: PageInput) -> str:
    """Zero pages by accounting."""
    rows = page.rows("whatif")
    now = present(rows)
    alike = [row for row in rows if all(row[knob] == now[knob] for knob in ("max_page_sharing", "merge_across_nodes"))]
    shown = [
        (
            row["accounting"],
            _ACCOUNTINGS[row["accounting"]],
            *(
                row[name]
                for name in ("zero_merges", "zero_pages_counted", "rmap_item_bytes", "general_profit", "profit")
            ),
            row["zero_pages_given_back"],
            "now" if row["present"] else "",
        )
        for row in alike
    ]
    headings = (
        "accounting",
        "what it is",
        "zero pages merged",
        "zero pages counted",
        "rmap item bytes",
        "general_profit",
        "profit",
        "given back by unmerge",
        "marked",
    )
    return section(
        "zero",
        "Zero pages, by how they are accounted for",
        paragraph(
            f"max_page_sharing={_limit(now['max_page_sharing'])}, merge_across_nodes={int(now['merge_across_nodes'])}. "
            "general_profit is what a kernel that accounts so would show, profit what it saves; where they differ, the "
            "counter misleads. A question mark: nothing counts them."
        ),
        table(
            "Ways to account for zero pages",
            headings,
            shown,
            texts=2,
            trailing_texts=1,
            marked=["now" if row["present"] else "" for row in alike],
            name="zero-table",
        ),
    )


def counters(page: PageInput) -> str:
    """The kernel's counters."""
    rows = page.rows("counters")
    settings = Settings(**page.manifest["settings"])
    several = len(rows) > 1
    headings = ["counter", *(f"changed pages {row['volatile']}" for row in rows)] if several else ["counter", "value"]
    shown = []
    for column in COUNTERS.columns[COUNTERS.schema.get_field_index("full_scans") + 1 :]:
        values = [row[column.name] for row in rows]
        nbytes = rows[0][column.name]
        if nbytes is not None and column.unit == "pages":
            nbytes *= settings.page_size
        elif column.unit != "bytes":
            nbytes = None
        size = "" if nbytes is None or column.name in ("pages_scanned", "pages_skipped") else format_bytes(nbytes)
        doc = (
            column.doc if None not in values else f"{column.doc}. Not known here: {_why_unknown(column.name, settings)}"
        )
        shown.append((column.name, *values, size, doc))
    pages = page.manifest["summary"]["pages"]
    classes = [
        (name, count, percent(count, pages["total"]) if name != "absent" else "") for name, count in pages.items()
    ]
    bounds = page.manifest["summary"]["bounds"]["pages_shared"]
    return section(
        "counters",
        "The kernel's counters",
        paragraph(
            f"As /sys/kernel/mm/ksm of Linux {settings.kernel} would show them on memory that does not change, and "
            "below them what the kernel does not show."
        ),
        table("Counters", (*headings, "in memory", "meaning"), shown, trailing_texts=1, name="counters-table"),
        listed(
            [
                f"pages_shared lies between {bounds[0]:,} and {bounds[1]:,} where pages came and went before: ksmd "
                "never packs its KSM pages anew.",
                estimate_line(page.manifest["summary"]),
            ]
        ),
        table("Pages by class", ("class", "pages", "of present"), classes, name="classes-table"),
    )


def _why_unknown(name: str, settings: Settings) -> str:
    if name in ("frames_saved", "physical_profit"):
        return "the images do not name the frames of all pages"
    if name == "pages_scanned" and settings.full_scans is None:
        return "no number of scans was given"
    return f"Linux {settings.kernel} has no such counter"


def volatile(page: PageInput) -> str:
    """Pages that change between passes."""
    passes = page.tables["passes"]
    title = "Pages that change"
    if not len(passes):
        return section(
            "volatile",
            title,
            paragraph(
                "Each image was read once: which pages change is not known. pages_volatile counts no page for that "
                "reason here; on live memory it would."
            ),
        )
    names = ("pages", "changed", "appeared", "gone", "stable")
    by: dict[int, dict[str, Any]] = {}
    for row in passes.to_pylist():
        sums = by.setdefault(row["pass"], {"images": 0} | dict.fromkeys(names, 0))
        sums["images"] += 1
        for name in names:
            sums[name] = None if row[name] is None or sums[name] is None else sums[name] + row[name]
    shown = [(number, *(sums[name] for name in ("images", *names))) for number, sums in sorted(by.items())]
    once = len(page.tables["images"]) - len(set(passes.column("image").to_pylist()))
    counted = {row["volatile"]: row for row in page.rows("counters")}
    notes = []
    if once:
        notes.append(
            f"{once:,} of {len(page.tables['images']):,} images have one pass: what changes there is not known."
        )
    if "included" in counted and "excluded" in counted:
        saved = {which: row["saved_bytes"] for which, row in counted.items()}
        notes.append(
            f"{format_bytes(saved['excluded'])} saved where pages that changed are not merged, "
            f"{format_bytes(saved['included'])} if they had not changed; the counters are above for both."
        )
    return section(
        "volatile",
        title,
        paragraph(
            "Passes of the same images, compared by the kernel's own test: ksmd merges only pages whose checksum did "
            "not change since its last visit. The first pass has nothing to compare."
        ),
        listed(notes),
        table(
            "Pages by pass, over all images that have several", ("pass", "images", *names), shown, name="passes-table"
        ),
    )
