"""VMware: the memory of a suspended guest or a snapshot, a .vmem file, and where it lies, its .vmss or .vmsn file.

Rules: VMware's vmware_vmss.c and .h in crash; nothing else is published. The metadata file has a header (magic,
version, number of groups), groups of 80 bytes (name, place and size of its tags), and tags: a word (length of the
name, number of indices, length of the value), the name, indices of 4 bytes, the value. Values of length 63 and 62 are
blocks, plain and compressed: their length in the file and in memory, the length of a padding, that padding, the bytes.
In the group `memory` regionsCount, regionPageNum, regionPPN and regionSize say, in pages of 4096 bytes, which pages of
the memory lie at which guest-physical pages; without regions they lie from 0 on. ESX writes the memory into the
metadata file itself, as the block Memory. Holes of the file are pages that were never touched: absent, as in raw files.

Whichever file is named, the image is that of the .vmem. Raises ImageError: no memory, or compressed; both a .vmss and
a .vmsn; structures past the end of the file; regions that lack a number, reach past 2**64 or share pages of the file.
"""

from __future__ import annotations

import posixpath
import re
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import numpy as np

from ksmdist.errors import ImageError
from ksmdist.images.base import Format, Image, ImageInfo
from ksmdist.images.extents import extent_image
from ksmdist.images.files import ImageFile
from ksmdist.images.segments import Segments, cut_pages, holes_of, without_file_holes
from ksmdist.images.siblings import open_sibling
from ksmdist.images.uris import local_path, parse_uri
from ksmdist.images.windows import Window

__all__ = ["VMWARE", "is_vmem", "vmem_of"]

_MAGICS = tuple(
    magic.to_bytes(4, "little") for magic in (0xBED0BED0, 0xBED2BED0, 0xBED2BED2, 0xBED3BED3, 0xBAD1BAD1, 0xBAD2BAD2)
)
_METADATA = (".vmss", ".vmsn")
_VMEM = ".vmem"
_PACKED = re.compile(r"\.(?:gz|zstd?|xz|lz4)$")
_UNIT = 4096  # bytes of a page of VMware's
_GROUP_BYTES, _NAME_BYTES = 80, 64
_MOST_GROUPS, _MOST_TAGS = 4096, 1 << 17  # real files have some hundreds of each
_BLOCK, _PACKED_BLOCK = 63, 62
_MOST_PAGES = 1 << 52
_PCI_HOLE = 3 << 30  # a guest with more memory has it from 4 GiB on
_HINT = "copy it again, or suspend the guest again"
_NO_REGIONS = (
    "no .vmss or .vmsn file beside it says where its memory lies: addresses from 3 GiB on are places in the file"
)
_IN_NONE = "{} pages of {} are in no region of the guest's memory, and not counted"


def is_vmem(path: str) -> bool:
    """Whether a file is VMware's memory, compressed or not, by its name: it has no magic."""
    return _unpacked_name(path).endswith(_VMEM)


def vmem_of(name: str) -> str:
    """The name of the file whose memory a .vmss or .vmsn file of this name describes; "" for another name."""
    stem, ending = posixpath.splitext(name)
    return stem + _VMEM if ending in _METADATA else ""


def _name(path: str) -> str:
    local = local_path(path)
    return posixpath.basename(parse_uri(path).path if local is None else local)


def _unpacked_name(path: str) -> str:
    return _PACKED.sub("", _name(path))


@dataclass(slots=True)
class _Memory:
    """What the group `memory` says: numbers of regions by name and indices; (byte, nbytes) of what is in the file."""

    numbers: dict[tuple[bytes, tuple[int, ...]], int] = field(default_factory=dict)
    block: tuple[int, int] | None = None


def _memory(file: ImageFile) -> _Memory:
    """The group `memory` of a metadata file."""
    path, window = file.path, Window(file)

    def read(at: int, nbytes: int) -> bytes:
        data = window.read(at, nbytes) if at + nbytes <= file.nbytes else b""
        if len(data) < nbytes:
            raise ImageError(f"is cut off: it ends before byte {at + nbytes}", path, _HINT)
        return data

    head = read(0, 12)
    wide = 8 if head[0] & 15 else 4  # bytes of a block's lengths
    count = int.from_bytes(head[8:], "little")
    if count > _MOST_GROUPS:
        raise ImageError(f"says that it has {count} groups of tags", path, _HINT)
    table = read(12, count * _GROUP_BYTES)
    groups = [table[at : at + _GROUP_BYTES] for at in range(0, len(table), _GROUP_BYTES)]
    here = [group for group in groups if group[:_NAME_BYTES].split(b"\0")[0] == b"memory"]
    if not here:
        raise ImageError("says nothing of memory: it has no group of that name", path, _HINT)
    at = int.from_bytes(here[0][_NAME_BYTES : _NAME_BYTES + 8], "little")
    found = _Memory()
    for _ in range(_MOST_TAGS):  # 1.6 us a tag
        value_bits, name_bytes = read(at, 2)
        if value_bits == name_bytes == 0:
            return found
        indices, nbytes = value_bits >> 6, value_bits & 63
        body = read(at + 2, name_bytes + 4 * indices)
        name = body[:name_bytes]
        index = tuple(int.from_bytes(body[n : n + 4], "little") for n in range(name_bytes, len(body), 4))
        at += 2 + len(body)
        if nbytes not in (_BLOCK, _PACKED_BLOCK):
            if name.startswith(b"region"):
                found.numbers.setdefault((name, index), int.from_bytes(read(at, nbytes), "little"))
            at += nbytes
            continue
        lengths = read(at, 2 * wide + 2)
        length, padding = int.from_bytes(lengths[:wide], "little"), int.from_bytes(lengths[-2:], "little")
        at += len(lengths) + padding
        if name == b"Memory" and found.block is None and length:
            if nbytes == _PACKED_BLOCK:
                raise ImageError("holds its memory compressed, which ksmdist does not read", path, _HINT)
            found.block = at, length
            if at + length > file.nbytes:  # cut off within it
                return found
        at += length
    raise ImageError(f"has more than {_MOST_TAGS} tags in its group memory", path, _HINT)


