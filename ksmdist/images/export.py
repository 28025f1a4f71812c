"""Images as raw files and ELF cores again: the way back from Arrow, byte by byte.

A raw file has each page at its address and a hole for what is absent; the zero pages in it are written, since a hole
would say that they were never touched. An ELF core (System V ABI, chapter 5) has a PT_LOAD for each run of pages, at
page-aligned offsets, and at its end a note of ksmdist's with what Arrow's metadata would say, and the program headers.
Pages without bytes of their own (swapped, mapped to the zero page) and holes are in neither.

Raises ImageError: addresses that a raw file cannot have.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from ksmdist.columns import present, values
from ksmdist.errors import ImageError
from ksmdist.images.base import Hole, Image, ImageInfo, joined_ranges, lost_level

__all__ = ["NOTE_NAME", "Exported", "export_elf", "export_raw", "note_fields"]

NOTE_NAME = b"ksmdist"
"""Name of the note in a core that was written here; its text is a JSON object."""

_MOST_RAW = 1 << 44  # ext4's largest file
_PN_XNUM = 0xFFFF
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = np.dtype([("type", "<u4"), ("flags", "<u4"), *[(name, "<u8") for name in ("o", "v", "p", "f", "m", "a")]])


@dataclass(slots=True)
class Exported:
    """What was written: pages; without_bytes: rows that have none; holes: what could not be read."""

    pages: int = 0
    without_bytes: int = 0
    holes: list[Hole] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Neighbouring pages and their bytes: address and nbytes, in bytes."""

    address: int
    data: memoryview

    @property
    def nbytes(self) -> int:
        return len(self.data)


def export_raw(image: Image, sink: BinaryIO) -> Exported:
    """Write the pages at their addresses. sink: an empty, seekable file."""
    info, done = image.info, Exported()
    ranges = image.ranges()
    end = max(int(ranges[-1, 1]) if len(ranges) else 0, info.span)
    if info.kind != "guest" or end > _MOST_RAW:
        raise ImageError(
            f"is of kind {info.kind} and has addresses up to {end:#x}: a raw file has each page at its address",
            info.path,
            "export it to X.elf",
        )
    for stretch in _stretches(image, done):
        sink.seek(stretch.address)
        sink.write(stretch.data)
    sink.truncate(end)
    return done


def export_elf(image: Image, sink: BinaryIO) -> Exported:
    """Write a core: of a guest by p_paddr, of all else by p_vaddr. sink: an empty, seekable file."""
    info, done = image.info, Exported()
    data_at = info.page_size
    start: list[int] = []
    nbytes: list[int] = []
    sink.seek(data_at)
    for stretch in _stretches(image, done):
        if start and start[-1] + nbytes[-1] == stretch.address:
            nbytes[-1] += stretch.nbytes
        else:
            start.append(stretch.address)
            nbytes.append(stretch.nbytes)
        sink.write(stretch.data)
    lost = sum(hole.pages for hole in done.holes)
    level = lost_level(info.filter_level, lost=lost, how="exported")
    fields = note_fields(replace(info, filter_level=level, pages_absent=info.pages_absent + lost))
    text = json.dumps(fields, sort_keys=True).encode()
    name = NOTE_NAME + b"\0"
    note = struct.pack("<III", len(name), len(text), 1) + name + text + bytes(-len(text) % 4)
    note_at = data_at + sum(nbytes)
    segments = np.zeros(len(start) + 1, _SEGMENT)
    segments["type"], segments["flags"], segments["a"] = 1, 4, info.page_size
    segments["p" if info.kind == "guest" else "v"][1:] = np.array(start, np.uint64)
    segments["f"][1:] = segments["m"][1:] = np.array(nbytes, np.uint64)
    segments["o"][1:] = data_at + np.cumsum([0, *nbytes])[:-1]
    segments[0] = (4, 0, note_at, 0, 0, len(note), len(note), 4)
    table_at = note_at + -(-len(note) // 8) * 8
    many = len(segments) >= _PN_XNUM
    section_at = table_at + segments.nbytes if many else 0
    sink.write(note.ljust(table_at - note_at, b"\0") + segments.tobytes())
    if many:  # elf(5): the number of program headers is in sh_info of section 0
        sink.write(struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, len(segments), 0, 0))
    phnum = _PN_XNUM if many else len(segments)
    ident = b"\x7fELF\2\1\1" + bytes(9)
    head = _HEADER.pack(ident, 4, 62, 1, 0, table_at, section_at, 0, 64, 56, phnum, 64, int(many), 0)
    sink.seek(0)
    sink.write(head)
    return done


def note_fields(info: ImageInfo) -> dict[str, object]:
    """What the note of a core says of its image."""
    return {
        "caveats": list(info.caveats),
        "filter_level": info.filter_level,
        "host": info.host,
        "image_id": info.image_id,
        "kind": info.kind,
        "page_size": info.page_size,
        "pages_absent": info.pages_absent,
        "pages_excluded": info.pages_excluded,
        "producer": info.producer,
        "span": info.span,
        "salt": info.salt,
        "tenant": info.tenant,
    }


def _stretches(image: Image, done: Exported) -> Iterator[_Stretch]:
    """The bytes of the pages, by address."""
    done.holes += image.holes
    for item in image.batches(0, image.info.pages):
        if isinstance(item, Hole):
            done.holes.append(item)
            continue
        yield from _of_batch(item, image.info.page_size, done)


def _of_batch(batch: pa.RecordBatch, size: int, done: Exported) -> Iterator[_Stretch]:
    content = batch.column("content")
    valid = present(content)
    address = values(batch.column("address"))[valid]
    done.pages += len(address)
    done.without_bytes += len(batch) - len(address)
    if len(address) == 0:
        return
    # Contents lie back to back: a null one has no bytes.
    offset = np.frombuffer(content.buffers()[1], np.int32)[content.offset : content.offset + len(content) + 1]
    data = memoryview(content.buffers()[2])[int(offset[0]) : int(offset[-1])]
    at = 0
    for start, end in joined_ranges(address, address + np.uint64(size)).tolist():
        yield _Stretch(start, data[at : at + end - start])
        at += end - start
