"""Memory that QEMU migrated to a file (`migrate file:`, exec:), with mapped-ram or without, and that `virsh save` did.

Pages of RAM blocks become pages at guest-physical addresses, as in dump-guest-memory; blocks of devices are left out.
Records of the stream are read by qemu_stream, places of blocks are known by qemu_blocks; mapped-ram has a bitmap and
then all pages of a block: docs/devel/migration/mapped-ram.rst. A page that was sent again counts as it was last.

Raises ImageError as qemu_stream and libvirt do, and for a stream with no RAM, or with more runs of pages than can be
indexed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ksmdist.errors import ImageError
from ksmdist.images.base import NEVER_TOUCHED, Format, Hole, Image, ImageInfo
from ksmdist.images.claims import check_claim
from ksmdist.images.extents import FILLED
from ksmdist.images.files import ImageFile
from ksmdist.images.libvirt import LIBVIRT, SavedDomain, saved_domain
from ksmdist.images.qemu_blocks import Part, is_device, placed
from ksmdist.images.qemu_stream import MAGIC, MappedBlock, RamStream, read_stream
from ksmdist.images.scattered import MOST_RUNS, PageRuns, concatenated, scattered_image
from ksmdist.images.segments import in_holes

__all__ = ["QEMU"]

_SHORT_GAP = 256  # pages of zeros between others: more would fill the page cache with a file's holes
_BITMAP_BYTES = 1 << 20  # of a bitmap, read and looked at together
_MOST_HOLES = 1 << 20  # migration begins with all pages in order: what is cut off has few
_FREE = "pages that the guest had said are free, or memory that was unplugged, are not in it"
_SHARED = "RAM in files that are shared is not in it (x-ignore-shared)"


def _open(file: ImageFile, page_size: int) -> Image:
    saved = SavedDomain(file, 0, "", True)
    libvirt = file.read(0, 16).startswith(LIBVIRT)
    if libvirt:
        saved = saved_domain(file)
    file = saved.file
    stream = read_stream(file, saved.start, page_size)
    if stream.mapped:  # before bitmaps are read: those of an empty file are clear, all zero pages
        check_claim(sum(block.nbytes for block in stream.blocks), file.path, file.disk_nbytes)
    parts = placed(stream.machine, stream.blocks)
    if not parts:
        raise ImageError("has no RAM but of devices", file.path, "migrate the guest to a file again")
    regions = sorted({part.block for part in parts})
    shared = {number for number in regions if _is_shared(stream, number)}
    if len(shared) == len(regions):
        raise ImageError(
            "has no RAM in it: it is in files that were shared, and left out with x-ignore-shared",
            file.path,
            "scan the files of its memory backends (mem-path), as raw images",
        )
    runs, gaps = _pages(file, stream, parts, regions)
    holes: list[Hole] = []
    absent = 0
    for part, some in zip(parts, gaps, strict=True):
        if stream.ended and not stream.mapped and part.block not in shared:
            absent += int((some[:, 1] - some[:, 0]).sum())
            continue
        if len(holes) + len(some) > _MOST_HOLES:
            raise ImageError(
                f"is cut off, and what it has lies in more than {_MOST_HOLES} pieces",
                file.path,
                "copy it again, or migrate the guest to a file again",
            )
        reason = "missing" if part.block in shared else "truncated"
        holes += [Hole(start * page_size, end - start, reason) for start, end in some.tolist()]
    left_out = [text for text, true in ((_FREE, absent), (_SHARED, shared)) if true]
    info = ImageInfo.of(
        file,
        "qemu",
        "guest",
        page_size,
        runs.pages,
        absent,
        pages_excluded=absent,
        filter_level="; ".join(left_out),
        producer=_producer(stream, saved, libvirt),
        regions=tuple(stream.blocks[number].name for number in regions),
        caveats=_caveats(stream, saved, page_size),
    )
    return scattered_image(file, info, runs, tuple(holes))


def _producer(stream: RamStream, saved: SavedDomain, libvirt: bool) -> str:
    if libvirt:
        return f"libvirt, domain {saved.name}" if saved.name else "libvirt"
    return f"QEMU ({stream.machine})" if stream.machine else "QEMU"


def _caveats(stream: RamStream, saved: SavedDomain, page_size: int) -> tuple[str, ...]:
    said = [NEVER_TOUCHED]
    devices = [block for block in stream.blocks if is_device(block.name)]
    if devices:
        pages = sum(block.nbytes for block in devices) // page_size
        names = ", ".join(block.name for block in devices[:8]) + (", ..." if len(devices) > 8 else "")
        said.append(f"{pages} pages of devices ({names}) are left out, though KSM could merge them too")
    if not saved.ended:
        said.append("libvirt had not ended saving it: the domain's memory may not all be in it")
    if not stream.ended and stream.left:
        said.append(f"it is cut off: {stream.left // page_size} more pages, of blocks that it does not name, are lost")
    return tuple(said)


def _is_shared(stream: RamStream, number: int) -> bool:
    """Whether a block was left out because other processes share it: then no page of it is in the file."""
    if "x-ignore-shared" not in stream.capabilities:
        return False
    if stream.mapped:
        return stream.mapped[number] == MappedBlock(0, 0)
    block = stream.blocks[number]
    return stream.ended and not len(stream.records.cut(block.key, block.key + block.nbytes // stream.page_size))


def _pages(
    file: ImageFile, stream: RamStream, parts: Sequence[Part], regions: Sequence[int]
) -> tuple[PageRuns, list[np.ndarray]]:
    """The pages of all parts at their addresses, ascending; and of each part what has none: ranges of pages."""
    size = stream.page_size
    found: list[PageRuns] = []
    gaps: list[np.ndarray] = []
    mapped: dict[int, PageRuns] = {}
    for part in parts:
        first, last, page = part.start // size, part.end // size, part.address // size
        block, region = stream.blocks[part.block], regions.index(part.block)
        if stream.mapped:
            if part.block not in mapped:
                room = MOST_RUNS - sum(len(runs) for runs in mapped.values())
                mapped[part.block] = _mapped(file, stream, part.block, room)
            runs = mapped[part.block].cut(first, last).moved(page - first, region)
        else:
            runs = stream.records.cut(block.key + first, block.key + last)
            runs = runs.moved(page - first - block.key, region)
        found.append(runs)
        gaps.append(runs.gaps(page, page + last - first))
    return concatenated(found), gaps


def _mapped(file: ImageFile, stream: RamStream, number: int, most: int) -> PageRuns:
    """The pages of a block of mapped-ram, numbered from its start on.

    A bit that is clear is a page of zeros, or one that was never touched; where RAM has not ended it says nothing,
    since the bitmaps are written last (ram_save_file_bmap). Where the file has a hole for a few such pages, they are
    read from there, zeros as well: then what is mapped are long runs. Raises ImageError for more than `most` runs: a
    bitmap has one for each of its bits, of 36 bytes.
    """
    size, where = stream.page_size, stream.mapped[number]
    if where == MappedBlock(0, 0):
        return concatenated([])
    pages = min(stream.blocks[number].nbytes, max(0, file.nbytes - where.pages)) // size
    found: list[PageRuns] = []
    data = file.data_extents()
    for at in range(0, pages, 8 * _BITMAP_BYTES):
        count = min(pages - at, 8 * _BITMAP_BYTES)
        raw = np.frombuffer(file.read(where.bitmap + at // 8, -(-count // 8)), np.uint8)
        bits = np.unpackbits(raw, bitorder="little")[:count]
        cuts = np.flatnonzero(bits[1:] != bits[:-1]) + 1
        first = np.concatenate(([0], cuts)) if len(bits) else cuts
        lengths = np.diff(np.append(first, len(bits)))
        there = bits[first] != 0
        page = first + at
        if stream.ended:
            lies = where.pages + page * size
            there |= (lengths < _SHORT_GAP) & in_holes(lies, lies + lengths * size, data)
            opens = np.concatenate(([True], there[1:] != there[:-1])) if len(there) else there
            page, there = page[opens], there[opens]
            lengths = np.diff(np.append(page, at + count))
        runs = PageRuns(
            page,
            lengths,
            np.where(there, where.pages + page * size, FILLED),
            np.where(there, size, 0),
            np.zeros(len(page), np.int32),
        )
        found.append(runs if stream.ended else runs.take(there))
        most -= len(found[-1])
        if most < 0:
            raise ImageError(
                f"has its pages in more than {MOST_RUNS} runs, more than an index of them may take of memory",
                file.path,
                "dump the guest as ELF instead",
            )
    return concatenated(found)


QEMU = Format("qemu", lambda head: head.startswith((MAGIC, *LIBVIRT)), _open)
"""QEMU's migration streams, and libvirt's saved domains."""
