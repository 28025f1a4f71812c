"""VMware's memory files with the files that say where the memory lies, and what is wrong with them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmdist import images
from ksmdist.errors import ImageError
from ksmdist.images import Hole, Image, vmware
from ksmdist.images.files import open_file
from ksmdist.images.vmware import VMWARE, is_vmem, vmem_of

from .conftest import PAGE, ZERO, page
from .readers import Found, checked_pages, exercise, pages_of
from .stores import Proxy
from .vmware_files import OLD, PACKED_BLOCK, block, metadata, region_tags, tag, vmss

GIB4 = 1 << 20  # in pages
REGIONS = [(0, 0, 3), (GIB4, 3, 2)]
PAGES = [page(1), ZERO, page(2), page(3), page(4)]
TRUTH: Found = {n * PAGE: content for n, content in zip((0, 1, 2, GIB4, GIB4 + 1), PAGES, strict=True)}


def save(folder: Path, **contents: bytes) -> Path:
    """Write guest.vmss, guest.vmem or guest.vmsn; the first of them."""
    paths = [folder / f"guest.{ending}" for ending in contents]
    for path, data in zip(paths, contents.values(), strict=True):
        path.write_bytes(data)
    return paths[0]


def opened(path: Path, page_size: int = PAGE) -> Image:
    """The image by its reader; a .vmem file has no magic by which it were found."""
    return VMWARE.open(open_file(str(path)), page_size)


def read(path: Path) -> Found:
    image = opened(path)
    try:
        return checked_pages(image)
    finally:
        image.close()


def error(path: Path) -> str:
    with pytest.raises(ImageError) as raised:
        opened(path)
    return str(raised.value)


@pytest.mark.parametrize("ending", ["vmss", "vmsn"])
def test_the_image_is_the_same_by_either_file(tmp_path: Path, ending: str) -> None:
    metadata_path = save(tmp_path, **{ending: vmss(REGIONS), "vmem": b"".join(PAGES)})
    memory_path = tmp_path / "guest.vmem"
    assert pages_of(metadata_path) == TRUTH
    assert read(memory_path) == TRUTH
    info = opened(memory_path).info
    assert opened(metadata_path).info == info
    assert (info.path, info.format, info.kind, info.producer) == (str(memory_path), "vmware", "guest", "VMware")
    assert (info.pages, info.pages_absent, info.caveats) == (5, 0, ())
    assert [path for path, _ in info.parts] == [str(metadata_path)]


def test_regions_in_any_order_and_pages_in_none(tmp_path: Path) -> None:
    regions = [(GIB4, 1, 1), (7, 5, 0), (2, 3, 2)]
    path = save(tmp_path, vmss=vmss(regions), vmem=b"".join(PAGES))
    assert pages_of(path) == {2 * PAGE: page(3), 3 * PAGE: page(4), GIB4 * PAGE: ZERO}
    assert opened(path).info.caveats == (
        "2 pages of guest.vmem are in no region of the guest's memory, and not counted",
    )


def test_without_regions_the_memory_lies_from_0_on(tmp_path: Path) -> None:
    path = save(tmp_path, vmss=vmss([]), vmem=b"".join(PAGES))
    assert pages_of(path) == {n * PAGE: content for n, content in enumerate(PAGES)}
    save(tmp_path, vmss=metadata(tag("x", 1)))
    assert len(pages_of(path)) == 5


def test_without_metadata_the_file_is_as_raw_ones_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, vmem=b"".join(PAGES))
    assert read(path) == pages_of(path)  # which is raw
    assert opened(path).info.caveats == ()
    monkeypatch.setattr(vmware, "_PCI_HOLE", 4 * PAGE)
    assert "from 3 GiB on are places in the file" in opened(path).info.caveats[0]
    assert "is empty" in error(save(tmp_path, vmem=b""))


def test_holes_of_the_file_are_absent(tmp_path: Path) -> None:
    path = save(tmp_path, vmss=vmss([(0, 0, 40), (GIB4, 40, 24)]), vmem=b"")
    with open(tmp_path / "guest.vmem", "r+b") as sink:
        sink.write(page(1))
        sink.seek(50 * PAGE)
        sink.write(page(2))
        sink.truncate(64 * PAGE)
    assert pages_of(path) == {0: page(1), (GIB4 + 10) * PAGE: page(2)}
    assert opened(path).info.pages_absent == 62


@pytest.mark.parametrize("page_size", [16384, 65536])
def test_larger_pages(tmp_path: Path, page_size: int) -> None:
    each = page_size // PAGE
    content = b"".join(page(n) for n in range(3 * each))
    # The second page is in two regions, back to front in the file.
    regions = [(0, each // 2, each + each // 2), (each + each // 2, 0, each // 2), (GIB4, 2 * each, each - 1)]
    image = opened(save(tmp_path, vmss=vmss(regions), vmem=content), page_size)
    assert image.holes == (Hole(GIB4 * PAGE, 1, "partial_page"),)
    found = [batch for batch in image.batches(0, 2) if not isinstance(batch, Hole)]
    half = page_size // 2
    expected = content[half : half + page_size + half] + content[:half]
    assert b"".join(part for batch in found for part in batch.column("content").to_pylist()) == expected


def test_memory_in_the_metadata_file(tmp_path: Path) -> None:
    """As ESX has it, and old files, whose blocks have lengths of 4 bytes; padded so that pages are aligned, or not."""
    for padding in (0, 5, 3000):
        for regions, truth in ((REGIONS, TRUTH), ([], {n * PAGE: content for n, content in enumerate(PAGES)})):
            for magic, wide in ((0xBED3BED3, True), (OLD, False), (0xBAD1BAD1, True)):
                tags = region_tags(regions) + block("Memory", b"".join(PAGES), 0, 0, padding=padding, wide=wide)
                path = save(tmp_path, vmss=metadata(tags + tag("x", 1), magic))
                assert pages_of(path) == truth
    assert opened(path).info.path == str(path)
    (tmp_path / "guest.vmem").write_bytes(page(9) * 2)  # is the memory, if it is there
    assert pages_of(path) == {0: page(9), PAGE: page(9)}


def test_a_packed_memory_has_its_regions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, **{"vmem.gz": gzip.compress(b"".join(PAGES)), "vmss": vmss(REGIONS)})
    assert pages_of(path) == TRUTH
    info = images.open_image(str(path)).info
    assert (info.format, [part for part, _ in info.parts]) == ("vmware", [str(tmp_path / "guest.vmss")])
    assert images.reopen(info).info == info
    (tmp_path / "guest.vmss").unlink()
    monkeypatch.setattr(vmware, "_PCI_HOLE", 4 * PAGE)
    assert "from 3 GiB on are places in the file" in images.open_image(str(path)).info.caveats[0]


def test_in_a_store(s3: Proxy) -> None:
    s3.server.put("guest.vmss", vmss(REGIONS))
    s3.server.put("guest.vmem", b"".join(PAGES))
    assert pages_of(s3.uri("guest.vmss")) == TRUTH
    image = VMWARE.open(open_file(s3.uri("guest.vmem")), PAGE)
    assert checked_pages(image) == TRUTH
    assert image.info.path == s3.uri("guest.vmem")


def test_no_memory_anywhere(tmp_path: Path) -> None:
    for data in (vmss(REGIONS), metadata(block("Memory", b"", 0, 0))):
        assert "bring guest.vmem" in error(save(tmp_path, vmss=data))
    packed = metadata(block("Memory", page(1), 0, 0, kind=PACKED_BLOCK))
    assert "compressed" in error(save(tmp_path, vmss=packed))
    (tmp_path / "other").write_bytes(vmss(REGIONS))
    assert "bring the .vmem file" in error(tmp_path / "other")


def test_two_files_of_metadata(tmp_path: Path) -> None:
    path = save(tmp_path, vmss=vmss(REGIONS), vmsn=vmss(REGIONS), vmem=b"".join(PAGES))
    for each in (path, tmp_path / "guest.vmem", tmp_path / "guest.vmsn"):
        assert "both a guest.vmss and a guest.vmsn" in error(each)


def test_memory_that_is_cut_off(tmp_path: Path) -> None:
    for size in (0, 1, PAGE, 3 * PAGE + 1, 5 * PAGE - 1):
        path = save(tmp_path, vmss=vmss(REGIONS), vmem=b"".join(PAGES)[:size])
        assert pages_of(path) == TRUTH | dict.fromkeys(list(TRUTH)[size // PAGE :])
        assert {hole.reason for hole in opened(path).holes} == {"truncated"}
    tags = region_tags(REGIONS) + block("Memory", b"".join(PAGES), 0, 0)
    whole = metadata(tags)
    (tmp_path / "guest.vmem").unlink()
    path = save(tmp_path, vmss=whole[: -2 - PAGE - 5])
    assert pages_of(path) == TRUTH | dict.fromkeys(list(TRUTH)[3:])


def test_overlapping_regions(tmp_path: Path) -> None:
    path = save(tmp_path, vmss=vmss([(0, 0, 3), (1, 3, 2), (2, 5, 3)]), vmem=b"".join(PAGES) * 2)
    expected = [page(1), ZERO, page(2), ZERO, page(2)]  # what starts lower has a page first
    assert pages_of(path) == {n * PAGE: content for n, content in enumerate(expected)}
    path = save(tmp_path, vmss=vmss([(0, 0, 3), (GIB4, 2, 2)]), vmem=b"".join(PAGES))
    assert "share pages of the file" in error(path)


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        (tag("regionsCount", 1), "lacks a number"),
        (tag("regionsCount", 2**32 - 1) + region_tags(REGIONS)[18:], "lacks a number"),
        (region_tags([(2**32 - 1, 0, 2**32 - 1)])[:-4] + b"", "is cut off"),
        (tag("regionsCount", 1) + tag("regionPPN", 2**60, 0, nbytes=8), "lacks a number"),
        (
            tag("regionsCount", 1)
            + tag("regionPPN", 2**52 - 1, 0, nbytes=8)
            + tag("regionPageNum", 0, 0)
            + tag("regionSize", 1, 0),
            "lacks a number",
        ),
    ],
)
def test_regions_that_cannot_be(tmp_path: Path, tags: bytes, said: str) -> None:
    whole = metadata(tags)
    path = save(tmp_path, vmss=whole[:-2] if "cut" in said else whole, vmem=b"".join(PAGES))
    assert said in error(path)


def test_regions_far_past_the_end_are_holes(tmp_path: Path) -> None:
    path = save(tmp_path, vmss=vmss([(0, 0, 1), (2**32 - 1, 2**31, 2**31)]), vmem=page(1))
    assert opened(path).holes == (Hole((2**32 - 1) * PAGE, 2**31, "truncated"),)
    far = tag("regionsCount", 1) + tag("regionSize", 1, 0) + tag("regionPPN", 5, 0)
    path = save(tmp_path, vmss=metadata(far + tag("regionPageNum", 2**51, 0, nbytes=8)), vmem=page(1))
    assert opened(path).holes == (Hole(5 * PAGE, 1, "truncated"),)


def test_metadata_cut_off_at_every_byte(tmp_path: Path) -> None:
    whole = vmss(REGIONS)
    for size in range(4, len(whole)):
        path = save(tmp_path, vmss=whole[:size], vmem=b"".join(PAGES))
        assert "is cut off" in error(path)
    assert "does not start like" in error(save(tmp_path, vmem=page(1), vmss=b""))


def test_headers_that_lie(tmp_path: Path) -> None:
    whole = vmss(REGIONS)
    place = 12 + 80 + 64  # of the tags of the second group
    for number in (len(whole), len(whole) - 1, 2**63, 2**64 - 1):
        lie = whole[:place] + struct.pack("<Q", number) + whole[place + 8 :]
        assert "is cut off" in error(save(tmp_path, vmss=lie, vmem=page(1)))
    for number in (4097, 2**32 - 1):
        assert "groups" in error(save(tmp_path, vmss=whole[:8] + struct.pack("<I", number) + whole[12:]))
    assert "no group of that name" in error(save(tmp_path, vmss=whole.replace(b"memory\0", b"nemory\0")))
    for length in (2**63, 2**64 - 1):
        empty = block("x", b"")
        lie = metadata(tag("a", 1) + empty[:-18] + struct.pack("<QQH", length, length, 0))
        assert "is cut off" in error(save(tmp_path, vmss=lie))
    many = metadata(tag("", 1, nbytes=1) * (1 << 17))
    assert "more than" in error(save(tmp_path, vmss=many))


def test_names() -> None:
    assert is_vmem("/x/guest.vmem")
    assert is_vmem("s3://bucket/guest.vmem?region=eu")
    assert all(is_vmem(f"guest.vmem.{ending}") for ending in ("gz", "zst", "xz", "lz4"))
    assert not any(is_vmem(name) for name in ("guest.vmem.txt", "guest.vmss.gz", "vmem.gz"))
    assert (vmem_of("a-Snapshot1.vmsn"), vmem_of("a.vmss"), vmem_of("a.vmx")) == ("a-Snapshot1.vmem", "a.vmem", "")
    heads = (0xBED0BED0, 0xBED2BED0, 0xBED2BED2, 0xBED3BED3, 0xBAD1BAD1, 0xBAD2BAD2)
    assert all(VMWARE.matches(struct.pack("<I", magic) + bytes(60)) for magic in heads)
    assert not VMWARE.matches(bytes(64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vmware")


@given(data=st.data(), within=st.booleans())
@settings(max_examples=150, deadline=None)
def test_mutated_files(folder: Path, data: Any, within: bool) -> None:
    tags = region_tags(REGIONS) + block("Memory", b"".join(PAGES), 0, 0, padding=9)
    whole = bytearray(metadata(tags) if within else vmss(REGIONS))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, min(len(whole) - 9, 900)))
        if data.draw(st.booleans()):
            whole[at] = data.draw(st.integers(0, 255))
        else:
            number = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**52, 2**63, 2**64 - 1]))
            whole[at : at + 8] = struct.pack("<Q", number)
    path = save(folder, vmss=bytes(whole))
    (folder / "guest.vmem").unlink(missing_ok=True)
    if not within:
        save(folder, vmem=b"".join(PAGES))
    exercise(path)


@given(
    regions=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20), st.integers(0, 6)), max_size=6),
    size=st.integers(1, 20 * PAGE),
)
@settings(max_examples=100, deadline=None)
def test_any_regions_against_reading_page_by_page(folder: Path, regions: list[tuple[int, int, int]], size: int) -> None:
    memory = b"".join(page(n) for n in range(20))[:size]
    path = save(folder, vmss=vmss(regions), vmem=memory)
    places = [n for _, place, pages in regions for n in range(place, place + pages)]
    if len(set(places)) < len(places):
        assert "share" in error(path)
        return
    truth: Found = {}
    for address, place, pages in sorted(regions, key=lambda region: region[0]) or [(0, 0, -(-size // PAGE))]:
        for n in range(pages):
            content = memory[(place + n) * PAGE : (place + n + 1) * PAGE]
            there = content if len(content) == PAGE else None
            if truth.get(address + n) is None:
                truth[address + n] = there
    assert pages_of(path) == {address * PAGE: there for address, there in sorted(truth.items())}
