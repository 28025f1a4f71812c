"""Migration streams of QEMU and saved domains of libvirt are read as the guest's pages at their addresses."""

from __future__ import annotations

import errno
import gzip
import lzma
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmdist import images
from ksmdist.columns import codes
from ksmdist.errors import ImageError, SettingsError
from ksmdist.images import stores
from ksmdist.images.qemu_blocks import Part, RamBlock, is_device, placed
from ksmdist.images.scattered import PageRuns, RunIndex

from .conftest import PAGE, ZERO, page
from .qemu_files import (
    COMPRESS_PAGE,
    HOOK,
    MULTIFD_FLUSH,
    XBZRLE,
    Ram,
    Stream,
    mapped_ram,
    migrated,
    saved_header,
)
from .readers import Found, checked_pages, exercise, pages_of
from .stores import Proxy

GIB = 1 << 30
FILLED = b"\xcc" * PAGE
BIOS = 4 * GIB - 2 * PAGE
RAM: Ram = {
    "pc.ram": [page(n) if n % 3 else ZERO for n in range(60)]
    + [ZERO] * 50
    + [FILLED] * 3
    + [page(n) for n in range(90)],
    "0000:00:02.0/vga.vram": [page(999)] * 5,
    "pc.bios": [page(500), ZERO],
    "pc.rom": [page(501)],
}
AGAIN = [("pc.ram", 5, page(700)), ("pc.ram", 4, ZERO), ("pc.bios", 1, page(701)), ("pc.ram", 5, page(702))]
AGAIN += [("pc.ram", n, page(800 + n)) for n in range(100, 140)]
EXPECTED = {n * PAGE: content for n, content in enumerate(RAM["pc.ram"])} | {BIOS: page(500), BIOS + PAGE: ZERO}
LAST = EXPECTED | {{"pc.ram": 0, "pc.bios": BIOS}[name] + n * PAGE: content for name, n, content in AGAIN}


def _file(folder: Path, data: bytes) -> Path:
    path = folder / "guest.migrated"
    path.write_bytes(data)
    return path


def _info(path: Path) -> images.ImageInfo:
    image = images.open_image(str(path))
    image.close()
    return image.info


@pytest.mark.parametrize("part", [1, 7, 1000])
@pytest.mark.parametrize("footers", [True, False])
def test_a_page_is_what_was_sent_last(tmp_path: Path, part: int, footers: bool) -> None:
    path = _file(tmp_path, migrated(RAM, AGAIN, part, stream=Stream(footers=footers)))
    assert pages_of(path) == dict(sorted(LAST.items()))
    info = _info(path)
    assert (info.format, info.kind, info.producer, info.image_id) == ("qemu", "guest", "QEMU (pc-i440fx-7.2)", "")
    assert (info.pages, info.pages_absent, info.filter_level) == (205, 0, "")
    assert info.regions == ("pc.ram", "pc.bios")
    assert any("6 pages of devices (0000:00:02.0/vga.vram, pc.rom)" in caveat for caveat in info.caveats)


def test_a_page_has_its_block_as_region(tmp_path: Path) -> None:
    image = images.open_image(str(_file(tmp_path, migrated(RAM))))
    batches: list[Any] = list(image.batches(0, image.info.pages))
    found = np.concatenate([codes(batch.column("region")) for batch in batches])
    assert found.tolist() == [0] * 203 + [1] * 2
    image.close()


@pytest.mark.parametrize("align", [PAGE, 512, 1 << 20])
def test_mapped_ram(tmp_path: Path, align: int) -> None:
    path = _file(tmp_path, mapped_ram(RAM, align=align))
    assert pages_of(path) == EXPECTED
    assert _info(path).producer == "QEMU (pc-q35-9.2)"


def test_long_runs_of_mapped_ram_are_mapped(tmp_path: Path) -> None:
    contents = [page(n) for n in range(600)] + [ZERO] * 600
    path = _file(tmp_path, mapped_ram({"pc.ram": contents}))
    assert pages_of(path) == {n * PAGE: content for n, content in enumerate(contents)}


