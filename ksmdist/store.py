"""The run directory: Parquet tables and run.json, all or nothing.

Everything is written in RUN.partial beside the target, which takes its name when the run is
complete (checkpoint.py): a run directory is whole or is not there. Directories are 0700, files 0600: digests
tell who guesses a page's content whether the guess is right.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ksmdist.errors import RunDirectoryError
from ksmdist.schema import Table
from ksmdist.tables import STABLE_TREE

__all__ = [
    "RUN_VERSION",
    "join_tables",
    "read_manifest",
    "read_table",
    "whole_file",
    "write_manifest",
    "write_table",
    "write_text",
]

RUN_VERSION = 4
"""Version of run.json and of the directory's layout."""


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file, 0600, that gets its name when the block has ended well; until then it has another. Raises OSError."""
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(fd, "wb") as sink:
            yield sink
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
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
        with whole_file(run / name) as sink:
            pq.write_table(table, sink, compression="zstd", compression_level=1, use_dictionary=dictionary)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot be written: {os.strerror(error.errno) if error.errno else error}",
            str(run / name),
            "free some space, or choose another directory with -o",
        ) from None


def join_tables(parts: Sequence[Path], definition: Table, run: Path) -> None:
    """Write a table whose rows lie in these Arrow files, end to end, a record batch at a time.

    Raises RunDirectoryError where it cannot be read or written.
    """
    try:
        with (
            whole_file(run / definition.file) as sink,
            pq.ParquetWriter(sink, definition.schema, compression="zstd", compression_level=1) as writer,
        ):
            for part in parts:
                with pa.ipc.open_file(str(part)) as source:
                    for number in range(source.num_record_batches):
                        batch = source.get_batch(number)
                        if len(batch):
                            writer.write_batch(batch)
    except (OSError, pa.ArrowException) as error:
        raise RunDirectoryError(
            f"cannot be written: {str(error).splitlines()[0]}",
            str(run / definition.file),
            "free some space, or choose another directory with -o",
        ) from None


def write_text(text: str, run: Path, name: str) -> None:
    """Write a file of text; raises RunDirectoryError where it cannot be written."""
    try:
        with whole_file(run / name) as sink:
            sink.write(text.encode())
    except OSError as error:
        raise RunDirectoryError(
            f"cannot be written: {os.strerror(error.errno) if error.errno else error}",
            str(run / name),
            "free some space, or choose another directory with -o",
        ) from None


def write_manifest(manifest: Mapping[str, object], run: Path) -> None:
    """Write run.json; raises RunDirectoryError where it cannot be written."""
    write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", run, "run.json")


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
