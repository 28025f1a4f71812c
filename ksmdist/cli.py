"""The command line: parse, call, print. The only place that ends the process or renders an error."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ksmdist import counters, images, options, pipeline, report, runs, schema, store, tables
from ksmdist.checkpoint import is_complete, unfinished
from ksmdist.errors import EXIT_HOLES, EXIT_INTERRUPTED, KsmdistError, RunDirectoryError, SettingsError
from ksmdist.explain import explain
from ksmdist.settings import Settings
from ksmdist.timings import Progress
from ksmdist.unmerge import unmerge
from ksmdist.version import __version__
from ksmdist.whatif import best, grid, present

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would take [heap] and [default: ...] for markup
    help=(
        "What Linux KSM would merge in memory images, and what that would save.\n\n"
        "Exit codes: 0 done; 1 failed; 2 wrong arguments; 3 done, but some pages could not be read; "
        "10 not a memory image, or a broken one; 11 the run directory is in use; 130 interrupted."
    ),
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"ksmdist {__version__}")
        raise typer.Exit


@app.command("run")
def run_command(
    context: typer.Context,
    sources: options.Sources = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="RUN", help="The run directory to write; required.")
    ] = None,
    manifest: options.Manifest = None,
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
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Scan memory images, merge what they share, and count it as KSM would."""
    if resume is not None:
        more = {"resume", "engine", "address", "task_memory", "as_json", "quiet"}
        given = [name for name in context.params if name not in more and _is_given(context, name)]
        if given:
            raise SettingsError(
                "goes with no images, no -o and no settings: the run has its own",
                "--resume",
                f"leave out {', '.join(given)}",
            )
        memory = None if task_memory is None else task_memory << 20
        _show(resume, lambda bar: pipeline.resume(resume, engine, address, bar, memory), as_json, quiet)
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
    )
    settings = _with_knobs(
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
    _show(
        out,
        lambda bar: pipeline.run(sources or [], out, settings, engine, address, bar, manifest, strict),
        as_json,
        quiet,
    )


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option or argument is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command("plan")
def plan_command(
    sources: options.Sources = None,
    manifest: options.Manifest = None,
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
    planned = pipeline.estimate(sources or [], settings, engine, address, manifest, cpus)
    if as_json:
        print(
            json.dumps(
                {
                    "plan": planned.estimate.as_dict(),
                    "engine": planned.engine.name,
                    "settings": planned.settings.as_dict(),
                    "out_of_reach": planned.missing,
                }
            )
        )
    else:
        report.render_plan(planned.estimate, planned.settings, planned.engine.name, sys.stdout)
    if planned.missing:
        _name_missing(planned.missing, "they are not in this plan")
        raise typer.Exit(EXIT_HOLES)


def _name_missing(missing: Sequence[str], then: str) -> None:
    names = ", ".join(missing[:10]) + (" ..." if len(missing) > 10 else "")
    print(f"{len(missing)} images are on nodes that are not in the cluster: {names}: {then}", file=sys.stderr)


@app.command("import")
def import_command(
    sources: Annotated[list[str], typer.Argument(metavar="SRC...", help="Memory images in any format.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="X.arrow", help="The Arrow file to write; or a directory, for one each."),
    ],
    image_id: Annotated[str, typer.Option("--id", help="Name of the image. [default: the file's name]")] = "",
    format: options.Format = None,
    page_size: options.PageSize = 4096,
) -> None:
    """Write memory images as Arrow (table memory_image): several sources as one image, by address."""
    opened = [images.open_image(source, page_size, format) for source in sources]
    infos = [source.info for source in opened]
    if out.is_dir():
        if image_id and len(opened) > 1:
            raise SettingsError("names one image, and there are several", "--id", "import them one by one")
        ids = [image_id] if image_id else images.image_ids(infos)
        jobs = [
            ([source], out / f"{name.replace('/', '_')}.arrow", name) for source, name in zip(opened, ids, strict=True)
        ]
    else:
        name = image_id or (infos[0].image_id or Path(infos[0].path).stem if len(infos) == 1 else out.stem)
        jobs = [(opened, out, name)]
    holes = 0
    for group, target, name in jobs:
        if target.exists():
            raise RunDirectoryError("exists", str(target), "choose another name with -o, or remove it")
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        try:
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            lost = images.write_image(group, str(partial), name)
            os.replace(partial, target)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot be written: {os.strerror(error.errno) if error.errno else error}",
                str(target),
                "choose another -o",
            ) from None
        finally:
            partial.unlink(missing_ok=True)
        for path, hole in lost:
            holes += hole.pages
            print(f"{path}: {hole.pages} pages at {hole.address:#x} {hole.reason}: left out", file=sys.stderr)
        pages = sum(source.info.pages for source in group) - sum(
            hole.pages for _, hole in lost if hole.reason == "unreadable"
        )
        print(f"{target}: image {name}, {pages:,} pages")
    if holes:
        raise typer.Exit(EXIT_HOLES)


@app.command("capture")
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
            print(f"note: {image.image_id}: {caveat}")
        if image.unreadable:
            print(f"{image.path}: {image.unreadable:,} pages could not be read", file=sys.stderr)
    if any(image.unreadable for image in done):
        raise typer.Exit(EXIT_HOLES)


@app.command("verify-kernel")
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


@app.command("demo")
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


@app.command("schema")
def schema_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A table. [default: all]")] = None,
) -> None:
    """Print the schema of a table as JSON, or of all tables."""
    if name is None:
        print(json.dumps([schema.render(table) for table in tables.TABLES.values()], indent=1))
        return
    if name not in tables.TABLES:
        raise SettingsError("is no table", name, f"use one of {', '.join(tables.TABLES)}")
    print(json.dumps(schema.render(tables.TABLES[name]), indent=1))


def _with_knobs(settings: Settings, **knobs: object) -> Settings:
    """The settings with these instead, None left as it is."""
    given = {name: value for name, value in knobs.items() if value is not None}
    limit = given.get("max_page_sharing")
    if limit is not None:
        text = str(limit)
        if text != "unlimited" and not (text.isascii() and text.isdecimal()):
            raise SettingsError(f"{text!r} is not a number", "max_page_sharing", "use 2 or more, or unlimited")
        given["max_page_sharing"] = None if text == "unlimited" else int(text)
    return replace(settings, **given)  # type: ignore[arg-type]  # Settings checks them


@app.command("whatif")
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
    settings = _with_knobs(
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
        print(json.dumps(result | {"grid": rows, "best": best(rows, settings), "present": present(rows)}))
        return
    if asked:
        report.render_prediction(result, fault, sys.stdout)
    else:
        report.render_whatif(rows, settings, result["merges"], fault, sys.stdout)


@app.command("explain")
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
        print(json.dumps({"explain": rows, "settings": settings.as_dict()}))
    else:
        report.render_explain(rows, settings.page_size, sys.stdout)


@app.command("unmerge")
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
        print(json.dumps({"unmerge": rows, "settings": settings.as_dict()}))
    else:
        report.render_unmerge(rows, settings, sys.stdout)


def _converged(
    run: Path, use_zero_pages: bool | None, max_page_sharing: str | None, across: bool | None, kernel: str | None
) -> tuple[runs.Run, Settings]:
    """A run, and its settings with these instead, once nothing changes any more."""
    done = runs.load(run)
    settings = replace(done.settings, full_scans=None, smart_scan=False)
    return done, _with_knobs(
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


def main() -> None:
    """The console script: run a command, render what it raises, end the process with its code."""
    code = 0
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: whoever closed it wants nothing
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        app()
    except KsmdistError as error:
        print(f"ksmdist: {error}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        if error.filename is not None:  # of a file, and not foreseen: a bug
            raise
        with suppress(OSError):
            print(f"ksmdist: cannot write what was found: {os.strerror(error.errno or 0)}", file=sys.stderr)
        code = 1
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BrokenPipeError:  # nobody reads on
        pass
    except OSError as error:
        with suppress(OSError):
            os.write(2, f"ksmdist: cannot write what was found: {os.strerror(error.errno or 0)}\n".encode())
        code = code or 1
    os._exit(code)  # taking Arrow and numpy apart takes 35 ms, and changes nothing
