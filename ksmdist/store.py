"""The run directory: Parquet tables and run.json, all or nothing.

Everything is written in RUN.partial beside the target, which takes its name when the run is
complete (checkpoint.py): a run directory is whole or is not there. Directories are 0700, files 0600: digests
tell who guesses a page's content whether the guess is right.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ksmdist import intake
from ksmdist.errors import RunDirectoryError, SettingsError
from ksmdist.schema import Table
from ksmdist.settings import Settings
from ksmdist.tables import CLASSES, KINDS, STABLE_TREE

__all__ = [
    "RUN_VERSION",
    "check_schema",
    "checked_file",
    "join_tables",
    "output_file",
    "read_file",
    "read_manifest",
    "read_table",
    "stream_at",
    "whole_file",
    "write_manifest",
    "write_table",
    "write_text",
]

RUN_VERSION = 6
"""Version of run.json and of the directory's layout."""

_WHOLE_ROWS = 1 << 20
_MOST_GROUP_ROWS = 1 << 20  # pyarrow's own most, of which write_table() leaves it
_MOST_TABLE_BYTES = 4 << 30  # in memory, of a table that is read whole: a million images take 1 GiB of each
_MOST_TEXTS_BYTES = 1 << 30  # of a column in a batch, written out
_COUNTED = {"pages", "contents", "images", "tenants", "nodes", "node number", "frames", "huge pages", "rmap items"}
_COUNTED |= {"stable nodes", "scans", "passes", "index"}
"""Units of what is never below zero."""
_BELOW_ZERO = ("frames_saved",)  # merging may take more frames than it frees, where fork shares them already
_MOST_INDEX = 1 << 27


@contextmanager
def whole_file(path: Path, like: os.stat_result | None = None) -> Iterator[BinaryIO]:
    """A file, 0600, that gets its name when the block has ended well; until then it has another. Raises OSError.

    like: the file it replaces, whose permission bits, and owner where we may, it gets.
    """
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(fd, "wb") as sink:
            if like is not None:
                with suppress(PermissionError):
                    os.fchown(fd, like.st_uid, like.st_gid)
                os.fchmod(fd, stat.S_IMODE(like.st_mode) & 0o777)
            yield sink
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


@contextmanager
def output_file(path: Path) -> Iterator[BinaryIO]:
    """A file that the user names, to write what was found to. Raises OSError.

    A regular file is there when the block has ended well: a new one is 0600, one that replaces another keeps its
    permission bits. A symbolic link stays, and what it leads to is written. Pipes, devices and this process's own
    stdout and stderr (/dev/stdout) are opened and written as they are.
    """
    try:
        there = os.stat(path)
    except FileNotFoundError:
        there = None
    open_already = stream_at(path)
    if open_already is not None:
        with open(os.dup(open_already), "wb") as sink:
            yield sink
    elif there is None or stat.S_ISREG(there.st_mode):
        with whole_file(Path(os.path.realpath(path)), there) as sink:
            yield sink
    else:  # nothing is made, should it be gone by now, and no terminal becomes ours
        with open(os.open(path, os.O_WRONLY | os.O_NOCTTY), "wb") as sink:
            yield sink


def stream_at(path: Path) -> int | None:
    """1 or 2 where a path leads to what this process's stdout or stderr writes to, else None."""
    for fd in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                return fd
    return None


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


_SETTINGS = {
    field.name: object if field.default is None or field.name == "max_page_sharing" else type(field.default)
    for field in fields(Settings)
}
_SUMMARY = {
    "pages": dict.fromkeys(("total", "absent", *CLASSES), int),
    "kinds": dict.fromkeys(KINDS, int),
    "contents": dict.fromkeys(("distinct", "shared", "max_copies"), int),
    "merges": dict.fromkeys(("zero", "content", "thp_zero", "saved_bytes"), int),
    "counters": {"pages_shared": int, "pages_sharing": int},
    "bounds": {"pages_shared": [int], "pages_sharing": [int]},
    "physical": {"frames_saved": object, "profit": object},
    "estimate": {"full_scans": int, "pages_per_scan": int, "seconds": object},
    "holes": {"ranges": int, "pages": int, "images": [str]},
    "settings": _SETTINGS,
    "zero_colors": list,
    "still": object,
    "verified": {"verify": str} | dict.fromkeys(("contents", "pages", "unread", "collided"), int),
    "filtered": [{"image_id": str, "filter_level": str, "excluded": int}],
    "engine": str,
    "engine_why": str,
    "run": str,
}
_MANIFEST = {
    "ksmdist": str,
    "settings": _SETTINGS,
    "summary": _SUMMARY,
    "engine": {"name": str, "why": str},
    "identities": [{"name": str, "left": int, "right": int, "holds": bool}],
    "images": [
        {"image_id": str, "path": str, "host": str, "node": str, "tenant": str, "kind": str}
        | {"reached": bool, "fingerprint": str, "base": [str]}
    ],
    "caveats": [str],
    "key": object,
}
"""What run.json has at the least: a type; keys and what each has; or a list and what each item has."""


