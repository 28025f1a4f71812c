"""Commands that count a run again: whatif, explain, unmerge."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ksmdist import counters, options, report, runs, store, tables
from ksmdist.errors import SettingsError
from ksmdist.explain import explain
from ksmdist.settings import Settings
from ksmdist.unmerge import unmerge
from ksmdist.whatif import best, grid, present

__all__ = ["explain_command", "unmerge_command", "whatif_command"]


def whatif_command(
    run: options.RunDirectory,
    use_zero_pages: options.UseZeroPages = None,
    max_page_sharing: options.MaxPageSharing = None,
    merge_across_nodes: options.MergeAcrossNodes = None,
    kernel: options.Kernel = None,
    full_scans: options.FullScans = None,
    smart_scan: options.SmartScan = None,
    pages_to_scan: options.PagesToScan = None,
    sleep_millisecs: options.SleepMillisecs = None,
    as_json: options.Json = False,
) -> None:
    """Count a run again under other settings; without any, show the grid of settings and name the best."""
    done = runs.load(run)
    settings = options.with_knobs(
        done.settings,
        use_zero_pages=use_zero_pages,
        max_page_sharing=max_page_sharing,
        merge_across_nodes=merge_across_nodes,
        kernel=kernel,
        full_scans=full_scans,
        smart_scan=smart_scan,
        pages_to_scan=pages_to_scan,
        sleep_millisecs=sleep_millisecs,
    )
    result = runs.whatif(done, settings)
    asked = settings != done.settings
    table = grid(done.sharing, settings) if asked else store.read_table(run, tables.WHATIF)
    rows = table.to_pylist()
    fault = int(done.sharing.of_images("zero_mapped_fault").sum())
    if as_json:
        print(
            json.dumps(
                result
                | {
                    "grid": rows,
                    "best": best(rows, settings),
                    "present": present(rows),
                    "filtered": done.filtered,
                }
            )
        )
        return
    report.render_filtered(done.filtered, sys.stdout)
    if asked:
        report.render_prediction(result, fault, sys.stdout)
    else:
        report.render_whatif(rows, settings, result["merges"], fault, sys.stdout)


def explain_command(
    run: options.RunDirectory,
    image: options.Image = None,
    region: Annotated[
        str | None, typer.Option("--region", metavar="NAME", help="This mapping alone: [heap], a path; - for none.")
    ] = None,
    use_zero_pages: options.UseZeroPages = None,
    max_page_sharing: options.MaxPageSharing = None,
    merge_across_nodes: options.MergeAcrossNodes = None,
    kernel: options.Kernel = None,
    as_json: options.Json = False,
) -> None:
    """Count why pages are not merged, by image and region."""
    done, settings = _converged(run, use_zero_pages, max_page_sharing, merge_across_nodes, kernel)
    prediction = counters.predict(done.sharing, settings)
    rows = explain(done.sharing, done.regions, prediction).to_pylist()
    rows = _of_image(rows, image, done)
    if region is not None:
        chosen = [row for row in rows if (row["region"] or "-") == region]
        if not chosen:
            names = sorted({row["region"] or "-" for row in rows})
            raise SettingsError("is no region of these images", region, f"use one of {', '.join(names[:20])}")
        rows = chosen
    if as_json:
        print(json.dumps({"explain": rows, "settings": settings.as_dict(), "filtered": done.filtered}))
    else:
        report.render_filtered(done.filtered, sys.stdout)
        report.render_explain(rows, settings.page_size, sys.stdout)


def unmerge_command(
    run: options.RunDirectory,
    image: options.Image = None,
    use_zero_pages: options.UseZeroPages = None,
    max_page_sharing: options.MaxPageSharing = None,
    merge_across_nodes: options.MergeAcrossNodes = None,
    kernel: options.Kernel = None,
    as_json: options.Json = False,
) -> None:
    """Count what MADV_UNMERGEABLE of an image, or run=2, would bring back: pages, frames, bytes."""
    done, settings = _converged(run, use_zero_pages, max_page_sharing, merge_across_nodes, kernel)
    rows = unmerge(done.sharing, counters.predict(done.sharing, settings), settings).to_pylist()
    rows = _of_image(rows, image, done)
    if as_json:
        print(json.dumps({"unmerge": rows, "settings": settings.as_dict(), "filtered": done.filtered}))
    else:
        report.render_filtered(done.filtered, sys.stdout)
        report.render_unmerge(rows, settings, sys.stdout)


def _converged(
    run: Path, use_zero_pages: bool | None, max_page_sharing: str | None, across: bool | None, kernel: str | None
) -> tuple[runs.Run, Settings]:
    """A run, and its settings with these instead, once nothing changes any more."""
    done = runs.load(run)
    settings = replace(done.settings, full_scans=None, smart_scan=False)
    return done, options.with_knobs(
        settings,
        use_zero_pages=use_zero_pages,
        max_page_sharing=max_page_sharing,
        merge_across_nodes=across,
        kernel=kernel,
    )


def _of_image(rows: list[dict[str, Any]], image: str | None, run: runs.Run) -> list[dict[str, Any]]:
    if image is None:
        return rows
    ids = run.images.column("image_id").to_pylist()
    if image not in ids:
        raise SettingsError("is no image of this run", image, f"use one of {', '.join(ids[:20])}")
    return [row for row in rows if row["image_id"] == image]
