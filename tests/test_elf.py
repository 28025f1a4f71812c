"""ELF cores: whose they are, what was left out of them, and headers that claim too much."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ksmdist
from ksmdist import images
from ksmdist.errors import ImageError
from ksmdist.images import segments
from ksmdist.images.extents import PIECES, Extents
from ksmdist.images.files import LocalFile
from ksmdist.images.segments import without_file_holes

from .conftest import PAGE, ZERO, arrow_image, elf_core, eligible, invoke, page
from .kdump_files import info_of, written
from .readers import pages_of

PRSTATUS, FPREGSET, PRPSINFO = 1, 2, 3


def with_notes(core: bytes, notes: list[tuple[bytes, int, bytes]]) -> bytes:
    """A core of elf_core() with these notes, (name, type, description), in place of its own."""
    found = b""
    for name, kind, text in notes:
        name += b"\0"
        found += struct.pack("<III", len(name), len(text), kind)
        found += name + bytes(-len(name) % 4) + text + bytes(-len(text) % 4)
    data = bytearray(core + found)
    struct.pack_into("<Q", data, 64 + 8, len(core))
    struct.pack_into("<QQ", data, 64 + 32, len(found), len(found))
    return bytes(data)


def mapped(core: bytes, addresses: list[int]) -> bytes:
    """The same with these p_vaddr."""
    data = bytearray(core)
    for number, address in enumerate(addresses, 1):
        struct.pack_into("<Q", data, 64 + 56 * number + 16, address)
    return bytes(data)


REGISTERS = [(b"CORE", PRSTATUS, bytes(392)), (b"CORE", FPREGSET, bytes(528))]
"""All notes of QEMU's dump of an arm64 guest with no vmcoreinfo (target/arm/arch_dump.c)."""


def test_a_guest_of_which_only_registers_are_noted(tmp_path: Path) -> None:
    """With paging=true each mapping of a physical page is a segment: by p_vaddr it would be its own duplicate."""
    data = page(1) + page(2)
    core = mapped(elf_core([(0x40000000, data, len(data))] * 2), [0xFFFF << 48, 0xFFFF8 << 44])
    path = written(tmp_path, with_notes(core, REGISTERS))
    assert pages_of(path) == {0x40000000: page(1), 0x40001000: page(2)}
    assert (info_of(path).kind, info_of(path).filter_level) == ("guest", "")
    path = written(tmp_path, with_notes(elf_core([(0, data, len(data))]), REGISTERS))  # s390x has all from 0 on
    assert info_of(path).kind == "guest"
    core = mapped(elf_core([(0x40000000, data, len(data))]), [0x7F0000000000])
    path = written(tmp_path, with_notes(core, [*REGISTERS, (b"CORE", PRPSINFO, bytes(136))]))
    assert pages_of(path) == {0x7F0000000000: page(1), 0x7F0000001000: page(2)}
    assert info_of(path).kind == "process"


@pytest.mark.parametrize(
    ("note", "flagged"), [(b"QEMU", True), (b"VMCOREINFO", True), (b"VBCORE", False), (b"CORE", False)]
)
def test_a_core_that_was_filtered_is_flagged(note: bytes, flagged: bool, tmp_path: Path) -> None:
    """makedumpfile -E leaves runs of pages out as memory with no bytes."""
    path = written(tmp_path, elf_core([(0, page(1), 301 * PAGE), (301 * PAGE, page(2), PAGE)], note))
    info = info_of(path)
    assert (info.pages, info.pages_absent, info.pages_excluded) == (2, 300, 300 * flagged)
    assert info.filter_level.startswith("memory was left out, as makedumpfile -E does") == flagged
    whole = info_of(written(tmp_path, elf_core([(0, page(1), PAGE)], note)))
    assert (whole.filter_level, whole.pages_excluded) == ("", 0)


@pytest.mark.parametrize("kind", ["process", "guest"])
def test_an_exported_core_may_lose_its_holes(kind: str, tmp_path: Path) -> None:
    """Copied by cp --sparse or zstd -d it has holes where its zero pages are: they are pages still."""
    rows = [(n * PAGE, ZERO if n % 16 else page(n), eligible()) for n in range(64)]
    arrow = arrow_image(tmp_path / "x.arrow", rows, {"ksmdist.kind": kind})
    invoke("export", arrow, "-o", tmp_path / "x.elf")
    with open(tmp_path / "x.elf", "rb") as source, open(tmp_path / "sparse.elf", "wb") as sink:
        while data := source.read(PAGE):
            if data.strip(b"\0"):
                sink.write(data)
            else:
                sink.seek(PAGE, os.SEEK_CUR)
    assert len(LocalFile(str(tmp_path / "sparse.elf")).data_extents()) > 1
    assert pages_of(tmp_path / "sparse.elf") == {address: content for address, content, _ in rows}
    assert info_of(tmp_path / "sparse.elf").pages_absent == 0


def note(**said: Any) -> bytes:
    """A note as `ksmdist export` writes it."""
    fields = {"caveats": [], "filter_level": "", "host": "", "image_id": "vm", "kind": "guest", "page_size": PAGE}
    fields |= {"pages_absent": 0, "pages_excluded": 0, "producer": "", "span": 0, "tenant": ""}
    return json.dumps(fields | said).encode()


