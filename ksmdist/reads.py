"""Pages that are read a second time, from anywhere in the images of a task."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import numpy as np

from ksmdist import images
from ksmdist.columns import present, values
from ksmdist.digests import content_rows
from ksmdist.errors import ImageError
from ksmdist.images import Hole, ImageInfo

__all__ = ["named_by_node", "read_again", "reopened"]


class named_by_node:  # noqa: N801  # reads as a statement
    """Errors about an image name the node that has it."""

    def __init__(self, node: str) -> None:
        self._node = node

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._node and isinstance(error, ImageError):
            raise type(error)(error.what, f"node://{self._node}{error.where}", error.hint) from None


@functools.lru_cache(maxsize=4)
def reopened(info: ImageInfo) -> images.Image:
    """The image, opened once in each worker; raises ImageError if it is not the file that was planned."""
    return images.reopen(info)


def read_again(
    infos: Mapping[int, ImageInfo], image: np.ndarray, address: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pages at these places -> (places, int64[k], their bytes, uint8[k, page_size]), a batch at a time.

    infos: by number; image: int64[n]; address: uint64[n]; a place is an index into these, none of
    which comes twice. Each image is read once, by
    address. Pages that cannot be read, or have no bytes, are left out. The bytes must be let go of before the next.
    Raises ImageError where an image is gone, or is another by now.
    """
    order = np.lexsort((address, image))
    for number in np.unique(image).tolist():
        mine = order[image[order] == number]
        info = infos[number]
        opened = reopened(info)
        at = opened.find(address[mine])
        mine, at = mine[at >= 0], at[at >= 0]
        wanted = address[mine]
        for batch in opened.take(at):
            if isinstance(batch, Hole):
                continue
            content = batch.column("content")
            has_bytes = present(content)
            here = values(batch.column("address"))[has_bytes]
            if len(here) == 0:
                continue
            rows = content_rows(content, info.page_size)
            low, high = np.searchsorted(wanted, here[[0]], "left")[0], np.searchsorted(wanted, here[[-1]], "right")[0]
            row = np.minimum(np.searchsorted(here, wanted[low:high]), len(here) - 1)
            found = here[row] == wanted[low:high]
            if len(row) == len(rows) and found.all():
                yield mine[low:high], rows
            else:
                yield mine[low:high][found], rows[row[found]]
        images.check_unchanged(info)
