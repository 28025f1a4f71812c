"""The command line: parse, call, print. The only place that ends the process or renders an error."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from ksmdist import images, pipeline, report, tables
from ksmdist.errors import EXIT_HOLES, EXIT_INTERRUPTED, KsmdistError, RunDirectoryError, SettingsError
from ksmdist.settings import Settings
from ksmdist.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=(
        "What Linux KSM would merge in memory images, and what that would save.\n\n"
        "Exit codes: 0 done; 1 failed; 2 wrong arguments; 3 done, but some pages could not be read; "
        "10 not a memory image, or a broken one; 11 the run directory is in use; 130 interrupted."
    ),
)

_Sources = Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Memory images: Arrow, raw or ELF core.")]
_PageSize = Annotated[int, typer.Option("--page-size", help="Bytes in a page.")]
_Format = Annotated[
    str | None, typer.Option("--format", help="Force the format: arrow, elf or raw. [default: by magic]")
]
_Engine = Annotated[str, typer.Option("--engine", help="auto, inline or ray.")]
_Address = Annotated[
    str | None, typer.Option("--address", help="A running Ray cluster. [default: RAY_ADDRESS, if set]")
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"ksmdist {__version__}")
        raise typer.Exit


@app.command("run")
def run_command(
    sources: _Sources,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="The run directory to write.")],
    format: _Format = None,
    page_size: _PageSize = 4096,
    use_zero_pages: Annotated[
        bool, typer.Option("--use-zero-pages/--no-use-zero-pages", help="As /sys/kernel/mm/ksm/use_zero_pages.")
    ] = False,
    max_page_sharing: Annotated[
        int, typer.Option("--max-page-sharing", help="As /sys/kernel/mm/ksm/max_page_sharing.")
    ] = 256,
    merge_across_nodes: Annotated[
        bool,
        typer.Option("--merge-across-nodes/--no-merge-across-nodes", help="As /sys/kernel/mm/ksm/merge_across_nodes."),
    ] = True,
    eligible: Annotated[
        str,
        typer.Option("--eligible", help="flagged: the pages an image marks; all: as if all its mappings were marked."),
    ] = "flagged",
    engine: _Engine = "auto",
    address: _Address = None,
    shard_pages: Annotated[
        int | None, typer.Option("--shard-pages", help="Pages in a shard. [default: by the size of the input]")
    ] = None,
    ranges: Annotated[
        int | None, typer.Option("--ranges", help="Digest ranges, a power of two. [default: by the size of the input]")
    ] = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Scan memory images, merge what they share, and count it as KSM would."""
    settings = Settings(
        page_size=page_size,
        use_zero_pages=use_zero_pages,
        max_page_sharing=max_page_sharing,
        merge_across_nodes=merge_across_nodes,
        eligible=eligible,  # type: ignore[arg-type]  # Settings checks it
        format=format,
        shard_pages=shard_pages,
        ranges=ranges,
    )
    _run_and_show(sources, out, settings, engine, address, as_json, quiet)


@app.command("import")
def import_command(
    sources: Annotated[list[str], typer.Argument(metavar="SRC...", help="Memory images in any format.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="X.arrow", help="The Arrow file to write; or a directory, for one each."),
    ],
    image_id: Annotated[str, typer.Option("--id", help="Name of the image. [default: the file's name]")] = "",
    format: _Format = None,
    page_size: _PageSize = 4096,
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


@app.command("demo")
def demo_command(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to put it.")] = Path("ksmdist-demo"),
    engine: _Engine = "auto",
    as_json: _Json = False,
    quiet: _Quiet = False,
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
    _run_and_show([str(path) for path in made], out, Settings(), engine, None, as_json, quiet)


@app.command("schema")
def schema_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A table. [default: all]")] = None,
) -> None:
    """Print the schema of a table as JSON, or of all tables."""
    if name is None:
        print(json.dumps([tables.render(table) for table in tables.TABLES.values()], indent=1))
        return
    if name not in tables.TABLES:
        raise SettingsError("is no table", name, f"use one of {', '.join(tables.TABLES)}")
    print(json.dumps(tables.render(tables.TABLES[name]), indent=1))


def _run_and_show(
    sources: list[str], out: Path, settings: Settings, engine: str, address: str | None, as_json: bool, quiet: bool
) -> None:
    bar = None if quiet or not sys.stderr.isatty() else report.Bar(sys.stderr)
    try:
        done = pipeline.run(sources, out, settings, engine, address, bar)
    except KeyboardInterrupt:
        print("ksmdist: interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        if bar is not None:
            bar.close()
    if as_json:
        print(json.dumps(done.summary))
    else:
        report.render(done.summary, done.images, done.caveats, sys.stdout)
    if done.holes:
        print(f"{done.holes} pages could not be read: {out / 'holes.parquet'} lists them", file=sys.stderr)
        raise typer.Exit(EXIT_HOLES)


def main() -> None:
    """The console script: run a command, render what it raises, end the process with its code."""
    code = 0
    try:
        app()
    except KsmdistError as error:
        print(f"ksmdist: {error}", file=sys.stderr)
        code = error.exit_code
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # taking Arrow and numpy apart takes 35 ms, and changes nothing
