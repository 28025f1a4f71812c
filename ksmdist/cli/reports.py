"""Commands that show what a run found, and what its tables are: report, diff, query, schema."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from ksmdist import options, report, schema, store, streams, tables
from ksmdist.errors import RunDirectoryError, SettingsError
from ksmdist.report.prometheus import expose
from ksmdist.report.summary import SUMMARY_TABLES, summarize

if TYPE_CHECKING:
    from ksmdist.query import Answer

__all__ = ["diff_command", "query_command", "report_command", "schema_command"]

_MAX_ROWS = 200  # that query shows as a table


def report_command(
    run: options.RunDirectory,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page to look at, in one file.")
    ] = None,
    prometheus: Annotated[bool, typer.Option("--prometheus", help="Print metrics in Prometheus' text format.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="With --prometheus or --json: write it there. A new file is 0600, one that is there keeps its mode.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show what a run found on one screen: what is merged, how much is the zero page, how varied the rest is."""
    if as_json and prometheus:
        raise SettingsError("exclude each other", "--json, --prometheus", "give one of them")
    if out is not None and not (as_json or prometheus):
        raise SettingsError("goes with --prometheus or --json", "-o", "the page to look at is --html FILE")
    manifest = store.read_manifest(run)
    if html is not None:
        _write_page(run, manifest, html)
        if not (as_json or prometheus):
            if store.stream_at(html) != 1:  # nothing is said within the page
                print(f"page: {html}")
            return
    found = summarize(
        str(run),
        manifest,
        {name: store.read_table(run, tables.TABLES[name]) for name in SUMMARY_TABLES},
        streams.read_batches(run, tables.SHARING),
        streams.read_batches(run, tables.EXPOSURE),
    )
    if prometheus:
        _put(expose(found, store.read_table(run, tables.IMAGES)), out)
    elif as_json:
        _put(json.dumps(found) + "\n", out)
    else:
        report.render_summary(found, sys.stdout)


def _write_page(run: Path, manifest: Mapping[str, Any], path: Path) -> None:
    """Write the page of a run; the file is there when it is whole."""
    from ksmdist.report.exposure import summarize_exposure
    from ksmdist.report.html import PAGE_TABLES, PageInput, render_html
    from ksmdist.report.page_data import TOP_ROWS

    page = PageInput(
        manifest,
        {name: store.read_table(run, tables.TABLES[name]) for name in PAGE_TABLES},
        streams.read_batches(run, tables.SHARING),
        summarize_exposure(manifest, streams.read_batches(run, tables.EXPOSURE), TOP_ROWS),
    )
    with _written(path, "--html") as sink:
        text = io.TextIOWrapper(sink, encoding="utf-8", newline="\n", write_through=True)
        render_html(page, text)
        text.detach()


@contextmanager
def _written(path: Path, option: str) -> Iterator[BinaryIO]:
    """A file that the user names with `option`; raises RunDirectoryError where it cannot be written."""
    try:
        with store.output_file(path) as sink:
            yield sink
    except OSError as error:
        raise RunDirectoryError(
            f"cannot be written: {os.strerror(error.errno) if error.errno else error}",
            str(path),
            f"free some space, or choose another name with {option}",
        ) from None


def _put(text: str, out: Path | None) -> None:
    """Print a text, or write it to a file."""
    if out is None:
        sys.stdout.write(text)
        return
    with _written(out, "-o") as sink:
        sink.write(text.encode())


