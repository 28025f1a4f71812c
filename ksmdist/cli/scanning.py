"""Commands that count what images hold: run, plan, demo."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ksmdist import keys, options, pipeline, report, runs
from ksmdist.checkpoint import is_complete, unfinished
from ksmdist.errors import EXIT_HOLES, EXIT_INTERRUPTED, RunDirectoryError, SettingsError
from ksmdist.settings import Settings
from ksmdist.timings import Progress

__all__ = ["demo_command", "plan_command", "run_command"]


def run_command(
    context: typer.Context,
    sources: options.Sources = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="RUN", help="The run directory to write; required.")
    ] = None,
    manifest: options.Manifest = None,
    manifest_root: options.ManifestRoot = None,
    base: options.Base = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="Take up an unfinished run; no IMAGE, no setting.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail if a node that has images is not in the cluster.")
    ] = False,
    format: options.Format = None,
    page_size: options.PageSize = 4096,
    use_zero_pages: options.UseZeroPages = None,
    max_page_sharing: options.MaxPageSharing = None,
    merge_across_nodes: options.MergeAcrossNodes = None,
    kernel: options.Kernel = None,
    full_scans: options.FullScans = None,
    smart_scan: options.SmartScan = None,
    pages_to_scan: options.PagesToScan = None,
    sleep_millisecs: options.SleepMillisecs = None,
    zero_page_colors: Annotated[
        int, typer.Option("--zero-page-colors", metavar="N", help="Zero pages chosen by address, as s390 has them.")
    ] = 1,
    eligible: Annotated[
        str,
        typer.Option("--eligible", help="flagged: the pages an image marks; all: as if all its mappings were marked."),
    ] = "flagged",
    engine: options.Engine = "auto",
    address: options.Address = None,
    shard_pages: options.ShardPages = None,
    ranges: options.Ranges = None,
    task_memory: options.TaskMemory = None,
    fan_in: options.FanIn = 1024,
    previous: Annotated[
        Path | None,
        typer.Option("--previous", metavar="RUN", help="An earlier run: pages that changed since are not merged."),
    ] = None,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Keep each page's checksum, 5 bytes a page, for a later --previous.")
    ] = False,
    verify: Annotated[
        str,
        typer.Option("--verify", help="How equal digests are confirmed to be equal pages: none, hash or bytes."),
    ] = "hash",
    key_file: options.KeyFile = None,
    no_key: options.NoKey = False,
    contents: Annotated[int, typer.Option("--contents", metavar="N", help="Most rows of table contents.")] = 500,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Scan memory images, merge what they share, and count it as KSM would."""
    if resume is not None:
        more = {"resume", "engine", "address", "task_memory", "key_file", "no_key", "as_json", "quiet"}
        given = [name for name in context.params if name not in more and _is_given(context, name)]
        if given:
            raise SettingsError(
                "goes with no images, no -o and no settings: the run has its own",
                "--resume",
                f"leave out {', '.join(given)}",
            )
        memory = None if task_memory is None else task_memory << 20
        key = keys.load(key_file, no_key)
        _show(resume, lambda bar: pipeline.resume(resume, engine, address, bar, memory, key), as_json, quiet)
        return
    if out is None:
        raise typer.BadParameter("Missing option '--out' / '-o': the run directory to write.")
    settings = Settings(
        page_size=page_size,
        zero_page_colors=zero_page_colors,
        eligible=eligible,  # type: ignore[arg-type]  # Settings checks it
        format=format,
        shard_pages=shard_pages,
        ranges=ranges,
        task_memory=None if task_memory is None else task_memory << 20,
        fan_in=fan_in,
        contents=contents,
        checksums=checksums,
        verify=verify,  # type: ignore[arg-type]  # Settings checks it
    )
    settings = options.with_knobs(
        settings,
        use_zero_pages=use_zero_pages,
        max_page_sharing=max_page_sharing,
        merge_across_nodes=merge_across_nodes,
        kernel=kernel,
        full_scans=full_scans,
        smart_scan=smart_scan,
        pages_to_scan=pages_to_scan,
        sleep_millisecs=sleep_millisecs,
    )
    key = keys.load(key_file, no_key)
    _show(
        out,
        lambda bar: pipeline.run(
            sources or [],
            out,
            settings,
            engine,
            address,
            bar,
            manifest,
            strict,
            previous,
            base or (),
            key,
            manifest_root or (),
        ),
        as_json,
        quiet,
    )


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option or argument is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def plan_command(
    sources: options.Sources = None,
    manifest: options.Manifest = None,
    manifest_root: options.ManifestRoot = None,
    base: options.Base = None,
    format: options.Format = None,
    page_size: options.PageSize = 4096,
    engine: options.Engine = "auto",
    address: options.Address = None,
    shard_pages: options.ShardPages = None,
    ranges: options.Ranges = None,
    task_memory: options.TaskMemory = None,
    fan_in: options.FanIn = 1024,
    cpus: Annotated[
        int | None,
        typer.Option("--cpus", metavar="N", min=1, help="Of a cluster that is to be. [default: what there is]"),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say what a run would do and take: shards, ranges, memory, network, time. No page is read."""
    settings = Settings(
        page_size=page_size,
        format=format,
        shard_pages=shard_pages,
        ranges=ranges,
        task_memory=None if task_memory is None else task_memory << 20,
        fan_in=fan_in,
    )
    planned = pipeline.estimate(
        sources or [], settings, engine, address, manifest, cpus, base or (), manifest_root or ()
    )
    if as_json:
        print(
            json.dumps(
                {
                    "plan": planned.estimate.as_dict(),
                    "engine": planned.engine.name,
                    "settings": planned.settings.as_dict(),
                    "out_of_reach": planned.missing,
                    "filtered": planned.filtered,
                }
            )
        )
    else:
        report.render_plan(planned.estimate, planned.settings, planned.engine.name, sys.stdout)
        report.render_filtered(planned.filtered, sys.stdout)
    if planned.missing:
        _name_missing(planned.missing, "they are not in this plan")
        raise typer.Exit(EXIT_HOLES)


def _name_missing(missing: Sequence[str], then: str) -> None:
    names = report.printable(", ".join(missing[:10]) + (" ..." if len(missing) > 10 else ""))
    print(f"{len(missing)} images are on nodes that are not in the cluster: {names}: {then}", file=sys.stderr)


def demo_command(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to put it.")] = Path("ksmdist-demo"),
    engine: options.Engine = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make three small images that look like real guests, and run on them."""
    from ksmdist.demo import make_images

    out = directory / "run"
    if (out / "run.json").is_file():  # of an earlier demo
        shutil.rmtree(out)
    try:
        made = make_images(directory / "images")
    except OSError as error:
        raise RunDirectoryError(
            f"cannot be written: {os.strerror(error.errno or 0)}", str(directory), "choose another directory"
        ) from None
    paths = [str(path) for path in made]
    _show(out, lambda bar: pipeline.run(paths, out, Settings(), engine, None, bar), as_json, quiet)


def _show(out: Path, run: Callable[[Progress | None], runs.Run], as_json: bool, quiet: bool) -> None:
    """Run, tell how it goes, and print what it found."""
    watching = sys.stderr.isatty()
    told: report.Bar | report.Log | None = (
        None if quiet else report.Bar(sys.stderr) if watching else report.Log(sys.stderr)
    )
    try:
        done = run(told)
    except KeyboardInterrupt:
        kept = unfinished(out)
        said = "nothing was written"
        if kept or is_complete(out):
            said = f"{kept} finished tasks are kept: ksmdist run --resume {out}"
        print(f"ksmdist: interrupted; {said}", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        if told is not None:
            told.close()
    processes = done.ksm_stat.to_pylist()
    if as_json:
        print(json.dumps({**done.summary, "processes": processes}))
    else:
        report.render(done.summary, done.images, processes, done.caveats, sys.stdout)
    if not done.complete:
        listed = out / "holes.parquet"
        if done.holes:
            print(f"{done.holes} pages could not be read: {listed} lists them", file=sys.stderr)
        if done.out_of_reach:
            _name_missing(done.out_of_reach, f"{listed} lists them")
        raise typer.Exit(EXIT_HOLES)
