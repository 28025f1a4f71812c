"""A live process as an image: the pages it holds, read from /proc/PID/mem without changing it.

Rows are private anonymous pages, with content, and pages of private mappings on the shared zero
page or swapped out, without. The rest is counted in `info.passed_over`: of shared and hugetlb
mappings the resident pages alone, as those are what somebody may miss among the merged; of special
mappings all; of private ones what was never touched (guard regions too) and what is a file's.

Never process_vm_readv, which un-merges KSM pages and un-shares forked ones (gup_must_unshare, mm/gup.c),
and never a page that PAGEMAP_SCAN does not show to be there: reading that would map the zero page.
A page that goes between the look and the reading, some milliseconds later, becomes a row flagged
`unreadable`; only a process that stands still (`ksmdist capture --pause`) has none.

Raises ImageReadError: no such process, a process without memory, no permission, a kernel without
PAGEMAP_SCAN (before 6.7) and no CAP_SYS_ADMIN to do without.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pyarrow as pa

from ksmdist.columns import arrow, values
from ksmdist.errors import ImageReadError
from ksmdist.images import proc
from ksmdist.images.base import Hole, ImageInfo
from ksmdist.images.proc import CATEGORIES, Machine, Vma
from ksmdist.tables import MEMORY_IMAGE, PAGE_FLAGS

__all__ = ["LiveImage"]

_PID_BITS = 22  # PID_MAX_LIMIT, include/linux/threads.h; of two started in one tick the lower pid is the elder
_FLAG = {name: np.uint32(bit) for name, bit in PAGE_FLAGS.items()}
_FOUND = {name: np.uint64(bit) for name, bit in CATEGORIES.items()}
_NO_ROW = _FOUND["file"] | _FOUND["guard"]
_NONE = np.zeros((0, 3), np.uint64)
_Piece = tuple[int, int, int]  # number of the mapping, start and end in bytes
_NOT_OWN = _FOUND["swapped"] | _FOUND["zero"]


class LiveImage:
    """A process's memory. `pages` of its info is what the first look found; later rows may be more or fewer.

    rows, unreadable: rows given since batches() last began with row 0, and those of them so flagged.
    """

    def __init__(self, pid: int, machine: Machine) -> None:
        self._pid, self._machine, self._where = pid, machine, f"process {pid}"
        self._size = mmap.PAGESIZE
        self.holes: tuple[Hole, ...] = ()
        self.rows = self.unreadable = 0
        self._fds: list[int] = []
        try:
            self.stat = proc.parse_stat(self._text("stat"))
            if self.stat.vsize == 0:
                raise ImageReadError(
                    "has no memory of its own: a kernel thread, or ended", self._where, "name another process"
                )
            self._fds = [self._open(name) for name in ("mem", "pagemap")]
            self._mem, self._pagemap = self._fds
        except OSError as error:
            self.close()
            raise self._refused(error) from None
        self._scanner = self._chosen()

    def close(self) -> None:
        """Let the process go."""
        while self._fds:
            os.close(self._fds.pop())

    def look(self, mergeable_only: bool = False, stopped: bool = False) -> None:
        """Look at its mappings and which pages are there; sets `info`. stopped: it stands still meanwhile."""
        try:
            self._vmas = proc.parse_smaps(self._text("smaps"))
            ksm_stat = self._ksm_stat()
            wanted = [i for i, vma in enumerate(self._vmas) if vma.passed_over(self._size)[0] == ""]
            left_out = [i for i in wanted if mergeable_only and "mg" not in self._vmas[i].flags]
            wanted = [i for i in wanted if not mergeable_only or "mg" in self._vmas[i].flags]
            found = [self._scan(vma.start, vma.end) for vma in (self._vmas[i] for i in wanted)]
            if not self._vmas or not self._alive():
                raise ImageReadError("ended while it was looked at", self._where, "name a process that lasts")
        except OSError as error:
            raise self._refused(error) from None
        self._regions = tuple(dict.fromkeys(vma.name for vma in self._vmas))
        code = {name: number for number, name in enumerate(self._regions)}
        self._names = pa.array(self._regions, pa.string())
        self._code = np.array([code[vma.name] for vma in self._vmas], np.int32)
        self._flags = np.array([_vma_flags(vma) for vma in self._vmas], np.uint32)

        has_row = [(r[:, 2] & _NO_ROW) == 0 for r in found]
        passed_over = self._passed_over(wanted, found, set(left_out))
        self._run = np.concatenate([r[keep] for r, keep in zip(found, has_row, strict=True)] or [_NONE])
        self._vma = np.repeat(np.array(wanted, np.int64), [int(keep.sum()) for keep in has_row])
        count = ((self._run[:, 1] - self._run[:, 0]) // np.uint64(self._size)).astype(np.int64)
        self._ends = np.cumsum(count)

        caveats = [] if stopped else ["was running while it was captured: its pages are of different moments"]
        caveats += self._place_zero_pages(ksm_stat, count)
        caveats += self._ksm_caveats(ksm_stat)
        if left_out:
            kib = sum(self._vmas[i].anonymous for i in left_out) >> 10
            caveats.append(f"only mergeable mappings were captured: {kib:,} KiB of anonymous pages are left out")
        self.info = ImageInfo(
            path=f"/proc/{self._pid}",
            format="live",
            kind="process",
            page_size=self._size,
            pages=int(count.sum()),
            pages_absent=sum(pages for _, _, pages in passed_over),
            nbytes=0,
            fingerprint="",
            host=os.uname().nodename,
            caveats=tuple(caveats),
            scan_order=(self.stat.starttime << _PID_BITS) + self._pid,
            regions=self._regions,
            passed_over=passed_over,
            ksm_stat=ksm_stat,
        )

    def batches(self, start: int, end: int) -> Iterator[pa.RecordBatch | Hole]:
        """Rows [start, end) of the first look, each stretch looked at again and then read at once.

        A batch points into one of the machine's buffers: while it is used, the next are read into the
        others. No Holes: what cannot be read is a row flagged `unreadable`, with a null content.
        """
        if start == 0:
            self.rows = self.unreadable = 0
        buffers = self._machine.buffers
        most = buffers.shape[1] // self._size
        ahead: deque[Future[list[pa.RecordBatch]]] = deque()
        with ThreadPoolExecutor(len(buffers) - 1) as threads:
            for number, first in enumerate(range(start, end, most)):
                buffer = buffers[number % len(buffers)]
                ahead.append(threads.submit(self._stretch, first, min(end, first + most), buffer))
                if len(ahead) == len(buffers):
                    yield from self._counted(ahead.popleft().result())
            while ahead:
                yield from self._counted(ahead.popleft().result())

    def _counted(self, batches: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            self.rows += batch.num_rows
            self.unreadable += int(((values(batch.column("flags")) & _FLAG["unreadable"]) != 0).sum())
            yield batch

    def _stretch(self, first: int, last: int, buffer: np.ndarray) -> list[pa.RecordBatch]:
        """The batch of rows [first, last) of the first look; more than one if there are more pages by now."""
        pieces, run, vma = self._where_from(first, last)
        now, number = self._look_again(pieces)
        if self._alive():
            run, vma = now, number
        address, category = proc.expand(run)
        vma = np.repeat(vma, ((run[:, 1] - run[:, 0]) // np.uint64(self._size)).astype(np.int64))
        batches = []
        for at in range(0, len(address), last - first):
            part = slice(at, at + last - first)
            into = buffer if at == 0 else np.empty((last - first) * self._size, np.uint8)
            batches.append(self._batch(address[part], category[part], vma[part], pieces, into))
        return batches

    def _chosen(self) -> proc.Scanner:
        if self._machine.pagemap_scan:
            return proc.PagemapScanner(self._pagemap)
        if self._machine.kpageflags is None:
            self.close()
            raise ImageReadError(
                "cannot be told from the zero page: this kernel has no PAGEMAP_SCAN",
                f"memory of {self._where}",
                "run as root (CAP_SYS_ADMIN), or on Linux 6.7 or up",
            )
        return proc.WalkScanner(self._pagemap, self._machine.kpageflags)

    def _open(self, name: str) -> int:
        return os.open(f"/proc/{self._pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)

    def _text(self, name: str) -> bytes:
        with open(self._open(name), "rb") as file:
            return file.read()

    def _refused(self, error: OSError) -> ImageReadError:
        if isinstance(error, PermissionError):
            return ImageReadError(
                "may not be read: permission denied",
                self._where,
                "run as its owner where ptrace is allowed, or as root (CAP_SYS_PTRACE)",
            )
        if isinstance(error, (FileNotFoundError, ProcessLookupError)):
            return ImageReadError("does not exist, or has ended", self._where, "`ps -e` lists the processes")
        return ImageReadError(f"cannot be read: {error.strerror}", self._where, "try again")

    def _ksm_stat(self) -> tuple[tuple[str, str], ...]:
        try:
            lines = self._text("ksm_stat").decode().splitlines()
        except FileNotFoundError:  # a kernel without KSM
            return ()
        pairs = (line.split(maxsplit=1) for line in lines)
        return tuple((pair[0].rstrip(":"), pair[1]) for pair in pairs if len(pair) == 2)

    def _alive(self) -> bool:
        return os.pread(self._pagemap, 8, 0) != b""  # pagemap_read: 0 bytes once the mm has no users

    def _scan(self, start: int, end: int) -> np.ndarray:
        try:
            return self._scanner.scan(start, end)
        except ProcessLookupError:
            return _NONE

    def _passed_over(
        self, wanted: list[int], found: list[np.ndarray], left_out: set[int]
    ) -> tuple[tuple[str, str, int], ...]:
        """What has no row, by region and reason, in the order of the addresses."""
        total: dict[tuple[str, str], int] = {}

        def add(name: str, reason: str, pages: int) -> None:
            if pages:
                total[name, reason] = total.get((name, reason), 0) + pages

        regions = dict(zip(wanted, found, strict=True))
        for number, vma in enumerate(self._vmas):
            if number in regions:
                run = regions[number]
                pages = ((run[:, 1] - run[:, 0]) // np.uint64(self._size)).astype(np.int64)
                guard = (run[:, 2] & _FOUND["guard"]) != 0
                file = ~guard & ((run[:, 2] & _FOUND["file"]) != 0)
                add(vma.name, "not_anonymous", int(pages[file].sum()))
                add(vma.name, "untouched", (vma.end - vma.start) // self._size - int(pages[~guard].sum()))
            elif number not in left_out:
                add(vma.name, *vma.passed_over(self._size))
        return tuple((name, reason, pages) for (name, reason), pages in total.items())

    def _place_zero_pages(self, ksm_stat: tuple[tuple[str, str], ...], count: np.ndarray) -> list[str]:
        """Decide which zero pages get pte_dirty; returns caveats. The huge zero page is never KSM's."""
        category = self._run[:, 2]
        mergeable = np.array(["mg" in vma.flags for vma in self._vmas], bool)[self._vma]
        tracked = np.array(["sd" not in vma.flags for vma in self._vmas], bool)[self._vma]
        zero = mergeable & ((category & (_FOUND["zero"] | _FOUND["huge"])) == _FOUND["zero"])
        sure = tracked & ((category & _FOUND["soft_dirty"]) != 0)
        told = dict(ksm_stat).get("ksm_zero_pages")
        placed, caveat = proc.place_zero_pages(count[zero], sure[zero], int(told or 0))
        self._zero_start = self._run[zero, 0]
        self._zero_end = self._zero_start + placed.astype(np.uint64) * np.uint64(self._size)
        if told is None and ksm_stat and zero.any():
            caveat = f"this kernel does not tell how many of its {int(count[zero].sum())} zero pages KSM placed"
        return [caveat] if caveat else []

    def _ksm_caveats(self, ksm_stat: tuple[tuple[str, str], ...]) -> list[str]:
        """Without a true KPF_KSM: pages that are not exclusive, in mappings with KSM pages, are taken for them."""
        caveats = []
        if self._machine.kpageflags is None:
            caveats.append("frame numbers need CAP_SYS_ADMIN: pages shared by fork count as pages of their own")
        self._has_ksm = np.array([bool(vma.ksm) for vma in self._vmas], bool)
        if self._machine.kpf_ksm:
            return caveats
        if int(dict(ksm_stat).get("ksm_merging_pages", 0)) and all(vma.ksm is None for vma in self._vmas):
            return [*caveats, "this kernel does not tell which of its pages are KSM pages: none is marked so"]
        own = self._has_ksm[self._vma] & ((self._run[:, 2] & _NOT_OWN) == 0)
        address, _ = proc.expand(self._run[own])
        entry = proc.read_pagemap(self._pagemap, address)
        shared = int(((entry & (proc.PM_EXCLUSIVE | proc.PM_FILE)) == 0).sum())
        smaps = sum(vma.ksm or 0 for vma in self._vmas) // self._size
        if shared != smaps:
            caveats.append(
                f"{shared} pages are taken for KSM pages as others share their frames in mappings that have some; "
                f"smaps counts {smaps}"
            )
        return caveats

    def _where_from(self, first: int, last: int) -> tuple[list[_Piece], np.ndarray, np.ndarray]:
        """Rows [first, last) of the first look: by mapping where from and where to; runs, and the mapping of each."""
        size = np.uint64(self._size)
        low, high = np.searchsorted(self._ends, (first, last - 1), side="right").tolist()
        run, vma = self._run[low : high + 1].copy(), self._vma[low : high + 1]
        before = int(self._ends[low]) - int((run[0, 1] - run[0, 0]) // size)
        run[-1, 1] -= np.uint64(int(self._ends[high]) - last) * size
        run[0, 0] += np.uint64(first - before) * size
        cut = [0, *(np.flatnonzero(np.diff(vma)) + 1).tolist(), len(vma)]
        return [(int(vma[b]), int(run[b, 0]), int(run[e - 1, 1])) for b, e in pairwise(cut)], run, vma

    def _look_again(self, pieces: list[_Piece]) -> tuple[np.ndarray, np.ndarray]:
        """Runs that have rows now, and the mapping of each."""
        found = [self._scan(start, end) for _, start, end in pieces]
        found = [run[(run[:, 2] & _NO_ROW) == 0] for run in found]
        vma = np.repeat(np.array([piece[0] for piece in pieces], np.int64), [len(run) for run in found])
        return np.concatenate(found), vma

    def _batch(
        self, address: np.ndarray, category: np.ndarray, vma: np.ndarray, pieces: list[_Piece], into: np.ndarray
    ) -> pa.RecordBatch:
        entry = proc.read_pagemap(self._pagemap, address)
        huge = (category & _FOUND["huge"]) != 0
        swapped = (category & _FOUND["swapped"]) != 0
        # Until 6.17 PAGEMAP_SCAN does not show the huge zero page to be zero; pagemap takes it for a file's.
        zero = ((category & _FOUND["zero"]) != 0) | (huge & ~swapped & ((entry & proc.PM_FILE) != 0))
        own = ~swapped & ~zero
        there = own & ((entry & proc.PM_PRESENT) != 0)
        lost, content = self._read(address[there], into)
        lost |= self._went(address[there], pieces)
        valid = there.copy()
        valid[there] = ~lost
        if lost.any():
            content = content[~lost]
        frame = np.where(valid, entry & proc.PM_FRAME, np.uint64(0))
        exclusive = valid & ((entry & proc.PM_EXCLUSIVE) != 0)
        kpf = np.zeros(len(entry), np.uint64)
        named = frame != proc.NO_FRAMES
        if self._machine.kpageflags is not None and named.any():
            kpf[named] = self._machine.kpageflags.of(frame[named])
            moved = named & ((proc.read_pagemap(self._pagemap, address) ^ entry) & proc.PM_FRAME != 0)
            named &= ~moved  # copied or merged meanwhile: the content is of the one frame or of the other
            exclusive &= ~moved
            if moved.any():
                # Gone and there again meanwhile: what was read between may be the shared zero page.
                content = content.reshape(-1, self._size)
                empty = np.zeros(len(entry), bool)
                some = np.flatnonzero(moved[valid])
                empty[np.flatnonzero(valid)[some]] = ~content[some].any(axis=1)
                if empty.any():
                    content = content[~empty[valid]]
                    valid &= ~empty
        said = named & ((kpf & proc.KPF_KSM) != 0)
        ksm = said if self._machine.kpf_ksm else valid & ~exclusive & self._has_ksm[vma]
        huge |= (kpf & proc.KPF_THP) != 0

        # A huge page that a parent has locked stays so for a child that shares it: mlock is the folio's too.
        locked = (kpf & proc.KPF_MLOCKED) != 0
        flags = self._flags[vma]
        for name, mask in (
            ("zero_mapped", zero),
            ("pte_dirty", zero & ~huge & self._by_ksm(address)),
            ("swapped", swapped),
            ("huge", huge),
            ("ksm", ksm),
            ("locked", locked),
            ("exclusive", exclusive),
            ("unreadable", own & ~valid),
        ):
            flags |= np.where(mask, _FLAG[name], np.uint32(0))
        offsets = np.zeros(len(address) + 1, np.int32)
        np.cumsum(np.where(valid, self._size, 0), out=offsets[1:])
        mask = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
        node = np.where(named, self._machine.blocks.nodes(frame), np.int16(0))
        columns = [
            arrow(address),
            pa.BinaryArray.from_buffers(
                pa.binary(), len(address), [mask, pa.py_buffer(offsets), pa.py_buffer(content.reshape(-1))]
            ),
            arrow(flags),
            arrow(node),
            arrow(frame, ~named),
            pa.DictionaryArray.from_arrays(arrow(self._code[vma]), self._names),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=MEMORY_IMAGE.schema)

    def _by_ksm(self, address: np.ndarray) -> np.ndarray:
        if not len(self._zero_start):
            return np.zeros(len(address), bool)
        run = np.searchsorted(self._zero_start, address, side="right") - 1
        return np.asarray((run >= 0) & (address < self._zero_end[np.maximum(run, 0)]))

    def _read(self, address: np.ndarray, into: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """bool[n], which pages could not be read; uint8[n, page_size], the pages, in `into`."""
        size, n = self._size, len(address)
        lost = np.zeros(n, bool)
        rows = into[: n * size]
        view, mem, preadv = rows.data, self._mem, os.preadv
        if n == 0:
            return lost, rows.reshape(0, size)
        first = np.flatnonzero(np.append(True, np.diff(address) != np.uint64(size)))
        last = np.append(first[1:], n)
        runs = zip(address[first].tolist(), (first * size).tolist(), (last * size).tolist(), strict=True)
        for source, start, end in runs:
            done = start
            while done < end:
                try:
                    count = preadv(mem, (view[done:end],), source + done - start)
                except OSError:  # EIO: this page has gone
                    lost[done // size] = True
                    done += size - done % size
                    continue
                if count == 0:  # mem_rw: the mm has no users, the process has ended
                    lost[done // size :] = True
                    return lost, rows.reshape(n, size)
                done += count
        return lost, rows.reshape(n, size)

    def _went(self, address: np.ndarray, pieces: list[_Piece]) -> np.ndarray:
        """bool[n]: pages that were read and are not there any more, so that zeros may have been read."""
        now, _ = self._look_again(pieces)
        still, _ = proc.expand(now[(now[:, 2] & _NOT_OWN) == 0])
        if not len(still):
            return np.ones(len(address), bool)
        at = np.minimum(np.searchsorted(still, address), len(still) - 1)
        return np.asarray(still[at] != address)


def _vma_flags(vma: Vma) -> int:
    """Flags of each page of a mapping. `mg` alone decides: prctl(PR_SET_MEMORY_MERGE) sets it on each mapping too."""
    return (PAGE_FLAGS["eligible"] if "mg" in vma.flags else 0) | (PAGE_FLAGS["locked"] if "lo" in vma.flags else 0)