def diff_command(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run directory: before.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="A run directory: after.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Write diff_contents.parquet and diff_images.parquet there."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show what changed from one run to another: contents that came, went, gained or lost copies; images."""
    from ksmdist import diff

    runs = (run_a, run_b)
    a, b = (store.read_manifest(run) for run in runs)
    for name in ("page_size", "eligible"):
        values = [manifest["settings"][name] for manifest in (a, b)]
        if values[0] != values[1]:
            raise SettingsError(
                f"is {values[0]} in {run_a} and {values[1]} in {run_b}", name, "compare runs that have the same"
            )
    if a["key"] != b["key"]:
        names = [f"key {manifest['key']}" if manifest["key"] else "no key" for manifest in (a, b)]
        raise RunDirectoryError(
            f"has digests under {names[1]}, and {run_a} under {names[0]}: they cannot be compared",
            str(run_b),
            "run the images of one again, with the key of the other",
        )
    tree_a, tree_b = (streams.read_batches(run, tables.STABLE_TREE, diff.TREE_COLUMNS) for run in runs)
    images = diff.diff_images(*(store.read_table(run, tables.IMAGES) for run in runs))
    found = diff.Difference()
    with ExitStack() as stack:
        write = None
        if out is not None:
            directory = stack.enter_context(streams.new_directory(out))
            write = stack.enter_context(streams.table_writer(tables.DIFF_CONTENTS, directory))
            store.write_table(images, tables.DIFF_IMAGES, directory)
        for rows in diff.diff_contents(tree_a, tree_b, found):
            if write is not None:
                write(rows)
        diff.check(found, *(store.read_table(run, tables.SPECTRUM) for run in runs))
    shown = report.diff_summary(
        (str(run_a), str(run_b)),
        a,
        b,
        found.sums,
        found.largest,
        images,
        [store.read_table(run, tables.CONTENTS) for run in (run_b, run_a)],
    )
    if as_json:
        print(json.dumps(shown))
        return
    report.render_diff(shown, sys.stdout)
    if out is not None:
        print(f"tables: {out}")


def query_command(
    run: options.RunDirectory,
    sql: Annotated[str | None, typer.Argument(metavar="[SQL]", help="What to ask. [default: list the tables]")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", metavar="FILE", help="Ask what is in this file.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the tables of the run, with their columns.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with a heading.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array, an object a row.")] = False,
) -> None:
    """Ask a run's tables in SQL, by their names. Needs DuckDB: pip install 'ksmdist[query]'.

    The SQL sees the tables of this run and no file; digests are printed as hexadecimal.
    """
    from ksmdist.query import ask, tables_of

    if sum((sql is not None, file is not None, listed)) > 1:
        raise SettingsError("exclude each other", "SQL, -f, --list", "give one of them")
    if as_csv and as_json:
        raise SettingsError("exclude each other", "--csv, --json", "give one of them")
    manifest = store.read_manifest(run)
    if file is not None:
        try:
            sql = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise SettingsError(f"cannot be read: {error}", str(file), "give a file of SQL with -f") from None
    if sql is None:
        _list(tables_of(run), as_csv, as_json)
        return
    with ask(run, sql) as answer:
        report.render_filtered(manifest["summary"]["filtered"], sys.stderr)
        _answer(answer, as_csv, as_json)


def _list(found: Iterable[schema.Table], as_csv: bool, as_json: bool) -> None:
    from ksmdist.query import Answer

    columns = ("table", "column", "type", "unit", "meaning")
    rows = [
        (table.name, column.name, str(column.type), column.unit or "", column.doc)
        for table in found
        for column in table.columns
    ]
    if as_csv or as_json:
        _answer(Answer(columns, iter(rows)), as_csv, as_json)
        return
    for table in found:
        print(f"{table.name}: {', '.join(column.name for column in table.columns)}")
    print("`ksmdist schema TABLE` says what each column is, and so does --list with --csv or --json.")


def _answer(answer: Answer, as_csv: bool, as_json: bool) -> None:
    if as_csv:
        import csv

        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.columns)
        # Rows that nobody reads any more are not asked for: there may be very many.
        writer.writerows(takewhile(lambda _: not getattr(sys.stdout, "left", False), answer.rows))
    elif as_json:
        twice = {name for name in answer.columns if answer.columns.count(name) > 1}
        if twice:
            raise SettingsError(f"has two columns {', '.join(sorted(twice))}", "SQL", "name one otherwise, with AS")
        print(json.dumps([dict(zip(answer.columns, row, strict=True)) for row in answer.rows]))
    else:
        report.render_rows(answer.columns, answer.rows, _MAX_ROWS, sys.stdout)


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
