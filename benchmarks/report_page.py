"""The report's page of 10,000 images: its size, the time to write it, and the time until a browser has drawn it.

    python benchmarks/report_page.py [--images 10000] [--partners 200] [--opens 7]

The run is made up (tests/report_runs.py). `--partners 9999` is all pairs of 10,000 images, 50 million rows of table
sharing. A browser is started anew for each opening, so that nothing is warm but the disk.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ksmdist.report.html import render_html
from tests.report_runs import made_up

DRAWN = "html[data-ready=true]"


def main() -> None:
    """Print size, seconds to write and median seconds to open."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--partners", type=int, default=200)
    parser.add_argument("--opens", type=int, default=7)
    args = parser.parse_args()

    run = made_up(args.images, args.partners)
    out = io.StringIO()
    start = time.perf_counter()
    render_html(run, out)
    written = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    text = out.getvalue()
    print(f"{args.images:,} images, {args.partners:,} partners each: {len(text.encode()) / 1e6:.2f} MB")
    print(f"written in {written:.2f} s (with making the pairs), peak of the process {peak:,.0f} MiB")

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("Chromium is not installed: not opened")
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "report.html"
        file.write_text(text, encoding="utf-8")
        seconds = sorted(opening(chromium, file) for _ in range(args.opens))
    print(f"opened and drawn in {statistics.median(seconds):.2f} s, {seconds[0]:.2f} to {seconds[-1]:.2f}")


def opening(chromium: str, file: Path) -> float:
    """Seconds from asking for the page until all plots are drawn, in a fresh browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        start = time.perf_counter()
        page.goto(file.as_uri(), wait_until="commit")
        page.locator(DRAWN).wait_for(state="attached")
        taken = time.perf_counter() - start
        browser.close()
    return taken


if __name__ == "__main__":
    main()
