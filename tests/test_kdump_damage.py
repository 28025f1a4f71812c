"""kdumps that are cut off, damaged, or lie: an error, or holes, and never another page."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmdist import images
from ksmdist.errors import ImageError, SettingsError
from ksmdist.images import Hole
from ksmdist.images.kdump import KdumpImage

from .conftest import PAGE, page
from .kdump_files import (
    FLAGS,
    PAGES,
    borders,
    flattened,
    kdump,
    packer,
    written,
)
from .readers import exercise, pages_of


def test_a_dump_cut_off_anywhere(tmp_path: Path) -> None:
    pages = {n: PAGES[n] for n in (0, 1, 2, 42, 44, 45)}
    whole = kdump(pages, range(50), dump_level=1)
    cuts = borders(whole)
    table = cuts.index(4 * PAGE)
    for size in sorted({size + d for size in cuts for d in (-1, 0, 1) if 0 <= size + d < len(whole)}):
        found = exercise(written(tmp_path, whole[:size]))
        if size < cuts[table]:
            assert isinstance(found, ImageError), size
            continue
        assert not isinstance(found, ImageError), size
        assert list(found) == [n * PAGE for n in sorted(pages)]
        assert all(content in (None, pages[at // PAGE]) for at, content in found.items())
        kept = [n for n in sorted(pages) if _data_end(whole, sorted(pages).index(n)) <= size]
        assert [at // PAGE for at, content in found.items() if content is not None] == kept


def _data_end(dump: bytes, number: int) -> int:
    offset, nbytes = struct.unpack_from("<QI", dump, 4 * PAGE + 24 * number)
    return int(offset + nbytes)


def reasons(path: Path) -> dict[int, str]:
    """The page frame number of each hole, and why."""
    image = images.open_image(str(path))
    found: dict[int, str] = {}
    for item in image.batches(0, image.info.pages):
        if isinstance(item, Hole):
            found |= {item.address // PAGE + n: item.reason for n in range(item.pages)}
    image.close()
    return found


START = 5 * PAGE + 24 * 8  # of the pages' data, with eight pages and blocks to spare


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ((0, 0, 0), "truncated"),
        ((0, PAGE, 1), "truncated"),
        ((1 << 40, 100, 1), "truncated"),
        ((1 << 62, PAGE, 0), "truncated"),
        (((1 << 64) - 1, 100, 1), "damaged"),
        (((1 << 63) - 2, 100, 1), "damaged"),
        ((PAGE, 100, 1), "damaged"),
        ((4 * PAGE, PAGE, 0), "damaged"),
        ((START, 0, 1), "damaged"),
        ((START, PAGE + 1, 1), "damaged"),
        ((START, (1 << 32) - 1, 1), "damaged"),
        ((START, 100, 0), "damaged"),
        ((START, PAGE, 8), "damaged"),
        ((START, PAGE, 3), "damaged"),
        ((START, PAGE, 1 << 31), "damaged"),
        ((START, 40, 1), "damaged"),
        ((START, 40, 2), "damaged"),
        ((START, 40, 4), "damaged"),
        ((START, 40, 0x20), "damaged"),
    ],
)
def test_descriptors_that_lie(tmp_path: Path, told: tuple[int, int, int], reason: str) -> None:
    pages = {n: page(n) for n in range(8)}
    path = written(tmp_path, kdump(pages, descriptors={3: told}, sub_blocks=2))
    assert pages_of(path) == {n * PAGE: None if n == 3 else page(n) for n in range(8)}
    assert reasons(path) == {3: reason}


def test_descriptors_of_one_page_and_of_parts_of_it(tmp_path: Path) -> None:
    pages = {n: page(n) for n in range(8)}
    plain = kdump(pages, compression="raw")
    at = 4 * PAGE + 24 * 8
    told = dict.fromkeys((1, 5, 7), (at + PAGE * 2, PAGE, 0)) | {3: (at + 100, PAGE, 0), 4: (at + PAGE, PAGE, 0)}
    path = written(tmp_path, kdump(pages, compression="raw", descriptors=told))
    data = plain[at:]
    expected = {n * PAGE: page(n) for n in range(8)} | {n * PAGE: page(2) for n in (1, 5, 7)}
    assert pages_of(path) == expected | {3 * PAGE: data[100 : 100 + PAGE], 4 * PAGE: page(1)}


def test_contents_of_many_pages_are_kept_up_to_a_point(tmp_path: Path) -> None:
    pages = {n: page(n) for n in range(20)}
    plain = kdump(pages, compression="raw")
    at = 4 * PAGE + 24 * 20
    told = {n: (at + (n - n % 2) * PAGE, PAGE, 0) for n in range(20)}
    path = written(tmp_path, kdump(pages, compression="raw", descriptors=told))
    assert len(plain) == path.stat().st_size
    image = images.open_image(str(path))
    assert isinstance(image, KdumpImage)
    for kept in (0, 7, 8, 9):  # threads may keep more, each at the same time
        (piece,) = image._pieces
        piece._shared.clear()
        piece._shared.update({(-n - 1, 0, 0): b"" for n in range(kept)})
        (batch,) = image.batches(0, 20)
        assert not isinstance(batch, Hole)
        assert batch.column("content").to_pylist() == [page(n - n % 2) for n in range(20)]
        assert len(piece._shared) == max(8, kept)
    image.close()


@pytest.mark.parametrize("compression", ["zlib", "lzo", "snappy", "zstd"])
def test_pages_that_unpack_to_another_size(tmp_path: Path, compression: str) -> None:
    pack = packer(compression)
    contents = [
        b"abcd" * 100,  # pyarrow's snappy gives whatever is in the buffer behind a shorter one
        bytes(PAGE - 1),
        bytes(PAGE + 1),
        bytes(1 << 20) if compression != "lzo" else bytes(1 << 18),
        b"",
    ]
    pages = {n: page(n) for n in range(8)}
    whole = kdump(pages, compression=compression)
    told, extra = {}, b""
    for number, content in enumerate(contents):
        bad = pack(content)[:PAGE]
        told[number + 1] = (len(whole) + len(extra), len(bad), FLAGS[compression])
        extra += bad
    half = pack(page(6))[: len(pack(page(6))) // 2]
    told[6] = (len(whole) + len(extra), len(half), FLAGS[compression])
    path = written(tmp_path, kdump(pages, compression=compression, descriptors=told) + extra + half)
    found = pages_of(path)
    assert found == {n * PAGE: page(n) if n in (0, 7) else None for n in range(8)}
    assert set(reasons(path).values()) == {"damaged"}


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"header_version": -1}, "header is damaged"),
        ({"header_version": 1 << 30}, "header is damaged"),
        ({"block_size": 0}, "header is damaged"),
        ({"block_size": 4095}, "header is damaged"),
        ({"block_size": 1 << 31}, "header is damaged"),
        ({"sub_hdr_size": 0}, "header is damaged"),
        ({"sub_hdr_size": (1 << 32) - 1}, "header is damaged"),
        ({"sub_hdr_size": (1 << 31) - 1}, "cut off in its bitmaps"),
        ({"bitmap_blocks": 0}, "header is damaged"),
        ({"bitmap_blocks": 1}, "cut off in its bitmaps|no pages|damaged"),
        ({"bitmap_blocks": (1 << 32) - 1}, "header is damaged"),
        ({"bitmap_blocks": 1 << 20}, "cut off in its bitmaps"),
        ({"max_mapnr_64": 1 << 36}, "header is damaged"),
        ({"max_mapnr_64": (1 << 64) - 1}, "header is damaged"),
        ({"max_mapnr_64": 40}, "page 40000 dumped, and of 40 page frames"),
        ({"max_mapnr_64": 0}, "page 40000 dumped, and of 0 page frames"),
    ],
)
def test_headers_that_lie(tmp_path: Path, fields: dict[str, int], what: str) -> None:
    for data in (kdump(PAGES, fields=fields), flattened(kdump(PAGES, fields=fields), 4096)):
        with pytest.raises(ImageError, match=what):
            images.open_image(str(written(tmp_path, data)))


def test_a_dump_of_no_pages(tmp_path: Path) -> None:
    for data in (kdump({}), kdump({}, range(100), dump_level=31)):
        with pytest.raises(ImageError, match="no pages in it"):
            images.open_image(str(written(tmp_path, data)))


def test_a_dump_of_a_32_bit_kernel(tmp_path: Path) -> None:
    head = b"KDUMP   " + struct.pack("<i", 6) + bytes(390) + bytes(10)
    head += struct.pack("<10I", 1, 4096, 1, 2, 1 << 17, 0, 0, 0, 0, 1)
    with pytest.raises(ImageError, match="of a 32-bit kernel"):
        images.open_image(str(written(tmp_path, head + bytes(8 * PAGE))))


def test_memory_that_lies_far_up_takes_no_memory_here(tmp_path: Path) -> None:
    """A server's second socket may begin at 64 TiB: a bitmap of 2 GiB, in a file that is mostly holes."""
    far = 1 << 34
    path = tmp_path / "x"
    half = -(-(far + 5) // (8 * PAGE)) * PAGE
    small = kdump({n: page(n) for n in range(4)})
    with open(path, "wb") as sink:
        fields = {"bitmap_blocks": 2 * half // PAGE, "max_mapnr_64": far + 5}
        sink.write(kdump({n: page(n) for n in range(4)}, fields=fields)[: 2 * PAGE])
        for start in (2 * PAGE, 2 * PAGE + half):
            for low in (0, far):
                sink.seek(start + low // 8)
                sink.write(b"\x0f")
        sink.seek(2 * PAGE + 2 * half)
        data = small[4 * PAGE + 24 * 4 :]
        at = 2 * PAGE + 2 * half + 24 * 8
        for number in range(8):
            offset, *rest = struct.unpack_from("<QIIQ", small, 4 * PAGE + 24 * (number % 4))
            sink.write(struct.pack("<QIIQ", offset - (4 * PAGE + 24 * 4) + at, *rest))
        sink.write(data)
    assert pages_of(path) == {n * PAGE: page(n) for n in range(4)} | {(far + n) * PAGE: page(n) for n in range(4)}


def test_a_million_pages_that_are_not_there(tmp_path: Path) -> None:
    count = 1 << 20
    bits = b"\x55" * (count // 8)
    fields = {"bitmap_blocks": 2 * len(bits) // PAGE, "max_mapnr_64": count}
    path = written(tmp_path, kdump({}, fields=fields)[: 2 * PAGE] + bits + bits)
    image = images.open_image(str(path))
    assert (image.info.pages, image.info.pages_absent) == (count // 2, 0)
    assert {item.reason for item in image.batches(5000, 9000) if isinstance(item, Hole)} == {"truncated"}
    assert len(image.ranges()) == count // 2
    assert len(pages_of(path)) == 64


Fields = st.dictionaries(
    st.sampled_from(
        [
            "header_version",
            "status",
            "block_size",
            "sub_hdr_size",
            "bitmap_blocks",
            "max_mapnr",
            "dump_level",
            "split",
            "start_pfn_64",
            "end_pfn_64",
            "max_mapnr_64",
        ]
    ),
    st.sampled_from([0, 1, 2, 3, 40, 63, 64, 4096, 40001, 65536, (1 << 31) - 1]),
    max_size=3,
)
SMALL = {n: PAGES[n] for n in (0, 1, 2, 42, 44, 45, 1024)}


@settings(max_examples=200, deadline=None)
@given(Fields, st.sampled_from(sorted(FLAGS)), st.booleans())
def test_lies_in_any_field(
    tmp_path_factory: pytest.TempPathFactory, fields: Mapping[str, int], compression: str, flat: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "lies-of-kdump"
    folder.mkdir(exist_ok=True)
    data = kdump(SMALL, range(1100), compression=compression, dump_level=31, fields=fields)
    try:
        found = exercise(written(folder, flattened(data, 3000) if flat else data))
    except SettingsError:
        assert "block_size" in fields
        return
    if not isinstance(found, ImageError) and not fields.keys() - {"status", "dump_level", "max_mapnr"}:
        assert {n: content for n, content in found.items() if n // PAGE in SMALL} == {
            n * PAGE: content for n, content in SMALL.items()
        }


WHOLE = {
    f"{compression}{' flattened' if flat else ''}": flattened(kdump(SMALL, range(1100), compression=compression), 900)
    if flat
    else kdump(SMALL, range(1100), compression=compression)
    for compression in FLAGS
    for flat in (False, True)
}


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255), st.booleans()), max_size=6),
    st.none() | st.floats(0, 1),
)
def test_changed_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    key: str,
    changes: list[tuple[float, int, bool]],
    cut_at: float | None,
) -> None:
    """Changes: anywhere, or in what the headers and descriptors say."""
    folder = tmp_path_factory.getbasetemp() / "changed-kdump"
    folder.mkdir(exist_ok=True)
    data = bytearray(WHOLE[key])
    base = 4096 + 16 if "flat" in key else 0
    told = [*range(base, base + 480), *range(base + PAGE, base + PAGE + 120), *range(base + 4 * PAGE, base + 5 * PAGE)]
    for at, value, anywhere in changes:
        place = int(at * len(data)) if anywhere else told[int(at * len(told))]
        data[place % len(data)] = value
    if cut_at is not None:
        del data[int(cut_at * len(data)) :]
    with suppress(SettingsError):  # another page size
        exercise(written(folder, bytes(data)))
