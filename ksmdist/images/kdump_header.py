"""The headers and bitmaps of a kdump-compressed dump: what it says of itself.

Format: makedumpfile's diskdump_mod.h (struct disk_dump_header, kdump_sub_header) and IMPLEMENTATION, QEMU's
include/sysemu/dump.h (DiskDumpHeader64, KdumpSubHeader64); crash's diskdump.c for what older ones were.
In blocks of one page: header, sub header with notes, a bitmap of the memory there is, one of what was dumped,
then a descriptor for each page of the second.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ksmdist.errors import ImageError, SettingsError
from ksmdist.images.bitmaps import BLOCK_PAGES, PageBitmap
from ksmdist.images.files import ImageFile
from ksmdist.images.flattened import FlattenedFile

__all__ = ["DESCRIPTOR_BYTES", "MAGICS", "KdumpHeader", "check_page_size", "holds", "read_bitmaps", "read_header"]

MAGICS = (b"KDUMP   ", b"DISKDUMP")
DESCRIPTOR_BYTES = 24

_MAIN_BYTES = 464
_SUB_BYTES = 104
_STATUS = slice(424, 428)  # of one piece of a split dump it may differ
_INCOMPLETE, _EXCLUDED_VMEMMAP = 0x8, 0x10
_BLOCK_SIZES = [1 << n for n in range(10, 21)]
_NEWEST_VERSION = 63  # 6 since 2014; a number read in the wrong byte order is far above
_MOST_MAPNR = 1 << 36
_MOST_DUMPED = 1 << 32  # 16 TiB of 4 KiB pages: a bitmap of 512 MiB
_BITMAP_READ = 8 << 20
_DAMAGED = "take the dump again, or copy it again"


@dataclass(frozen=True, slots=True)
class KdumpHeader:
    """What the headers say. Sizes and places in bytes, page frame numbers as they are.

    order: "<" or ">", of all numbers in the file; dump_level: -1 where it has none; split: [start, end) of the page
    frame numbers that a piece of a split dump holds, else None; main: what pieces of one dump have alike
    """

    path: str
    diskdump: bool
    order: str
    version: int
    status: int
    block_size: int
    bitmap_at: int
    bitmap_bytes: int
    max_mapnr: int
    dump_level: int
    split: tuple[int, int] | None
    erased: bool
    sysname: str
    machine: str
    main: tuple[bytes, bytes, int, int, int]

    @property
    def descriptors_at(self) -> int:
        """Where the page descriptors begin."""
        return self.bitmap_at + self.bitmap_bytes

    @property
    def incomplete(self) -> bool:
        """Whether makedumpfile says that it had no space for all of it."""
        return not self.diskdump and bool(self.status & _INCOMPLETE)

    @property
    def excluded_vmemmap(self) -> bool:
        """Whether it was made with --exclude-unused-vm."""
        return not self.diskdump and bool(self.status & _EXCLUDED_VMEMMAP)

    @property
    def producer(self) -> str:
        """QEMU knows of a kernel's utsname the machine alone; makedumpfile copies all of it, or knows none."""
        if self.diskdump:
            return "diskdump"
        return "QEMU" if self.machine and not self.sysname else "makedumpfile"


def holds(file: ImageFile, offset: np.ndarray, nbytes: np.ndarray | int) -> np.ndarray:
    """bool[n]: whether a file has all of these bytes, int64[n] each, neither negative."""
    if isinstance(file, FlattenedFile):
        return file.holds(offset, nbytes)
    return offset <= file.nbytes - nbytes


def _holds_all(file: ImageFile, offset: int, nbytes: int) -> bool:
    return bool(holds(file, np.array([offset], np.int64), nbytes)[0])


def read_header(file: ImageFile) -> KdumpHeader:
    """The headers of a kdump; raises ImageError."""
    path = file.path
    if not _holds_all(file, 0, _MAIN_BYTES):
        raise ImageError(f"is a kdump cut off in its header, after {file.nbytes} bytes", path, _DAMAGED)
    main = file.read(0, _MAIN_BYTES)
    diskdump = main.startswith(MAGICS[1])
    order = next((order for order in "<>" if _fits(main, order, 428)), None)
    if order is None:
        if any(_fits(main, order, 416) for order in "<>"):
            raise ImageError(
                "is a kdump of a 32-bit kernel, which this version does not read",
                path,
                "convert it: an ELF core or a raw image of that memory is read",
            )
        version, _, block_size, *_ = struct.unpack("<i412xIiI", main[8 : 8 + 428])
        raise ImageError(
            f"is a kdump whose header is damaged (version {version}, blocks of {block_size} bytes)", path, _DAMAGED
        )
    version = int(struct.unpack_from(order + "i", main, 8)[0])
    status, block_size, sub_blocks, bitmap_blocks, max_mapnr = struct.unpack_from(order + "IIiII", main, 424)
    level, split, erased, phys_base = -1, None, False, 0
    if not diskdump:
        if not _holds_all(file, block_size, _SUB_BYTES):
            raise ImageError(f"is a kdump cut off in its sub header, after {file.nbytes} bytes", path, _DAMAGED)
        sub = file.read(block_size, _SUB_BYTES)
        phys_base, found, is_split, start, end = struct.unpack_from(order + "QiiQQ", sub)
        level = found if version >= 1 else -1
        if version >= 5:
            erased = bool(struct.unpack_from(order + "Q", sub, 72)[0])
        if version >= 6:
            start, end, max_mapnr = struct.unpack_from(order + "QQQ", sub, 80)
        if version >= 2 and is_split:
            if not start <= end <= max_mapnr:
                raise ImageError(
                    f"is a piece of a split kdump, of pages {start} to {end} out of {max_mapnr}: its header is damaged",
                    path,
                    _DAMAGED,
                )
            split = (start, end)
    if max_mapnr > _MOST_MAPNR:
        raise ImageError(f"is a kdump that claims {max_mapnr} page frames: its header is damaged", path, _DAMAGED)
    return KdumpHeader(
        path=path,
        diskdump=diskdump,
        order=order,
        version=version,
        status=status,
        block_size=block_size,
        bitmap_at=(1 + sub_blocks) * block_size,
        bitmap_bytes=bitmap_blocks * block_size,
        max_mapnr=max_mapnr,
        dump_level=level,
        split=split,
        erased=erased,
        sysname=_text(main, 12),
        machine=_text(main, 12 + 4 * 65),
        main=(main[: _STATUS.start], main[_STATUS.stop :], level, max_mapnr, phys_base),
    )


