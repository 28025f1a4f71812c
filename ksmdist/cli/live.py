"""Commands for live processes and this host's kernel: capture, verify-kernel."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Annotated

import typer

from ksmdist import options, report
from ksmdist.errors import EXIT_HOLES, EXIT_INTERRUPTED, SettingsError

__all__ = ["capture_command", "verify_command"]


def capture_command(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the images go, one a process.")],
    pid: Annotated[list[int] | None, typer.Option("--pid", metavar="PID", help="A process; again for more.")] = None,
    cgroup: Annotated[
        str | None, typer.Option("--cgroup", metavar="PATH", help="All processes of this cgroup directory and below.")
    ] = None,
    comm: Annotated[str | None, typer.Option("--comm", metavar="NAME", help="All processes of this name.")] = None,
    mergeable_only: Annotated[
        bool, typer.Option("--mergeable-only", help="Only mappings that are marked mergeable today.")
    ] = False,
    pause: Annotated[
        bool, typer.Option("--pause", help="Stop the processes meanwhile, so that the images are one moment.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Write live processes as memory images, one each, without changing them."""
    from ksmdist.capture import capture, select

    bar = None if quiet or not sys.stderr.isatty() else report.Bar(sys.stderr, "capturing")
    try:
        done = capture(select(pid or [], cgroup, comm), out, mergeable_only, pause, cgroup, bar)
    except KeyboardInterrupt:
        print("ksmdist: interrupted; images that were complete are kept", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        if bar is not None:
            bar.close()
    for image in done:
        print(f"{image.path}: image {image.image_id}, {image.pages:,} pages")
        for caveat in image.caveats:
            print(report.printable(f"note: {image.image_id}: {caveat}"))
        if image.unreadable:
            print(f"{image.path}: {image.unreadable:,} pages could not be read", file=sys.stderr)
    if any(image.unreadable for image in done):
        raise typer.Exit(EXIT_HOLES)


def verify_command(
    layout: Annotated[
        list[str] | None,
        typer.Option(
            "--layout",
            metavar="LAYOUT",
            help="A process, a character a page: 0 zero, . untouched, r read, U unique, else filled with it; "
            "N:LAYOUT is forked from process N, - still shared with it. Again for more processes.",
        ),
    ] = None,
    random_count: Annotated[
        int | None, typer.Option("--random", metavar="N", help="N random experiments. [default: 10]")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the first random experiment.")] = 0,
    live: Annotated[
        list[int] | None,
        typer.Option(
            "--live",
            metavar="PID",
            help="Compare running processes, which are stopped while they are captured; no knob is written.",
        ),
    ] = None,
    use_zero_pages: Annotated[bool, typer.Option("--use-zero-pages", help="For --layout.")] = False,
    max_page_sharing: Annotated[int, typer.Option("--max-page-sharing", help="For --layout.")] = 256,
    smart_scan: Annotated[bool, typer.Option("--smart-scan", help="For --layout.")] = False,
    full_scans: Annotated[
        int | None,
        typer.Option("--full-scans", metavar="N", help="For --layout. [default: until no counter changes]"),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Predict, then switch KSM on for real, and compare every counter. As root; every knob is put back.

    Makes processes, captures them, predicts, lets KSM do its scans, and compares. Exit code 1 where anything differs.
    """
    from ksmdist import verify
    from ksmdist.layouts import Experiment, parse_process, random_experiment

    if sum(map(bool, (layout, random_count, live))) > 1:
        raise SettingsError("exclude each other", "--layout, --random, --live", "give one of them")
    compared: list[tuple[str, verify.Comparison]] = []
    if live:
        compared.append(("running processes", verify.live(live, verify.predict_live)))
    else:
        if layout:
            processes = tuple(map(parse_process, layout))
            made = {"as given": Experiment(processes, max_page_sharing, use_zero_pages, smart_scan, True, full_scans)}
        else:
            seeds = range(seed, seed + (random_count or 10))
            made = {f"seed {number}": random_experiment(random.Random(number)) for number in seeds}
        for name, experiment in made.items():
            comparison = verify.verify(experiment, verify.predict_captured)
            compared.append((f"{name}: {experiment.describe()}", comparison))
            if not as_json:
                print(f"{compared[-1][0]}: {comparison.describe()}", flush=True)
    if as_json:
        print(json.dumps([{"experiment": name} | comparison.as_dict() for name, comparison in compared]))
    else:
        for _, comparison in compared:
            if len(compared) == 1 or not comparison.equal:
                verify.render(comparison, sys.stdout)
    if not all(comparison.equal for _, comparison in compared):
        raise typer.Exit(1)
