"""ELF64 cores of guests (QEMU, kdump: by p_paddr) and of processes (kernel, gcore: by p_vaddr).

Rules: System V ABI chapter 5 (program headers), elf(5) (PN_XNUM). A core is a process's by notes that no guest has
(fs/binfmt_elf.c, fill_note_info): on arm64 and s390x QEMU writes registers alone, as CORE and LINUX (target/arm/
arch_dump.c), but tells where they are by p_paddr, which is 0 in all cores of processes. Pages are cut by address, never
by file offset: QEMU's and gcore's offsets are not page-aligned. Where segments overlap, a page
counts once, from the segment that starts lowest. Bytes past p_filesz are absent, not zero.
A file hole is absent in a process's core (the kernel skips never-touched pages, fs/coredump.c
dump_skip); in a guest's core, and in one that was exported, p_filesz bytes were dumped, so there a hole is zeros that
a copying tool (`zstd -d`, `cp --sparse`) left out.

Raises ImageError: not ELF64, not a core, headers past the end of the file, addresses past 2**64.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from ksmdist.errors import ImageError
from ksmdist.images.base import NEVER_TOUCHED, Format, Image, ImageInfo
from ksmdist.images.export import NOTE_NAME, note_fields
from ksmdist.images.extents import extent_image
from ksmdist.images.files import ImageFile
from ksmdist.images.headers import KINDS_OF_IMAGES
from ksmdist.images.segments import Segments, cut_pages, holes_of, without_file_holes
from ksmdist.intake import parsed

__all__ = ["ELF"]

_ET_CORE, _PT_LOAD, _PT_NOTE, _PN_XNUM = 4, 1, 4, 0xFFFF
_NOTE_BYTES = 4 << 20  # notes are looked for in the first 4 MiB of them
_NOTE_SEGMENTS = 64  # and in so many segments; the kernel and QEMU write one
_TABLE_BYTES = 1 << 28  # of program headers: 4.8 million, where a process has 65,530 mappings unless told otherwise
_OF_GUEST = frozenset((b"QEMU", b"VMCOREINFO"))
_OF_PROCESS = ((b"CORE", 3), (b"CORE", 6), (b"CORE", 0x46494C45), (b"CORE", 0x53494749))
"""NT_PRPSINFO, NT_AUXV, NT_FILE, NT_SIGINFO (include/uapi/linux/elf.h)."""


def _broken(path: str, what: str) -> ImageError:
    return ImageError(what, path, "take the dump again, or check that it was copied whole")


def _read_exactly(file: ImageFile, offset: int, nbytes: int, what: str) -> bytes:
    data = file.read(offset, nbytes) if offset < 1 << 63 else b""
    if len(data) < nbytes:
        raise _broken(file.path, f"truncated: {what} at byte {offset} is past the end of the file")
    return data


def _program_headers(file: ImageFile) -> np.ndarray:
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
    if phnum * phentsize > _TABLE_BYTES:
        raise _broken(path, f"claims {phnum} program headers, more than any core has")
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


def _notes(file: ImageFile, notes: np.ndarray) -> dict[tuple[bytes, int], bytes]:
    """(Name, type) of the notes in the PT_NOTE segments, each with what its last one says, as far as they are read."""
    found: dict[tuple[bytes, int], bytes] = {}
    order = notes.dtype["type"].byteorder
    left = _NOTE_BYTES
    for note in notes[:_NOTE_SEGMENTS]:
        if int(note["offset"]) >= 1 << 63:
            continue
        data = file.read(int(note["offset"]), min(int(note["filesz"]), left))
        left -= len(data)
        at = 0
        while at + 12 <= len(data):
            namesz, descsz, kind = struct.unpack_from(("<" if order in "<=|" else ">") + "III", data, at)
            text_at = at + 12 + -(-namesz // 4) * 4
            name = data[at + 12 : at + 12 + min(namesz, 64)].rstrip(b"\0")
            found[name, kind] = data[text_at : text_at + descsz]
            at = text_at + -(-descsz // 4) * 4
    return found


def _ours(note: bytes) -> dict[str, Any]:
    """What `ksmdist export` said of the image, checked; nothing where it is not what it should be."""
    try:
        said = {"salt": ""} | parsed(note)  # notes of ksmdist before it knew salts have none
        fits = all(isinstance(said[name], type(value)) for name, value in note_fields(_NOTHING).items())
        numbers = [said[name] for name in ("page_size", "pages_absent", "pages_excluded", "span")]
        if fits and said["kind"] in KINDS_OF_IMAGES and min(numbers) >= 0 and max(numbers) < 1 << 60:
            return dict(said)
    except (ValueError, KeyError, TypeError):
        pass
    return {}


def _read(file: ImageFile, page_size: int) -> Image:
    path = file.path
    headers = _program_headers(file)
    loads = headers[headers["type"] == _PT_LOAD]
    notes = _notes(file, headers[headers["type"] == _PT_NOTE])
    names, ours = {name for name, _ in notes}, _ours(notes.get((NOTE_NAME, 1), b""))
    if len(loads) == 0 and not ours:
        raise _broken(path, "is an ELF core with no memory in it (no PT_LOAD segment)")
    paddr = loads["paddr"].astype(np.uint64)
    by_paddr = bool(paddr.any()) or not bool(loads["vaddr"].any())
    guest = bool(names & _OF_GUEST) or (by_paddr and not any(note in notes for note in _OF_PROCESS))
    guest = ours.get("kind") == "guest" if ours else guest
    address = paddr if guest else loads["vaddr"].astype(np.uint64)
    offset = loads["offset"].astype(np.uint64)
    memsz, filesz = loads["memsz"].astype(np.uint64), loads["filesz"].astype(np.uint64)
    extent = np.maximum(memsz, filesz)
    most = np.uint64(2**64 - 1)
    if bool((extent > most - address).any()) or bool((filesz > most - offset).any()):
        raise _broken(path, "has a segment that reaches past the end of the address space")
    eof = np.uint64(file.nbytes)
    in_file = np.minimum(filesz, np.where(offset < eof, eof - np.minimum(offset, eof), np.uint64(0)))
    claimed = Segments(address, address + extent, offset).disjoint()
    dumped = Segments(address, address + filesz, offset).disjoint()
    available = Segments(address, address + filesz, offset).up_to(address + in_file, page_size).disjoint()

    extents, partial = cut_pages(available, page_size)
    absent = claimed.nbytes() - dumped.nbytes()
    if not guest and not ours:
        before = int(extents.count.sum())
        extents = without_file_holes(extents, file.data_extents(), page_size, path)
        absent += (before - int(extents.count.sum())) * page_size
    holes = holes_of(dumped, available, partial, page_size)
    absent //= page_size
    if ours:
        more = _said(ours, page_size)
    elif guest:
        more = _of_guest(names, absent)
    else:
        more = _of_process(offset, page_size, _has_holes(file))
    info = ImageInfo.of(
        file,
        "elf",
        str(ours.get("kind") or ("guest" if guest else "process")),
        page_size,
        extents.pages,
        **{"absent": absent} | more,
    )
    return extent_image([file], info, extents, tuple(holes))


def _said(ours: dict[str, Any], page_size: int) -> dict[str, Any]:
    """Fields of ImageInfo as a core that was exported has them."""
    names = ("filter_level", "host", "image_id", "producer", "salt", "span", "tenant")
    excluded = ours["pages_excluded"] * ours["page_size"] // page_size  # it counts in pages of its own
    absent = max(ours["pages_absent"] * ours["page_size"] // page_size, excluded)
    caveats = tuple(str(caveat) for caveat in ours["caveats"])
    return {"absent": absent, "pages_excluded": excluded, "caveats": caveats} | {name: ours[name] for name in names}


def _has_holes(file: ImageFile) -> bool:
    """Whether a file has holes: one that was compressed or copied through a pipe has none any more."""
    data = file.data_extents()
    return int((data[:, 1] - data[:, 0]).sum()) < file.nbytes


def _of_guest(names: set[bytes], absent: int) -> dict[str, Any]:
    """What wrote the core of a guest, or of a host's kernel, and left out, as fields of ImageInfo.

    What makedumpfile -E leaves out is memory with no bytes in the file, and it keeps the notes (makedumpfile.c,
    write_elf_pages_cyclic). In a core that neither QEMU nor a kernel began such memory may be a device's.
    """
    said: dict[str, Any] = {"producer": "QEMU", "caveats": (NEVER_TOUCHED,)} if b"QEMU" in names else {}
    if absent and names & _OF_GUEST:
        level = "memory was left out, as makedumpfile -E does, and the core does not say which"
        said |= {"filter_level": level, "pages_excluded": absent}
    return said


def _of_process(offset: np.ndarray, page_size: int, has_holes: bool) -> dict[str, Any]:
    """The same of a process's core.

    The kernel writes a process's pages at page-aligned offsets (fs/coredump.c, elf_core_dump); gdb's gcore does not,
    and reads every page of a mapping to write it, those never touched too. Through a pipe (systemd-coredump) the
    kernel writes zeros for what it else skips (dump_skip).
    """
    if bool((offset % np.uint64(page_size) != 0).any()):
        level = "gcore: memory that was never touched is in it as zeros, and counts as zero pages"
        return {"producer": "gcore", "filter_level": level}
    if not has_holes:
        level = "core without holes, as of systemd-coredump: memory that was never touched is in it as zeros"
        return {"producer": "kernel", "filter_level": level}
    caveat = "a core of the kernel has no pages that were never touched, nor those that coredump_filter excludes"
    return {"producer": "kernel", "caveats": (caveat,)}


_NOTHING = ImageInfo("", "", "", 0, 0, 0, 0, "")

ELF = Format("elf", lambda head: head.startswith(b"\x7fELF"), _read)
"""ELF64 cores, of either byte order."""
