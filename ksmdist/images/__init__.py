"""Memory images: one reader a format, found by magic, all behind `Image`.

To add a format: a module with a `Format`, and its name in `FORMATS` before RAW, which takes all.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from contextlib import ExitStack

from ksmdist.errors import ImageError, SettingsError
from ksmdist.images.arrow import ARROW
from ksmdist.images.avml import AVML
from ksmdist.images.base import Format, Hole, Image, ImageInfo
from ksmdist.images.claims import check_claim
from ksmdist.images.criu import CRIU
from ksmdist.images.elf import ELF
from ksmdist.images.files import ImageFile, changed, is_changed, open_file
from ksmdist.images.flattened import FLATTENED, FlattenedFile
from ksmdist.images.kdump import KDUMP
from ksmdist.images.lime import LIME
from ksmdist.images.packed import PackedFile, codec_of
from ksmdist.images.qemu import QEMU
from ksmdist.images.raw import RAW, open_layers
from ksmdist.images.uris import local_path, parse_uri
from ksmdist.images.vmware import VMWARE, is_vmem
from ksmdist.images.writer import write_image

__all__ = [
    "FORMATS",
    "Format",
    "Hole",
    "Image",
    "ImageInfo",
    "check_unchanged",
    "image_ids",
    "open_image",
    "reopen",
    "why_no_image",
    "write_image",
]

FORMATS: tuple[Format, ...] = (ARROW, ELF, KDUMP, LIME, AVML, QEMU, CRIU, VMWARE, RAW)
"""All formats, in the order in which they are tried."""

_PAGES_OF_CRIU = re.compile(r"pages-(shmem-)?[0-9]+\.img")
_INVENTORY = "a CRIU checkpoint's inventory"

_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (bytes.fromhex("16313158"), _INVENTORY),
    (b"QFI\xfb", "a qcow2 disk image"),
    (b"KDMV", "a VMDK disk image"),
    (b"PAR1", "a Parquet file"),
    (b"BZh", "bzip2-compressed"),
    (b"PK\x03\x04", "a zip archive"),
)
"""Files that are certainly not raw memory, by their first bytes: scanning them as raw would mislead."""

_LAYERS = 4  # a file in a file: compressed, flattened, compressed
_HEAD_BYTES = 64


def open_image(
    path: str, page_size: int = 4096, format: str | None = None, base: Sequence[str] = (), unpacked: int = 0
) -> Image:
    """Open a memory image by path or URI, its format found by magic unless given by name.

    A compressed or flattened file is read through. base: files that a raw image is laid over, the lowest first;
    unpacked: ImageInfo.unpacked of when it was opened before, so that it is not counted again.
    Raises ImageError for what is no memory image or has another format, ImageReadError for what
    cannot be opened, SettingsError for an unknown format, another page size or a URI that cannot be.
    """
    by_name = {known.name: known for known in FORMATS}
    if format is not None and format not in by_name:
        raise SettingsError(f"{format!r} is unknown", "format", f"use one of {', '.join(by_name)}")
    with ExitStack() as opened:  # closes what was opened, unless an image takes it over
        file: ImageFile = open_file(path)
        opened.callback(file.close)
        found: Format | None = None if format is None else by_name[format]
        if found is not RAW or unpacked:  # raw by name is what the file itself has
            file, head = _unwrapped(file, unpacked)
            found = _format(file, head, found)
        if base and found is not RAW:
            raise SettingsError(f"is a file of format {found.name}", path, "--base goes with raw images alone")
        if base:
            files: list[ImageFile] = []
            for lower in base:
                files.append(open_file(lower))
                opened.callback(files[-1].close)
                _check_base(files[-1], file)
            image = open_layers([*files, file], page_size)
        elif format == RAW.name and not unpacked:
            image = open_layers([file], page_size, _mistaken(file))
        else:
            if found is RAW and format is None and _PAGES_OF_CRIU.fullmatch(posixpath.basename(path)):
                raise ImageError(
                    "is the pages of a CRIU checkpoint, which does not say where they are",
                    path,
                    "name its folder, or the pagemap file; --format raw counts them as a guest's",
                )
            image = found.open(file, page_size)
        opened.callback(image.close)
        info = image.info
        if not info.base:  # pages of layers are data of their files, whatever these are
            parts = [path for path, _ in info.parts]
            check_claim(info.pages * info.page_size, info.path, info.nbytes, parts)
        opened.pop_all()
        return image


def reopen(info: ImageInfo) -> Image:
    """The image of which this is known; raises ImageError if a file of it has changed since."""
    image = open_image(info.path, info.page_size, info.format, info.base, info.unpacked)
    if (image.info.fingerprint, image.info.parts) != (info.fingerprint, info.parts):
        image.close()
        raise changed(info.path)
    return image


def check_unchanged(info: ImageInfo) -> None:
    """Raises ImageError if a local file of an image is not what it was; stored ones are checked as they are read."""
    for path, fingerprint in ((info.path, info.fingerprint), *info.parts):
        if is_changed(path, fingerprint):
            raise changed(path)


def _unwrapped(file: ImageFile, unpacked: int) -> tuple[ImageFile, bytes]:
    """What a file holds, compressed or flattened, and the first bytes of that."""
    for _ in range(_LAYERS):
        head = file.read(0, _HEAD_BYTES)
        if file.unpacked and len(head) < min(_HEAD_BYTES, file.nbytes):
            raise ImageError(
                "is compressed, and cannot be unpacked from its first byte on: it is damaged or truncated",
                file.path,
                "copy it again, or take the dump again",
            )
        codec = codec_of(head)
        if codec:
            file = PackedFile(file, codec, unpacked)
        elif head.startswith(FLATTENED):
            file = FlattenedFile(file)
        else:
            return file, head
    raise ImageError(f"is compressed more than {_LAYERS} times over", file.path, "unpack it, and scan that")


def _format(file: ImageFile, head: bytes, forced: Format | None) -> Format:
    if forced is not None:
        if not (forced.matches(head) or (forced is VMWARE and is_vmem(file.path))):
            raise ImageError(
                f"does not start like {forced.name}", file.path, "leave --format out, or give the right one"
            )
        return forced
    foreign = _foreign(head)
    if foreign == _INVENTORY:
        raise ImageError(f"is {foreign}, and has no pages", file.path, "name the folder that it is in")
    if foreign is not None:
        raise ImageError(
            f"is {foreign}, which this version does not read",
            file.path,
            "unpack or convert it to raw or ELF; --format raw scans the file as it is",
        )
    found = next(known for known in FORMATS if known.matches(head))
    return VMWARE if found is RAW and is_vmem(file.path) else found


def _check_base(lower: ImageFile, file: ImageFile) -> None:
    """Raises an error for a base that is the file itself, or is compressed."""
    if lower.fingerprint == file.fingerprint:
        raise SettingsError(
            "is laid over itself", lower.path, "give as --base the memory file that was taken before it"
        )
    codec = codec_of(lower.read(0, _HEAD_BYTES))
    if codec:
        raise ImageError(f"is compressed ({codec})", lower.path, "unpack it first: a base is read at any page")


def _mistaken(file: ImageFile) -> tuple[str, ...]:
    """A caveat where a file that is read as raw memory because the user says so starts with a known magic."""
    head = file.read(0, _HEAD_BYTES)
    name = next((known.name for known in FORMATS if known is not RAW and known.matches(head)), None)
    what = name or codec_of(head) or ("flattened kdump" if head.startswith(FLATTENED) else _foreign(head))
    return (f"starts like {what}, and is counted as raw memory, headers and all: leave --format out",) if what else ()


def _foreign(head: bytes) -> str | None:
    return next((name for magic, name in _FOREIGN if head.startswith(magic)), None)


def why_no_image(head: bytes, named_as_raw: bool, named_as_packed: bool) -> str:
    """Why a file of a folder is no image, such as "is a qcow2 disk image"; "" if it may be one.

    head: its first 64 bytes; named_as_raw: its name says that it is raw memory, which has no magic;
    named_as_packed: that it is a compressed image.
    """
    if not head:
        return "is empty"
    foreign = _foreign(head)
    if foreign is not None:
        return f"is {foreign}"
    if ELF.matches(head):
        # e_type, in the file's own byte order: 4 is a core.
        return "" if head[16:18] in (b"\4\0", b"\0\4") else "is an ELF file, and no core"
    if codec_of(head) and not named_as_packed:
        return f"is {codec_of(head)}-compressed, and its name does not say that an image is in it"
    if named_as_raw or codec_of(head) or head.startswith(FLATTENED):
        return ""
    if any(known.matches(head) for known in FORMATS if known is not RAW):
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
