"""What unmerging brings back: pages that get frames of their own, and the frames that takes."""

from __future__ import annotations

import pyarrow as pa

from ksmdist.counters import Prediction
from ksmdist.settings import Settings
from ksmdist.sharing import Sharing
from ksmdist.tables import UNMERGE

__all__ = ["unmerge"]


def unmerge(sharing: Sharing, prediction: Prediction, settings: Settings) -> pa.Table:
    """The `unmerge` table: a row for all images together, then one for each by itself.

    MADV_UNMERGEABLE and run=2 give back zero pages that KSM placed from Linux 6.6 on (mm/ksm.c,
    break_ksm; e2942062e01d); before, nothing knows which they are, and they stay.
    """
    given_back = settings.kernel != "6.1"
    merged, zero = prediction.merging_pages, prediction.zero_pages
    back = zero if given_back else zero * 0
    freed = prediction.nodes_within
    ids: list[str | None] = [None, *sharing.images.column("image_id").to_pylist()]
    counters = prediction.counters
    columns = {"image_id": ids} | {
        name: [total, *by_image.tolist()]
        for name, total, by_image in (
            ("pages_unshared", int((merged + back).sum()), merged + back),
            ("zero_pages_given_back", int(back.sum()), back),
            ("zero_pages_kept", int((zero - back).sum()), zero - back),
            ("frames_freed", counters.pages_shared, freed),
            ("frames_needed", counters.pages_sharing + int(back.sum()), merged + back - freed),
            (
                "bytes_needed",
                (counters.pages_sharing + int(back.sum())) * settings.page_size,
                (merged + back - freed) * settings.page_size,
            ),
        )
    }
    return pa.Table.from_pydict(columns, schema=UNMERGE.schema)
