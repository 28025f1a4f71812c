"""The traps of memory images, one test each: what a reader that falls into it would count, and that ours does not."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ksmdist
from ksmdist import images
from ksmdist.capture import capture
from ksmdist.images.proc import PM_FILE, PM_PRESENT, Machine

from .conftest import PAGE, ZERO, MakeImage, elf_core, oracle, page, random_pages
from .kdump_files import kdump
from .readers import pages_of
from .targets import HUGE, NOHUGE, Rows, Start, linux, root


def counted(path: Path, out: Path, **options: Any) -> dict[str, Any]:
    """A run's summary: its counters, and how many pages it was of."""
    summary = ksmdist.run([path], out, engine="inline", **options).summary
    pages, contents = summary["pages"], summary["contents"]
    return {
        "counters": summary["counters"],
        "pages": {name: pages[name] for name in ("zero", "duplicate", "unique")},
        "contents": {name: contents[name] for name in ("distinct", "shared")},
    }


def truth(pages: Sequence[bytes | None]) -> dict[str, Any]:
    """What counted() must say of these pages, by the oracle."""
    told = oracle({"image": pages})
    counters = {"pages_shared": len(told["stable"]), "rmap_items": sum(content is not None for content in pages)}
    contents = {name: told["contents"][name] for name in ("distinct", "shared")}
    return {"counters": counters, "pages": {n: told[n] for n in ("zero", "duplicate", "unique")}, "contents": contents}


