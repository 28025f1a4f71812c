"""Readers: which pages they give, and what they say of files that are broken."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import ksmdist
from ksmdist import images
from ksmdist.errors import ImageError, ImageReadError, SettingsError
from ksmdist.images import Hole, arrow
from ksmdist.settings import Settings
from ksmdist.store import read_table
from ksmdist.tables import HOLES, STABLE_TREE

from .conftest import PAGE, ZERO, MakeImage, arrow_image, elf_core, eligible, page, table_files


def read(path: Path, start: int = 0, end: int | None = None, **options: Any) -> list[tuple[int, bytes | None]]:
    """(address, content) of every page, and of holes (address, None)."""
    image = images.open_image(str(path), **options)
    found: list[tuple[int, bytes | None]] = []
    for item in image.batches(start, image.info.pages if end is None else end):
        if isinstance(item, Hole):
            found.append((item.address, None))
        else:
            found += zip(item.column("address").to_pylist(), item.column("content").to_pylist(), strict=True)
    image.close()
    return found


def test_a_hole_in_a_raw_image_is_absent_not_zero(make_raw: MakeImage, tmp_path: Path) -> None:
    path = make_raw("a.raw", [None, page(1), ZERO, None, None, page(2), None])
    info = images.open_image(str(path)).info
    assert (info.pages, info.pages_absent, info.format) == (3, 4, "raw")
    assert read(path) == [(PAGE, page(1)), (2 * PAGE, ZERO), (5 * PAGE, page(2))]
    assert read(path, 1, 3) == read(path)[1:]


def test_long_and_short_runs_of_a_raw_image(make_raw: MakeImage) -> None:
    pages: list[bytes | None] = [page(n) if n % 7 else None for n in range(40)] + [page(n) for n in range(40, 700)]
    path = make_raw("a.raw", pages)
    expected = [(n * PAGE, content) for n, content in enumerate(pages) if content is not None]
    assert read(path) == expected
    assert read(path, 30, 500) == expected[30:500]


@pytest.mark.parametrize("order", ["<", ">"])
def test_elf_is_cut_by_address_not_by_file_offset(tmp_path: Path, order: str) -> None:
    path = tmp_path / "core"
    path.write_bytes(elf_core([(0x100000, page(1) + ZERO, 2 * PAGE), (0x0, page(2), PAGE)], order=order))
    assert read(path) == [(0, page(2)), (0x100000, page(1)), (0x101000, ZERO)]


def test_a_process_core_is_read_by_virtual_address(tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_bytes(elf_core([(0x7F0000000000, page(1), PAGE)], note=b"CORE", physical=False))
    info = images.open_image(str(path)).info
    assert (info.kind, info.producer) == ("process", "gcore")  # its pages are not at aligned offsets
    assert "never touched" in info.filter_level
    assert read(path) == [(0x7F0000000000, page(1))]


def test_bytes_past_filesz_are_absent_not_zero(tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_bytes(elf_core([(0, page(1), 5 * PAGE)]))
    info = images.open_image(str(path)).info
    assert (info.pages, info.pages_absent) == (1, 4)


def test_overlapping_segments_count_a_page_once(tmp_path: Path) -> None:
    path = tmp_path / "core"
    both = page(1) + page(2) + page(3)
    path.write_bytes(
        elf_core([(0, both, 3 * PAGE), (PAGE, page(2) + page(3) + page(4), 3 * PAGE), (0, both, 3 * PAGE)])
    )
    assert read(path) == [(n * PAGE, page(n + 1)) for n in range(4)]
    assert images.open_image(str(path)).info.pages_absent == 0


def test_more_segments_than_e_phnum_can_say(tmp_path: Path) -> None:
    path = tmp_path / "core"
    count = 70_000
    path.write_bytes(elf_core([(2 * n * PAGE, page(n % 3), PAGE) for n in range(count)], xnum=True))
    image = images.open_image(str(path))
    assert image.info.pages == count
    assert read(path, count - 2, count) == [(2 * n * PAGE, page(n % 3)) for n in (count - 2, count - 1)]


def test_a_page_in_two_segments_is_put_together(tmp_path: Path) -> None:
    path = tmp_path / "core"
    both = page(1) + page(2)
    path.write_bytes(elf_core([(0, both[:5000], 5000), (5000, both[5000:], 2 * PAGE - 5000)]))
    assert read(path) == [(0, page(1)), (PAGE, page(2))]


def test_a_page_of_which_only_a_part_is_there_is_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_bytes(elf_core([(0, page(1) + page(2)[:100], PAGE + 100)]))
    assert images.open_image(str(path)).holes == (Hole(PAGE, 1, "partial_page"),)


def test_a_truncated_core_is_scanned_where_it_can_be(tmp_path: Path) -> None:
    path = tmp_path / "core"
    whole = elf_core([(0, b"".join(page(n) for n in range(8)), 8 * PAGE)])
    path.write_bytes(whole[: -3 * PAGE + 100])
    run: Any = ksmdist.run([path], tmp_path / "out")
    assert run.summary["pages"]["total"] == 5
    assert run.holes == 3
    assert read_table(run.path, HOLES).to_pylist() == [
        {"image_id": "core", "address": 5 * PAGE, "pages": 3, "reason": "truncated"}
    ]


def test_file_holes_are_zeros_in_a_guest_and_absent_in_a_process(tmp_path: Path) -> None:
    data = page(1) + bytes(64 * PAGE) + page(2)
    for note, physical, expected in ((b"QEMU", True, (66, 0)), (b"CORE", False, (None, 64))):
        path = tmp_path / note.decode()
        core = elf_core([(0x400000, data, len(data))], note, physical)
        with open(path, "wb") as sink:
            start = core.index(data[PAGE : 3 * PAGE])
            sink.write(core[:start])
            sink.seek(start + 64 * PAGE)
            sink.write(core[start + 64 * PAGE :])
        if path.stat().st_blocks * 512 > path.stat().st_size - 32 * PAGE:
            raise AssertionError("this file system keeps no holes: the test shows nothing")
        info = images.open_image(str(path)).info
        if physical:
            assert (info.pages, info.pages_absent) == expected
        else:
            # A hole is whole blocks of the file, and the pages of this core lie across two blocks each.
            assert info.pages_absent == 62
            assert info.pages + info.pages_absent == 66


def test_the_same_guest_as_raw_elf_and_arrow_gives_the_same_tree(make_raw: MakeImage, tmp_path: Path) -> None:
    pages = [page(n % 5) for n in range(9)] + [ZERO] * 4 + [b"\xcc" * PAGE] * 2 + [page(77)]
    raw = make_raw("guest.raw", pages)
    elf = tmp_path / "guest.elf"
    elf.write_bytes(elf_core([(0, b"".join(pages), len(pages) * PAGE)]))
    for source, name in ((raw, "r"), (elf, "e")):
        (tmp_path / name).mkdir()
        image = images.open_image(str(source))
        assert images.write_image([image], str(tmp_path / name / "guest.arrow"), "guest") == []
    runs = []
    for number, path in enumerate([raw, elf, tmp_path / "r" / "guest.arrow", tmp_path / "e" / "guest.arrow"]):
        runs.append(table_files(ksmdist.run([path], tmp_path / f"out{number}").path))
    for name in ("stable_tree/00000.parquet", "spectrum.parquet", "counters.parquet"):
        assert len({files[name] for files in runs}) == 1, name


def test_several_sources_become_one_image_by_address(tmp_path: Path) -> None:
    for name, address in (("high", 0x10000), ("low", 0)):
        (tmp_path / name).write_bytes(elf_core([(address, page(address + 1), PAGE)]))
    opened = [images.open_image(str(tmp_path / name)) for name in ("high", "low")]
    images.write_image(opened, str(tmp_path / "x.arrow"), "x")
    assert read(tmp_path / "x.arrow") == [(0, page(1)), (0x10000, page(0x10001))]
    with pytest.raises(ImageError, match="which another source holds"):
        images.write_image([opened[0], opened[0]], str(tmp_path / "y.arrow"), "y")


def test_classes_of_an_arrow_images_pages(tmp_path: Path) -> None:
    rows = [
        (0, ZERO, 0),
        (1, page(1), eligible("file")),
        (2, None, eligible("swapped")),
        (3, None, eligible("zero_mapped")),
        (4, None, eligible("zero_mapped", "pte_dirty")),
        (5, ZERO, eligible()),
        (6, page(1), eligible()),
        (7, page(1), eligible("huge")),
        (8, page(2), eligible("locked")),
        (9, b"\x00\x01" * (PAGE // 2), eligible()),
    ]
    path = arrow_image(tmp_path / "x.arrow", [(n * PAGE, c, f) for n, c, f in rows], {"ksmdist.pages_absent": "7"})
    run: Any = ksmdist.run([path], tmp_path / "out", Settings(shard_pages=3))
    assert run.summary["pages"] == {
        "total": 10,
        "absent": 7,
        "ineligible": 3,
        "zero_mapped_fault": 1,
        "zero_mapped_ksm": 1,
        "volatile": 0,
        "zero": 1,
        "duplicate": 2,
        "unique": 2,
    }
    assert run.summary["kinds"] == {"zero": 2, "same_filled": 1, "other": 4}
    assert run.summary["contents"] == {"distinct": 3, "shared": 1, "max_copies": 2}
    # The zero page KSM placed counts as what it was: with the other zero page it merges.
    assert run.summary["merges"]["zero"] == 2
    stable = read_table(run.path, STABLE_TREE).select(["kind", "copies", "first_address"]).to_pylist()
    assert {"kind": "zero", "copies": 2, "first_address": 4 * PAGE} in stable
    assert {"kind": "other", "copies": 2, "first_address": 6 * PAGE} in stable


BAD_ROWS = {
    "comes twice": [(0, ZERO, 1), (PAGE, ZERO, 1), (PAGE, ZERO, 1)],
    "out of order": [(PAGE, ZERO, 1), (0, ZERO, 1)],
    r"out of order after 0x3000": [(0, ZERO, 1), (PAGE, ZERO, 1), (3 * PAGE, ZERO, 1), (2 * PAGE, ZERO, 1)],
    "not aligned": [(12, ZERO, 1)],
    r"content of 12 bytes, not 4096": [(0, ZERO, 1), (PAGE, b"x" * 12, 1)],
}


@pytest.mark.parametrize("message", BAD_ROWS)
@pytest.mark.parametrize("shard_pages", [1, None])
def test_bad_rows_of_an_arrow_image(tmp_path: Path, message: str, shard_pages: int | None) -> None:
    path = arrow_image(tmp_path / "x.arrow", BAD_ROWS[message])
    with pytest.raises(ImageError, match=message):
        ksmdist.run([path], tmp_path / "out", Settings(shard_pages=shard_pages))
    assert not (tmp_path / "out").exists()


BAD_KEYS: dict[str, dict[str, str]] = {
    "no memory_image": {"ksmdist.table": "page"},
    "version 2": {"ksmdist.version": "2"},
    "pages_absent is '-1'": {"ksmdist.pages_absent": "-1"},
    "kind is 'vm'": {"ksmdist.kind": "vm"},
    "source is not what it should be": {"ksmdist.source": "[1"},
}


@pytest.mark.parametrize("message", BAD_KEYS)
def test_bad_metadata_of_an_arrow_image(tmp_path: Path, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        images.open_image(str(arrow_image(tmp_path / "x.arrow", [(0, ZERO, 1)], BAD_KEYS[message])))


def test_an_arrow_image_of_another_page_size_or_other_columns(tmp_path: Path) -> None:
    path = arrow_image(tmp_path / "x.arrow", [(0, ZERO, 1)])
    with pytest.raises(SettingsError, match="--page-size 4096"):
        images.open_image(str(path), page_size=16384)
    other = tmp_path / "y.arrow"
    schema = pa.schema([("address", pa.int32())], metadata={"ksmdist.table": "memory_image", "ksmdist.version": "1"})
    with pa.OSFile(str(other), "wb") as sink, pa.ipc.new_file(sink, schema):
        pass
    with pytest.raises(ImageError, match=r"column address is int32, memory_image has uint64"):
        images.open_image(str(other))


def test_a_truncated_arrow_file(tmp_path: Path) -> None:
    path = arrow_image(tmp_path / "x.arrow", [(n * PAGE, page(n), 1) for n in range(9)])
    whole = path.read_bytes()
    for size in (8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ImageError, match="truncated or damaged"):
            images.open_image(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello", "not a memory image: no known magic"),
        (page(1)[:-1], "ends 4095 bytes into one"),
        (b"\x7fELF\x01\x01\x01" + bytes(4089), "32-bit ELF"),
        (b"\x7fELF\x02\x01", "truncated: the ELF header"),
        (b"\x7fELF\x02\x01" + bytes(10) + struct.pack("<H", 2) + bytes(60), "type 2, not a core"),
        (b"PAR1" + bytes(4092), "a Parquet file"),
        (b"\x28\xb5\x2f\xfd" + bytes(4092), "zstd-compressed, and damaged"),
    ],
)
def test_what_is_no_image(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message):
        images.open_image(str(path))


def test_elf_headers_cut_at_every_border(tmp_path: Path) -> None:
    path = tmp_path / "core"
    whole = elf_core([(0, page(1), PAGE)], xnum=True)
    for size in range(1, 64 + 56 * 2 + 64):
        path.write_bytes(whole[:size])
        with pytest.raises(ImageError):
            images.open_image(str(path))
    for at in (32, 40):  # e_phoff, e_shoff far past the end
        path.write_bytes(whole[:at] + b"\xff" * 8 + whole[at + 8 :])
        with pytest.raises(ImageError, match="truncated"):
            images.open_image(str(path))
    segment = 64 + 56 + 32  # p_filesz of the first PT_LOAD
    path.write_bytes(whole[:segment] + b"\xff" * 8 + whole[segment + 8 :])
    with pytest.raises(ImageError, match="past the end of the address space"):
        images.open_image(str(path))


def test_a_forced_format(make_raw: MakeImage, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"KDUMP   " + page(1)[8:])
    assert read(path, format="raw") == [(0, b"KDUMP   " + page(1)[8:])]
    packed = gzip.compress(page(1)).ljust(PAGE, b"\0")
    path.write_bytes(packed)
    assert read(path, format="raw") == [(0, packed)]
    with pytest.raises(ImageError, match="does not start like elf"):
        images.open_image(str(path), format="elf")
    with pytest.raises(SettingsError, match="arrow, elf, kdump"):
        images.open_image(str(path), format="limy")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageReadError, match="No such file"):
        images.open_image(str(tmp_path / "none"))
    with pytest.raises(ImageReadError, match="not a regular file"):
        images.open_image(str(tmp_path))


@pytest.mark.parametrize("count", [4, 600])
def test_pages_that_vanish_are_holes_not_a_crash(make_raw: MakeImage, count: int) -> None:
    path = make_raw("a.raw", [page(n) for n in range(count)])
    image = images.open_image(str(path))
    os.truncate(path, (count - 2) * PAGE)  # a mapping of the last two pages would now be SIGBUS
    items = list(image.batches(0, count))
    assert sum(len(item) for item in items if not isinstance(item, Hole)) == count - 2
    assert [item for item in items if isinstance(item, Hole)] == [Hole((count - 2) * PAGE, 2, "unreadable")]


def test_an_arrow_image_that_becomes_shorter_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = arrow_image(tmp_path / "x.arrow", [(n * PAGE, page(n), 1) for n in range(12)], batch=12)
    image = images.open_image(str(path))
    os.truncate(path, 6 * PAGE)
    with pytest.raises(ImageReadError, match="became shorter"):
        list(image.batches(0, 12))


@pytest.mark.parametrize("failing", [(), (3, 7)])
def test_contents_that_cannot_be_mapped_are_read_page_by_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...]
) -> None:
    """A kernel before 5.14, and a disk that fails for some pages: what is lost is a hole, the rest is read."""
    rows = [(n * PAGE, page(n) if n % 4 else None, eligible("zero_mapped") if n % 4 == 0 else 1) for n in range(12)]
    path = arrow_image(tmp_path / "x.arrow", rows, batch=12)
    content_at = path.read_bytes().index(page(1))
    lost = {content_at + (n - n // 4 - 1) * PAGE for n in failing}
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if any(offset <= at < offset + len(buffers[0]) for at in lost):
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(arrow, "populate", lambda *_: False)
    monkeypatch.setattr(os, "preadv", preadv)
    got = sorted(read(path), key=lambda row: row[0])
    assert [address for address, _ in got] == [n * PAGE for n in range(12)]
    assert dict(got) == {n * PAGE: None if n in failing else content for n, (_, content, _) in enumerate(rows)}


@pytest.mark.parametrize("page_size", [16384, 65536])
def test_other_page_sizes(tmp_path: Path, page_size: int) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(page_size) * 2 + page(1) * (page_size // PAGE) * 3)
    run: Any = ksmdist.run([path], tmp_path / "out", Settings(page_size=page_size))
    assert run.summary["pages"]["zero"] == 2
    assert run.summary["pages"]["duplicate"] == 3
    assert run.summary["merges"]["saved_bytes"] == 3 * page_size


def test_an_arrow_image_is_read_with_no_copy(tmp_path: Path) -> None:
    path = arrow_image(tmp_path / "x.arrow", [(n * PAGE, page(n), 1) for n in range(8)])
    image = images.open_image(str(path))
    assert isinstance(image, arrow.ArrowImage)
    mapped = range(image._file.address, image._file.address + image._file.size)
    for batch in image.batches(0, 8):
        assert isinstance(batch, pa.RecordBatch)
        assert batch.column("content").buffers()[2].address in mapped
        assert batch.column("address").buffers()[1].address in mapped


@pytest.mark.parametrize(("old", "new"), [(b"[heap]", b"\xff\xfeeap]"), (b"frame", b"\xfframe")])
def test_names_that_are_no_utf8(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = arrow_image(tmp_path / "x.arrow", [(0, page(1), 1, None, "[heap]", 0)])
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ImageError):
        images.open_image(str(path))


def test_two_truncated_segments_that_share_pages(tmp_path: Path) -> None:
    path = tmp_path / "core"
    core = elf_core([(0, bytes(0x3500), 0x3500), (0x1000, bytes(0x3000), 0x3000)])
    path.write_bytes(core[: 64 + 56 * 3 + 30])
    image = images.open_image(str(path))
    assert image.info.pages == 0
    assert [(hole.address, hole.pages) for hole in image.holes] == [(0, 4)]


def test_a_page_is_not_made_of_two_segments_that_both_have_it(tmp_path: Path) -> None:
    path = tmp_path / "core"
    whole = elf_core([(0, page(1), PAGE), (0, page(2), PAGE)])
    start = whole.index(page(1))
    offsets = [len(whole) - 1, start + PAGE]
    path.write_bytes(
        elf_core([(0, page(1), PAGE), (0, page(2), PAGE)], offsets=offsets).ljust(start, b"\0") + whole[start:]
    )
    assert read(path) == [(0, page(2))]
