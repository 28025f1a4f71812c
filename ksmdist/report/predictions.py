"""What-ifs, reasons and unmerging, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from ksmdist.explain import ADVICE
from ksmdist.report.terminal import (
    MAX_ROWS,
    console,
    counter_table,
    estimate_line,
    format_bytes,
    knobs,
    percent,
    printable,
    process_table,
    table,
    zero_line,
)
from ksmdist.settings import Settings
from ksmdist.tables import ACCOUNTINGS
from ksmdist.whatif import accounting_of, best, present, profit

__all__ = ["render_explain", "render_prediction", "render_unmerge", "render_whatif"]

Row = Mapping[str, Any]

_MEANING = {
    "stable_tree": ("off: zero pages are a KSM page like others", "in pages_sharing", "yes"),
    "untracked": ("up to Linux 6.5", "nothing counts them", "no"),
    "rmap_tracked": ("the series of 2023, v6", "KSM's, stale until the next scan", "once the item is freed"),
    "all_zero_mappings": ("proposed in its review", "KSM's and those of read faults", "yes, all in range"),
    "pte_dirty": ("Linux 6.6 and up", "KSM's, at once", "yes"),
}


def render_prediction(result: Mapping[str, Any], fault: int, out: TextIO) -> None:
    """Print what other settings show. result: as runs.whatif() gives it; fault: pages of read faults."""
    to = console(out)
    to.out(f"settings: {knobs(result['settings'])}")
    to.print(counter_table(result))
    to.out(zero_line(result["merges"], fault))
    least, most = result["bounds"]["pages_shared"]
    to.out(f"pages_shared after a history of changes: between {least:,} and {most:,}, with the same pages merged")
    to.out(estimate_line(result))
    to.print(process_table(result["processes"]))


def _limit(row: Row) -> str:
    return "unlimited" if row["max_page_sharing"] is None else f"{row['max_page_sharing']:,}"


def _knobs(row: Row) -> str:
    return (
        f"use_zero_pages={int(row['use_zero_pages'])}, max_page_sharing={_limit(row)}, "
        f"merge_across_nodes={int(row['merge_across_nodes'])}"
    )


def render_whatif(rows: Sequence[Row], settings: Settings, merges: Mapping[str, Any], fault: int, out: TextIO) -> None:
    """Print the grid: the best setting first, then all by profit, then the accountings side by side.

    rows: table `whatif`; merges: of the run's own settings; fault: pages of read faults.
    """
    to = console(out)
    now, top = present(rows), best(rows, settings)
    won = profit(top) - profit(now)
    physical = now["physical_profit"] is not None
    if won > 0:
        to.out(f"Best: {_knobs(top)}: {format_bytes(profit(top))} of profit,")
        to.out(f"{format_bytes(won)} more than now ({_knobs(now)}).")
    else:
        to.out(f"No setting wins over the present one ({_knobs(now)}): {format_bytes(profit(now))} of profit.")
    to.out(
        "Profit is "
        + ("frames really freed, less all that KSM keeps." if physical else "pages merged, less rmap items.")
    )

    shown = table("by profit, as this kernel accounts for zero pages")
    for heading in ("use_zero\npages", "max_page\nsharing", "merge_across\nnodes"):
        shown.add_column(heading, justify="right")
    for heading in ("pages\nshared", "pages\nsharing", "ksm_zero\npages", "general\nprofit", "profit"):
        shown.add_column(heading, justify="right")
    for (zero, limit), (across, row) in _lines(rows, settings):
        shown.add_row(
            str(int(zero)) + (" *" if row["present"] else ""),
            limit,
            across,
            f"{row['pages_shared']:,}",
            f"{row['pages_sharing']:,}",
            "-" if row["zero_pages_counted"] is None else f"{row['zero_pages_counted']:,}",
            f"{row['general_profit']:,}",
            f"{profit(row):,}",
        )
    to.print(shown)
    to.out("* the present setting")

    shown = table(f"accounting for zero pages, max_page_sharing={_limit(now)}")
    for heading in ("", "counted", "general_profit", "rmap items", "profit", "zero pages\ngiven back"):
        shown.add_column(heading, justify="left" if heading in ("",) else "right")
    for name in ACCOUNTINGS:
        row = next(
            row
            for row in rows
            if row["accounting"] == name
            and all(row[knob] == now[knob] for knob in ("max_page_sharing", "merge_across_nodes"))
        )
        counted = "-" if row["zero_pages_counted"] is None else f"{row['zero_pages_counted']:,}"
        shown.add_row(
            name,
            counted,
            f"{row['general_profit']:,}",
            format_bytes(row["rmap_item_bytes"]),
            f"{profit(row):,}",
            f"{row['zero_pages_given_back']:,}",
        )
    to.print(shown)
    for name, (what, count, back) in _MEANING.items():
        to.out(f"  {name}: {what}; count: {count}; unmerging gives back: {back}")
    to.out(zero_line(merges, fault))


def _lines(rows: Sequence[Row], settings: Settings) -> list[tuple[tuple[bool, str], tuple[str, Row]]]:
    """The rows this kernel can have, most profit first; one for both merge_across_nodes where they are alike."""
    from dataclasses import replace

    chosen = [
        row
        for row in rows
        if row["accounting"] == accounting_of(replace(settings, use_zero_pages=row["use_zero_pages"]))
    ]
    knobs_only = ("merge_across_nodes", "present")
    pairs: dict[tuple[bool, str], list[Row]] = {}
    for row in chosen:
        pairs.setdefault((row["use_zero_pages"], _limit(row)), []).append(row)
    lines: list[tuple[tuple[bool, str], tuple[str, Row]]] = []
    for key, pair in pairs.items():
        alike = len({tuple(value for name, value in row.items() if name not in knobs_only) for row in pair}) == 1
        if alike:
            lines.append((key, ("0 or 1", next((row for row in pair if row["present"]), pair[0]))))
        else:
            lines += [(key, (str(int(row["merge_across_nodes"])), row)) for row in pair]
    return sorted(lines, key=lambda line: -profit(line[1][1]))


def render_explain(rows: Sequence[Row], page_size: int, out: TextIO) -> None:
    """Print table `explain`: reasons, most pages first; then images and regions by what they do not merge."""
    to = console(out)
    total: Counter[str] = Counter()
    for row in rows:
        total[row["reason"]] += row["pages"]
    whole = sum(total.values())
    to.out(f"{total['merged']:,} of {whole:,} pages of address space are merged ({percent(total['merged'], whole)}).")
    shown = table()
    shown.add_column("reason")
    shown.add_column("pages", justify="right")
    shown.add_column("bytes", justify="right")
    shown.add_column("what it means", overflow="fold")
    for reason, pages in total.most_common():
        shown.add_row(reason, f"{pages:,}", format_bytes(pages * page_size), ADVICE[reason])
    to.print(shown)
    for key, title in (("image_id", "by image"), ("region", "by region")):
        _explain_by(rows, key, title, to)


def _explain_by(rows: Sequence[Row], key: str, title: str, to: Any) -> None:
    """A table with a row for each value of `key`, unless there is one alone."""
    by: dict[str, Counter[str]] = {}
    for row in rows:
        by.setdefault(row[key] or "-", Counter())[row["reason"]] += row["pages"]
    if len(by) < 2:
        return
    shown = table(title)
    shown.add_column(key.removesuffix("_id"), overflow="fold")
    shown.add_column("merged", justify="right")
    shown.add_column("not merged, and why", overflow="fold")
    order = sorted(by, key=lambda name: (-sum(by[name].values()), name))
    for name in order[:MAX_ROWS]:
        reasons = [f"{reason} {pages:,}" for reason, pages in by[name].most_common() if reason != "merged"]
        shown.add_row(printable(name), f"{by[name]['merged']:,}", ", ".join(reasons))
    to.print(shown)
    if len(order) > MAX_ROWS:
        to.out(f"... and {len(order) - MAX_ROWS:,} more; --json has them all")


def render_unmerge(rows: Sequence[Row], settings: Settings, out: TextIO) -> None:
    """Print table `unmerge`: the frames that unmerging needs."""
    to = console(out)
    first = rows[0]
    who = "everything (run=2)" if first["image_id"] is None else f"{printable(first['image_id'])} (MADV_UNMERGEABLE)"
    to.out(
        f"Unmerging {who} needs {first['frames_needed']:,} frames, {format_bytes(first['bytes_needed'])}, "
        f"for {first['pages_unshared']:,} pages."
    )
    if first["zero_pages_kept"]:
        to.out(
            f"{first['zero_pages_kept']:,} pages stay on the shared zero page: Linux {settings.kernel} does not know "
            "that KSM placed them."
        )
    elif first["zero_pages_given_back"]:
        to.out(f"{first['zero_pages_given_back']:,} of them were on the shared zero page.")
    shown = table()
    shown.add_column("unmerged", overflow="fold")
    names = ("pages_unshared", "zero_pages_given_back", "frames_freed", "frames_needed")
    for name in (*names, "bytes"):
        shown.add_column(name, justify="right")
    for row in rows[:MAX_ROWS]:
        who = printable(row["image_id"] or "all")
        shown.add_row(who, *(f"{row[n]:,}" for n in names), format_bytes(row["bytes_needed"]))
    to.print(shown)
    if len(rows) > MAX_ROWS:
        to.out(f"... and {len(rows) - MAX_ROWS:,} images more; --json has them all")