def _misfit(value: Any, shape: Any, name: str) -> str | None:
    """What a JSON value lacks of a shape like _MANIFEST, in words; None where it fits."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{name} is no object"
        parts = []
        for key, of in shape.items():
            at = f"{name}.{key}" if name else key
            if key not in value:
                return f"{at} is missing"
            parts.append((value[key], of, at))
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is no list"
        parts = [(item, shape[0], f"{name}[{number}]") for number, item in enumerate(value)]
    else:
        fits = isinstance(value, shape) and (shape is not int or not isinstance(value, bool))
        return None if fits else f"{name} is no {shape.__name__}"
    return next((why for part in parts if (why := _misfit(*part)) is not None), None)


def read_manifest(run: Path) -> dict[str, Any]:
    """Read run.json; raises RunDirectoryError where there is none, one of another version, or a damaged one."""
    try:
        manifest = intake.read_json(run, "run.json")
        version = manifest["run_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunDirectoryError("is no run directory", str(run), "give a directory that `ksmdist run` wrote") from None
    if version != RUN_VERSION:
        raise RunDirectoryError(
            f"is of version {version}, this ksmdist reads {RUN_VERSION}", str(run), "run the images again"
        )
    why = _misfit(manifest, _MANIFEST, "")
    if why is None:
        try:
            for settings in (manifest["settings"], manifest["summary"]["settings"]):
                Settings(**settings)
        except (TypeError, ValueError, SettingsError) as error:
            why = str(error)
    if why is not None:
        raise RunDirectoryError(
            f"has a run.json that is not what it should be: {why}", str(run), "run the images again"
        )
    return dict(manifest)


def check_schema(found: pa.Schema, definition: Table, run: Path, name: str) -> None:
    """Raise RunDirectoryError where the schema of a table's file is not what its definition says.

    Compared are columns and their types, and which table of which version it is. name: of the file.
    """
    metadata = found.metadata or {}
    is_table, is_version = (
        metadata.get(key, b"").decode(errors="replace") for key in (b"ksmdist.table", b"ksmdist.version")
    )
    if (is_table, is_version) != (definition.name, str(definition.version)):
        what = f"table {is_table}, version {is_version}" if is_table else "no table of ksmdist"
        why = f"{name} is {what}, not {definition.name}, version {definition.version}"
    elif found.names != definition.schema.names:
        why = f"{name} has columns {', '.join(found.names)}"
    elif found.types != definition.schema.types:
        why = f"{name} has columns of other types"
    else:
        return
    raise RunDirectoryError(f"has tables that are not what they should be: {why}", str(run), "run the images again")


def read_table(run: Path, definition: Table) -> pa.Table:
    """Read a table of a run back, the stable tree's files in order.

    Raises RunDirectoryError where it is not there, cannot be read, is not what its definition says, or would take
    more than 4 GiB.
    """
    names = intake.names(run, definition.file) if definition is STABLE_TREE else [definition.file]
    nbytes, parts = 0, [definition.schema.empty_table()]
    for name in names:
        for batch in read_file(run, name, definition, _WHOLE_ROWS):
            nbytes += batch.nbytes
            if nbytes > _MOST_TABLE_BYTES:
                raise _unreadable(run, definition, "it is larger than any that ksmdist reads whole")
            parts.append(pa.Table.from_batches([batch]))
    if not names:
        raise _unreadable(run, definition, f"{definition.file} is not there")
    return pa.concat_tables(parts)


def read_file(
    run: Path, name: str, definition: Table, rows: int, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """A file of a table of a run, in batches of at most `rows` rows, each checked; columns: these alone.

    name: relative to the run directory, whose files are opened as intake.py says. Whoever wrote it: a batch takes no
    more memory than its rows, of which a row group of ours has 1,048,576 at most, and texts of 1 GiB.
    Raises RunDirectoryError where it is not there, cannot be read, or is not what its definition says.
    """
    texts = [field.name for field in definition.schema if pa.types.is_string(field.type)]
    wanted = [definition.schema.field(column) for column in columns or definition.schema.names]
    try:
        with intake.open_arrow(run, name) as source:
            checked_file(source, definition, run, name)
            # As they are in the file, so that one long text of a million rows is in memory once.
            file = pq.ParquetFile(source, read_dictionary=texts)
            for batch in file.iter_batches(rows, columns=[field.name for field in wanted], use_threads=False):
                found = []
                for field in wanted:
                    column = batch.column(field.name)
                    if field.name in texts:
                        if intake.text_nbytes(column) > _MOST_TEXTS_BYTES:
                            raise ValueError(f"the texts of its column {field.name} are larger than any that were")
                        column = column.cast(field.type)
                    found.append(column)
                checked = pa.RecordBatch.from_arrays(found, schema=pa.schema(wanted, definition.schema.metadata))
                _check_rows(checked)
                yield checked
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _unreadable(run, definition, str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def checked_file(source: pa.NativeFile, definition: Table, run: Path, name: str) -> pq.ParquetFile:
    """An open file of a table of a run, whose footer is what it should be; name: of the file.

    Raises RunDirectoryError as check_schema(); ArrowException, OSError and ValueError where it is damaged, or has row
    groups that no memory should be given for.
    """
    file = pq.ParquetFile(source)
    check_schema(file.schema_arrow, definition, run, Path(name).name)
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        if not 0 <= group.num_rows <= _MOST_GROUP_ROWS or group.total_byte_size > _MOST_TABLE_BYTES:
            raise ValueError("it has a row group larger than any that ksmdist writes")
    return file


def _check_rows(batch: pa.RecordBatch) -> None:
    """Raises ValueError where Arrow's own rules, nulls, or numbers that cannot be are against it."""
    batch.validate(full=True)
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if column.null_count and not field.nullable:
            raise ValueError(f"its column {field.name} has nulls")
        unit = (field.metadata or {}).get(b"unit", b"").decode()
        if unit in _COUNTED and field.name not in _BELOW_ZERO and pa.types.is_signed_integer(field.type):
            least, most = pc.min_max(column).as_py().values()
            if least is not None and (least < 0 or (unit == "index" and most >= _MOST_INDEX)):
                raise ValueError(f"its column {field.name} has {least if least < 0 else most}, which cannot be")


def _unreadable(run: Path, definition: Table, why: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"has no readable table {definition.name}: {why}", str(run), "give a directory that `ksmdist run` wrote"
    )