def test_a_page_that_became_zero_is_zero_and_not_what_is_in_the_file(tmp_path: Path) -> None:
    """QEMU clears its bit and leaves the file alone; for a page that never was other than zero the file has a hole."""
    contents = [ZERO if n % 20 in (3, 4, 9) else page(n) for n in range(1000)] + [ZERO] * 500 + [page(1)] * 40
    data = mapped_ram({"pc.ram": contents})
    start = data.index(page(0))
    path = tmp_path / "x"
    with open(path, "wb") as sink:
        sink.write(data[:start])
        for number, content in enumerate(contents):
            old = page(7) if number % 40 == 3 and content == ZERO else content
            if any(old):
                sink.seek(start + number * PAGE)
                sink.write(old)
        sink.seek(start + len(contents) * PAGE)
        sink.write(data[start + len(contents) * PAGE :])
    assert pages_of(path) == {n * PAGE: content for n, content in enumerate(contents)}


def test_a_background_snapshot_has_no_end_but_devices(tmp_path: Path) -> None:
    path = _file(tmp_path, migrated(RAM, ended=False))
    assert pages_of(path) == EXPECTED


def test_a_stream_without_configuration(tmp_path: Path) -> None:
    path = _file(tmp_path, migrated(RAM, machine=""))
    assert pages_of(path) == EXPECTED
    assert _info(path).producer == "QEMU"


def test_free_pages_are_absent(tmp_path: Path) -> None:
    path = _file(tmp_path, migrated(RAM, left_out=[("pc.ram", 3), ("pc.ram", 4), ("pc.rom", 0)]))
    assert pages_of(path) == {at: content for at, content in EXPECTED.items() if at not in (3 * PAGE, 4 * PAGE)}
    info = _info(path)
    assert (info.pages_absent, info.pages_excluded) == (2, 2)
    assert "free" in info.filter_level


def test_shared_ram_that_was_left_out_is_missing(tmp_path: Path) -> None:
    left_out = [("pc.ram", n) for n in range(203)]
    path = _file(tmp_path, migrated(RAM, left_out=left_out, capabilities=["x-ignore-shared"]))
    assert pages_of(path) == {n * PAGE: None for n in range(203)} | {BIOS: page(500), BIOS + PAGE: ZERO}
    image = images.open_image(str(path))
    assert [(hole.address, hole.pages, hole.reason) for hole in image.holes] == [(0, 203, "missing")]
    image.close()
    with pytest.raises(ImageError, match="x-ignore-shared"):
        pages_of(_file(tmp_path, migrated({"pc.ram": [ZERO]}, left_out=left_out, capabilities=["x-ignore-shared"])))


def test_shared_ram_of_mapped_ram_has_no_place(tmp_path: Path) -> None:
    ram = {"pc.ram": [ZERO] * 3, "pc.bios": [page(1), page(2)]}
    path = _file(tmp_path, mapped_ram(ram, shared=["pc.ram"]))
    assert pages_of(path) == {0: None, PAGE: None, 2 * PAGE: None, BIOS: page(1), BIOS + PAGE: page(2)}


def _zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data))


PACKED: dict[int, Callable[[bytes], bytes]] = {0: bytes, 1: gzip.compress, 3: lzma.compress, 5: _zstd}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("format", PACKED)
def test_a_saved_domain(tmp_path: Path, format: int, order: str) -> None:
    path = _file(tmp_path, saved_header(format, order=order) + PACKED[format](migrated(RAM)))
    assert pages_of(path) == EXPECTED
    info = _info(path)
    assert (info.producer, info.image_id, info.nbytes) == ("libvirt, domain web-1", "", path.stat().st_size)
    again = images.reopen(info)
    assert again.info == info
    again.close()


def test_a_saved_domain_that_is_sparse(tmp_path: Path) -> None:
    head = saved_header(6)
    path = _file(tmp_path, head + mapped_ram(RAM, Stream(len(head))))
    assert pages_of(path) == EXPECTED


def test_a_saved_domain_whose_saving_has_not_ended(tmp_path: Path) -> None:
    path = _file(tmp_path, saved_header(magic=b"LibvirtQemudPart", xml=b"<domain/>") + migrated(RAM)[:100000])
    info = _info(path)
    assert info.producer == "libvirt"
    assert any("had not ended" in caveat for caveat in info.caveats)
    assert None in pages_of(path).values()


