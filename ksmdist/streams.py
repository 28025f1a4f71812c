"""Tables of a run that may be larger than memory, read and written a batch of rows at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ksmdist import intake
from ksmdist.errors import RunDirectoryError
from ksmdist.schema import Table
from ksmdist.store import read_file, whole_file

__all__ = ["files", "new_directory", "read_batches", "table_writer"]

_BATCH_ROWS = 1 << 16
_GROUP_ROWS = 1 << 17  # of a file written: its bytes do not depend on how the rows came


def files(run: Path, definition: Table) -> list[str]:
    """The files of a table that are in a run directory, by their names in it, in order: several where its name has
    a `*`. Raises RunDirectoryError where the folder they are in is a link."""
    return intake.names(run, definition.file) if definition.file else []


def read_batches(
    run: Path, definition: Table, columns: Sequence[str] | None = None, rows: int = _BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """A table of a run in batches of at most `rows` rows, in its order; columns: these alone, in their order.

    Raises RunDirectoryError where the table is not there, cannot be read, or is not what its definition says.
    """
    found = files(run, definition)
    if not found:
        raise RunDirectoryError(
            f"has no readable table {definition.name}: {definition.file} is not there",
            str(run),
            "give a directory that `ksmdist run` wrote",
        )
    for name in found:
        yield from read_file(run, name, definition, rows, columns)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory, 0700, that gets its name when the block has ended well; until then it has another, beside it.

    Raises RunDirectoryError where there is something of that name, or it cannot be made or written.
    """
    if os.path.lexists(path):
        raise RunDirectoryError("exists", str(path), "choose another directory with -o, or remove it")
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        yield partial
        try:
            os.rename(partial, path)
        except OSError as error:
            raise _unwritable(path, error) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _unwritable(path: Path, error: OSError) -> RunDirectoryError:
    why = os.strerror(error.errno) if error.errno else str(error)
    return RunDirectoryError(f"cannot be written: {why}", str(path), "free some space, or choose another with -o")


@contextmanager
def table_writer(definition: Table, directory: Path) -> Iterator[Callable[[pa.Table], None]]:
    """Write a table piece by piece, in its order: the same rows give the same bytes, whatever the pieces.

    The file is there when the block has ended well. Raises RunDirectoryError where it cannot be written.
    """
    path = directory / definition.file
    plain = {"digest", "first_address"}  # they do not repeat: a dictionary would only cost
    dictionary = [column.name for column in definition.columns if column.name not in plain]
    held: list[pa.Table] = []
    try:
        with (
            whole_file(path) as sink,
            pq.ParquetWriter(
                sink, definition.schema, compression="zstd", compression_level=1, use_dictionary=dictionary
            ) as writer,
        ):

            def write(piece: pa.Table) -> None:
                assert piece.schema.equals(definition.schema, check_metadata=True), definition.name
                if len(piece):
                    held.append(piece)
                while sum(map(len, held)) >= _GROUP_ROWS:
                    flush()

            def flush() -> None:
                rows = pa.concat_tables(held)
                writer.write_table(rows.slice(0, _GROUP_ROWS).combine_chunks(), row_group_size=_GROUP_ROWS)
                held[:] = [rows.slice(_GROUP_ROWS)] if len(rows) > _GROUP_ROWS else []

            yield write
            if held:
                flush()
    except OSError as error:
        raise _unwritable(path, error) from None
