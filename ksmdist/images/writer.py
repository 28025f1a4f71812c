"""Writes images of any format as one `memory_image` Arrow file."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ksmdist.errors import ImageError
from ksmdist.images.base import Hole, ImageInfo, Pages, lost_level, page_batch
from ksmdist.tables import MEMORY_IMAGE, PAGE_FLAGS

__all__ = ["write_image"]


def write_image(
    sources: Sequence[Pages],
    path: str,
    image_id: str,
    captured_at: str = "",
    producer: str = "",
    host: str = "",
    tenant: str = "",
) -> list[tuple[str, Hole]]:
    """Write images, as one, to an Arrow file at `path`; returns (source path, hole) for what was unreadable.

    producer, host, tenant: instead of what the sources say.
    The sources' addresses must not interleave: they are laid one after the other by first address.
    What is known at opening to be unreadable gets no row, and the image says how much it was; a page found so while
    it is read gets a row flagged `unreadable`. Raises ImageError where two sources hold the same address, or where
    several name regions.
    """
    ordered = sorted(sources, key=_first_address) if len(sources) > 1 else list(sources)
    first = ordered[0].info
    if len(ordered) > 1 and any(source.info.regions for source in ordered):
        raise ImageError("names regions, so it cannot be joined with other sources", first.path, "import it by itself")
    lost = sum(hole.pages for source in sources for hole in source.holes)
    absent = sum(source.info.pages_absent for source in sources) + lost
    infos = [source.info for source in ordered]
    origin = {
        "format": first.format,
        "producer": producer or first.producer,
        "filter_level": lost_level(*(info.filter_level for info in infos), lost=lost, how="imported"),
        "pages_excluded": sum(info.pages_excluded for info in infos),
        "span": max(info.span for info in infos),
        "caveats": list(dict.fromkeys(caveat for info in infos for caveat in info.caveats)),
    }
    passed_over = [
        dict(zip(("region", "reason", "pages"), row, strict=True)) for s in ordered for row in s.info.passed_over
    ]
    metadata = {
        "ksmdist.table": MEMORY_IMAGE.name,
        "ksmdist.version": str(MEMORY_IMAGE.version),
        "ksmdist.page_size": str(first.page_size),
        "ksmdist.image_id": image_id,
        "ksmdist.kind": first.kind,
        "ksmdist.host": host or first.host,
        "ksmdist.tenant": tenant or first.tenant,
        "ksmdist.salt": first.salt,
        "ksmdist.source": json.dumps(origin, sort_keys=True),
        "ksmdist.pages_absent": str(absent),
        "ksmdist.captured_at": captured_at,
        "ksmdist.scan_order": str(first.scan_order),
        "ksmdist.passed_over": json.dumps(passed_over),
        "ksmdist.ksm_stat": json.dumps(dict(first.ksm_stat)),
    }
    holes: list[tuple[str, Hole]] = [(source.info.path, hole) for source in ordered for hole in source.holes]
    schema = MEMORY_IMAGE.schema.with_metadata(metadata)
    before = -1
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for source in ordered:
            for item in source.batches(0, source.info.pages):
                if isinstance(item, Hole):  # found after the metadata was written: only rows can tell of it
                    holes.append((source.info.path, item))
                    item = _unreadable(item, source.info)
                address = int(item.column("address")[0].as_py())
                if address <= before:
                    raise ImageError(
                        f"holds address {address:#x}, which another source holds or goes past",
                        source.info.path,
                        "import the sources one by one, each to an image of its own",
                    )
                before = int(item.column("address")[-1].as_py())
                # Fields that may be null by the schema of another writer's file, and are not.
                writer.write_batch(pa.RecordBatch.from_arrays(item.columns, schema=schema))
    return holes


def _unreadable(hole: Hole, info: ImageInfo) -> pa.RecordBatch:
    """Rows of pages that could not be read: as `ksmdist capture` has them."""
    pages = np.arange(hole.pages, dtype=np.int64) + hole.address // info.page_size
    region = np.full(hole.pages, -1, np.int32) if info.regions else None  # an Arrow file has one dictionary
    flags = np.full(hole.pages, PAGE_FLAGS["eligible"] | PAGE_FLAGS["unreadable"], np.uint32)
    nothing = pa.nulls(hole.pages, MEMORY_IMAGE.schema.field("content").type)
    return page_batch(pages, nothing, info.page_size, flags, region, info.regions)


def _first_address(image: Pages) -> int:
    for item in image.batches(0, min(1, image.info.pages)):
        return item.address if isinstance(item, Hole) else int(item.column("address")[0].as_py())
    return 0
