"""Mappings of a process as a CRIU checkpoint has them: which of its pages KSM may merge, and their names.

Rules: CRIU's images/mm.proto and vma.proto, criu/include/image.h (VMA_AREA_*), criu/proc_parse.c (parse_vmflags:
VmFlags of smaps as bits of madvise(2)); vma_ksm_compatible of the kernel's mm/ksm.c. Names of files: reg_file_entry in
files.img, or reg-files.img before CRIU 3.0; other names are those of /proc/PID/maps.

Raises ImageError: no mm image, mappings that end before they begin or are not of pages of this size.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np

from ksmdist.errors import ImageError
from ksmdist.images.files import ImageFile
from ksmdist.images.pagemaps import PlacedRuns
from ksmdist.images.protobuf_messages import fields_of, numbers_of, records_of
from ksmdist.images.siblings import open_sibling, read_whole
from ksmdist.tables import PAGE_FLAGS

__all__ = ["Vmas", "command_of", "read_vmas"]

_COMMON = bytes.fromhex("19435654")
_MM, _CORE = _COMMON + bytes.fromhex("20284957"), _COMMON + bytes.fromhex("47380555")
_FILES = {"files.img": _COMMON + bytes.fromhex("38313056"), "reg-files.img": _COMMON + bytes.fromhex("36363650")}
_MOST_BYTES = 64 << 20  # of mm: a million mappings
_MOST_SMALL = 8 << 20  # of core and the list of files: a hundred thousand files
_MOST_VMA = 256  # bytes of a vma_entry: those known have 90 at most
_VMAS, _TC, _COMM = 14, 3, 6  # fields of mm_entry, core_entry, task_core_entry
_REG, _ID, _NAME = 3, 1, 6  # of file_entry, reg_file_entry
_COMM_LETTERS = 16  # TASK_COMM_LEN

_MAP_SHARED, _MAP_LOCKED, _MAP_HUGETLB, _MAP_DROPPABLE = 0x01, 0x2000, 0x40000, 0x08
_MAP_TYPE = 0x0F
_MADV_MERGEABLE = 1 << 12
_HEAP, _STACK, _VSYSCALL, _VDSO, _FILE_PRIVATE, _FILE_SHARED = 1 << 5, 1 << 1, 1 << 2, 1 << 3, 1 << 6, 1 << 7
_ANON_SHARED, _ANON_PRIVATE, _SYSVIPC, _VVAR, _AIORING = 1 << 8, 1 << 9, 1 << 10, 1 << 12, 1 << 13
_GUARD, _UPROBES = 1 << 16, 1 << 17
_SHARED = _FILE_SHARED | _ANON_SHARED | _SYSVIPC
_SPECIAL = _VSYSCALL | _VDSO | _VVAR | _AIORING | _UPROBES
_NAMES = (  # the first that fits
    (_VSYSCALL, "[vsyscall]"),
    (_VDSO, "[vdso]"),
    (_VVAR, "[vvar]"),
    (_UPROBES, "[uprobes]"),
    (_AIORING, "/[aio] (deleted)"),
    (_HEAP, "[heap]"),
    (_STACK, "[stack]"),
    (_ANON_SHARED, "/dev/zero (deleted)"),
    (_ANON_PRIVATE, "[anon]"),
)


@dataclass(frozen=True, slots=True)
class Vmas:
    """Mappings [first, last) in pages, int64[n], ascending and disjoint, guard regions left out.

    flags: uint32[n], `memory_image.flags` of their pages; region: int32[n], places in `names`, -1: of a file whose
    name is not known; mergeable: whether any is marked so. part: the mm image, as (path, fingerprint).
    """

    first: np.ndarray
    last: np.ndarray
    flags: np.ndarray
    region: np.ndarray
    names: tuple[str, ...]
    mergeable: bool
    part: tuple[str, str]


def read_vmas(file: ImageFile, pid: str, page_size: int) -> Vmas | None:
    """The mappings of process `pid`, from mm-PID.img beside `file`; None if it is not there."""
    mm = open_sibling(file, f"mm-{pid}.img")
    if mm is None:
        return None
    with closing(mm):
        number, part = _vma_numbers(mm), (mm.path, mm.fingerprint)
    start, end, shmid, flags, status, madv = (number[field] for field in (1, 2, 4, 6, 7, 9))
    size = np.uint64(page_size)
    if bool((end < start).any()) or bool(((start | end) % size != 0).any()):
        raise ImageError(
            f"has mappings that are not of {page_size}-byte pages, or end before they begin",
            part[0],
            "give the --page-size of where it was taken, or take mm-*.img away to do without",
        )
    some = np.flatnonzero((start < end) & ((status & np.uint64(_GUARD)) == 0))
    first, last = (start[some] // size).astype(np.int64), (end[some] // size).astype(np.int64)
    placed = PlacedRuns.of(first, last, some.astype(np.int32))
    which = placed.source
    shmid, flags, status, madv = shmid[which], flags[which], status[which], madv[which]

    def has(bits: np.ndarray, mask: int) -> np.ndarray:
        return np.asarray((bits & np.uint64(mask)) != 0)

    shared = ((flags & np.uint64(_MAP_TYPE)) == _MAP_SHARED) | has(status, _SHARED)
    droppable = (flags & np.uint64(_MAP_TYPE)) == _MAP_DROPPABLE
    never = shared | droppable | has(status, _SPECIAL) | has(flags, _MAP_HUGETLB)
    mergeable = ~never & has(madv, _MADV_MERGEABLE)
    page_flags = np.zeros(len(which), np.uint32)
    for name, mask in (("file", never), ("eligible", mergeable), ("locked", has(flags, _MAP_LOCKED))):
        page_flags[mask] |= PAGE_FLAGS[name]
    region, names = _regions(file, status, shmid)
    return Vmas(placed.first, placed.last, page_flags, region, names, bool(mergeable.any()), part)


def _vma_numbers(mm: ImageFile) -> dict[int, np.ndarray]:
    """Numbers of every vma_entry of an mm image, by field. 1 us a mapping."""
    data = read_whole(mm, _MOST_BYTES)
    try:
        if not data.startswith(_MM):
            raise ValueError("is no mm image of CRIU")
        starts, ends = records_of(data, len(_MM))
        at = []
        for start, end in zip(starts[:1].tolist(), ends[:1].tolist(), strict=True):
            whole = memoryview(data)[start:end]
            for field, value, behind in fields_of(whole):
                if field == _VMAS and isinstance(value, memoryview):
                    at.append((start + behind - len(value), start + behind))
        places = np.array(at, np.int64).reshape(-1, 2)
        found = numbers_of(np.frombuffer(data, np.uint8), places[:, 0], places[:, 1], range(1, 10), _MOST_VMA)
        if not (found[1][1] & found[2][1]).all():
            raise ValueError("has a mapping without addresses")
    except ValueError as error:
        hint = "take the checkpoint again, or take mm-*.img away to do without"
        raise ImageError(str(error), mm.path, hint) from None
    return {field: value for field, (value, _) in found.items()}


def _regions(file: ImageFile, status: np.ndarray, shmid: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """The name of each mapping, as its place among all names; -1 for none."""
    region = np.full(len(status), -1, np.int32)
    names: list[str] = []
    for bit, name in _NAMES:
        mask = (region < 0) & ((status & np.uint64(bit)) != 0)
        if mask.any():
            region[mask] = len(names)
            names.append(name)
    of_file = np.flatnonzero((region < 0) & ((status & np.uint64(_FILE_PRIVATE | _FILE_SHARED)) != 0))
    known = _file_names(file) if len(of_file) else {}
    place: dict[str, int] = {}
    for row in of_file.tolist():  # 0.2 us a mapping
        name = known.get(int(shmid[row]), "")
        if name:
            region[row] = place.setdefault(name, len(names) + len(place))
    return region, (*names, *place)


def _file_names(file: ImageFile) -> dict[int, str]:
    """Names of the checkpoint's regular files, by number; none where the list cannot be read: they are only names."""
    found: dict[int, str] = {}
    for name, magic in _FILES.items():
        listed = open_sibling(file, name)
        if listed is None:
            continue
        with closing(listed):
            try:
                data = read_whole(listed, _MOST_SMALL)
                if not data.startswith(magic):
                    continue
                starts, ends = records_of(data, len(magic))
                for start, end in zip(starts, ends, strict=True):  # 6 us a file
                    entry = memoryview(data)[start:end]
                    fields = _fields(_text(_fields(entry), _REG) if name == "files.img" else entry)
                    number, text = fields.get(_ID), _text(fields, _NAME)
                    if isinstance(number, int) and text:
                        shown = bytes(text).decode("utf-8", "replace")
                        found[number] = "".join(letter if letter.isprintable() else "?" for letter in shown)
            except (ValueError, ImageError):
                continue
    return found


def command_of(file: ImageFile, pid: str) -> str:
    """The name of the process's command, from core-PID.img beside `file`; "" where it does not say."""
    core = open_sibling(file, f"core-{pid}.img")
    if core is None:
        return ""
    with closing(core):
        try:
            data = read_whole(core, _MOST_SMALL)
            if not data.startswith(_CORE):
                return ""
            (start, *_), (end, *_) = records_of(data, len(_CORE))
            task = _text(_fields(memoryview(data)[start:end]), _TC)
            text = bytes(_text(_fields(task), _COMM)).decode("utf-8", "replace")
        except (ValueError, ImageError):
            return ""
    return "".join(letter for letter in text[:_COMM_LETTERS] if letter.isprintable())


def _fields(message: memoryview) -> dict[int, int | memoryview]:
    return {number: value for number, value, _ in fields_of(message)}


def _text(fields: dict[int, int | memoryview], number: int) -> memoryview:
    value = fields.get(number)
    return value if isinstance(value, memoryview) else memoryview(b"")
