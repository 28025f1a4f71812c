"""Small structures that lie all over a file, read ahead where they lie near each other."""

from __future__ import annotations

from ksmdist.images.files import ImageFile
from ksmdist.images.stores import StoredFile

__all__ = ["Window"]

_NEAR = 4 << 10  # from one structure to the next: nearer, and a read of both costs less than two
_AHEAD = 64 << 10


class Window:
    """A file's bytes, for a reader that goes forwards."""

    def __init__(self, file: ImageFile) -> None:
        self._file = file
        self._near, self._ahead = _NEAR, _AHEAD
        if isinstance(file, StoredFile):  # each read is a request
            self._near = self._ahead = file.block_bytes
        self._at = 0
        self._data = b""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes from `offset` on: `nbytes`, or as many as there are."""
        at = offset - self._at
        if at >= 0 and at + nbytes <= len(self._data):
            return self._data[at : at + nbytes]
        near = 0 <= at <= len(self._data) + self._near
        self._data = self._file.read(offset, max(nbytes, self._ahead) if near else nbytes)
        self._at = offset
        return self._data[:nbytes]
