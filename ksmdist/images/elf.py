"""ELF64 cores of guests (QEMU, kdump: by p_paddr) and of processes (kernel, gcore: by p_vaddr).

Rules: System V ABI chapter 5 (program headers), elf(5) (PN_XNUM). Pages are cut by address, never
by file offset: QEMU's and gcore's offsets are not page-aligned. Where segments overlap, a page
counts once, from the segment that starts lowest. Bytes past p_filesz are absent, not zero.
A file hole is absent in a process's core (the kernel skips never-touched pages, fs/coredump.c
dump_skip); in a guest's core p_filesz bytes were dumped, so there a hole is zeros that a copying
tool (`zstd -d`, `cp --sparse`) left out.

Raises ImageError: not ELF64, not a core, headers past the end of the file, addresses past 2**64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from ksmdist.errors import ImageError
from ksmdist.images.base import Format, Hole, Image, ImageInfo
from ksmdist.images.extents import Extents, extent_image
from ksmdist.images.files import LocalFile
from ksmdist.images.stores import StoredFile

__all__ = ["ELF"]

_ET_CORE, _PT_LOAD, _PT_NOTE, _PN_XNUM = 4, 1, 4, 0xFFFF
_File = LocalFile | StoredFile
_NOTE_BYTES = 4 << 20  # names of the notes are looked for in the first 4 MiB of them


def _broken(path: str, what: str) -> ImageError:
    return ImageError(what, path, "take the dump again, or check that it was copied whole")


def _read_exactly(file: _File, offset: int, nbytes: int, what: str) -> bytes:
    data = file.read(offset, nbytes) if offset < 1 << 63 else b""
    if len(data) < nbytes:
        raise _broken(file.path, f"truncated: {what} at byte {offset} is past the end of the file")
    return data


def _program_headers(file: _File) -> np.ndarray:
    """The program headers, as a structured array in file order."""
    path = file.path
    head = _read_exactly(file, 0, 64, "the ELF header")
    if head[4] != 2:
        raise ImageError("is a 32-bit ELF file, ksmdist reads ELF64", path, "take a 64-bit dump")
    if head[5] not in (1, 2):
        raise _broken(path, f"has byte order {head[5]} in its ELF header, neither 1 nor 2")
    order = "<" if head[5] == 1 else ">"
    (e_type,) = struct.unpack_from(order + "H", head, 16)
    if e_type != _ET_CORE:
        raise ImageError(
            f"is an ELF file of type {e_type}, not a core (4)", path, "give a memory dump, or --format raw to force"
        )
    phoff, shoff = struct.unpack_from(order + "QQ", head, 32)
    phentsize, phnum = struct.unpack_from(order + "HH", head, 54)
    if phnum == _PN_XNUM:
        section = _read_exactly(file, shoff, 64, "section header 0 (PN_XNUM)")
        (phnum,) = struct.unpack_from(order + "I", section, 44)
    if phnum and phentsize < 56:
        raise _broken(path, f"has program headers of {phentsize} bytes, less than 56")
    if phnum * phentsize > file.nbytes:
        raise _broken(path, f"truncated: it claims {phnum} program headers")
    table = _read_exactly(file, phoff, phnum * phentsize, "the program header table")
    words = ("offset", "vaddr", "paddr", "filesz", "memsz", "align")
    header = np.dtype(
        {
            "names": ["type", *words],
            "formats": [order + "u4", *[order + "u8"] * 6],
            "offsets": [0, *range(8, 56, 8)],
            "itemsize": max(phentsize, 56),
        }
    )
    return np.frombuffer(table, header)


def _note_names(file: _File, notes: np.ndarray) -> set[bytes]:
    """Names of the notes in the PT_NOTE segments, as far as they can be read."""
    names: set[bytes] = set()
    order = notes.dtype["type"].byteorder
    for note in notes:
        if int(note["offset"]) >= 1 << 63:
            continue
        data = file.read(int(note["offset"]), min(int(note["filesz"]), _NOTE_BYTES))
        at = 0
        while at + 12 <= len(data):
            namesz, descsz = struct.unpack_from(("<" if order in "<=|" else ">") + "II", data, at)
            names.add(data[at + 12 : at + 12 + min(namesz, 64)].rstrip(b"\0"))
            at += 12 + -(-namesz // 4) * 4 + -(-descsz // 4) * 4
    return names


@dataclass(frozen=True, slots=True)
class _Ranges:
    """Address ranges [start, end) in bytes, uint64[n], each with the file offset of its start."""

    start: np.ndarray
    end: np.ndarray
    offset: np.ndarray

    def disjoint(self) -> _Ranges:
        """The same addresses once each, ascending: what an earlier range covers, later ones lose."""
        order = np.argsort(self.start, kind="stable")
        start, end, offset = self.start[order], self.end[order], self.offset[order]
        if len(start) == 0:
            return self
        covered = np.concatenate((start[:1], np.maximum.accumulate(end)[:-1]))
        cut = np.maximum(start, covered)
        keep = cut < end
        return _Ranges(cut[keep], end[keep], (offset + (cut - start))[keep])

    def nbytes(self) -> int:
        """Bytes covered; of disjoint ranges."""
        return int((self.end - self.start).sum())


def _less(whole: _Ranges, part: _Ranges) -> list[tuple[int, int]]:
    """Address ranges of `whole` that `part` does not cover; both disjoint and ascending."""
    edges = np.concatenate((whole.start, whole.end, part.start, part.end))
    step = np.repeat(np.array([1, -1, -2, 2]), [len(whole.start)] * 2 + [len(part.start)] * 2)
    order = np.argsort(edges, kind="stable")
    edges, level = edges[order], np.cumsum(step[order])
    # level 1: in whole, not in part
    spans = np.flatnonzero((level[:-1] == 1) & (edges[:-1] < edges[1:]))
    return [(int(edges[i]), int(edges[i + 1])) for i in spans]


def _cut_pages(ranges: _Ranges, page_size: int) -> tuple[Extents, np.ndarray]:
    """Disjoint byte ranges -> runs of whole pages, and int64 numbers of pages only partly covered."""
    size = np.uint64(page_size)
    first = (ranges.start // size).astype(np.int64) + (ranges.start % size != 0)
    last = (ranges.end // size).astype(np.int64)
    whole = first < last
    skip = first[whole].astype(np.uint64) * size - ranges.start[whole]
    page, count = first[whole], (last - first)[whole]
    offset = (ranges.offset[whole] + skip).astype(np.int64)
    # Ends of ranges that fill only a part of a page: a page may be whole in several pieces.
    bits: dict[int, list[tuple[int, int]]] = {}
    ragged = np.flatnonzero((ranges.start % size != 0) | (ranges.end % size != 0))
    for i in ragged.tolist():
        start, end, at = int(ranges.start[i]), int(ranges.end[i]), int(ranges.offset[i])
        for number in {start // page_size, (end - 1) // page_size}:
            low, high = max(start, number * page_size), min(end, (number + 1) * page_size)
            if high - low < page_size:
                bits.setdefault(number, []).append((at + low - start, high - low))
    joined = {n: tuple(p) for n, p in sorted(bits.items()) if sum(nbytes for _, nbytes in p) == page_size}
    partial = np.array(sorted(bits.keys() - joined.keys()), np.int64)
    pages = np.concatenate((page, np.fromiter(joined, np.int64, len(joined))))
    counts = np.concatenate((count, np.ones(len(joined), np.int64)))
    offsets = np.concatenate((offset, np.full(len(joined), -1, np.int64)))
    order = np.argsort(pages, kind="stable")
    pages, counts, offsets = pages[order], counts[order], offsets[order]
    if len(pages):  # runs that go on in the file where they go on in memory are one
        ends, file_ends = pages + counts, offsets + counts * page_size
        goes_on = (ends[:-1] == pages[1:]) & (file_ends[:-1] == offsets[1:]) & (offsets[:-1] >= 0)
        opens = np.flatnonzero(np.concatenate(([True], ~goes_on)))
        counts = np.add.reduceat(counts, opens)
        pages, offsets = pages[opens], offsets[opens]
    pieces = {int(i): joined[int(pages[i])] for i in np.flatnonzero(offsets < 0)}
    return Extents(pages, counts, offsets, pieces), partial


def _without_file_holes(extents: Extents, data: np.ndarray, page_size: int) -> Extents:
    """Leave out pages all of whose bytes lie in holes of the file (`data`: byte ranges, int64[n, 2])."""
    runs: list[tuple[int, int, int]] = []
    pieces: dict[int, tuple[tuple[int, int], ...]] = {}
    for i in range(len(extents)):
        page, count, offset = int(extents.page[i]), int(extents.count[i]), int(extents.offset[i])
        if offset < 0:
            pieces[len(runs)] = extents.pieces[i]
            runs.append((page, count, offset))
            continue
        reached = 0
        at = int(np.searchsorted(data[:, 1], offset, side="right"))
        while at < len(data) and data[at, 0] < offset + count * page_size:
            first = max(reached, (int(data[at, 0]) - offset) // page_size)
            reached = min(count, -(-(int(data[at, 1]) - offset) // page_size))
            if first < reached:
                runs.append((page + first, reached - first, offset + first * page_size))
            at += 1
    table = np.array(runs, np.int64).reshape(-1, 3)
    return Extents(table[:, 0], table[:, 1], table[:, 2], pieces)


def _read(file: _File, page_size: int) -> Image:
    path = file.path
    headers = _program_headers(file)
    loads = headers[headers["type"] == _PT_LOAD]
    if len(loads) == 0:
        raise _broken(path, "is an ELF core with no memory in it (no PT_LOAD segment)")
    names = _note_names(file, headers[headers["type"] == _PT_NOTE])
    paddr = loads["paddr"].astype(np.uint64)
    guest = bool(names & {b"QEMU", b"VMCOREINFO"}) or (not names & {b"CORE", b"LINUX"} and bool(paddr.any()))
    address = paddr if guest else loads["vaddr"].astype(np.uint64)
    offset = loads["offset"].astype(np.uint64)
    memsz, filesz = loads["memsz"].astype(np.uint64), loads["filesz"].astype(np.uint64)
    extent = np.maximum(memsz, filesz)
    most = np.uint64(2**64 - 1)
    if bool((extent > most - address).any()) or bool((filesz > most - offset).any()):
        raise _broken(path, "has a segment that reaches past the end of the address space")
    eof = np.uint64(file.nbytes)
    in_file = np.minimum(filesz, np.where(offset < eof, eof - np.minimum(offset, eof), np.uint64(0)))
    claimed = _Ranges(address, address + extent, offset).disjoint()
    dumped = _Ranges(address, address + filesz, offset).disjoint()
    available = _Ranges(address, address + in_file, offset).disjoint()

    extents, partial = _cut_pages(available, page_size)
    absent = claimed.nbytes() - dumped.nbytes()
    if not guest:
        before = int(extents.count.sum())
        extents = _without_file_holes(extents, file.data_extents(), page_size)
        absent += (before - int(extents.count.sum())) * page_size
    cut_off = np.zeros(0, np.int64)
    holes: list[Hole] = []
    for start, end in _less(dumped, available):
        first, last = start // page_size, -(-end // page_size)
        holes.append(Hole(first * page_size, last - first, "truncated"))
        cut_off = np.append(cut_off, [first, last - 1])
    holes += [Hole(n * page_size, 1, "partial_page") for n in np.setdiff1d(partial, cut_off).tolist()]
    caveats = []
    if not guest:
        caveats.append("a process's core may hold never-touched memory as zeros (gcore writes it so)")
    info = ImageInfo(
        path=path,
        format="elf",
        kind="guest" if guest else "process",
        page_size=page_size,
        pages=int(extents.count.sum()),
        pages_absent=absent // page_size,
        nbytes=file.nbytes,
        fingerprint=file.fingerprint,
        caveats=tuple(caveats),
    )
    return extent_image(file, info, extents, tuple(sorted(holes, key=lambda hole: hole.address)))


ELF = Format("elf", lambda head: head.startswith(b"\x7fELF"), _read)
"""ELF64 cores, of either byte order."""