@pytest.mark.parametrize(("format", "tool"), [(2, "bzip2"), (4, "lzop"), (9, "unknown"), (1, "gzip")])
def test_what_of_libvirt_is_not_read_says_so(tmp_path: Path, format: int, tool: str) -> None:
    with pytest.raises(ImageError, match=tool):
        pages_of(_file(tmp_path, saved_header(format) + b"LZO?" + migrated(RAM)))


def test_packed_and_sent_again_is_read_only_unpacked(tmp_path: Path) -> None:
    path = _file(tmp_path, gzip.compress(migrated(RAM)))
    assert pages_of(path) == EXPECTED
    again = [("pc.ram", n, page(n + 1)) for n in range(199, 0, -1)]
    with pytest.raises(ImageError, match="unpack it"):
        pages_of(_file(tmp_path, gzip.compress(migrated(RAM, again))))


def test_pages_of_another_size_are_refused(tmp_path: Path) -> None:
    path = _file(tmp_path, migrated({"mach-virt.ram": [page(1) * 4] * 3}, machine="virt-9.2", page_size=16384))
    with pytest.raises(SettingsError, match="--page-size 16384"):
        images.open_image(str(path))
    image = images.open_image(str(path), 16384)
    assert (image.ranges() == [[GIB, GIB + 3 * 16384]]).all()
    assert image.info.pages == 3
    image.close()