def _text(main: bytes, at: int) -> str:
    """A field of struct new_utsname."""
    return main[at : at + 65].split(b"\0")[0].decode("ascii", "replace")


def _fits(main: bytes, order: str, block_size_at: int) -> bool:
    """Whether a header makes sense in this byte order, with its block size there: 428 in the 64-bit layout."""
    version = struct.unpack_from(order + "i", main, 8)[0]
    block_size, sub_blocks = struct.unpack_from(order + "Ii", main, block_size_at)
    return 0 <= version <= _NEWEST_VERSION and block_size in _BLOCK_SIZES and sub_blocks >= 1


def check_page_size(header: KdumpHeader, page_size: int) -> None:
    """Raises SettingsError if the dump has pages of another size.

    QEMU's of an arm64 guest has 64 KiB, whatever the guest's are (target/arm/arch_dump.c, cpu_get_dump_info).
    """
    if header.block_size != page_size:
        hint = f"run it with --page-size {header.block_size}"
        if header.producer == "QEMU":
            hint += f", or to count pages of {page_size} bytes dump the guest as ELF"
        raise SettingsError(
            f"has pages of {header.block_size} bytes, this run has {page_size}",
            header.path,
            hint,
        )


def read_bitmaps(file: ImageFile, header: KdumpHeader) -> tuple[PageBitmap, PageBitmap, int]:
    """The memory there is, the pages that were dumped, and the page frame number from which on these are not known.

    Not known: only in a flattened file that was cut off; there all memory counts as dumped. Raises ImageError.
    """
    path, at, nbytes, half = header.path, header.bitmap_at, header.bitmap_bytes, header.bitmap_bytes // 2
    single = half * 8 < header.max_mapnr  # an old diskdump that was not filtered has one
    if single:
        half = nbytes
    if half * 8 < header.max_mapnr or half > _MOST_MAPNR // 8:
        raise ImageError(
            f"is a kdump of {header.max_mapnr} page frames with bitmaps of {nbytes} bytes: its header is damaged",
            path,
            _DAMAGED,
        )
    second, known = (at if single else at + half), half
    if not _holds_all(file, at, nbytes):
        known = _known(file, second, half) if isinstance(file, FlattenedFile) and _holds_all(file, at, half) else 0
        if not known or single:
            raise ImageError(
                f"is a kdump cut off in its bitmaps, which end at byte {at + nbytes}", path, "take or copy it again"
            )
    memory = PageBitmap.of(_chunks(file, at, half, path)).below(header.max_mapnr)
    dumped = memory if single else PageBitmap.of(_chunks(file, second, known, path))
    if dumped.end > header.max_mapnr:
        raise ImageError(
            f"is a kdump with page {dumped.end - 1} dumped, and of {header.max_mapnr} page frames in all",
            path,
            _DAMAGED,
        )
    if known < half:
        dumped = dumped.joined(memory.from_page(known * 8))
    return memory, dumped, known * 8


def _known(file: ImageFile, at: int, nbytes: int) -> int:
    """Bytes of this range up to the first that is not known, whole blocks of a bitmap."""
    ends = np.arange(0, nbytes, BLOCK_PAGES // 8, dtype=np.int64)
    held = holds(file, at + ends, np.minimum(BLOCK_PAGES // 8, nbytes - ends))
    return int(ends[np.argmin(held)]) if not held.all() else nbytes


def _chunks(file: ImageFile, at: int, nbytes: int, path: str) -> Iterator[tuple[int, bytes]]:
    """A bitmap in pieces, those alone that are not holes of the file. Raises ImageError."""
    if nbytes <= _BITMAP_READ:
        extents = [(at, at + nbytes)]
    else:
        extents = [(max(at, low), min(at + nbytes, high)) for low, high in file.data_extents().tolist()]
    done, pages = 0, 0
    for low, high in extents:
        low = max(done, (low - at) // _BITMAP_READ * _BITMAP_READ)
        for start in range(low, high - at, _BITMAP_READ):
            done = start + _BITMAP_READ
            data = file.read(at + start, min(_BITMAP_READ, nbytes - start))
            if len(data) < min(_BITMAP_READ, nbytes - start):
                raise ImageError(f"is a kdump whose bitmaps cannot be read at byte {at + start}", path, _DAMAGED)
            pages += int(np.bitwise_count(np.frombuffer(data, np.uint8)).sum())
            if pages > _MOST_DUMPED:
                raise ImageError(f"is a kdump that claims more than {_MOST_DUMPED} pages", path, _DAMAGED)
            yield start, data