def test_an_exported_core_of_pages_of_another_size(tmp_path: Path) -> None:
    text = note(page_size=4 * PAGE, pages_absent=10, pages_excluded=5)
    path = written(tmp_path, with_notes(elf_core([(0, page(1) * 4, 4 * PAGE)]), [(b"ksmdist", 1, text)]))
    assert (info_of(path).pages, info_of(path).pages_absent, info_of(path).pages_excluded) == (4, 40, 20)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        note(image_id="\ud800"),
        note(caveats=["\udfff"]),
        note(page_size=-1),
        note(pages_absent=float("inf")),
        note(span=1 << 60),
    ],
)
def test_notes_that_lie(text: bytes, tmp_path: Path) -> None:
    path = written(tmp_path, with_notes(elf_core([(PAGE, page(1), PAGE)]), [(b"ksmdist", 1, text), (b"QEMU", 0, b"")]))
    assert pages_of(path) == {PAGE: page(1)}
    info = info_of(path)
    assert (info.kind, info.producer, info.image_id, info.pages_absent) == ("guest", "QEMU", "", 0)
    assert ksmdist.run([path], tmp_path / "run", engine="inline").summary["pages"]["total"] == 1


def test_headers_of_which_there_cannot_be_so_many(tmp_path: Path) -> None:
    """A sparse file is as long as it likes."""
    core = bytearray(elf_core([(0, page(1), PAGE)]).ljust(4 * PAGE, b"\0"))
    struct.pack_into("<Q", core, 40, 3 * PAGE)
    struct.pack_into("<H", core, 56, 0xFFFF)
    struct.pack_into("<I", core, 3 * PAGE + 44, 1 << 30)
    path = written(tmp_path, bytes(core))
    os.truncate(path, 1 << 40)
    with pytest.raises(ImageError, match="claims 1073741824 program headers, more than any core has"):
        images.open_image(str(path))


def test_notes_of_which_there_cannot_be_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 1 << 16
    core = bytearray(elf_core([(0, page(1), PAGE)]))
    segment, notes_at = bytes(core[64 + 56 : 64 + 112]), len(core) + (count + 1) * 56
    struct.pack_into("<Q", core, 32, len(core))
    struct.pack_into("<H", core, 56, 0xFFFF)
    struct.pack_into("<Q", core, 40, notes_at)
    core += segment + struct.pack("<IIQQQQQQ", 4, 0, notes_at, 0, 0, 8 << 20, 0, 0) * count
    core += bytes(44) + struct.pack("<I", count + 1) + bytes(16)
    path = written(tmp_path, bytes(core))
    os.truncate(path, len(core) + (16 << 20))
    asked = []
    real = LocalFile.read

    def read(self: LocalFile, offset: int, nbytes: int) -> bytes:
        asked.append(nbytes)
        return real(self, offset, nbytes)

    monkeypatch.setattr(LocalFile, "read", read)
    assert info_of(path).pages == 1
    assert len(asked) < 100
    assert sum(asked) < 16 << 20


Runs = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12), st.integers(0, 300)), max_size=8)


@settings(max_examples=300, deadline=None)
@given(Runs, st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=12), st.sets(st.integers(0, 7)))
def test_pages_in_holes_of_a_file(
    runs: list[tuple[int, int, int]], data: list[tuple[int, int]], pieces: set[int]
) -> None:
    """Pages of 16 bytes: each is left out if none of its bytes is data."""
    rows, at = [], 0
    for number, (gap, count, offset) in enumerate(runs):
        at += gap
        rows.append((at, 1, PIECES) if number in pieces else (at, count, offset))
        at += rows[-1][1]
    ranges, at = [], 0
    for gap, nbytes in data:
        ranges.append((at + gap, at + gap + nbytes))
        at += gap + nbytes
    held = {byte for low, high in ranges for byte in range(low, high)}
    expected: dict[int, Any] = {}
    for place, (first, count, offset) in enumerate(rows):
        for n in range(count):
            start = offset + 16 * n
            if offset == PIECES:
                expected[first] = ((place, 16),)
            elif held & set(range(start, start + 16)):
                expected[first + n] = start
    table = np.array(rows, np.int64).reshape(-1, 3)
    made_of = {n: ((n, 16),) for n, row in enumerate(rows) if row[2] == PIECES}
    extents = Extents(table[:, 0], table[:, 1], table[:, 2], made_of)
    left = without_file_holes(extents, np.array(ranges, np.int64).reshape(-1, 2), 16, "x")
    found: dict[int, Any] = {}
    for place, (first, count, offset) in enumerate(
        zip(left.page.tolist(), left.count.tolist(), left.offset.tolist(), strict=True)
    ):
        for n in range(count):
            found[first + n] = left.pieces[place] if offset == PIECES else offset + 16 * n
    assert found == expected
    assert list(found) == sorted(found)
    assert left.pages == len(expected)


def test_segments_that_all_lie_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand of them over a file of as many holes would be 10^10 runs."""
    count, holes, data_at = 50, 50, 1 << 16
    size = 2 * holes * PAGE
    wide = [(0x7F0000000000 + n * (size + PAGE), b"", size) for n in range(count)]
    core = bytearray(elf_core(wide, b"CORE", physical=False, offsets=[data_at] * count))
    for number in range(1, count + 1):
        struct.pack_into("<Q", core, 64 + 56 * number + 32, size)
    path = written(tmp_path, bytes(core))
    os.truncate(path, data_at + size)
    with open(path, "r+b") as sink:
        for n in range(holes):
            os.pwrite(sink.fileno(), page(n), data_at + 2 * n * PAGE)
    assert info_of(path).pages == count * holes
    monkeypatch.setattr(segments, "MOST_RUNS", count * holes - 1)
    with pytest.raises(ImageError, match="has its pages in 2500 runs"):
        images.open_image(str(path))
