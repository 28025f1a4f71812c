"""A finished run, for people: the answer first, then the counts behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

import pyarrow as pa

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

__all__ = ["Bar", "format_bytes", "headline", "render"]

_MAX_IMAGES = 20


def format_bytes(nbytes: float) -> str:
    """Bytes in the largest binary unit that keeps it at one or more, with its sign."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def headline(summary: Mapping[str, Any]) -> str:
    """The answer in one sentence: what KSM would save, and how much of it is the zero page."""
    pages, merges = summary["pages"], summary["merges"]
    total = pages["total"] * summary["settings"]["page_size"]
    merged = merges["zero"] + merges["content"]
    if not merged:
        return f"KSM would save nothing of these {format_bytes(total)}: no two eligible pages are the same."
    return (
        f"KSM would save {format_bytes(merges['saved_bytes'])} of {format_bytes(total)} "
        f"({_percent(merges['saved_bytes'], total)}); "
        f"{_percent(merges['zero'], merged)} of the merged pages are zero pages."
    )


def render(summary: Mapping[str, Any], images: pa.Table, caveats: tuple[str, ...], out: TextIO) -> None:
    """Print a run: `summary` as `--json` gives it, and the `images` table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=out, width=None if out.isatty() else 100, highlight=False, markup=False)
    pages, settings, counted = summary["pages"], summary["settings"], summary["counters"]
    console.print(headline(summary))
    console.print()

    knobs = (
        f"use_zero_pages={int(settings['use_zero_pages'])}, max_page_sharing={settings['max_page_sharing']}, "
        f"merge_across_nodes={int(settings['merge_across_nodes'])}, eligible={settings['eligible']}"
    )
    left = Table(box=box.SIMPLE_HEAD, title="pages", title_justify="left", show_header=False, pad_edge=False)
    left.add_column()
    left.add_column(justify="right")
    left.add_column(justify="right")
    left.add_row("present", f"{pages['total']:,}", "100.0 %")
    for name in list(pages)[2:]:
        if pages[name] or name in ("zero", "duplicate", "unique"):
            left.add_row(f"  {name}", f"{pages[name]:,}", _percent(pages[name], pages["total"]))
    left.add_row("absent", f"{pages['absent']:,}", "")
    contents = summary["contents"]
    left.add_row("non-zero contents", f"{contents['distinct']:,}", "")
    left.add_row("  with 2 copies or more", f"{contents['shared']:,}", "")
    left.add_row("  most copies", f"{contents['max_copies']:,}", "")
    left.add_row("same-filled pages", f"{summary['kinds']['same_filled']:,}", "")

    right = Table(box=box.SIMPLE_HEAD, title="kernel counters", title_justify="left", show_header=False, pad_edge=False)
    right.add_column()
    right.add_column(justify="right")
    for name, value in counted.items():
        right.add_row(name, f"{value:,}")
    merges = summary["merges"]
    right.add_row("merged zero pages", f"{merges['zero']:,}")
    right.add_row("merged other pages", f"{merges['content']:,}")
    both = Table.grid(padding=(0, 4))
    both.add_row(left, right)
    console.print(both)
    console.print(f"settings: {knobs}")

    if len(images) > 1:
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        shown.add_column("image", overflow="fold")
        for heading in ("pages", "zero", "duplicate", "unique", "shared within", "with others"):
            shown.add_column(heading, justify="right")
        for row in images.slice(0, _MAX_IMAGES).to_pylist():
            names = ("total", "zero", "duplicate", "unique", "shared_within", "shared_with_others")
            shown.add_row(row["image_id"], *(f"{row[name]:,}" for name in names))
        console.print(shown)
        if len(images) > _MAX_IMAGES:
            console.print(f"... and {len(images) - _MAX_IMAGES:,} images more, in images.parquet")
    for caveat in caveats[:_MAX_IMAGES]:
        console.print(f"note: {caveat}")
    holes = summary["holes"]
    if holes["pages"]:
        console.print(
            f"INCOMPLETE: {holes['pages']:,} pages in {holes['ranges']:,} ranges could not be read and are not "
            "counted; holes.parquet lists them"
        )
    console.print(f"engine: {summary['engine']} ({summary['engine_why']})")
    console.print(f"run directory: {summary['run']}")


class Bar:
    """A progress bar on a terminal: shards, then ranges; pages, GiB/s and the time left."""

    def __init__(self, err: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bars: Bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]} {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(file=err),
            transient=True,
        )
        self._page_size = 0
        self._task: TaskID | None = None
        self._merging = False

    def engine(self, name: str, why: str) -> None:
        """Say which engine runs, and why."""
        self._bars.console.print(f"engine: {name} ({why})", highlight=False)

    def scanning(self, pages: int, page_size: int) -> None:
        """Start the bar."""
        self._page_size = page_size
        self._bars.start()
        self._task = self._bars.add_task("scanning", total=pages, unit="pages", rate="")

    def scanned(self, pages: int) -> None:
        """Move it on."""
        assert self._task is not None
        self._bars.update(self._task, advance=pages)
        speed = self._bars.tasks[0].speed or 0
        self._bars.update(self._task, rate=f"{speed * self._page_size / (1 << 30):.2f} GiB/s")

    def merged(self, ranges: int) -> None:
        """Go over to the ranges, one more done."""
        if not self._merging:
            self._merging = True
            self._task = self._bars.add_task("merging", total=ranges, unit="ranges", rate="")
        assert self._task is not None
        self._bars.update(self._task, advance=1)

    def close(self) -> None:
        """Take the bar away."""
        self._bars.stop()
