"""An image before its pages are read: what it is, what is in it, and what that means for counts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ksmdist.images.base import Image, ImageInfo

__all__ = ["describe"]

_LOW_MEMORY = 3 << 30  # of a PC guest: what is above lies at 4 GiB and up (hw/i386/pc_piix.c, pc_init1)


def describe(image: Image) -> dict[str, Any]:
    """The object that `ksmdist info --json` prints of an image. Keys are a promise: they are added to, none goes.

    ranges: [start, end) in bytes of the pages it has; holes: what should be there and cannot be read; salted: whether
    it has a salt, which is not shown; meaning: what the counts of this image do not show, in sentences. Empty texts:
    not known.
    """
    info = image.info
    return {
        "path": info.path,
        "image_id": info.image_id,
        "format": info.format,
        "producer": info.producer,
        "kind": info.kind,
        "host": info.host,
        "tenant": info.tenant,
        "salted": bool(info.salt),
        "page_size": info.page_size,
        "nbytes": info.nbytes,
        "unpacked": info.unpacked,
        "pages": info.pages,
        "pages_absent": info.pages_absent,
        "pages_excluded": info.pages_excluded,
        "filter_level": info.filter_level,
        "ranges": image.ranges().tolist(),
        "regions": [name for name in info.regions if name],
        "holes": [asdict(hole) for hole in image.holes],
        "files": [path for path, _ in info.parts],
        "base": list(info.base),
        "meaning": _meaning(info, sum(hole.pages for hole in image.holes)),
    }


def _meaning(info: ImageInfo, lost: int) -> list[str]:
    said = []
    if lost:
        said.append(f"{lost:,} pages should be in it and cannot be read: they are not counted, and a run exits with 3")
    if info.filter_level:
        said.append(
            "its producer left pages out or made some up: counts are of what is in the file, and KSM on the machine "
            "sees the rest too"
        )
    if info.base:
        said.append("a hole in the file is memory that has not changed: it is as in the file below")
    elif info.format == "raw" and (info.unpacked or "://" in info.path):
        said.append("holes of the file are not kept: memory that was never touched counts as zero pages")
    elif info.format == "raw":
        said.append("a hole in the file is memory that was never touched, which is absent, not zero")
        if info.pages_absent:
            said.append(
                "if it is a Diff snapshot, a hole is memory that has not changed: give the file below as --base"
            )
    if info.format == "raw" and info.span > _LOW_MEMORY:
        said.append("addresses are offsets in the file: of a PC guest those from 3 GiB on lie at 4 GiB and up")
    said += info.caveats
    if info.pages_absent and not info.filter_level:
        said.append("absent pages are in no count: they had no memory, or the image does not have them")
    return said or ["no page was left out: counts are of the whole memory, if all of it can be read"]