@pytest.mark.parametrize("size", [1 << 12, 1 << 13, 40961])
def test_windows_that_end_anywhere(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksmdist.images.qemu_bytes._FIRST_BYTES", size)
    monkeypatch.setattr("ksmdist.images.qemu_bytes._WINDOW_BYTES", size)
    monkeypatch.setattr("ksmdist.images.qemu_records._PENDING", 10)
    monkeypatch.setattr("ksmdist.images.scattered._BLOCK_BYTES", 16 * PAGE)
    assert pages_of(_file(tmp_path, migrated(RAM, AGAIN, 1000))) == dict(sorted(LAST.items()))


def test_an_object_in_a_store(tmp_path: Path, s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "RULES", replace(stores.RULES, block_bytes=64 << 10))
    for data, expected in ((migrated(RAM, AGAIN), LAST), (mapped_ram(RAM), EXPECTED)):
        s3.server.put("guest", data)
        assert pages_of(s3.uri("guest")) == dict(sorted(expected.items()))


def _blocks(*sizes: tuple[str, int]) -> list[RamBlock]:
    return [RamBlock(name, nbytes, 0) for name, nbytes in sizes]


@pytest.mark.parametrize(
    ("machine", "blocks", "parts"),
    [
        ("pc-i440fx-7.2", [("pc.ram", 0xDFFFF000)], [(0, 0, 0xDFFFF000, 0)]),
        ("pc-i440fx-7.2", [("pc.ram", 0xE0000000)], [(0, 0, 3 * GIB, 0), (0, 3 * GIB, 0xE0000000, 4 * GIB)]),
        ("pc-i440fx-1.4", [("pc.ram", 4 * GIB)], [(0, 0, 0xE0000000, 0), (0, 0xE0000000, 4 * GIB, 4 * GIB)]),
        ("pc-q35-9.2", [("ram", 0xAFFFF000)], [(0, 0, 0xAFFFF000, 0)]),
        ("pc-q35-9.2", [("ram", 0xB0000000)], [(0, 0, 2 * GIB, 0), (0, 2 * GIB, 0xB0000000, 4 * GIB)]),
        ("microvm", [("microvm.ram", 3 * GIB)], [(0, 0, 3 * GIB, 0)]),
        ("microvm", [("microvm.ram", 4 * GIB)], [(0, 0, 3 * GIB, 0), (0, 3 * GIB, 4 * GIB, 4 * GIB)]),
        ("virt-9.2", [("mach-virt.ram", 8 * GIB)], [(0, 0, 8 * GIB, GIB)]),
        ("virt", [("riscv_virt_board.ram", GIB)], [(0, 0, GIB, 2 * GIB)]),
        ("s390-ccw-virtio-9.2", [("s390.ram", 8 * GIB)], [(0, 0, 8 * GIB, 0)]),
        (  # by NUMA nodes, whatever their order
            "pc-i440fx-7.2",
            [("ram-node1", 3 * GIB), ("ram-node0", GIB)],
            [(1, 0, GIB, 0), (0, 0, 2 * GIB, GIB), (0, 2 * GIB, 3 * GIB, 4 * GIB)],
        ),
        (  # DIMMs larger than the RAM
            "pc-q35-9.2",
            [("dimm1", 2 * GIB), ("dimm2", 2 * GIB), ("pc.ram", GIB), ("pc.bios", 1 << 18)],
            [
                (2, 0, GIB, 0),
                (3, 0, 1 << 18, 4 * GIB - (1 << 18)),
                (0, 0, 2 * GIB, 4 * GIB),
                (1, 0, 2 * GIB, 6 * GIB),
            ],
        ),
        ("none", [("big", 5 * GIB), ("pc.bios", 4096)], [(0, 0, 5 * GIB, 0), (1, 0, 4096, 5 * GIB)]),
        ("none", [("/rom@etc/acpi/tables", 4096)], []),
    ],
)
def test_where_blocks_lie(machine: str, blocks: list[tuple[str, int]], parts: list[tuple[int, ...]]) -> None:
    assert placed(machine, _blocks(*blocks)) == [Part(*part) for part in parts]


def test_which_blocks_are_of_devices() -> None:
    memory = ["pc.ram", "pc.bios", "/objects/mem0", "ram-node0", "memdimm3", "ppc_spapr.ram", "mem1"]
    devices = ["0000:00:02.0/vga.vram", "vga.vram", "/rom@etc/acpi/tables", "pc.rom", "system.flash0", "virt.flash1"]
    assert [name for name in memory if is_device(name)] == []
    assert [name for name in devices if not is_device(name)] == []


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 30), st.one_of(st.integers(0, 40), st.just(-2))), max_size=12), max_size=12
    )
)
def test_the_last_time_counts(writes: list[list[tuple[int, int]]]) -> None:
    index, truth = RunIndex(10, "x"), {}
    for some in writes:
        pages, offsets = np.array(some, np.int64).reshape(-1, 2).T
        index.add(pages, np.where(offsets < 0, offsets, offsets * 10))
        truth.update({n: offset if offset < 0 else offset * 10 for n, offset in some})
    runs = index.runs()
    assert (runs.page[1:] >= (runs.page + runs.count)[:-1]).all()
    assert _single(runs) == dict(sorted(truth.items()))
    cut = runs.cut(7, 21)
    assert _single(cut) == {n: offset for n, offset in sorted(truth.items()) if 7 <= n < 21}
    gaps = {n for start, end in cut.gaps(7, 21).tolist() for n in range(start, end)}
    assert gaps == set(range(7, 21)) - truth.keys()


def _single(runs: PageRuns) -> dict[int, int]:
    rows = zip(*(column.tolist() for column in (runs.page, runs.count, runs.offset, runs.step)), strict=True)
    return {page + k: offset + k * step for page, count, offset, step in rows for k in range(count)}


@pytest.mark.parametrize(
    ("flag", "capability"),
    [(XBZRLE, "xbzrle"), (COMPRESS_PAGE, "compress"), (HOOK, "rdma"), (MULTIFD_FLUSH, "multifd")],
)
def test_what_only_qemu_can_read_names_the_capability(tmp_path: Path, flag: int, capability: str) -> None:
    stream = Stream()
    stream.begin()
    stream.listed(RAM)
    stream.number("record", 8, flag)
    with pytest.raises(ImageError, match=capability):
        pages_of(_file(tmp_path, stream.finish()))