def agrees(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether counted() says what truth() does, as far as that goes."""
    return all(found[part].items() >= wanted[part].items() for part in wanted)


def guest_pages(seed: int, count: int = 256) -> list[bytes]:
    """A guest's pages: a third zero, a third in pairs, the rest unique."""
    rng = np.random.default_rng(seed)
    third = count // 3
    pairs = random_pages(rng, third // 2) * 2
    pages = [ZERO] * third + pairs + random_pages(rng, count - third - len(pairs))
    return [pages[n] for n in rng.permutation(count)]


def test_t01_elf_is_cut_by_address(tmp_path: Path) -> None:
    """File offsets of a core's segments are not page-aligned: cut by offset, hardly a content is a page's."""
    pages = guest_pages(1)
    core = elf_core([(0, b"".join(pages), len(pages) * PAGE)])
    path = tmp_path / "core"
    path.write_bytes(core)
    by_offset = [core[at : at + PAGE] for at in range(0, len(core) - PAGE + 1, PAGE)]
    assert (len(core) - len(pages) * PAGE) % PAGE
    assert len(set(by_offset) & set(pages)) <= 1  # the zero page
    found = counted(path, tmp_path / "run")
    assert agrees(found, truth(pages))
    assert not agrees(found, truth(by_offset))
    assert pages_of(path) == {n * PAGE: content for n, content in enumerate(pages)}


def process_core(path: Path, address: int, pages: Sequence[bytes | None], sparse: bool) -> Path:
    """A process's core of one segment, as the kernel writes it: from a page of the file on, None is never touched."""
    data = b"".join(content or ZERO for content in pages)
    head = elf_core([(address, data, len(data))], note=b"CORE", physical=False, offsets=[PAGE])
    with open(path, "wb") as sink:
        sink.write(head)
        for number, content in enumerate(pages):
            if content is not None or not sparse:
                sink.seek((number + 1) * PAGE)
                sink.write(content or ZERO)
        sink.truncate((len(pages) + 1) * PAGE)
    return path


def test_t02_holes_of_a_process_core_were_never_touched(tmp_path: Path) -> None:
    """Read through, its holes are zeros: a process would share tens of times what it does. gcore writes them so."""
    pages: list[bytes | None] = [None] * 200 + [ZERO] * 3 + [page(1), page(2), page(1)] + [None] * 100 + [ZERO]
    kernel = process_core(tmp_path / "kernel", 0x7F0000000000, pages, sparse=True)
    found = counted(kernel, tmp_path / "run")
    assert agrees(found, truth(pages))
    assert found["pages"]["zero"] == 4
    image = images.open_image(str(kernel))
    assert (image.info.pages, image.info.pages_absent) == (7, 300)
    image.close()

    written = process_core(tmp_path / "gcore", 0x7F0000000000, pages, sparse=False)
    image = images.open_image(str(written))
    assert image.info.pages == 307
    assert "never touched is in it as zeros" in image.info.filter_level
    image.close()


@linux
@root
def test_t03_reading_a_live_process_leaves_it_as_it_is(start: Start, tmp_path: Path) -> None:
    """Who reads all that can be read maps zero pages into the process, and then counts them."""
    count = 512
    target = start(f'anon("untouched", {count}, {NOHUGE})\nm = anon("written", 8, {NOHUGE})\nwrite(m, 0, 5, 8)')
    before = target.memory()
    [captured] = capture([target.pid], tmp_path / "out")
    rows = Rows(captured)
    assert rows.at(target.told["untouched"], count) == []
    assert len(rows.at(target.told["written"], 8)) == 8
    assert target.memory() == before
    assert not any(target.frames("untouched", count))
    with open(f"/proc/{target.pid}/mem", "rb", buffering=0) as memory:
        memory.seek(target.told["untouched"])
        assert memory.read(count * PAGE) == bytes(count * PAGE)
    assert all(target.frames("untouched", count))


@linux
@root
@pytest.mark.parametrize("way", ["PAGEMAP_SCAN", "pagemap and kpageflags"])
def test_t04_the_huge_zero_page_is_no_files(
    way: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pagemap says "file or shared" of it: believed, most of a process's memory would be passed over."""
    target = start(f'm, o = aligned("read", 4, {HUGE})\nfor p in range(0, 4 << 20, P): m[o + p]')
    with open(f"/proc/{target.pid}/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(target.told["read"] // PAGE * 8)
        entry = np.frombuffer(pagemap.read(1024 * 8), np.uint64)
    if "never" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().split("[")[1].split("]")[0]:
        pytest.skip("transparent huge pages are off")
    assert ((entry & PM_PRESENT) != 0).all()
    assert ((entry & PM_FILE) != 0).all()  # which is the trap
    if way != "PAGEMAP_SCAN":
        here = replace(Machine.here(), pagemap_scan=False)  # as on a kernel before 6.7
        monkeypatch.setattr(Machine, "here", classmethod(lambda _: here))
    [captured] = capture([target.pid], tmp_path / "out")
    rows = Rows(captured)
    assert rows.flags(target.told["read"], 1024) == [{"zero_mapped", "huge"}] * 1024
    assert [row[0] for row in rows.at(target.told["read"], 1024)] == [None] * 1024
    assert "not_anonymous" not in rows.passed_over("[anon]")


def test_t05_a_physical_page_counts_once(tmp_path: Path, make_raw: MakeImage) -> None:
    """Dumped with paging=true a page is in as many segments as map it: each would be a duplicate of itself."""
    pages = guest_pages(5)
    segments = [(0, b"".join(pages), len(pages) * PAGE)]
    rng = np.random.default_rng(5)
    for _ in range(100):
        first = int(rng.integers(0, len(pages) - 8))
        count = int(rng.integers(1, 8))
        segments.append((first * PAGE, b"".join(pages[first : first + count]), count * PAGE))
    order = rng.permutation(len(segments))
    path = tmp_path / "core"
    path.write_bytes(elf_core([segments[n] for n in order]))
    assert pages_of(path) == {n * PAGE: content for n, content in enumerate(pages)}
    found = counted(path, tmp_path / "run")
    assert agrees(found, truth(pages))
    assert found == counted(make_raw("raw", pages), tmp_path / "raw-run")


@pytest.mark.parametrize("level", [2, 3, 16, 31])
def test_t06_pages_left_out_of_a_kdump_are_not_zero(level: int, tmp_path: Path) -> None:
    """They are zero at level 1 alone: else most of a filtered dump would be zero pages that nobody has."""
    pages = guest_pages(6)
    kept = {n: content for n, content in enumerate(pages) if n % 3}
    path = tmp_path / "kdump"
    path.write_bytes(kdump(kept, range(len(pages)), dump_level=level))
    found = counted(path, tmp_path / "run")
    assert agrees(found, truth(list(kept.values())))
    assert not agrees(found, truth([kept.get(n, ZERO) for n in range(len(pages))]))
    image = images.open_image(str(path))
    left_out = len(pages) - len(kept)
    assert (image.info.pages_absent, image.info.pages_excluded) == (left_out, left_out)
    assert image.info.filter_level
    image.close()


def test_t06_at_level_1_they_are_zero(tmp_path: Path) -> None:
    pages = guest_pages(6)
    other = {n: content for n, content in enumerate(pages) if content != ZERO}
    path = tmp_path / "kdump"
    path.write_bytes(kdump(other, range(len(pages)), dump_level=1, zero_page=False))
    found = counted(path, tmp_path / "run")
    assert agrees(found, truth(pages))
    assert pages_of(path) == {n * PAGE: content for n, content in enumerate(pages)}


def test_t07_what_was_not_dumped_is_not_zero(tmp_path: Path) -> None:
    """p_filesz less than p_memsz is memory that is not in the file: in a core it is not zeros, as in a program."""
    pages = [page(1), page(1), ZERO, ZERO, page(2)]
    path = tmp_path / "core"
    path.write_bytes(elf_core([(0, b"".join(pages), 100 * PAGE), (200 * PAGE, b"", 50 * PAGE)]))
    assert agrees(counted(path, tmp_path / "run"), truth(pages))
    assert pages_of(path) == {n * PAGE: content for n, content in enumerate(pages)}
    image = images.open_image(str(path))
    assert (image.info.pages, image.info.pages_absent) == (5, 95 + 50)
    image.close()


@pytest.mark.parametrize("format", ["elf", "kdump"])
def test_t08_dumps_of_qemu_have_the_bios_too(format: str, tmp_path: Path, make_raw: MakeImage) -> None:
    """The same guest has 64 pages more as ELF or kdump than as raw: its counts differ by those of these alone."""
    pages, bios, at = guest_pages(8), [ZERO] * 18 + [page(1000 + n) for n in range(46)], 0xFFFC0000
    path = tmp_path / "dump"
    if format == "elf":
        path.write_bytes(elf_core([(0, b"".join(pages), len(pages) * PAGE), (at, b"".join(bios), len(bios) * PAGE)]))
    else:
        path.write_bytes(kdump(dict(enumerate(pages)) | {at // PAGE + n: content for n, content in enumerate(bios)}))
    dumped, as_raw = pages_of(path), pages_of(make_raw("raw", pages))
    assert {a: content for a, content in dumped.items() if a < at} == as_raw
    assert [content for a, content in dumped.items() if a >= at] == bios
    found, raw = counted(path, tmp_path / "run"), counted(make_raw("raw", pages), tmp_path / "raw-run")
    assert agrees(found, truth(pages + bios))
    assert agrees(raw, truth(pages))
    assert found["pages"]["zero"] - raw["pages"]["zero"] == 18
    assert found["pages"]["unique"] - raw["pages"]["unique"] == 46


def test_t09_ram_over_3_gib_goes_on_at_4_gib(tmp_path: Path) -> None:
    """Its file goes on at byte 0xc0000000 with what is at 4 GiB in the guest: the addresses differ, no count does."""
    gap, top = 0xC0000000, 1 << 32
    low, last, high = guest_pages(91, 30), [page(7)], [*guest_pages(92, 40), page(7)]
    places = [(0, low), (gap - PAGE, last), (gap, high)]
    raw, core = tmp_path / "guest.raw", tmp_path / "core"
    with open(raw, "wb") as sink:
        for address, pages in places:
            sink.seek(address)
            sink.write(b"".join(pages))
    segments = [(address if address < gap else top, b"".join(pages), len(pages) * PAGE) for address, pages in places]
    core.write_bytes(elf_core(segments))
    as_raw, as_core = pages_of(raw), pages_of(core)
    assert {a if a < gap else a - gap + top: content for a, content in as_raw.items()} == as_core
    assert as_core[top] == as_raw[gap] == high[0]
    found = counted(raw, tmp_path / "raw-run")
    assert agrees(found, truth(low + last + high))
    assert found == counted(core, tmp_path / "elf-run")


def checkpoint(folder: Path, runs: Mapping[int, Sequence[bytes]]) -> Path:
    """A CRIU checkpoint of one process: runs of pages by address, back to back in pages-1.img; its pagemap's path.

    CRIU's images/pagemap.proto: pagemap_head {pages_id = 1}, then pagemap_entry {vaddr = 1, nr_pages = 2, flags = 4}.
    """

    def number(field: int, value: int) -> bytes:
        digits = bytearray([field << 3])
        while value >= 128:
            digits.append(value & 127 | 128)
            value >>= 7
        return bytes(digits) + bytes([value])

    records = [number(1, 1)]
    records += [number(1, at) + number(2, len(pages)) + number(4, 4) for at, pages in runs.items()]  # PE_PRESENT
    path = folder / "pagemap-7.img"
    path.write_bytes(
        bytes.fromhex("1943565425400856") + b"".join(struct.pack("<I", len(data)) + data for data in records)
    )
    (folder / "pages-1.img").write_bytes(b"".join(b"".join(pages) for pages in runs.values()))
    return path


def test_t10_a_checkpoint_has_zero_pages_that_were_written(tmp_path: Path) -> None:
    """CRIU leaves out pages that were only read, which are zero too: what is in none of its runs is not there."""
    written = [ZERO] * 40 + [page(1), page(2), page(1)]
    at = 0x7F0000000000
    path = checkpoint(tmp_path, {at: written, at + 100 * PAGE: [ZERO, page(3)]})  # between them 57 were read
    assert agrees(counted(path, tmp_path / "run"), truth([*written, ZERO, page(3)]))
    image = images.open_image(str(path))
    assert (image.info.kind, image.info.pages) == ("process", 45)
    assert image.info.filter_level
    image.close()
