"""What Linux says of a live process's pages: /proc/PID, PAGEMAP_SCAN, pagemap, kpageflags, NUMA blocks.

Nothing here touches the process: no page is read, none is brought in. The bits are those of
include/uapi/linux/fs.h (PAGE_IS_*), fs/proc/task_mmu.c (PM_*) and
include/uapi/linux/kernel-page-flags.h (KPF_*). Failures are OSErrors: who opens the process knows
what to say of them.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ksmdist.images.base import BATCH_BYTES

__all__ = [
    "CATEGORIES",
    "NO_FRAMES",
    "Blocks",
    "Kpageflags",
    "Machine",
    "PagemapScanner",
    "Scanner",
    "Stat",
    "Vma",
    "WalkScanner",
    "expand",
    "has_pagemap_scan",
    "kpf_ksm_is_true",
    "memory_blocks",
    "parse_smaps",
    "parse_stat",
    "place_zero_pages",
    "read_pagemap",
]

CATEGORIES: Mapping[str, int] = {
    "file": 1 << 2,
    "present": 1 << 3,
    "swapped": 1 << 4,
    "zero": 1 << 5,
    "huge": 1 << 6,
    "soft_dirty": 1 << 7,
    "guard": 1 << 8,
}
"""PAGE_IS_* of PAGEMAP_SCAN; guard is Linux 6.15 and up."""

NO_FRAMES = 0
"""The frame number that pagemap gives a reader without CAP_SYS_ADMIN."""

PM_FRAME = np.uint64((1 << 55) - 1)
PM_SOFT_DIRTY, PM_EXCLUSIVE, PM_GUARD, PM_FILE, PM_SWAP, PM_PRESENT = (
    np.uint64(1 << bit) for bit in (55, 56, 58, 61, 62, 63)
)
KPF_KSM, KPF_THP, KPF_ZERO_PAGE, KPF_MLOCKED = (np.uint64(1 << bit) for bit in (21, 22, 24, 33))

_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_VECTOR = 1 << 14  # page_regions of 24 bytes asked for at once
_NEAR_PTES = 512  # pagemap entries between two pages that are cheaper read than skipped: 4 KiB
_NEAR_FRAMES = 16  # kpageflags entries are looked up one by one
_WALK_PAGES = 1 << 16
_BUFFERS, _BUFFER_BYTES = 3, BATCH_BYTES // 2  # one is used while two are read into
_SPECIAL = frozenset(("io", "pf", "mm", "de", "dp"))  # VM_SPECIAL and VM_DROPPABLE: ksm_compatible(), mm/ksm.c


@dataclass(frozen=True, slots=True)
class Stat:
    """Of /proc/PID/stat: comm, state (R, S, D, T, Z ...), start in clock ticks since boot, vsize in bytes."""

    comm: str
    state: str
    starttime: int
    vsize: int


def parse_stat(text: bytes) -> Stat:
    """/proc/PID/stat; comm may hold spaces and brackets, so it ends at the last one (proc_pid_stat(5))."""
    opening, closing = text.index(b"("), text.rindex(b")")
    fields = text[closing + 2 :].split()
    return Stat(
        text[opening + 1 : closing].decode("utf-8", "replace"), fields[0].decode(), int(fields[19]), int(fields[20])
    )


@dataclass(frozen=True, slots=True)
class Vma:
    """A mapping of smaps: [start, end), the two-letter VmFlags; sizes in bytes; ksm None: not told (before 6.7)."""

    start: int
    end: int
    name: str
    flags: frozenset[str]
    rss: int
    anonymous: int
    ksm: int | None
    hugetlb: int

    def passed_over(self, page_size: int) -> tuple[str, int]:
        """Why no page of it has a row, and how many those are; ("", 0) for a private mapping."""
        if "ht" in self.flags:  # before `de`, which hugetlbfs sets too
            return "hugetlb", self.hugetlb // page_size
        if self.flags & _SPECIAL or self.name == "[vsyscall]":
            return "special", (self.end - self.start) // page_size
        if "sh" in self.flags or "ms" in self.flags:
            return "shared_mapping", self.rss // page_size
        return "", 0


_HEAD = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) \S{4} [0-9a-f]+ \S+ \d+ *(.*)\n", re.M)
_FIELD = re.compile(rb"^(Rss|Anonymous|KSM|Shared_Hugetlb|Private_Hugetlb): +(\d+) kB$", re.M)
_FLAGS = re.compile(rb"^VmFlags:(.*)$", re.M)


def parse_smaps(text: bytes) -> list[Vma]:
    """/proc/PID/smaps as mappings, by address; one without a name is "[anon]" (fs/proc/task_mmu.c, show_smap)."""
    heads = list(_HEAD.finditer(text))
    found = []
    for number, head in enumerate(heads):
        first, last = head.end(), heads[number + 1].start() if number + 1 < len(heads) else len(text)
        kib = {name: int(value) for name, value in _FIELD.findall(text, first, last)}
        flags = _FLAGS.search(text, first, last)
        found.append(
            Vma(
                start=int(head[1], 16),
                end=int(head[2], 16),
                name=head[3].decode("utf-8", "replace") or "[anon]",
                flags=frozenset((flags[1] if flags else b"").decode().split()),
                rss=kib.get(b"Rss", 0) << 10,
                anonymous=kib.get(b"Anonymous", 0) << 10,
                ksm=kib[b"KSM"] << 10 if b"KSM" in kib else None,
                hugetlb=(kib.get(b"Shared_Hugetlb", 0) + kib.get(b"Private_Hugetlb", 0)) << 10,
            )
        )
    return found


class Scanner(Protocol):
    """Finds the pages of an address range that are there."""

    def scan(self, start: int, end: int) -> np.ndarray:
        """Present and swapped pages of [start, end): uint64[n, 3] of (start, end, CATEGORIES), by address."""


class PagemapScanner:
    """The PAGEMAP_SCAN ioctl (Linux 6.7 and up): needs no privilege beyond reading pagemap."""

    def __init__(self, pagemap: int) -> None:
        self._fd = pagemap
        self._wanted = sum(CATEGORIES.values())

    def scan(self, start: int, end: int) -> np.ndarray:
        """As Scanner says."""
        found = []
        vector = np.empty((_VECTOR, 3), np.uint64)
        there = CATEGORIES["present"] | CATEGORIES["swapped"]
        argument = np.zeros(12, np.uint64)  # struct pm_scan_arg
        while start < end:
            argument[:] = (96, 0, start, end, 0, vector.ctypes.data, _VECTOR, 0, 0, 0, there, self._wanted)
            try:
                count = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, argument.data.cast("B"), True)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._wanted & CATEGORIES["guard"]:
                    raise
                self._wanted &= ~CATEGORIES["guard"]  # before 6.15, where guard regions cannot be told
                continue
            found.append(vector[:count].copy())
            # walk_end is of an earlier lap where the last one, of 512 regions, meets the end (6.18, do_pagemap_scan).
            start = end if count < _VECTOR else max(int(argument[4]), int(vector[-1, 1]))
        return np.concatenate(found) if found else np.zeros((0, 3), np.uint64)


class WalkScanner:
    """The same from pagemap and kpageflags, for older kernels: needs CAP_SYS_ADMIN."""

    def __init__(self, pagemap: int, kpageflags: Kpageflags) -> None:
        self._fd = pagemap
        self._kpageflags = kpageflags

    def scan(self, start: int, end: int) -> np.ndarray:
        """As Scanner says; huge is of every page of a large folio, mapped by a PMD or not."""
        size, found = mmap.PAGESIZE, []
        for at in range(start, end, _WALK_PAGES * size):
            address = np.arange(at, min(end, at + _WALK_PAGES * size), size, dtype=np.uint64)
            found.append(self._runs(address, read_pagemap(self._fd, address)))
        return np.concatenate(found) if found else np.zeros((0, 3), np.uint64)

    def _runs(self, address: np.ndarray, entry: np.ndarray) -> np.ndarray:
        keep = (entry & (PM_PRESENT | PM_SWAP)) != 0
        address, entry = address[keep], entry[keep]
        is_present = (entry & PM_PRESENT) != 0
        flags = np.zeros(len(entry), np.uint64)
        flags[is_present] = self._kpageflags.of(entry[is_present] & PM_FRAME)
        zero = (flags & KPF_ZERO_PAGE) != 0
        category = np.zeros(len(entry), np.uint64)
        for name, mask in (
            ("present", is_present),
            ("swapped", ~is_present),
            ("zero", zero),
            ("file", is_present & ~zero & ((entry & PM_FILE) != 0)),  # bit 61 is set for the huge zero page too
            ("huge", (flags & KPF_THP) != 0),
            ("soft_dirty", (entry & PM_SOFT_DIRTY) != 0),
            ("guard", (entry & PM_GUARD) != 0),
        ):
            category |= np.where(mask, np.uint64(CATEGORIES[name]), np.uint64(0))
        size = np.uint64(mmap.PAGESIZE)
        cut = np.flatnonzero((np.diff(address) != size) | (np.diff(category) != 0)) + 1
        first = np.concatenate(([0], cut)).astype(np.int64)[: len(address)]
        last = np.append(cut, len(address))[: len(first)] - 1
        return np.stack((address[first], address[last] + size, category[first]), axis=1)


def has_pagemap_scan() -> bool:
    """Whether this kernel has the ioctl: tried on this very process."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        PagemapScanner(fd).scan(mmap.PAGESIZE, 2 * mmap.PAGESIZE)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def expand(regions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint64[n, 3] regions of a Scanner as (address, category) of each page: uint64, uint64."""
    size = np.uint64(mmap.PAGESIZE)
    count = ((regions[:, 1] - regions[:, 0]) // size).astype(np.int64)
    before = np.cumsum(count) - count
    step = np.arange(int(count.sum()), dtype=np.uint64) - np.repeat(before.astype(np.uint64), count)
    return np.repeat(regions[:, 0], count) + step * size, np.repeat(regions[:, 2], count)


def _read_entries(fd: int, index: np.ndarray, near: int) -> np.ndarray:
    """uint64 entries of a file of 8-byte entries at ascending `index`; those it does not have are 0."""
    entry = np.zeros(len(index), np.uint64)
    if not len(index):
        return entry
    gap = np.flatnonzero(np.diff(index) > np.uint64(near)) + 1
    firsts, lasts = [0, *gap.tolist()], [*gap.tolist(), len(index)]
    for first, last in zip(firsts, lasts, strict=True):
        at = int(index[first])
        wanted = int(index[last - 1]) - at + 1
        span = np.zeros(wanted, np.uint64)
        view = span.data.cast("B")
        done = 0
        while done < len(view):
            n = os.preadv(fd, [view[done:]], at * 8 + done)
            if n == 0:
                break
            done += n
        entry[first:last] = span[(index[first:last] - np.uint64(at)).view(np.int64)]
    return entry


def read_pagemap(fd: int, address: np.ndarray) -> np.ndarray:
    """The pagemap entries of ascending page addresses, uint64; 0 where the process has ended."""
    return _read_entries(fd, address // np.uint64(mmap.PAGESIZE), _NEAR_PTES)


class Kpageflags:
    """/proc/kpageflags; raises OSError without CAP_SYS_ADMIN."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)

    def of(self, frame: np.ndarray) -> np.ndarray:
        """The KPF_* bits of these frames, uint64."""
        order = np.argsort(frame, kind="stable")
        flags = np.empty(len(frame), np.uint64)
        flags[order] = _read_entries(self._fd, frame[order], _NEAR_FRAMES)
        return flags

    def close(self) -> None:
        """Let it go."""
        os.close(self._fd)


def kpf_ksm_is_true(kpageflags: Kpageflags) -> bool:
    """Whether KPF_KSM means what it says: from 6.10 until 81401cebfc15 every anonymous page has it.

    Linux "fs/proc: fix KPF_KSM reported for all anonymous pages". Tried on a page of this process,
    in a mapping that is not mergeable.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without KSM
        page.madvise(13)  # MADV_UNMERGEABLE: this process may be one that prctl(PR_SET_MEMORY_MERGE) marked
    page[:8] = b"\1" * 8
    address = np.array([np.frombuffer(page, np.uint8).ctypes.data], np.uint64)
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        frame = read_pagemap(fd, address) & PM_FRAME
    finally:
        os.close(fd)
    return bool(frame[0] != NO_FRAMES) and not (kpageflags.of(frame)[0] & KPF_KSM)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Memory blocks of the machine: `nbytes` each (0: unknown), node: int16, NUMA node by block number."""

    nbytes: int
    node: np.ndarray

    def nodes(self, frame: np.ndarray) -> np.ndarray:
        """int16: the node of each frame (uint64), 0 where it is not known."""
        if not self.nbytes or not len(self.node):
            return np.zeros(len(frame), np.int16)
        block = frame // np.uint64(max(1, self.nbytes // mmap.PAGESIZE))
        known = block < len(self.node)
        return np.where(known, self.node[np.where(known, block, 0).astype(np.int64)], np.int16(0))


def memory_blocks(devices: Path = Path("/sys/devices/system")) -> Blocks:
    """Which node has which memory block: node/node*/memory* and memory/block_size_bytes under `devices`.

    A block that two nodes share is given to the lower one. Nothing where the kernel has no hotplug.
    """
    try:
        nbytes = int((devices / "memory/block_size_bytes").read_text(), 16)
    except (OSError, ValueError):
        return Blocks(0, np.zeros(0, np.int16))
    of_block: dict[int, int] = {}
    for link in devices.glob("node/node[0-9]*/memory[0-9]*"):
        block, node = int(link.name[6:]), int(link.parent.name[4:])
        of_block[block] = min(node, of_block.get(block, node))
    nodes = np.zeros(max(of_block, default=-1) + 1, np.int16)
    nodes[list(of_block)] = list(of_block.values())
    return Blocks(nbytes, nodes)


@dataclass(frozen=True, slots=True)
class Machine:
    """What is alike for all processes, and the buffers that all are read into, one after the other.

    kpageflags: None where not permitted; kpf_ksm: its KPF_KSM is true; pagemap_scan: the ioctl is
    there; buffers: uint8[n, nbytes], a batch in each.
    """

    kpageflags: Kpageflags | None
    kpf_ksm: bool
    pagemap_scan: bool
    blocks: Blocks
    buffers: np.ndarray

    @classmethod
    def here(cls) -> Machine:
        """This machine, as this process may see it."""
        try:
            kpageflags = Kpageflags()
        except OSError:
            kpageflags = None
        believed = kpageflags is not None and kpf_ksm_is_true(kpageflags)
        buffers = np.frombuffer(_huge(_BUFFERS * _BUFFER_BYTES), np.uint8).reshape(_BUFFERS, -1)
        return cls(kpageflags, believed, has_pagemap_scan(), memory_blocks(), buffers)

    def close(self) -> None:
        """Let its files go."""
        if self.kpageflags is not None:
            self.kpageflags.close()


def place_zero_pages(pages: np.ndarray, sure: np.ndarray, count: int) -> tuple[np.ndarray, str]:
    """Which zero pages KSM placed, when only their number is known: those that are sure, then the first.

    pages: int64[n], runs of zero pages of mergeable mappings by address; sure: bool[n], runs of
    soft-dirty pages, which no read fault makes; count: ksm_zero_pages of ksm_stat.
    Returns int64[n], how many from the start of each run are KSM's, and what is uncertain of it, or "".
    """
    order = np.argsort(~sure, kind="stable")
    ordered = pages[order]
    placed = np.zeros_like(pages)
    placed[order] = np.clip(count - (np.cumsum(ordered) - ordered), 0, ordered)
    total, known = int(pages.sum()), int(pages[sure].sum())
    if count > total:
        return placed, f"KSM placed {count} zero pages by ksm_stat, and only {total} are in its mergeable mappings"
    if count in (0, total) or count == known:
        return placed, ""
    return placed, (
        f"KSM placed {count} of the {total} zero pages of its mergeable mappings; that many are marked so, "
        "but which of them it placed is not known"
    )


def _huge(nbytes: int) -> mmap.mmap:
    """Anonymous memory in huge pages, where the kernel has them: the fewer faults, the better."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