def test_postcopy_and_live_devices_are_refused(tmp_path: Path) -> None:
    stream = Stream()
    stream.begin()
    data = bytes(stream.data)
    start = data.index(b"\1\0\0\0\2\3ram")
    postcopy = data[:start] + struct.pack(">BHH", 8, 3, 16) + bytes(16)
    with pytest.raises(ImageError, match="postcopy-ram"):
        pages_of(_file(tmp_path, postcopy + data[start:]))
    for kind in (1, 4):
        device = struct.pack(">BIB5sII", kind, 1, 5, b"block", 0, 1)
        with pytest.raises(ImageError, match="block"):
            pages_of(_file(tmp_path, data[:start] + device + data[start:]))
    pings = struct.pack(">BHHI", 8, 2, 4, 1)
    assert isinstance(exercise(_file(tmp_path, data[:start] + pings + migrated(RAM)[start:])), dict)


def test_multifd_with_mapped_ram_is_read(tmp_path: Path) -> None:
    data = mapped_ram(RAM)
    at = data.rindex(struct.pack(">Q", 0x10))
    path = _file(tmp_path, data[:at] + struct.pack(">Q", MULTIFD_FLUSH) + data[at:])
    assert pages_of(path) == EXPECTED


SMALL: Ram = {"pc.ram": [page(1), ZERO, page(2), FILLED, page(3)], "pc.bios": [page(4)]}
BIOS1 = 4 * GIB - PAGE
SMALL_EXPECTED = {n * PAGE: content for n, content in enumerate(SMALL["pc.ram"])} | {BIOS1: page(4)}


def _borders(stream: Stream, length: int) -> list[int]:
    edges = sorted({edge for at, nbytes in stream.fields.values() for edge in (at, at + nbytes)})
    return sorted({cut for edge in edges for cut in (edge - 1, edge, edge + 1) if 0 < cut <= length})


def test_a_stream_that_is_cut_off_has_holes(tmp_path: Path) -> None:
    stream = Stream()
    data = migrated(SMALL, [("pc.ram", 0, page(5))], 2, stream=stream)
    listed = stream.fields["bytes of pc.bios"][0] + 8
    ended = stream.fields["end"][0] + 8
    for cut in [*_borders(stream, len(data)), *range(listed, len(data), 1000)]:
        found = exercise(_file(tmp_path, data[:cut]))
        if cut < listed:
            assert isinstance(found, ImageError), cut
            continue
        assert isinstance(found, dict), cut
        assert found.keys() == SMALL_EXPECTED.keys()
        assert all(content in (None, SMALL_EXPECTED[at], page(5)) for at, content in found.items())
        if cut >= ended:
            assert None not in found.values()
    cuts = range(listed, ended, 500)
    counts = [sum(content is not None for content in pages_of(_file(tmp_path, data[:cut])).values()) for cut in cuts]
    assert all(before <= after for before, after in pairwise(counts))
    assert (counts[0], counts[-1]) == (0, len(SMALL_EXPECTED))


def test_mapped_ram_that_is_cut_off_has_holes(tmp_path: Path) -> None:
    stream = Stream()
    data = mapped_ram(SMALL, stream)
    known = stream.fields["pages of pc.ram"][0] + 8
    for cut in [*_borders(stream, len(data)), *range(known, len(data), 1000)]:
        found = exercise(_file(tmp_path, data[:cut]))
        if cut < known:
            assert isinstance(found, ImageError), cut
            continue
        assert isinstance(found, dict)
        assert all(content in (None, SMALL_EXPECTED[at]) for at, content in found.items())
        if cut < stream.fields["end"][0] + 8:  # zeros are not known before RAM has ended
            assert found[PAGE] is None
        if cut < stream.fields["length of pc.bios"][0]:
            assert any(
                "blocks that it does not name" in caveat for caveat in _info(tmp_path / "guest.migrated").caveats
            )


def _answer(path: Path) -> Found | ImageError | None:
    """What the reader has to say; None: that pages have another size."""
    try:
        return exercise(path)
    except SettingsError:
        return None


