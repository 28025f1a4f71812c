"""Many byte ranges of a file, read together where they lie near each other."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ksmdist.images.files import ImageFile

__all__ = ["GAP_BYTES", "ReadsSpans", "clusters", "read_spans"]

GAP_BYTES = 16 << 10
"""Ranges this near are read as one: it costs less than another read."""


@runtime_checkable
class ReadsSpans(Protocol):
    """A file that reads many ranges better than one by one."""

    def read_spans(self, spans: Sequence[tuple[int, int]], stop: Event | None = None) -> list[Any]:
        """A buffer for each (offset, nbytes), shorter where the file has no more."""


def read_spans(file: ImageFile, spans: Sequence[tuple[int, int]], stop: Event | None = None) -> list[memoryview]:
    """The bytes of each (offset, nbytes) of a file, fewer where it has no more. stop: as StoredFile has it.

    Raises ImageReadError, ImageError.
    """
    if isinstance(file, ReadsSpans):
        return [memoryview(buffer) for buffer in file.read_spans(spans, stop)]
    return [memoryview(file.read(offset, nbytes)) for offset, nbytes in spans]


def clusters(offset: np.ndarray, nbytes: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Ranges of a file, int64[n] each, by offset -> ranges (offset, nbytes) that hold them all, and int64[n] in which.

    What lies at most GAP_BYTES apart comes together.
    """
    if len(offset) == 0:
        return [], np.zeros(0, np.int64)
    reach = np.maximum.accumulate(offset + nbytes)
    opens = np.concatenate(([True], offset[1:] > reach[:-1] + GAP_BYTES))
    first = np.flatnonzero(opens)
    last = np.append(first[1:], len(offset)) - 1
    found = zip(offset[first].tolist(), (reach[last] - offset[first]).tolist(), strict=True)
    return list(found), np.cumsum(opens) - 1
