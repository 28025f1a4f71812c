"""What a run would take, for people."""

from __future__ import annotations

from typing import TextIO

from ksmdist.plan import Estimate
from ksmdist.report.terminal import console, format_bytes, table
from ksmdist.settings import Settings

__all__ = ["render_plan"]


def render_plan(estimate: Estimate, settings: Settings, engine: str, out: TextIO) -> None:
    """Print an estimate. Bounds are for pages that are all different; real images take less."""
    assert settings.shard_pages is not None
    assert settings.task_memory is not None
    shown = table(header=False)
    shown.add_column()
    shown.add_column(overflow="fold")
    size = settings.page_size
    network = format_bytes(estimate.network_bytes)
    if estimate.read_bytes:
        network += f", {format_bytes(estimate.read_bytes)} of it from object stores"
    combined = f", {estimate.combine_tasks:,} tasks to combine their results" if estimate.combine_tasks else ""
    for name, value in (
        ("pages", f"{estimate.pages:,} in {estimate.images:,} images, {format_bytes(estimate.pages * size)}"),
        *([("earlier passes", f"{estimate.earlier_pages:,} pages more")] if estimate.earlier_pages else []),
        (
            "scan",
            f"{estimate.shards:,} shards of up to {settings.shard_pages:,} pages, {estimate.tasks:,} tasks{combined}",
        ),
        ("merge", f"{estimate.ranges:,} ranges of digests, at most {estimate.rows:,} rows"),
        ("on", f"{engine}, {estimate.cpus:,} CPUs"),
        ("memory of a scan", f"up to {format_bytes(estimate.scan_bytes)}"),
        ("memory of a merge", f"up to {format_bytes(estimate.merge_bytes)}"),
        ("memory of the driver", f"about {format_bytes(estimate.driver_bytes)}, if all images share at random"),
        ("disk meanwhile", f"up to {format_bytes(estimate.work_bytes)}"),
        ("network", f"up to {network}" if estimate.network_bytes else "none"),
        ("time", f"about {_duration(estimate.seconds)}, if the images can be read as fast as they are hashed"),
    ):
        shown.add_row(name, value)
    to = console(out)
    to.print(shown)
    to.out("Bounds hold for pages that are all different; each distinct content of a shard is one row.")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
