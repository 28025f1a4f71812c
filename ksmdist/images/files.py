"""Files that hold images: on this host, or in an object store; what readers ask of both."""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from dataclasses import replace
from typing import Protocol, runtime_checkable
from weakref import finalize

import numpy as np

from ksmdist.errors import ImageError, ImageReadError, SettingsError
from ksmdist.images.stores import StoredFile
from ksmdist.images.uris import is_uri, local_path, parse_uri

__all__ = [
    "ImageFile",
    "LocalFile",
    "Resumable",
    "changed",
    "is_changed",
    "open_file",
    "path_beside",
]


class ImageFile(Protocol):
    """An open file, or what another file holds packed. path: as errors name it; fingerprint: changes when it does."""

    @property
    def path(self) -> str:
        """Its path or URI."""

    @property
    def nbytes(self) -> int:
        """Bytes that can be read from it."""

    @property
    def disk_nbytes(self) -> int:
        """Bytes of the file itself: other than nbytes where it is packed."""

    @property
    def unpacked(self) -> int:
        """Bytes in it once decompressed, 0 where it is not compressed."""

    @property
    def fingerprint(self) -> str:
        """Size, time and the like: not a hash."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes from `offset` on: `nbytes`, or as many as there are. Raises ImageReadError."""

    def data_extents(self) -> np.ndarray:
        """Byte ranges that are not holes: int64[n, 2], ascending."""

    def checked(self) -> None:
        """Raises ImageError if it is not what was opened, where that can only be asked for: of an object in a store."""

    def close(self) -> None:
        """Let it go."""


@runtime_checkable
class Resumable(Protocol):
    """A file of which parts may be damaged or unknown, and what follows them be whole."""

    def resume(self, offset: int) -> int:
        """First byte from `offset` on at which reading may go on, where the byte at `offset` cannot be read."""


class LocalFile:
    """A regular file, open for reading as the descriptor `fd`; raises ImageReadError."""

    unpacked = 0

    def __init__(self, path: str) -> None:
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait
        except OSError as error:
            raise ImageReadError(
                f"cannot be opened: {os.strerror(error.errno or 0)}", path, "check the path and the permissions"
            ) from None
        self._close = finalize(self, os.close, self.fd)  # a worker's cache of images lets them go without close()
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise ImageReadError(
                "is not a regular file", path, "name the image files themselves; save first what comes through a pipe"
            )
        self.path = path
        self.nbytes = self.disk_nbytes = status.st_size
        self.fingerprint = _fingerprint(status)

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
            try:
                position = os.lseek(self.fd, start, os.SEEK_HOLE)
            except OSError:  # it has become shorter since: whoever reads it finds that out
                position = self.nbytes
            found.append((start, min(position, self.nbytes)))
        return np.array(found, np.int64).reshape(-1, 2)

    def checked(self) -> None:
        """Nothing: is_changed() tells."""

    def close(self) -> None:
        """Let it go."""
        self._close()


def _fingerprint(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


def is_changed(path: str, fingerprint: str) -> bool:
    """Whether a local file is not what it was; False for stored ones."""
    if is_uri(path):
        return False
    try:
        return _fingerprint(os.stat(path)) != fingerprint
    except OSError:
        return True


def changed(path: str) -> ImageError:
    """The error of a file that is not what it was."""
    return ImageError("changed while it was scanned", path, "scan a copy, or stop what writes to it")


def path_beside(path: str, name: str) -> str:
    """The path or URI of `name`, a relative path, in the folder of `path`."""
    local = local_path(path)
    if local is not None:
        return os.path.join(os.path.dirname(local), name)
    uri = parse_uri(path)
    return str(replace(uri, path=posixpath.join(posixpath.dirname(uri.path), name)))


def open_file(path: str) -> LocalFile | StoredFile:
    """Open a path or URI. Raises ImageReadError, and SettingsError for a URI that names nothing here."""
    local = local_path(path)
    if local is not None:
        return LocalFile(local)
    if is_uri(path) and parse_uri(path).scheme == "node":
        raise SettingsError("is on a node of a cluster", path, "open it there, by its path")
    return StoredFile(path)