def _regions(memory: _Memory, path: str) -> np.ndarray | None:
    """Guest-physical page, page of the memory, and pages, of each region: int64[n, 3]; None: there are none."""
    count = memory.numbers.get((b"regionsCount", ()), 0)
    if count == 0:
        return None
    rows = []
    for number in range(min(count, len(memory.numbers))):
        row = [memory.numbers.get((name, (number,))) for name in (b"regionPPN", b"regionPageNum", b"regionSize")]
        rows.append([-1 if part is None or part >= _MOST_PAGES else part for part in row])
    found = np.array(rows, np.int64).reshape(-1, 3)
    if len(found) < count or bool((found < 0).any()) or bool((found[:, :2] + found[:, 2:] >= _MOST_PAGES).any()):
        raise ImageError(f"lacks a number of one of its {count} regions of memory, or it cannot be", path, _HINT)
    place = found[np.argsort(found[:, 1], kind="stable")]
    place = place[place[:, 2] > 0]
    if bool((place[1:, 1] < place[:-1, 1] + place[:-1, 2]).any()):
        raise ImageError("has regions of memory that share pages of the file", path, _HINT)
    return found


def _image(
    memory: ImageFile,
    regions: np.ndarray | None,
    block: tuple[int, int],
    page_size: int,
    parts: tuple[tuple[str, str], ...],
    caveats: tuple[str, ...],
) -> Image:
    """The image of a guest whose memory is `block`, (byte, nbytes), of a file."""
    at, nbytes = block
    there = max(0, min(nbytes, memory.nbytes - at))
    if regions is None:
        start, offset, length = (np.array([n], np.uint64) for n in (0, 0, nbytes))
    else:
        start, offset, length = regions.astype(np.uint64).T * np.uint64(_UNIT)
        left = (there - int(length.sum())) // _UNIT
        if left > 0:
            caveats = (*caveats, _IN_NONE.format(left, _name(memory.path)))
    had = np.minimum(length, np.uint64(there) - np.minimum(offset, np.uint64(there)))
    offset = offset + np.uint64(at)
    dumped = Segments(start, start + length, offset)
    available = dumped.up_to(start + had, page_size).disjoint()
    whole, partial = cut_pages(available, page_size)
    extents = without_file_holes(whole, memory.data_extents(), page_size, memory.path)
    absent = whole.pages - extents.pages
    info = ImageInfo.of(
        memory,
        "vmware",
        "guest",
        page_size,
        extents.pages,
        absent,
        producer="VMware",
        parts=parts,
        caveats=caveats,
    )
    return extent_image([memory], info, extents, tuple(holes_of(dumped.disjoint(), available, partial, page_size)))


def _open_vmem(memory: ImageFile, page_size: int) -> Image:
    """The image of a .vmem file, which it takes over."""
    stem = _unpacked_name(memory.path).removesuffix(_VMEM)
    with ExitStack() as opened:
        beside = [open_sibling(memory, stem + ending) for ending in _METADATA]
        metadata = [opened.enter_context(closing(file)) for file in beside if file is not None]
        if len(metadata) > 1:
            raise ImageError(
                f"has both a {stem}.vmss and a {stem}.vmsn file beside it",
                memory.path,
                "take away the one that it was not written with",
            )
        if not metadata:
            if memory.nbytes == 0:
                raise ImageError("is empty: not a memory image", memory.path, _HINT)
            caveats = (_NO_REGIONS,) if memory.nbytes > _PCI_HOLE else ()
            return _image(memory, None, (0, memory.nbytes), page_size, (), caveats)
        (file,) = metadata
        head = file.read(0, 4)
        if head not in _MAGICS:
            raise ImageError("does not start like a .vmss or .vmsn file", file.path, _HINT)
        regions = _regions(_memory(file), file.path)
        parts = ((file.path, file.fingerprint),)
        return _image(memory, regions, (0, memory.nbytes), page_size, parts, ())


def _open(file: ImageFile, page_size: int) -> Image:
    if is_vmem(file.path):
        return _open_vmem(file, page_size)
    name = vmem_of(_name(file.path))
    memory = open_sibling(file, name) if name else None
    if memory is not None:
        with ExitStack() as opened:
            opened.callback(memory.close)
            image = _open_vmem(memory, page_size)
            opened.pop_all()
        file.close()
        return image
    found = _memory(file)
    if found.block is None:
        raise ImageError(
            "has no memory in it, and no .vmem file of its name is beside it",
            file.path,
            f"bring {name or 'the .vmem file'}, and name both alike",
        )
    return _image(file, _regions(found, file.path), found.block, page_size, (), ())


VMWARE = Format("vmware", lambda head: head[:4] in _MAGICS, _open)
"""VMware's .vmss and .vmsn files, and the .vmem file beside them."""
