"""SQL over the tables of a run by their names, in DuckDB, which opens no file itself.

The tables are handed to DuckDB as Arrow data sets that read the run's Parquet files as they are
needed. DuckDB's own reader is faster, but needs access to the files, and SQL that may read them
could as well write them (COPY, also inside EXPLAIN ANALYZE and WITH): SQL from a stranger must not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksmdist import intake, store, streams
from ksmdist.errors import RunDirectoryError, SettingsError
from ksmdist.schema import Table
from ksmdist.tables import TABLES

__all__ = ["Answer", "ask", "json_value", "tables_of"]

_ROWS = 1024
_LINES = 6  # of DuckDB's message
_CLOSED = {
    "temp_directory": "''",  # nothing of a run is left elsewhere, not even where a query needs more than memory has
    "autoinstall_known_extensions": "false",  # nothing is fetched, and nothing that lies about is loaded
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",  # a table of Python's variables is none of the run
    "python_scan_all_frames": "false",
    "allow_persistent_secrets": "false",
}
"""DuckDB's settings that let SQL reach anything but the tables it was given."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a query gives. columns: names; rows: read as they are asked for, values as json_value() makes them."""

    columns: tuple[str, ...]
    rows: Iterator[tuple[Any, ...]]


def tables_of(run: Path) -> list[Table]:
    """The tables that are in a run directory, in the order of tables.TABLES."""
    return [table for table in TABLES.values() if streams.files(run, table)]


@contextmanager
def ask(run: Path, sql: str) -> Iterator[Answer]:
    """Run SQL, the answer of its last statement; rows can be read inside the block.

    Raises SettingsError where DuckDB is not installed, or refuses the SQL, or fails at it, or there is none;
    RunDirectoryError where a table that it asks for cannot be read, or is not what its definition says.
    """
    try:
        import duckdb
    except ImportError:
        raise SettingsError(
            "needs DuckDB, which is not installed", "query", "install it: pip install 'ksmdist[query]'"
        ) from None
    try:
        with duckdb.connect(":memory:") as connection:
            for name, value in _CLOSED.items():
                connection.execute(f"set {name} = {value}")
            tables = tables_of(run)
            for table in tables:
                connection.register(table.name, _data_set(run, table))
            connection.execute("set enable_external_access = false")
            connection.execute("set lock_configuration = true")
            if not connection.extract_statements(sql):
                raise SettingsError("asks for nothing", "SQL", "ksmdist query RUN --list names tables and columns")
            for table in tables:  # those that the SQL may mean: one that is damaged keeps no other from being asked
                if re.search(rf"\b{table.name}\b", sql, re.IGNORECASE):
                    _check(run, table)
            done = connection.execute(sql)
            columns = tuple(column[0] for column in done.description or ())
            yield Answer(columns, _rows(done))
    except duckdb.Error as error:
        lines = [line for line in str(error).splitlines() if line.strip(" ^")][:_LINES]
        raise SettingsError("\n".join(lines), "SQL", "ksmdist query RUN --list names tables and columns") from None


def _check(run: Path, table: Table) -> None:
    """Raise RunDirectoryError where a table's files are not what its definition says: DuckDB would show nulls."""
    import pyarrow as pa

    try:
        for name in streams.files(run, table):
            with intake.open_arrow(run, name) as source:
                store.checked_file(source, table, run, name)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _unreadable(run, table, error) from None


def _unreadable(run: Path, table: Table, error: Exception) -> RunDirectoryError:
    return RunDirectoryError(
        f"has no readable table {table.name}: {str(error).splitlines()[0]}", str(run), "run the images again"
    )


def _data_set(run: Path, table: Table) -> Any:
    """A table's files as one Arrow data set, opened as intake.py says, texts as they are in the files."""
    import pyarrow as pa
    import pyarrow.dataset as dataset

    schema = table.schema.remove_metadata()
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    for name in texts:  # one long text of a million rows would be a million texts
        kind = pa.dictionary(pa.int32(), pa.string())
        schema = schema.set(schema.get_field_index(name), schema.field(name).with_type(kind))
    options = dataset.ParquetReadOptions(dictionary_columns=texts)
    try:
        return dataset.dataset(
            streams.files(run, table),
            schema=schema,
            format=dataset.ParquetFileFormat(read_options=options),
            filesystem=_file_system(run),
        )
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _unreadable(run, table, error) from None


def _file_system(run: Path) -> Any:
    """The files of a run directory as a file system of Arrow's, which has nothing else and writes nothing."""
    from pyarrow import fs

    def info(_: object, names: Sequence[str]) -> list[Any]:
        return [fs.FileInfo(name, fs.FileType.File) for name in names]

    def refuse(*_: object) -> None:
        raise OSError("a run directory is read, file by file, and nothing else")

    members: dict[str, Callable[..., Any]] = dict.fromkeys(fs.FileSystemHandler.__abstractmethods__, refuse)
    members |= {
        "get_type_name": lambda _: "ksmdist",
        "normalize_path": lambda _, name: name,
        "get_file_info": info,
        "open_input_file": lambda _, name: intake.open_arrow(run, name),
        "open_input_stream": lambda _, name: intake.open_arrow(run, name),
    }
    return fs.PyFileSystem(type("_Files", (fs.FileSystemHandler,), members)())


def _rows(result: Any) -> Iterator[tuple[Any, ...]]:
    while some := result.fetchmany(_ROWS):
        for row in some:
            yield tuple(map(json_value, row))


def json_value(value: Any) -> Any:
    """A value of DuckDB as JSON has it: bytes as hexadecimal, NaN as null, what JSON does not know as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, dict):
        return {str(key): json_value(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    from decimal import Decimal

    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return str(value)