EXTREMES = (0, 1, 0x7F, 0xFFF, 0x1000, (1 << 31) - 1, 1 << 31, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


@pytest.mark.parametrize("kind", ["stream", "mapped"])
def test_lies_in_each_number(tmp_path: Path, kind: str) -> None:
    stream = Stream()
    data = migrated(SMALL, stream=stream) if kind == "stream" else mapped_ram(SMALL, stream)
    for at, nbytes in stream.fields.values():
        for value in (*EXTREMES, int.from_bytes(data[at : at + nbytes], "big") + PAGE):
            lie = (value & (1 << 8 * nbytes) - 1).to_bytes(nbytes, "big")
            path = _file(tmp_path, data[:at] + lie + data[at + nbytes :])
            _answer(path)


def _claim(blocks: list[tuple[bytes, int]], total: int) -> bytes:
    stream = Stream()
    stream.begin()
    data = bytes(stream.data) + struct.pack(">Q", total | 4)
    return data + b"".join(bytes([len(name)]) + name + struct.pack(">Q", nbytes) for name, nbytes in blocks)


def test_huge_blocks_take_no_memory(tmp_path: Path) -> None:
    record = struct.pack(">QB6s", (1 << 45) | 8, 6, b"pc.ram") + page(1)
    path = _file(tmp_path, _claim([(b"pc.ram", 1 << 46)], 1 << 46) + record)
    image = images.open_image(str(path))
    assert image.info.pages == 1
    assert sum(hole.pages for hole in image.holes) == (1 << 34) - 1
    assert (image.ranges() == [[(1 << 45) + GIB, (1 << 45) + GIB + PAGE]]).all()
    image.close()


def test_more_ram_than_there_is_is_refused(tmp_path: Path) -> None:
    """A sparse file of mapped-ram may have bitmaps of any size, all clear, and each bit would be looked at."""
    data = mapped_ram({"pc.ram": [ZERO]})
    for number in ((1 << 46) + PAGE, 1 << 58):
        lie = data.replace(struct.pack(">Q", PAGE | 4), struct.pack(">Q", number | 4))
        with pytest.raises(ImageError, match="lists"):
            pages_of(_file(tmp_path, lie))


@pytest.mark.parametrize("blocks", [["pc.ram"], ["pc.ram", "mem1"]])
def test_more_runs_than_can_be_indexed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: list[str]
) -> None:
    each = 64 // len(blocks)
    path = _file(tmp_path, mapped_ram({name: [page(1), ZERO] * (each // 2) for name in blocks}))
    monkeypatch.setattr("ksmdist.images.qemu.MOST_RUNS", 64)
    assert len(pages_of(path)) == 64
    monkeypatch.setattr("ksmdist.images.qemu.MOST_RUNS", 63)
    with pytest.raises(ImageError, match="more than 63 runs"):
        pages_of(path)


def test_a_read_that_fails_once_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes its place is what is in the file, and not what was in the buffer before."""
    path = _file(tmp_path, migrated(RAM, AGAIN))
    real = os.preadv
    for failing in range(1, 12):
        calls = iter(range(1, 1 << 20))

        def preadv(fd: int, buffers: Any, offset: int, failing: int = failing, calls: Any = calls) -> int:
            if next(calls) == failing:
                raise OSError(errno.EIO, "x")
            return real(fd, buffers, offset)

        with monkeypatch.context() as patch:
            patch.setattr("ksmdist.images.qemu_bytes.os.preadv", preadv)
            image = images.open_image(str(path))
        assert checked_pages(image) == dict(sorted(LAST.items()))
        image.close()


@pytest.mark.parametrize(
    "blocks",
    [
        [(b"a", 1 << 61), (b"b", 1 << 61)],
        [(b"a", PAGE), (b"a", PAGE)],
        [(b"a", 3 * PAGE)],
        [(b"", PAGE)],
        [(b"a", 100)],
        [(b"%d" % n, 0) for n in range(100_000)],
        [(b"%d" % n, PAGE) for n in range(5000)],
        [(b"\xff\0/rom", 2 * PAGE)],
    ],
)
def test_lists_of_blocks_that_cannot_be(tmp_path: Path, blocks: list[tuple[bytes, int]]) -> None:
    total = max(2 * PAGE, sum(nbytes for _, nbytes in blocks)) if len(blocks) > 1 else 2 * PAGE
    assert isinstance(exercise(_file(tmp_path, _claim(blocks, total) + struct.pack(">Q", 0x10))), ImageError)


@pytest.mark.parametrize("name", [b"pc.ram", b"nothing"])
def test_records_outside_of_their_block(tmp_path: Path, name: bytes) -> None:
    record = struct.pack(">QB", 2 * PAGE | 2, len(name)) + name + b"\0"
    data = _claim([(b"pc.ram", 2 * PAGE)], 2 * PAGE)
    with pytest.raises(ImageError, match="block"):
        pages_of(_file(tmp_path, data + record))
    with pytest.raises(ImageError, match="outside"):  # CONTINUE, of no block
        pages_of(_file(tmp_path, data + struct.pack(">QB", 0x22, 0)))
    many = struct.pack(">QB6sB", 2, 6, b"pc.ram", 0) + struct.pack(">QB", 0x22, 0) * 100
    with pytest.raises(ImageError, match="outside"):
        pages_of(_file(tmp_path, data + many + struct.pack(">QB", 2 * PAGE | 0x22, 0) * 100))


def test_a_stream_of_nothing_but_parts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksmdist.images.qemu_stream._MOST_PARTS", 1000)
    data = _claim([(b"pc.ram", PAGE)], PAGE) + struct.pack(">Q", 0x10)
    with pytest.raises(ImageError, match="parts"):
        pages_of(_file(tmp_path, data + struct.pack(">BIQ", 2, 2, 0x10) * 2000))


def test_an_index_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksmdist.images.qemu_records._PENDING", 4)
    with monkeypatch.context() as patch:
        patch.setattr("ksmdist.images.scattered.MOST_RUNS", 20)
        with pytest.raises(ImageError, match="runs"):
            pages_of(_file(tmp_path, migrated(RAM)))
    data = migrated(RAM, left_out=[("pc.ram", n) for n in range(1, 100, 2)])
    monkeypatch.setattr("ksmdist.images.qemu._MOST_HOLES", 20)
    assert isinstance(exercise(_file(tmp_path, data)), dict)
    with pytest.raises(ImageError, match="pieces"):
        pages_of(_file(tmp_path, data[: len(data) // 2]))


@pytest.mark.parametrize("cut", [0, 4, 16, 91, 92, 93, 200, 400])
def test_a_saved_domain_that_is_cut_off(tmp_path: Path, cut: int) -> None:
    assert isinstance(exercise(_file(tmp_path, (saved_header() + migrated(SMALL))[:cut])), ImageError)


FILES = {
    "stream": migrated(SMALL, [("pc.ram", 0, page(5))], 2),
    "mapped": mapped_ram(SMALL),
    "saved": saved_header() + migrated(SMALL),
    "sparse": saved_header(6) + mapped_ram(SMALL, Stream(len(saved_header()))),
    "gzip": saved_header(1) + gzip.compress(migrated(SMALL)),
}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutations_give_pages_or_an_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(FILES[data.draw(st.sampled_from(sorted(FILES)))])
    for _ in range(data.draw(st.integers(1, 4))):
        near = data.draw(st.sampled_from((300, 600, len(content))))
        at = data.draw(st.integers(8, max(8, min(near, len(content)) - 8)))
        width = data.draw(st.sampled_from((1, 4, 8)))
        value = data.draw(st.one_of(st.sampled_from(EXTREMES), st.integers(0, (1 << 64) - 1)))
        content[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "big")
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = _file(tmp_path_factory.getbasetemp(), bytes(content))
    _answer(path)


def test_a_disk_that_fails_gives_holes(tmp_path: Path) -> None:
    path = _file(tmp_path, migrated(SMALL))
    image = images.open_image(str(path))
    with path.open("r+b") as file:
        file.truncate(8000)  # what was there at opening
    found: list[Any] = list(image.batches(0, image.info.pages))
    lost = {(hole.address, hole.reason) for hole in found if isinstance(hole, images.Hole)}
    assert lost == {(4 * PAGE, "unreadable"), (2 * PAGE, "unreadable"), (BIOS1, "unreadable")}
    assert sum(item.num_rows for item in found if not isinstance(item, images.Hole)) == 3
    image.close()
