"""A finished run, for people: the answer first, then the counts behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import pyarrow as pa

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "confirmed_line",
    "console",
    "counter_table",
    "estimate_line",
    "filtered_lines",
    "format_bytes",
    "headline",
    "knobs",
    "printable",
    "process_table",
    "render",
    "render_filtered",
    "still_line",
    "table",
    "zero_line",
]

MAX_ROWS = 20
"""Rows of a table that grows with the input; the rest is in the run directory."""

_NAMED = 3  # of many images
_LEVEL = 300  # characters of a filter level, which an Arrow image chooses


def format_bytes(nbytes: float) -> str:
    """Bytes in the largest binary unit that keeps it at one or more, with its sign."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def printable(text: str, width: int | None = None) -> str:
    """A name from outside, fit for a terminal: no control characters, the middle left out where it is too long."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    if width is None or len(text) <= width:
        return text
    tail = (width - 2) // 2
    return f"{text[: width - 2 - tail]}..{text[len(text) - tail :]}"


def percent(part: int, whole: int) -> str:
    """A share with one decimal, `-` of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def console(out: TextIO) -> Console:
    """A rich console on a stream; 100 columns where it is no terminal, so that output is stable."""
    from rich.console import Console

    return Console(file=out, width=None if out.isatty() else 100, highlight=False, markup=False)


def table(title: str | None = None, header: bool = True) -> Table:
    """An empty table in the one style."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", show_header=header, pad_edge=False)


def headline(summary: Mapping[str, Any]) -> str:
    """The answer in one sentence: what KSM would save, and how much of it is the zero page.

    Where frames are known it is what is really freed, the kernel's own figure beside it.
    """
    pages, merges, frames = summary["pages"], summary["merges"], summary["physical"]["frames_saved"]
    size = summary["settings"]["page_size"]
    total = pages["total"] * size
    merged = merges["zero"] + merges["content"]
    if not total and (summary["holes"]["ranges"] or summary["holes"]["images"]):
        return "No page could be read: nothing is known of these images."
    if pages["ineligible"] and pages["ineligible"] == pages["total"]:
        return (
            f"KSM would save nothing of these {format_bytes(total)}: no page is in a mapping marked mergeable; "
            "`run --eligible all` counts them as if all were."
        )
    if not merged:
        return f"KSM would save nothing of these {format_bytes(total)}: no two eligible pages are the same."
    saved, claim = merges["saved_bytes"], ""
    if frames is not None and frames * size != saved:
        saved, claim = frames * size, f", where its counters claim {format_bytes(saved)}"
    return (
        f"KSM would save {format_bytes(saved)} of {format_bytes(total)} ({percent(saved, total)}){claim}; "
        f"{percent(merges['zero'], merged)} of the merged pages are zero pages."
    )


def zero_line(merges: Mapping[str, Any], fault: int) -> str:
    """Zero pages that KSM merges or places, those of read faults apart."""
    merged = merges["zero"] + merges["content"]
    line = (
        f"zero pages: {merges['zero']:,} by KSM, {percent(merges['zero'], merged)} of all it merges; "
        f"{fault:,} by read faults, which cost nothing"
    )
    if merges["thp_zero"]:
        line += f"; {merges['thp_zero']:,} freed as KSM splits huge pages, in no counter"
    return line


def still_line(summary: Mapping[str, Any]) -> str:
    """What pages that changed between passes cost: they are not merged. summary: of a run with `still`."""
    volatile, still = summary["pages"]["volatile"], summary["still"]["merges"]["saved_bytes"]
    return (
        f"volatile pages: {volatile:,} changed since the pass before and are not merged; had they not changed, "
        f"{format_bytes(still)} would be saved"
    )


def estimate_line(result: Mapping[str, Any]) -> str:
    """About how long KSM takes to converge. result: as counters.summary() gives it, with settings."""
    estimate, settings = result["estimate"], result["settings"]
    how = f"{estimate['full_scans']} full scans of {estimate['pages_per_scan']:,} pages"
    if estimate["seconds"] is None:
        return f"estimated time to converge: {how}; never, as pages_to_scan is 0"
    return (
        f"estimated time to converge: {estimate['seconds']:,.1f} s and the scanning itself ({how}, "
        f"pages_to_scan={settings['pages_to_scan']}, sleep_millisecs={settings['sleep_millisecs']})"
    )


def confirmed_line(summary: Mapping[str, Any]) -> str:
    """How far equal digests are known to be equal pages."""
    verified = summary["verified"]
    if verified["verify"] == "none":
        return "equal digests were taken for equal pages, and not confirmed (--verify none)"
    how = "a second hash" if verified["verify"] == "hash" else "comparing the pages"
    contents, pages = verified["contents"], verified["pages"]
    line = f"confirmed by {how}: {contents:,} contents that seem to be held twice or more, {pages:,} pages read again"
    if verified["unread"]:
        line += f", {verified['unread']:,} of them NOT readable"
    if verified["collided"]:
        line += f"; {verified['collided']:,} digests were of SEVERAL contents, told apart"
    return line


def knobs(settings: Mapping[str, Any]) -> str:
    """The settings of KSM in one line, those that were left alone apart."""
    limit = settings["max_page_sharing"]
    parts = [
        f"use_zero_pages={int(settings['use_zero_pages'])}",
        f"max_page_sharing={'unlimited' if limit is None else limit}",
        f"merge_across_nodes={int(settings['merge_across_nodes'])}",
        f"eligible={settings['eligible']}",
        f"kernel={settings['kernel']}",
    ]
    if settings["full_scans"] is not None:
        parts += [f"full_scans={settings['full_scans']}", f"smart_scan={int(settings['smart_scan'])}"]
    if settings["zero_page_colors"] != 1:
        parts.append(f"zero_page_colors={settings['zero_page_colors']}")
    return ", ".join(parts)


def counter_table(result: Mapping[str, Any]) -> Table:
    """The kernel's counters, and what is behind them. result: as counters.summary() gives it."""
    right = table("kernel counters", header=False)
    right.add_column()
    right.add_column(justify="right")
    for name, value in result["counters"].items():
        if value is not None:
            right.add_row(name, f"{value:,}")
    merges, physical = result["merges"], result["physical"]
    right.add_row("merged zero pages", f"{merges['zero']:,}")
    right.add_row("merged other pages", f"{merges['content']:,}")
    if physical["profit"] is not None:
        right.add_row("frames really freed", f"{physical['frames_saved']:,}")
        right.add_row("physical profit", f"{physical['profit']:,}")
    return right


