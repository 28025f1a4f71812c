"""What anyone may have written, taken in: files opened with no link followed, JSON and Arrow within bounds.

A run directory may come from a stranger, and a shared one may be written to while it is read. So its files are
opened one folder after the other from the directory itself, each as it is (openat(2) with O_NOFOLLOW), and what was
opened is what is checked: a regular file, which no reader waits for. Only the directory, which the user names, may
be a link.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ksmdist.errors import RunDirectoryError

__all__ = ["MOST_TEXT_BYTES", "names", "open_arrow", "open_file", "parsed", "read_bytes", "read_json", "text_nbytes"]

MOST_TEXT_BYTES = 1 << 30
"""Most bytes of a run's JSON: run.json of a million images has some 300 MiB."""

_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # of a surrogate pair, or the whole of one
_KINDS = {stat.S_IFLNK: "symbolic link", stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}


def open_file(root: Path, name: str) -> int:
    """A descriptor of file `name`, relative, of run directory `root`, for reading; the caller closes it.

    Raises OSError; RunDirectoryError where it, or a folder on the way, is a link or anything but a regular file.
    """
    *folders, last = name.split("/")
    with _folder(root, folders) as folder:
        try:
            fd = os.open(last, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError as error:
            raise _refused(root, name, _kind(folder, last), error) from None
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise _refused(root, name, mode, OSError(errno.EINVAL, "no regular file"))
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def _folder(root: Path, parts: list[str]) -> Iterator[int]:
    """A descriptor of a folder of a run directory, only to be used for what is in it."""
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number, part in enumerate(parts, 1):
            try:
                inner = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=fd)
            except OSError as error:
                raise _refused(root, "/".join(parts[:number]), _kind(fd, part), error) from None
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def _kind(folder: int, name: str) -> int:
    """Mode of what is in a folder; 0 if nothing is."""
    try:
        return os.lstat(name, dir_fd=folder).st_mode
    except OSError:
        return 0


def _refused(root: Path, name: str, mode: int, error: OSError) -> Exception:
    """The error of what could not be opened: of its kind where that is the reason, else the system's own."""
    kind = stat.S_IFMT(mode)
    if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EINVAL, errno.ENXIO) or kind in (0, stat.S_IFREG):
        return error
    what = _KINDS.get(kind, "device")
    hint = "run directories have none: if you trust it, copy it with cp -rL" if kind == stat.S_IFLNK else "remove it"
    return RunDirectoryError(f"has {name}, which is a {what}: it is not read", str(root), hint)


def names(root: Path, pattern: str) -> list[str]:
    """Names, relative to run directory `root`, that fit a pattern of files in one folder, sorted; none without it.

    Raises RunDirectoryError where the folder is a link.
    """
    *folders, last = pattern.split("/")
    try:
        with _folder(root, folders) as folder:
            readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
            try:
                found = os.listdir(readable)
            finally:
                os.close(readable)
    except OSError:
        return []
    return sorted("/".join([*folders, name]) for name in found if fnmatchcase(name, last))


def read_bytes(root: Path, name: str, most: int = MOST_TEXT_BYTES) -> bytes:
    """All of a file of a run directory. Raises OSError, RunDirectoryError; ValueError where it has more than `most`."""
    with open(open_file(root, name), "rb") as source:
        if os.fstat(source.fileno()).st_size > most:
            raise ValueError(f"{name} has more than {most} bytes")
        return source.read(most)


def read_json(root: Path, name: str, most: int = MOST_TEXT_BYTES) -> Any:
    """A file of JSON of a run directory; raises as read_bytes() and parsed() do."""
    return parsed(read_bytes(root, name, most))


def open_arrow(root: Path, name: str) -> pa.NativeFile:
    """A file of a run directory, as pyarrow reads it; close it. Raises as open_file() does."""
    fd = open_file(root, name)
    try:
        return pa.OSFile(f"/proc/self/fd/{fd}")  # the very file, by whatever name it has by now
    finally:
        os.close(fd)


def parsed(text: str | bytes) -> Any:
    """JSON that anyone may have written; raises ValueError, for what cannot be written again too: halves of surrogate
    pairs, numbers that are none or too long, lists in lists without end."""
    data = text.encode() if isinstance(text, str) else text
    try:
        found = json.loads(data, parse_constant=_no_number, parse_float=_number)
        if _HALF.search(data):
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("lists in lists") from None
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _number(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"{text[:20]} is no number")
    return value


def text_nbytes(column: pa.ChunkedArray | pa.Array) -> int:
    """Bytes that the texts of a dictionary column have, written out: one may stand for a million."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    total = 0
    for chunk in chunks:
        lengths = pc.take(pc.binary_length(chunk.dictionary), chunk.indices)
        total += pc.sum(lengths.cast(pa.int64())).as_py() or 0
    return total
