"""An unfinished run on disk: what finished tasks found, kept so that no fault costs it twice.

    RUN.partial/            becomes RUN when the run is done
        lock                held (flock) by the driver that writes here
        plan.json           what is scanned, and how: enough to go on without the command that began it
        work/0-00012.arrow  what task 12 of the map found: a record batch of `shard_content` for each digest range,
                            after an empty one
        work/0-00012.json   its mark: the task is done; its summary, and a checksum of the file
        work/1-00003.*      the same of combination 3 of results of level 0, in whose place it stands
        work/image_set-*    and huge_frame-*, sharing-*: what merges leave for the tables of images
        stable_tree/        parts of the run itself, and checksums/ where they are kept

A file gets its name when it is whole, and its mark after that: a mark without its file, or with
another checksum, counts as no mark. So a task may run twice, at once even: the results are the same
bytes. Tasks and driver see the directory under one path, on a file system that they share.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ksmdist import intake
from ksmdist.errors import RunDirectoryError
from ksmdist.images import ipc
from ksmdist.store import whole_file
from ksmdist.tables import SHARD_CONTENT

__all__ = [
    "Checkpoint",
    "Results",
    "Written",
    "check_free",
    "compact",
    "content_file",
    "drop_content",
    "drop_related",
    "is_complete",
    "read_batch",
    "read_mark",
    "read_range",
    "related_file",
    "unfinished",
    "write_batches",
    "write_content",
    "write_related",
]

_PREFIX = b"\xff\xff\xff\xff" + bytes(4)  # of a message's metadata in a file
_PLAN_VERSION = 3
_OURS = ("lock", "plan.json", "work", "stable_tree", "checksums", "metrics.prom")  # and tables, .parquet


@dataclass(frozen=True, slots=True)
class Written:
    """A result's file. rows: int64[ranges]; offsets: int64[ranges + 1], bytes where each range begins, and the end."""

    rows: np.ndarray
    offsets: np.ndarray


def content_file(directory: Path, level: int, number: int) -> Path:
    """Where result `number` of level `level` is: 0 the map, above it combinations."""
    return directory / "work" / f"{level}-{number:05d}.arrow"


def related_file(directory: Path, name: str, number: int) -> Path:
    """Where merge `number` leaves table `name`, image_set or huge_frame, and relate its part of sharing."""
    return directory / "work" / f"{name}-{number:05d}.arrow"


def drop_related(directory: Path, *names: str) -> None:
    """Remove the files of these tables, which nothing reads any more."""
    for name in names:
        for path in (directory / "work").glob(f"{name}-*.arrow"):
            path.unlink(missing_ok=True)


def write_batches(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], compression: str | None = None) -> Written:
    """Write an Arrow file with a record batch for each table, after an empty one. Raises OSError."""
    rows, offsets = [], []
    empty = pa.RecordBatch.from_pylist([], schema)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with whole_file(path) as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(empty)  # the file's head goes out with the first batch
        offsets.append(sink.tell())
        for table in tables:
            rows.append(len(table))
            batches = table.to_batches() if table.num_columns and len(table) else [empty]
            if len(batches) > 1:
                batches = table.combine_chunks().to_batches()
            writer.write_batch(batches[0])
            offsets.append(sink.tell())
    return Written(np.array(rows, np.int64), np.array(offsets, np.int64))


