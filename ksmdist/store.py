"""The run directory: Parquet tables and run.json, all or nothing.

Everything is written to a temporary directory beside the target, which takes its name when the
run is complete: a run directory is whole or is not there. Directories are 0700, files 0600: digests
tell who guesses a page's content whether the guess is right.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ksmdist.errors import RunDirectoryError
from ksmdist.schema import Table
from ksmdist.tables import STABLE_TREE

__all__ = ["RUN_VERSION", "new_run", "read_manifest", "read_table", "write_manifest", "write_table"]

RUN_VERSION = 2
"""Version of run.json and of the directory's layout."""


@contextmanager
def new_run(out: Path) -> Iterator[Path]:
    """A temporary directory that becomes `out` if the block ends well, and goes if it does not.

    Raises RunDirectoryError if `out` exists and is not an empty directory, or cannot be made.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        holds = "already holds a run" if (out / "run.json").exists() else "exists and is not an empty directory"
        raise RunDirectoryError(holds, str(out), "choose another directory with -o, or remove this one")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(mode=0o700)
        (partial / "stable_tree").mkdir(mode=0o700)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot be made: {os.strerror(error.errno or 0)}", str(out), "choose another directory with -o"
        ) from None
    try:
        yield partial
        try:
            os.rename(partial, out)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot be put in place: {os.strerror(error.errno or 0)}", str(out), "choose another directory with -o"
            ) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_table(table: pa.Table, definition: Table, run: Path, part: int | None = None) -> None:
    """Write a table where its definition says; the stable tree's ranges are parts.

    Raises RunDirectoryError where it cannot be written (a full disk).
    """
    name = definition.file if part is None else definition.file.replace("*", f"{part:05d}")
    # Digests do not compress and do not repeat: a dictionary for them would only cost.
    plain = {"digest", "first_address"}
    dictionary = [column.name for column in definition.columns if column.name not in plain]
    assert table.schema.equals(definition.schema, check_metadata=True), name
    try:
        with open(os.open(run / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as sink:
            pq.write_table(table, sink, compression="zstd", compression_level=1, use_dictionary=dictionary)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot be written: {os.strerror(error.errno) if error.errno else error}",
            str(run / name),
            "free some space or choose another directory with -o",
        ) from None


def write_manifest(manifest: Mapping[str, object], run: Path) -> None:
    """Write run.json."""
    with open(os.open(run / "run.json", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="utf-8") as sink:
        json.dump(manifest, sink, indent=1, sort_keys=True)
        sink.write("\n")


def read_manifest(run: Path) -> dict[str, Any]:
    """Read run.json; raises RunDirectoryError where there is none, or one of another version."""
    try:
        manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
        version = manifest["run_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunDirectoryError("is no run directory", str(run), "give a directory that `ksmdist run` wrote") from None
    if version != RUN_VERSION:
        raise RunDirectoryError(
            f"is of version {version}, this ksmdist reads {RUN_VERSION}", str(run), "run the images again"
        )
    return dict(manifest)


def read_table(run: Path, definition: Table) -> pa.Table:
    """Read a table of a run back, the stable tree's files in order; raises RunDirectoryError."""
    files = sorted(run.glob(definition.file)) if definition is STABLE_TREE else [run / definition.file]
    try:
        return pa.concat_tables([pq.read_table(file, partitioning=None) for file in files])
    except (OSError, pa.ArrowException, ValueError) as error:
        raise RunDirectoryError(
            f"has no readable table {definition.name}: {str(error).splitlines()[0]}",
            str(run),
            "give a directory that `ksmdist run` wrote",
        ) from None