def process_table(processes: Sequence[Mapping[str, Any]]) -> Table:
    """What /proc/PID/ksm_stat would show, a row an image."""
    names = ("ksm_rmap_items", "ksm_zero_pages", "ksm_merging_pages", "ksm_process_profit")
    shown = table()
    shown.add_column("image", overflow="fold")
    for name in names:
        shown.add_column(name, justify="right")
    for row in processes[:MAX_ROWS]:
        shown.add_row(printable(row["image_id"]), *("-" if row[name] is None else f"{row[name]:,}" for name in names))
    return shown


def filtered_lines(filtered: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each way in which producers of images left pages out; none where all images are whole.

    filtered: image_id, filter_level and excluded (pages) of each such image, as key `filtered` of a run's summary.
    """
    by_level: dict[str, list[Mapping[str, Any]]] = {}
    for image in filtered:
        by_level.setdefault(image["filter_level"], []).append(image)
    lines = []
    for level, images in by_level.items():
        names = ", ".join(printable(image["image_id"], 40) for image in images[:_NAMED])
        more = f" and {len(images) - _NAMED:,} more" if len(images) > _NAMED else ""
        pages = sum(image["excluded"] for image in images)
        known = f" ({pages:,} pages)" if pages else ""
        said = printable(level, _LEVEL)
        lines.append(f"FILTERED: {names}{more}: {said}{known}; what is counted is not the whole memory.")
    if len(lines) > MAX_ROWS:
        rest = sum(len(images) for images in list(by_level.values())[MAX_ROWS:])
        lines[MAX_ROWS:] = [f"FILTERED: {rest:,} images more, each in its own way; table images has them all."]
    return lines


def render_filtered(filtered: Sequence[Mapping[str, Any]], out: TextIO) -> None:
    """Print filtered_lines()."""
    out.writelines(f"{line}\n" for line in filtered_lines(filtered))


def render(
    summary: Mapping[str, Any],
    images: pa.Table,
    processes: Sequence[Mapping[str, Any]],
    caveats: tuple[str, ...],
    out: TextIO,
) -> None:
    """Print a run: `summary` as `--json` gives it, table `images`, the rows of table `ksm_stat`."""
    from rich.table import Table

    to = console(out)
    pages, settings = summary["pages"], summary["settings"]
    incomplete = summary["holes"]["ranges"] or summary["holes"]["images"]
    to.out(headline(summary) + (" INCOMPLETE: see below." if incomplete else ""))
    for line in filtered_lines(summary["filtered"]):
        to.out(line)
    to.print()
    left = table("pages", header=False)
    left.add_column()
    left.add_column(justify="right")
    left.add_column(justify="right")
    left.add_row("present", f"{pages['total']:,}", "100.0 %")
    for name in list(pages)[2:]:
        if pages[name] or name in ("zero", "duplicate", "unique"):
            left.add_row(f"  {name}", f"{pages[name]:,}", percent(pages[name], pages["total"]))
    left.add_row("absent", f"{pages['absent']:,}", "")
    contents = summary["contents"]
    left.add_row("non-zero contents", f"{contents['distinct']:,}", "")
    left.add_row("  with 2 copies or more", f"{contents['shared']:,}", "")
    left.add_row("  most copies", f"{contents['max_copies']:,}", "")
    left.add_row("same-filled pages", f"{summary['kinds']['same_filled']:,}", "")
    both = Table.grid(padding=(0, 4))
    both.add_row(left, counter_table(summary))
    to.print(both)
    to.out(zero_line(summary["merges"], pages["zero_mapped_fault"]))
    if summary["still"] is not None:
        to.out(still_line(summary))
    if settings["zero_page_colors"] > 1:
        most = max(summary["zero_colors"], key=lambda row: row["zero"])
        used = sum(row["zero"] + row["zero_mapped_fault"] > 0 for row in summary["zero_colors"])
        to.out(
            f"colours: the pages choose {used:,} of {settings['zero_page_colors']:,} zero pages by address, "
            f"{most['zero']:,} of them number {most['color']}"
        )
    to.out(estimate_line(summary))
    to.out(f"settings: {knobs(settings)}")

    if len(images) > 1:
        shown = table()
        shown.add_column("image", overflow="fold")
        for heading in ("pages", "zero", "duplicate", "unique", "shared within", "with others"):
            shown.add_column(heading, justify="right")
        for row in images.slice(0, MAX_ROWS).to_pylist():
            names = ("total", "zero", "duplicate", "unique", "shared_within", "shared_with_others")
            known = row["unreadable"] is not None
            shown.add_row(printable(row["image_id"]), *(f"{row[name]:,}" if known else "?" for name in names))
        to.print(shown)
    if "process" in images.column("kind").to_pylist():
        to.print(process_table(processes))
    if len(images) > MAX_ROWS:
        to.out(f"... and {len(images) - MAX_ROWS:,} images more, in images.parquet and ksm_stat.parquet")
    for caveat in caveats[:MAX_ROWS]:
        to.out(printable(f"note: {caveat}"))
    if len(caveats) > MAX_ROWS:
        to.out(f"... and {len(caveats) - MAX_ROWS:,} notes more; run.json has them all")
    holes = summary["holes"]
    if holes["pages"]:
        to.out(
            f"INCOMPLETE: {holes['pages']:,} pages in {holes['ranges']:,} ranges could not be read and are not "
            "counted; holes.parquet lists them"
        )
    if holes["images"]:
        missing = ", ".join(holes["images"][:MAX_ROWS])
        to.out(
            f"INCOMPLETE: {len(holes['images']):,} images are on nodes that are not in the cluster, and are not "
            f"counted: {printable(missing)}"
        )
    to.out(confirmed_line(summary))
    to.out(printable(f"engine: {summary['engine']} ({summary['engine_why']})"))
    to.out(printable(f"run directory: {summary['run']}"))