def write_related(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> Written:
    """write_batches(), packed, with a RunDirectoryError where the file cannot be written.

    Counts of pages are small numbers: packed they take a fifth. Digests, in what scans write, would not shrink.
    """
    try:
        return write_batches(path, schema, tables, "lz4")
    except OSError as error:
        raise _unwritable(path, path.parents[1], error) from None


def read_batch(path: Path, schema: pa.Schema, start: int, end: int) -> pa.Table:
    """The record batch between two of Written.offsets of a file. Raises RunDirectoryError."""
    fd = _opened(path)
    try:
        return _table(path, fd, start, end, schema)
    finally:
        os.close(fd)


def write_content(
    content: Iterable[pa.Table], directory: Path, level: int, number: int, summary: Mapping[str, Any]
) -> Written:
    """Write `shard_content` tables, one a digest range, then the mark with `summary`.

    Raises RunDirectoryError where it cannot be written (a full disk, a node that does not see the directory).
    """
    path = content_file(directory, level, number)
    try:
        written = write_batches(path, SHARD_CONTENT.schema, content)
        nbytes, checksum = _checksum(path)
        rows, offsets = written.rows.tolist(), written.offsets.tolist()
        mark = {"rows": rows, "offsets": offsets, "nbytes": nbytes, "xxh3_64": checksum, "summary": summary}
        with whole_file(path.with_suffix(".json")) as sink:
            sink.write(json.dumps(mark, separators=(",", ":")).encode())
    except OSError as error:
        raise _unwritable(path, directory, error) from None
    return written


def read_mark(directory: Path, level: int, number: int, superseded: bool = False) -> tuple[Written, Any] | None:
    """What write_content() wrote of a result, and its summary; None where it is not there, or not whole.

    superseded: a result of a higher level stands in the file's place, so that the mark alone counts.
    """
    path = content_file(directory, level, number)
    try:
        mark: dict[str, Any] = intake.read_json(directory, f"work/{path.stem}.json")
        if not superseded and (mark["nbytes"], mark["xxh3_64"]) != _checksum(path):
            return None
        rows, offsets, nbytes = np.array(mark["rows"]), np.array(mark["offsets"]), mark["nbytes"]
        fits = rows.dtype == offsets.dtype == np.int64 and rows.ndim == 1 and offsets.shape == (len(rows) + 1,)
        if not fits or (rows < 0).any() or not 0 <= offsets[0] <= offsets[-1] <= nbytes or (np.diff(offsets) < 0).any():
            return None
        return Written(rows, offsets), mark["summary"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RunDirectoryError):
        return None


class Results:
    """Files of results, open, to read one digest range after the other; close() them. Raises RunDirectoryError."""

    def __init__(self, directory: Path, results: Sequence[tuple[int, int]]) -> None:
        self._files: list[tuple[Path, int, np.ndarray]] = []
        try:
            for result in results:
                mark = read_mark(directory, *result, superseded=True)
                if mark is None:
                    raise _unreadable(content_file(directory, *result), "no mark")
                path = content_file(directory, *result)
                self._files.append((path, _opened(path), mark[0].offsets))
        except BaseException:
            self.close()
            raise

    def range(self, number: int) -> list[pa.Table]:
        """The `shard_content` rows of a range, of each result that has any, in their order."""
        tables = [_table(path, fd, *offsets[number : number + 2].tolist()) for path, fd, offsets in self._files]
        return [table for table in tables if len(table)]

    def close(self) -> None:
        """Close the files."""
        for _, fd, _ in self._files:
            os.close(fd)
        self._files = []


def read_range(
    directory: Path, results: Sequence[tuple[int, int]], start: np.ndarray, end: np.ndarray
) -> Iterator[pa.Table]:
    """The `shard_content` rows between two of Written.offsets, of each result (level, number) that has any, in order.

    Files are opened one after the other, and only these bytes of each are read. Raises RunDirectoryError.
    """
    for result, first, last in zip(results, start.tolist(), end.tolist(), strict=True):
        path = content_file(directory, *result)
        fd = _opened(path)
        try:
            table = _table(path, fd, first, last)
        finally:
            os.close(fd)
        if len(table):
            yield table


def compact(table: pa.Table) -> pa.Table:
    """A copy of a slice that does not hold on to what it is a slice of."""
    batches = [pa.ipc.read_record_batch(pa.ipc.read_message(b.serialize()), b.schema) for b in table.to_batches()]
    return pa.Table.from_batches(batches, table.schema)


def _opened(path: Path) -> int:
    """A descriptor of a file of work/, with no link followed: who else writes there may be anyone."""
    try:
        return intake.open_file(path.parents[1], f"{path.parent.name}/{path.name}")
    except OSError as error:
        raise _unreadable(path, os.strerror(error.errno or 0)) from None


def _table(path: Path, fd: int, start: int, end: int, schema: pa.Schema = SHARD_CONTENT.schema) -> pa.Table:
    """The record batch that is these bytes of the file, found without the file's footer: that took 0.4 ms a time.

    What it holds is checked before it is used: 0.1 ms for the 524,288 rows of 2 GiB of pages.
    """
    try:
        if not 0 <= start <= end <= os.fstat(fd).st_size:
            raise _unreadable(path, "it is cut short")
        data = os.pread(fd, end - start, start)
        if len(data) < end - start:
            raise _unreadable(path, "it is cut short")
        message = pa.ipc.read_message(data)
        _check_packed(message, schema)
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        if any(column.null_count and not field.nullable for field, column in zip(schema, batch.columns, strict=True)):
            raise ValueError("it has nulls")
        return pa.Table.from_batches([batch])
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _unreadable(path, str(error).splitlines()[0]) from None


def _check_packed(message: pa.Message, schema: pa.Schema) -> None:
    """Raise ValueError where a compressed buffer says that it holds more than its bytes can: pyarrow would give it all.

    LZ4 alone is written here: in it a byte more of a length stands for 255 bytes. Columnar.rst, Compression: the
    length comes first, in 8 bytes, -1 for what is not compressed.
    """
    body = message.body if message.body is not None else pa.py_buffer(b"")
    buffers = sum(3 if pa.types.is_binary(kind) or pa.types.is_string(kind) else 2 for kind in schema.types)
    batch = ipc.rows_of(_PREFIX + message.metadata.to_pybytes(), 0, body.size, buffers)
    if batch.codec not in ("", "lz4"):
        raise ValueError("it is compressed otherwise than it was")
    if batch.codec:
        for at, length in zip(batch.offset.tolist(), batch.length.tolist(), strict=True):
            said = int.from_bytes(body.slice(at, min(8, length)).to_pybytes(), "little", signed=True)
            if not -1 <= said <= 255 * length:
                raise ValueError("a compressed buffer says that it holds more than it can")


def _unreadable(path: Path, why: str) -> RunDirectoryError:
    return RunDirectoryError(f"holds a result that cannot be read: {why}", str(path), "run the images again")


def drop_content(directory: Path, results: Iterable[tuple[int, int]]) -> None:
    """Remove the files of results that a combination stands for; their marks stay."""
    for level, number in results:
        content_file(directory, level, number).unlink(missing_ok=True)


def _checksum(path: Path) -> tuple[int, str]:
    digest = xxhash.xxh3_64()
    nbytes = 0
    with open(_opened(path), "rb", buffering=0) as source:
        while block := source.read(1 << 20):
            digest.update(block)
            nbytes += len(block)
    return nbytes, digest.hexdigest()


def _unwritable(path: Path, directory: Path, error: OSError) -> RunDirectoryError:
    if not directory.is_dir():
        return RunDirectoryError(
            f"is not there on node {socket.gethostname()}",
            str(directory),
            "choose a run directory on a file system that all nodes have under this path",
        )
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return RunDirectoryError(
        f"cannot be written: {os.strerror(error.errno) if error.errno else error}",
        str(path),
        "free some space" if full else f"see why node {socket.gethostname()} may not write there",
    )


class Checkpoint:
    """The directory of an unfinished run, held by this process until close().

    path: where the run will be; directory: where it is made; plan: what plan.json says.
    """

    def __init__(self, path: Path, directory: Path, lock: int, plan: dict[str, Any]) -> None:
        self.path = path
        self.directory = directory
        self.plan = plan
        self._lock = lock
        self._placed = False

    @classmethod
    def begin(cls, path: Path, plan: Mapping[str, Any]) -> Checkpoint:
        """Start a run that will be at `path`, or go on with one of the same plan.

        Raises RunDirectoryError: `path` holds something; another driver writes here; an unfinished
        run of another plan with finished tasks is here; it cannot be made.
        """
        check_free(path)
        directory = _partial(path)
        wanted = {"plan_version": _PLAN_VERSION, **json.loads(json.dumps(plan))}
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            lock = _taken(path, directory)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot be made: {os.strerror(error.errno or 0)}", str(directory), "choose another directory with -o"
            ) from None
        self = cls(path, directory, lock, wanted)
        try:
            there = self._agreed(wanted)
        except BaseException:
            if not self.complete and not self.finished():  # a directory that is not ours is left as it was
                (directory / "lock").unlink(missing_ok=True)
            os.close(lock)
            raise
        try:
            if not there:
                self._clear()
                (directory / "work").mkdir(mode=0o700)
                (directory / "stable_tree").mkdir(mode=0o700)
                with whole_file(directory / "plan.json") as sink:
                    sink.write(json.dumps(wanted, separators=(",", ":")).encode())
        except OSError as error:
            self.close()
            raise RunDirectoryError(
                f"cannot be written: {os.strerror(error.errno or 0)}", str(directory), "choose another -o"
            ) from None
        except BaseException:
            self.close()
            raise
        return self

    def _agreed(self, wanted: Mapping[str, Any]) -> bool:
        """Whether a run of this plan is here to go on with; raises RunDirectoryError where what is here must stay."""
        if self.complete:
            raise RunDirectoryError(
                "a finished run that has not got its name yet is here",
                str(self.directory),
                f"put it in place with ksmdist run --resume {self.path}, or remove it",
            )
        foreign = sorted(
            entry.name for entry in self.directory.iterdir() if not (entry.name in _OURS or entry.name[0] == ".")
        )
        foreign = [name for name in foreign if not name.endswith(".parquet")]
        if foreign:
            raise RunDirectoryError(
                f"holds {foreign[0]}, which is not of an unfinished run",
                str(self.directory),
                "move it away, or choose another directory with -o",
            )
        there = _read_plan(self.directory)
        done = self.finished()
        if there != wanted and done:
            what = "of other images or settings" if there is not None else "that this version cannot read"
            if there is not None and there.get("key") != wanted.get("key"):
                what = "under another key"
            raise RunDirectoryError(
                f"an unfinished run {what} is here, with {done} finished tasks",
                str(self.directory),
                f"finish it with ksmdist run --resume {self.path}, or remove it",
            )
        return there == wanted

    @classmethod
    def resume(cls, path: Path) -> Checkpoint:
        """Take up the unfinished run that was to be at `path`; raises RunDirectoryError where there is none."""
        directory = _partial(path)
        try:
            if not directory.is_dir():
                done = "is finished" if (path / "run.json").is_file() else "is not there, finished or unfinished"
                raise RunDirectoryError(done, str(path), "run the images with -o, or read the run that is there")
            check_free(path)
            lock = _taken(path, directory)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot be taken up: {os.strerror(error.errno or 0)}", str(directory), "see whose it is"
            ) from None
        if (directory / "run.json").is_file():  # it ended between the last write and the rename
            return cls(path, directory, lock, {})
        plan = _read_plan(directory)
        if plan is None:
            os.close(lock)
            raise RunDirectoryError(
                "has no plan.json of this version: nothing can be taken up", str(directory), "remove it, and run again"
            )
        return cls(path, directory, lock, plan)

    @property
    def complete(self) -> bool:
        """Whether all is written, and only finish() is wanting."""
        return is_complete(self.path)

    def finished(self) -> int:
        """How many scans are done, of earlier passes too."""
        return unfinished(self.path)

    def drop_parts(self) -> None:
        """Remove the parts of the stable tree that are there."""
        for part in (self.directory / "stable_tree").glob("*.parquet"):
            part.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the run its name: from here on it is whole. Raises RunDirectoryError."""
        try:
            # Away first, so that a worker which a dead driver has left cannot write there any more.
            gone = self.directory / f".work-{os.getpid()}"
            with suppress(FileNotFoundError):
                os.rename(self.directory / "work", gone)
            for left in (
                *self.directory.glob(".*"),
                *self.directory.glob("stable_tree/.*"),
                *self.directory.glob("checksums/.*"),
            ):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)  # of a worker that was killed while it wrote
            (self.directory / "plan.json").unlink(missing_ok=True)
            os.rename(self.directory, self.path)
            self._placed = True
            (self.path / "lock").unlink(missing_ok=True)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot be put in place: {os.strerror(error.errno or 0)}",
                str(self.path),
                f"the run is whole and is {self.directory}: rename it, or make room and ksmdist run --resume",
            ) from None

    def close(self) -> bool:
        """Let go of it; remove it where nothing in it is worth taking up. Returns whether it is kept."""
        keep = not self._placed and (self.complete or self.finished() > 0)
        if not keep and not self._placed:
            shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._lock)
        return keep

    def _clear(self) -> None:
        for entry in self.directory.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()


def check_free(path: Path) -> None:
    """Raises RunDirectoryError if `path` exists and is not an empty directory, or cannot be made."""
    try:
        if path.is_symlink():
            raise RunDirectoryError("is a symbolic link", str(path), "name the directory itself with -o")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            holds = "already holds a run" if (path / "run.json").exists() else "exists and is not an empty directory"
            raise RunDirectoryError(holds, str(path), "choose another directory with -o, or remove this one")
        if not path.name or path.is_mount():
            raise RunDirectoryError("cannot be renamed to", str(path), "name a directory in it with -o")
        if not path.parent.is_dir():
            raise RunDirectoryError(
                f"cannot be made: {path.parent} is no directory", str(path), "choose another directory with -o"
            )
    except OSError as error:
        raise RunDirectoryError(
            f"cannot be made: {os.strerror(error.errno or 0)}", str(path), "choose another directory with -o"
        ) from None


def is_complete(path: Path) -> bool:
    """Whether the run that was to be at `path` is all written, and only its name is wanting."""
    return (_partial(path) / "run.json").is_file()


def unfinished(path: Path) -> int:
    """Finished scans, of earlier passes too, in the unfinished run that was to be at `path`; 0 where there is none."""
    work = _partial(path) / "work"
    return sum(1 for pattern in ("0-*.json", "pass-*.parquet") for _ in work.glob(pattern))


def _partial(path: Path) -> Path:
    return path.parent / f"{path.name}.partial"


def _taken(path: Path, directory: Path) -> int:
    """A descriptor of the lock file, locked: the kernel lets go of it when the process ends, however it ends.

    Raises OSError, and RunDirectoryError where another has it, or the directory is not this user's alone.
    """
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        folder = -1
    try:
        if folder < 0 or os.fstat(folder).st_uid != os.geteuid():
            raise RunDirectoryError(
                "is no directory of this user", str(directory), "remove it, or choose another directory with -o"
            )
        os.fchmod(folder, 0o700)
    finally:
        if folder >= 0:
            os.close(folder)
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 256, 0).decode(errors="replace").strip()
        os.close(lock)
        raise RunDirectoryError(
            f"is being written by another ksmdist ({holder})", str(path), "wait for it, or choose another -o"
        ) from None
    except OSError as error:
        os.close(lock)
        raise RunDirectoryError(
            f"is on a file system that has no locks: {os.strerror(error.errno or 0)}", str(path), "choose another -o"
        ) from None
    if not _same_file(lock, directory / "lock"):  # its holder has just ended, and taken the file away
        os.close(lock)
        raise RunDirectoryError("was being written until now", str(path), "try again")
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return lock


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def _read_plan(directory: Path) -> dict[str, Any] | None:
    try:
        plan: dict[str, Any] = intake.read_json(directory, "plan.json")
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) and plan.get("plan_version") == _PLAN_VERSION else None
