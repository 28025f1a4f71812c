"""The schema metadata of a `memory_image` Arrow file: what it says of its image, checked key by key."""

from __future__ import annotations

import pyarrow as pa

from ksmdist.errors import ImageError, SettingsError
from ksmdist.images.base import ImageInfo
from ksmdist.images.files import ImageFile
from ksmdist.intake import parsed
from ksmdist.tables import MEMORY_IMAGE, PASSED_OVER

__all__ = ["HINT", "KINDS_OF_IMAGES", "image_info"]

HINT = "`ksmdist schema memory_image` describes the format; write the image again"

KINDS_OF_IMAGES = ("guest", "process", "container", "kernel")
"""What an image can be the memory of."""


def image_info(schema: pa.Schema, file: ImageFile, page_size: int, rows: int) -> ImageInfo:
    """What is known of an image by its schema; raises ImageError, SettingsError for another page size."""
    path = file.path
    raw = {} if schema.metadata is None else schema.metadata
    found = {key.decode("utf-8", "replace"): value.decode("utf-8", "replace") for key, value in raw.items()}
    if found.get("ksmdist.table") != MEMORY_IMAGE.name:
        raise ImageError("is an Arrow file but no memory_image (metadata ksmdist.table)", path, HINT)
    known = {key.name: found.get(key.name, key.default) for key in MEMORY_IMAGE.keys}
    if known["ksmdist.version"] != str(MEMORY_IMAGE.version):
        raise ImageError(
            f"is memory_image version {known['ksmdist.version']}, this ksmdist reads {MEMORY_IMAGE.version}",
            path,
            "use the ksmdist that wrote it, or write it again",
        )
    wanted = {field.name: field.type for field in MEMORY_IMAGE.schema}
    given = {field.name: field.type for field in schema}
    if list(given.items()) != list(wanted.items()):
        name = next((n for n in wanted if given.get(n) != wanted[n]), ", ".join(given))
        raise ImageError(
            f"column {name} is {given.get(name, 'missing')}, memory_image has {wanted.get(name, 'other columns')}",
            path,
            HINT,
        )
    numbers = {}
    for key in ("page_size", "pages_absent", "scan_order"):
        text = known[f"ksmdist.{key}"] or ""
        if not (text.isascii() and text.isdecimal() and len(text) < 19):
            raise ImageError(f"metadata ksmdist.{key} is {text!r}, not a number", path, HINT)
        numbers[key] = int(text)
    if numbers["page_size"] != page_size:
        raise SettingsError(
            f"has pages of {numbers['page_size']} bytes, this run has {page_size}",
            path,
            f"run it with --page-size {numbers['page_size']}",
        )
    kind = known["ksmdist.kind"] or ""
    if kind not in KINDS_OF_IMAGES:
        raise ImageError(f"metadata ksmdist.kind is {kind!r}", path, HINT)
    try:
        source = parsed(known["ksmdist.source"] or "{}")
        producer, filter_level = (str(source.get(key) or "") for key in ("producer", "filter_level"))
        excluded, span = (int(source.get(key) or 0) for key in ("pages_excluded", "span"))
        caveats = tuple(str(caveat) for caveat in source.get("caveats", ()))
        if not (0 <= excluded <= numbers["pages_absent"] and 0 <= span < 1 << 63):
            raise ValueError
    except (ValueError, AttributeError, TypeError):
        raise ImageError("metadata ksmdist.source is not what it should be", path, HINT) from None
    return ImageInfo(
        path=path,
        format="arrow",
        kind=kind,
        page_size=page_size,
        pages=rows,
        pages_absent=numbers["pages_absent"],
        nbytes=file.nbytes,
        fingerprint=file.fingerprint,
        image_id=known["ksmdist.image_id"] or "",
        host=known["ksmdist.host"] or "",
        tenant=known["ksmdist.tenant"] or "",
        salt=known["ksmdist.salt"] or "",
        caveats=caveats,
        scan_order=numbers["scan_order"],
        producer=producer,
        filter_level=filter_level,
        pages_excluded=excluded,
        span=span,
        passed_over=_passed_over(known["ksmdist.passed_over"] or "[]", path),
        ksm_stat=_ksm_stat(known["ksmdist.ksm_stat"] or "{}", path),
    )


def _passed_over(text: str, path: str) -> tuple[tuple[str, str, int], ...]:
    try:
        rows = tuple((str(row["region"]), str(row["reason"]), int(row["pages"])) for row in parsed(text))
        if all(reason in PASSED_OVER and 0 <= pages < 1 << 52 for _, reason, pages in rows):
            return rows
    except (ValueError, TypeError, KeyError):
        pass
    raise ImageError("metadata ksmdist.passed_over is not what it should be", path, HINT)


def _ksm_stat(text: str, path: str) -> tuple[tuple[str, str], ...]:
    try:
        return tuple((str(name), str(value)) for name, value in parsed(text).items())
    except (ValueError, AttributeError):
        raise ImageError("metadata ksmdist.ksm_stat is no JSON object", path, HINT) from None
