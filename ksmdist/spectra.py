"""The sharing spectrum told two ways more: in buckets of powers of two, and image after image."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from ksmdist.columns import arrow, strings
from ksmdist.groups import count_rows
from ksmdist.sharing import Sharing
from ksmdist.tables import CUMULATIVE, KINDS, SPECTRUM_BUCKETS
from ksmdist.tree import ALL_NODES

__all__ = ["buckets_table", "cumulative_table"]

_ZERO = KINDS.index("zero")


def buckets_table(sharing: Sharing, page_size: int) -> pa.Table:
    """The `spectrum_buckets` table."""
    rows = sharing.spectrum[sharing.spectrum[:, 0] == ALL_NODES]
    kind, copies, contents = rows[:, 1], rows[:, 2], rows[:, 4]
    bucket = np.frexp(copies.astype(np.float64))[1].astype(np.int64) - 1  # exact below 2**53 copies
    (number, kinds), count = count_rows([bucket, kind], contents)
    _, pages = count_rows([bucket, kind], contents * copies)
    columns = [
        arrow(np.int64(1) << number),
        strings(KINDS, kinds),
        *(arrow(column.astype(np.int64)) for column in (count, pages, count * page_size, pages * page_size)),
    ]
    return pa.Table.from_arrays(columns, schema=SPECTRUM_BUCKETS.schema)


def cumulative_table(sharing: Sharing, page_size: int) -> pa.Table:
    """The `cumulative` table. Contents in frames of their own come from image_spectrum, others from their mappings."""
    images = len(sharing.images)
    pages, zero, known, added = (np.zeros(images, np.int64) for _ in range(4))
    rows = sharing.by_image(across_nodes=True)
    image, before, here, contents = rows[:, 1], rows[:, 3], rows[:, 4], rows[:, 6]
    for into, which, weight in (
        (pages, slice(None), here * contents),
        (known, before > 0, here * contents),
        (added, before == 0, contents),
    ):
        np.add.at(into, image[which], weight[which])
    for pattern in sharing.patterns:
        (holders,), count = count_rows([pattern.rows[:, 0]], pattern.rows[:, -1])
        for into in (pages, zero) if pattern.kind == _ZERO else (pages,):
            into[holders] += count * pattern.contents
        known[holders[1:]] += count[1:] * pattern.contents
        added[holders[:1]] += pattern.contents
    total, contents_so_far = np.cumsum(pages), np.cumsum(added)
    saved = total - contents_so_far
    columns = [
        arrow(np.arange(images, dtype=np.int32)),
        sharing.images.column("image_id").combine_chunks(),
        *map(arrow, (pages, zero, added, known, total, contents_so_far, saved, saved * page_size)),
    ]
    return pa.Table.from_arrays(columns, schema=CUMULATIVE.schema)
