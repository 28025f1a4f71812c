"""What every reader must do with any file: give its pages, or say what is wrong; never anything else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ksmdist import images
from ksmdist.columns import codes, values
from ksmdist.errors import ImageError
from ksmdist.images import Hole, Image

PAGE = 4096
MOST_PAGES = 1 << 16
"""Of an image that is read whole here: a header may claim more with a right, and reading them would take its time."""

Found = dict[int, bytes | None]


def pages_of(path: Path | str, base: Sequence[str] = (), format: str | None = None) -> Found:
    """Address -> bytes of every page, None for a hole; all that an Image promises is checked on the way."""
    image = images.open_image(str(path), PAGE, format, base)
    try:
        return checked_pages(image)
    finally:
        image.close()


def checked_pages(image: Image) -> Found:
    """The pages of an image, read whole, in parts and one by one: each way gives the same."""
    info = image.info
    assert 0 <= info.pages_excluded <= info.pages_absent
    assert info.pages >= 0
    if info.pages > MOST_PAGES:  # only a few, from all over
        some = np.unique(np.linspace(0, info.pages - 1, 64).astype(np.int64))
        return _read(image, list(image.take(some)))
    found = _read(image, list(image.batches(0, info.pages)))
    assert len(found) == info.pages
    assert list(found) == sorted(found)
    half = info.pages // 2
    parts = _read(image, [*image.batches(0, half), *image.batches(half, info.pages)])
    assert parts == found
    some = np.arange(0, info.pages, 3)
    addresses = np.array(list(found), np.uint64)
    assert _read(image, list(image.take(some))) == {int(addresses[n]): found[int(addresses[n])] for n in some}
    if len(addresses):
        assert (image.find(addresses) == np.arange(info.pages)).all()
    ranges = image.ranges()
    assert (ranges[1:, 0] > ranges[:-1, 1]).all()
    assert int((ranges[:, 1] - ranges[:, 0]).sum()) == info.pages * info.page_size
    for start, end in ranges.tolist():
        assert start in found
        assert end - info.page_size in found
        assert end not in found
        assert int(image.find(np.array([end % (1 << 64)], np.uint64))[0]) == -1
    whole = found | {hole.address + n * PAGE: None for hole in image.holes for n in range(min(hole.pages, 1 << 10))}
    assert len(whole) == len(found) + sum(min(hole.pages, 1 << 10) for hole in image.holes)
    return dict(sorted(whole.items()))


def _read(image: Image, items: list[Any]) -> Found:
    found: Found = {}
    for item in items:
        if isinstance(item, Hole):
            assert item.pages > 0
            found.update({item.address + n * PAGE: None for n in range(item.pages)})
            continue
        batch = item
        assert batch.num_rows > 0
        addresses = values(batch.column("address")).tolist()
        region = codes(batch.column("region"))
        assert -1 <= int(region.min()) <= int(region.max()) < max(1, len(image.info.regions))
        contents = batch.column("content").to_pylist()
        assert all(content is None or len(content) == image.info.page_size for content in contents)
        assert not found.keys() & set(addresses)
        found.update(zip(addresses, contents, strict=True))
    return dict(sorted(found.items()))


def exercise(path: Path | str, base: Sequence[str] = ()) -> Found | ImageError:
    """pages_of(), or the error it raised, which is one that the user can act on."""
    try:
        return pages_of(path, base)
    except ImageError as raised:
        error = raised
    assert error.what
    assert error.hint
    return error
