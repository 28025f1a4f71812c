"""Memory images: one reader a format, found by magic, all behind `Image`.

To add a format: a module with a `Format`, and its name in `FORMATS` before RAW, which takes all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ksmdist.errors import ImageError, SettingsError
from ksmdist.images.arrow import ARROW
from ksmdist.images.base import Format, Hole, Image, ImageInfo
from ksmdist.images.elf import ELF
from ksmdist.images.files import LocalFile, open_file
from ksmdist.images.raw import RAW
from ksmdist.images.stores import StoredFile
from ksmdist.images.uris import local_path, parse_uri
from ksmdist.images.writer import write_image

__all__ = [
    "FORMATS",
    "Format",
    "Hole",
    "Image",
    "ImageInfo",
    "image_ids",
    "open_image",
    "why_no_image",
    "write_image",
]

FORMATS: tuple[Format, ...] = (ARROW, ELF, RAW)
"""All formats, in the order in which they are tried."""

_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"KDUMP   ", "a kdump file"),
    (b"DISKDUMP", "a diskdump file"),
    (b"makedumpfile\0\0\0\0", "a flattened kdump file"),
    (b"EMiL", "a LiME file"),
    (b"AVML", "an AVML file"),
    (b"QEVM", "a QEMU migration stream"),
    (b"LibvirtQemudSave", "a libvirt save file"),
    (bytes.fromhex("1943565425400856"), "a CRIU pagemap"),
    (bytes.fromhex("16313158"), "a CRIU inventory"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed"),
    (b"\x1f\x8b", "gzip-compressed"),
    (b"\xfd7zXZ\0", "xz-compressed"),
    (b"\x04\x22\x4d\x18", "lz4-compressed"),
    (b"QFI\xfb", "a qcow2 disk image"),
    (b"KDMV", "a VMDK disk image"),
    (b"PAR1", "a Parquet file"),
)
"""Files that are certainly not raw memory, by their first bytes: scanning them as raw would mislead."""


def open_image(path: str, page_size: int = 4096, format: str | None = None) -> Image:
    """Open a memory image by path or URI, its format found by magic unless given by name.

    Raises ImageError for what is no memory image or has another format, ImageReadError for what
    cannot be opened, SettingsError for an unknown format, another page size or a URI that cannot be.
    """
    by_name = {known.name: known for known in FORMATS}
    if format is not None and format not in by_name:
        raise SettingsError(f"{format!r} is unknown", "format", f"use one of {', '.join(by_name)}")
    file = open_file(path)
    try:
        return _format(file, None if format is None else by_name[format]).open(file, page_size)
    except BaseException:
        file.close()
        raise


def _format(file: LocalFile | StoredFile, forced: Format | None) -> Format:
    if forced is RAW:
        return forced
    head = file.read(0, 64)
    if forced is not None:
        if not forced.matches(head):
            raise ImageError(
                f"does not start like {forced.name}", file.path, "leave --format out, or give the right one"
            )
        return forced
    foreign = _foreign(head)
    if foreign is not None:
        raise ImageError(
            f"is {foreign}, which this version does not read",
            file.path,
            "unpack or convert it to raw or ELF; --format raw scans the file as it is",
        )
    return next(known for known in FORMATS if known.matches(head))


def _foreign(head: bytes) -> str | None:
    return next((name for magic, name in _FOREIGN if head.startswith(magic)), None)


def why_no_image(head: bytes, named_as_raw: bool) -> str:
    """Why a file of a folder is no image, such as "is a kdump file"; "" if it may be one.

    head: its first 64 bytes; named_as_raw: its name says that it is raw memory, which has no magic.
    """
    if not head:
        return "is empty"
    foreign = _foreign(head)
    if foreign is not None:
        return f"is {foreign}"
    if ELF.matches(head):
        # e_type, in the file's own byte order: 4 is a core.
        return "" if head[16:18] in (b"\4\0", b"\0\4") else "is an ELF file, and no core"
    if ARROW.matches(head) or named_as_raw:
        return ""
    return "has no magic of an image, nor an ending of raw memory"


def image_ids(infos: Sequence[ImageInfo]) -> list[str]:
    """A unique name for each image, in the order given: a function of the set, not of the order.

    An image that names itself keeps that name. Others get the file's name without its ending; where
    that is not unique, the whole name; where that is not, as many folders before it as it takes.
    Raises SettingsError where an image is given twice or two name themselves alike.
    """
    real = [_real_name(info.path) for info in infos]
    given = [info.image_id for info in infos if info.image_id]
    _refuse_repeats(infos, real, "is given twice", "give each image once")
    _refuse_repeats(
        [info for info in infos if info.image_id],
        given,
        "has the image id of another image",
        "import it again with another --id",
    )
    names = [""] * len(infos)
    todo = []
    for index, info in enumerate(infos):
        names[index] = info.image_id or os.path.splitext(os.path.basename(real[index]))[0]
        if not info.image_id:
            todo.append(index)
    depth = 0
    while True:
        seen: dict[str, int] = {}
        for name in names:
            seen[name] = seen.get(name, 0) + 1
        clash = [index for index in todo if seen[names[index]] > 1]
        if not clash:
            return names
        depth += 1
        if all(depth > real[index].count("/") + 1 for index in clash):
            raise SettingsError(
                "has a path that is the image id of another image", infos[clash[0]].path, "import that one with an --id"
            )
        for index in clash:
            names[index] = "/".join(real[index].split("/")[-depth:])


def _real_name(path: str) -> str:
    """One name for each file: of a URI what it names, without how it is reached."""
    local = local_path(path)
    return parse_uri(path).name if local is None else os.path.realpath(local)


def _refuse_repeats(infos: Sequence[ImageInfo], keys: Sequence[str], what: str, hint: str) -> None:
    seen: set[str] = set()
    for info, key in zip(infos, keys, strict=True):
        if key in seen:
            raise SettingsError(what, info.path, hint)
        seen.add(key)
