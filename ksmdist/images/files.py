"""Files that hold images: on this host, or in an object store; what readers ask of both."""

from __future__ import annotations

import errno
import os
from typing import Protocol
from weakref import finalize

import numpy as np

from ksmdist.errors import ImageError, ImageReadError, SettingsError
from ksmdist.images.stores import StoredFile
from ksmdist.images.uris import is_uri, local_path, parse_uri

__all__ = ["ImageFile", "LocalFile", "check_unchanged", "open_file"]


class ImageFile(Protocol):
    """An open file. path: as errors name it; fingerprint: changes when the file does."""

    path: str
    nbytes: int
    fingerprint: str

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes from `offset` on: `nbytes`, or as many as there are. Raises ImageReadError."""

    def data_extents(self) -> np.ndarray:
        """Byte ranges that are not holes: int64[n, 2], ascending."""

    def close(self) -> None:
        """Let it go."""


class LocalFile:
    """A regular file, open for reading as the descriptor `fd`; raises ImageReadError."""

    def __init__(self, path: str) -> None:
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ImageReadError(
                f"cannot be opened: {os.strerror(error.errno or 0)}", path, "check the path and the permissions"
            ) from None
        self._close = finalize(self, os.close, self.fd)  # a worker's cache of images lets them go without close()
        if not os.path.isfile(path):
            self.close()
            raise ImageReadError("is not a regular file", path, "name the image files themselves")
        stat = os.fstat(self.fd)
        self.path = path
        self.nbytes = stat.st_size
        self.fingerprint = _fingerprint(stat)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes from `offset` on: `nbytes`, or as many as there are."""
        try:
            return os.pread(self.fd, nbytes, offset)
        except OSError as error:
            raise ImageReadError(
                f"cannot be read at byte {offset}: {os.strerror(error.errno or 0)}", self.path, "check the disk"
            ) from None

    def data_extents(self) -> np.ndarray:
        """Byte ranges that are not holes: int64[n, 2], ascending; lseek(2), SEEK_DATA."""
        found: list[tuple[int, int]] = []
        position = 0
        while position < self.nbytes:
            try:
                start = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data up to the end of the file
                    break
                found.append((position, self.nbytes))  # a file system that does not know: all is data
                break
            position = os.lseek(self.fd, start, os.SEEK_HOLE)
            found.append((start, min(position, self.nbytes)))
        return np.array(found, np.int64).reshape(-1, 2)

    def close(self) -> None:
        """Let it go."""
        self._close()


def _fingerprint(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"


def check_unchanged(path: str, fingerprint: str) -> None:
    """Raises ImageError if a local file is not what it was; stored ones are checked as they are read."""
    if is_uri(path):
        return
    try:
        now = _fingerprint(os.stat(path))
    except OSError:
        now = ""
    if now != fingerprint:
        raise ImageError("changed while it was scanned", path, "scan a copy, or stop what writes to it")


def open_file(path: str) -> LocalFile | StoredFile:
    """Open a path or URI. Raises ImageReadError, and SettingsError for a URI that names nothing here."""
    local = local_path(path)
    if local is not None:
        return LocalFile(local)
    if is_uri(path) and parse_uri(path).scheme == "node":
        raise SettingsError("is on a node of a cluster", path, "open it there, by its path")
    return StoredFile(path)
