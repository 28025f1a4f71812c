"""LiME and AVML: ranges of physical memory, plain and packed, and what is wrong with them."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmdist import images
from ksmdist.errors import ImageError
from ksmdist.images import Hole, segments

from .conftest import PAGE, ZERO, page, random_pages
from .lime_files import CHUNK, IDENTIFIER, Range, avml_file, chunk, crc32c, lime_file, lime_header
from .readers import Found, exercise, pages_of
from .stores import Proxy

MAKERS = {"lime": lime_file, "avml": avml_file}
Make = Callable[[list[Range]], bytes]

SOME = [page(n) for n in range(20)] + random_pages(np.random.default_rng(1), 20) + [ZERO] * 4 + [page(3)]
RAGGED: list[Range] = [
    (0x100000, b"".join(SOME)),
    (0x1000, b"".join(SOME[:5]) + SOME[5][:100]),
    (0x6064, SOME[5][100:] + SOME[6][:7]),
]
TRUTH: Found = {
    **{(n + 1) * PAGE: content for n, content in enumerate(SOME[:6])},
    0x7000: None,  # seven bytes of it
    **{0x100000 + n * PAGE: content for n, content in enumerate(SOME)},
}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Make:
    maker: Make = MAKERS[request.param]
    return maker


def save(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def error(tmp_path: Path, data: bytes) -> str:
    with pytest.raises(ImageError) as raised:
        images.open_image(str(save(tmp_path / "bad", data)))
    return str(raised.value)


def test_the_checksum_of_the_maker() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


def test_ranges_in_any_order_that_begin_and_end_within_pages(tmp_path: Path, make: Make) -> None:
    assert pages_of(save(tmp_path / "x", make(RAGGED))) == TRUTH


def test_what_is_known_of_them(tmp_path: Path) -> None:
    for name, producer in (("lime", "LiME"), ("avml", "AVML")):
        info = images.open_image(str(save(tmp_path / name, MAKERS[name](RAGGED)))).info
        assert (info.format, info.kind, info.producer, info.pages) == (name, "guest", producer, len(TRUTH) - 1)
        assert ("zeros are left out" in info.filter_level) == (name == "avml")
        assert any("moments" in caveat for caveat in info.caveats)


def test_blocks_as_avml_writes_lime(tmp_path: Path) -> None:
    block = bytes(16 << 20)
    info = images.open_image(str(save(tmp_path / "x", lime_file([(0, block), (16 << 20, page(1))])))).info
    assert info.producer == "AVML"
    assert "zeros are left out" in info.filter_level


def test_a_block_of_avml_with_none_beside_it(tmp_path: Path) -> None:
    """Where those around it were zeros, and are left out: still a filter, which is said."""
    ranges = [(0, page(1)), (1 << 20, bytes(16 << 20)), (1 << 26, page(2) * 3)]
    info = images.open_image(str(save(tmp_path / "x", lime_file(ranges)))).info
    assert info.producer == "AVML"
    assert "zeros are left out" in info.filter_level


def test_what_lime_could_not_read_is_said(tmp_path: Path) -> None:
    for name in MAKERS:
        info = images.open_image(str(save(tmp_path / name, MAKERS[name](RAGGED)))).info
        assert any("could not read" in caveat for caveat in info.caveats) == (name == "lime")


def test_more_ranges_than_anything_writes(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lime", "avml"):
        monkeypatch.setattr(f"ksmdist.images.{module}.MOST_RANGES", 5)
    ranges = [(2 * n * PAGE, page(n)) for n in range(6)]
    assert len(pages_of(save(tmp_path / "x", make(ranges[:5])))) == 5
    assert "more than 5 ranges" in error(tmp_path, make(ranges))


def test_a_page_in_two_ranges_counts_once(tmp_path: Path, make: Make) -> None:
    ranges = [(2 * PAGE, page(1) + page(2)), (0, page(3) * 3), (3 * PAGE, page(4) * 2)]
    assert pages_of(save(tmp_path / "x", make(ranges))) == {
        0: page(3),
        PAGE: page(3),
        2 * PAGE: page(3),
        3 * PAGE: page(2),
        4 * PAGE: page(4),
    }


def test_a_page_in_many_pieces(tmp_path: Path, make: Make) -> None:
    cuts = [0, 1, 99, 100, 4000, 4096 + 17, 3 * PAGE - 1, 3 * PAGE]
    whole = page(1) + page(2) + page(3)
    ranges = [(low, whole[low:high]) for low, high in pairwise(cuts)]
    assert pages_of(save(tmp_path / "x", make(ranges[::-1]))) == {0: page(1), PAGE: page(2), 2 * PAGE: page(3)}


@pytest.mark.parametrize("page_size", [16384, 65536])
def test_larger_pages(tmp_path: Path, make: Make, page_size: int) -> None:
    content = b"".join(SOME[:32])
    image = images.open_image(str(save(tmp_path / "x", make([(page_size, content)]))), page_size)
    (batch,) = image.batches(0, image.info.pages)
    assert not isinstance(batch, Hole)
    assert b"".join(batch.column("content").to_pylist()) == content[: len(content) // page_size * page_size]


def test_packed_as_a_whole(tmp_path: Path, make: Make) -> None:
    assert pages_of(save(tmp_path / "x.gz", gzip.compress(make(RAGGED), 1))) == TRUTH


def test_a_packed_file_whose_ranges_go_back_and_forth_is_refused(tmp_path: Path, make: Make) -> None:
    ranges = [(2 * n * PAGE, page(n)) for n in range(200)][::-1]
    assert len(pages_of(save(tmp_path / "x", make(ranges)))) == 200
    assert "do not lie in it by address" in error(tmp_path, gzip.compress(make(ranges)))


def test_in_a_store(s3: Proxy, make: Make) -> None:
    s3.server.put("ranges", make(RAGGED))
    assert pages_of(s3.uri("ranges")) == TRUTH


def test_cut_off_at_every_byte_near_a_border(tmp_path: Path, make: Make) -> None:
    """What is whole is read, the rest of a range is a hole; no page is ever other than it was."""
    ranges: list[Range] = [(0x1000, page(1) + SOME[25] + page(2)[:50]), (0x9000, page(3)), (0x40000, page(4) * 2)]
    whole = make(ranges)
    truth = pages_of(save(tmp_path / "x", whole))
    borders = [at for at in range(len(whole)) if whole[at : at + 4] in (b"EMiL", b"AVML")] + [len(whole)]
    near = {border + by for border in borders for by in range(-12, 64)} | set(range(0, len(whole), 997))
    for size in sorted(at for at in near if 0 < at < len(whole)):
        found = exercise(save(tmp_path / "x", whole[:size]))
        if isinstance(found, ImageError):
            assert size < 32
            continue
        assert all(content is None or content == truth[address] for address, content in found.items())
        said = [header for header in borders if header + 24 <= size]
        assert len(found) == sum((0, 3, 4, 6)[place] - (0, 3, 4, 6)[place - 1] for place in range(1, len(said) + 1))
        if size not in borders and size - borders[len(said) - 1] > 31 and make is lime_file and size + 32 < len(whole):
            holes = images.open_image(str(tmp_path / "x")).holes
            assert any(hole.reason == "truncated" for hole in holes) or "cut off" in str(
                images.open_image(str(tmp_path / "x")).info.caveats
            )


def test_the_holes_of_a_cut_off_file(tmp_path: Path) -> None:
    whole = lime_file([(0, page(1) * 9)])
    assert images.open_image(str(save(tmp_path / "x", whole[: -3 * PAGE + 5]))).holes == (
        Hole(6 * PAGE, 3, "truncated"),
    )
    whole = avml_file([(0, b"".join(random_pages(np.random.default_rng(2), 40)))])
    assert images.open_image(str(save(tmp_path / "x", whole[:-9]))).holes == (Hole(32 * PAGE, 8, "truncated"),)
    assert images.open_image(str(save(tmp_path / "x", whole[:-8]))).holes == ()


def test_a_page_that_is_cut_off_is_not_joined_with_another_copy(tmp_path: Path) -> None:
    whole = lime_file([(PAGE, page(1)), (PAGE, page(2))])  # of two that start alike, the first
    assert pages_of(save(tmp_path / "x", whole)) == {PAGE: page(1)}
    whole = lime_file([(PAGE, page(1) * 2), (0, page(2) * 3)])
    assert pages_of(save(tmp_path / "x", whole[: -PAGE - 9])) == {0: page(2), PAGE: page(1), 2 * PAGE: page(1)}


def test_garbage_where_a_header_should_be(tmp_path: Path, make: Make) -> None:
    first = make([(0, page(1))])
    for tail in (b"x", bytes(31), b"EMiX" + bytes(60), bytes(4096)):
        assert f"byte {len(first)}" in error(tmp_path, first + tail)
    magic = first[:4]
    assert "version 7" in error(tmp_path, magic + struct.pack("<I", 7) + first[8:])
    assert "truncated" in error(tmp_path, magic)
    for start, last in ((5, 4), (1, 0), (0, 2**64 - 1), (2**64 - 1, 2**64 - 1)):
        assert "which is none" in error(tmp_path, lime_header(start, last, magic, first[4]) + bytes(64))


def test_a_range_that_claims_all_memory(tmp_path: Path) -> None:
    path = save(tmp_path / "x", lime_header(0, 2**64 - 2) + page(1))
    assert images.open_image(str(path)).holes == (Hole(PAGE, 2**52 - 1, "truncated"),)
    found = pages_of(save(tmp_path / "x", lime_header(2**64 - 2 * PAGE, 2**64 - PAGE - 1) + page(1)))
    assert found == {2**64 - 2 * PAGE: page(1)}


def test_many_ranges_are_bounded(tmp_path: Path) -> None:
    count = 50_000
    ragged = b"".join(lime_header(n * 8192 + 5, n * 8192 + 11) + b"1234567" for n in range(count))
    image = images.open_image(str(save(tmp_path / "x", ragged)))
    assert (image.info.pages, len(image.holes)) == (0, count)


def test_damaged_chunks_are_holes(tmp_path: Path) -> None:
    """Each chunk damaged in turn: its own pages are lost, and those that begin or end in it."""
    rng = np.random.default_rng(3)
    content = b"".join(rng.bytes(PAGE // 2) + bytes(PAGE // 2) for _ in range(56))
    for start in (0, PAGE - 100):
        whole = avml_file([(start, content)])
        truth = pages_of(save(tmp_path / "x", whole))
        at = 32 + len(IDENTIFIER)
        for number in range(4):
            length = int.from_bytes(whole[at + 1 : at + 4], "little")
            assert whole[at] == 0
            for begin in (at + 8, at + 11):  # its own length, and the first thing packed: a copy of what is not there
                bad = whole[:begin] + b"\xff" * 5 + whole[begin + 5 :]
                found = pages_of(save(tmp_path / "x", bad))
                low, high = start + number * CHUNK, start + min((number + 1) * CHUNK, len(content))
                lost = [address for address in truth if low - PAGE < address < high]
                assert found == truth | dict.fromkeys(lost)
            at += 4 + length


def test_damaged_chunks_of_pages_in_many_pieces(tmp_path: Path) -> None:
    """Ranges of a few bytes, each a chunk, and ranges of several chunks: any of them damaged, by their checksums."""
    rng = np.random.default_rng(6)
    memory = rng.bytes(60 * PAGE)
    for _ in range(25):
        cuts = np.unique(rng.integers(1, len(memory), 40))
        edges = [0, *cuts.tolist(), 5 * PAGE + 1, 5 * PAGE + 2, len(memory)]
        spans = list(pairwise(sorted(edges)))
        lost: set[int] = set()
        whole = b""
        for number in rng.permutation(len(spans)).tolist():
            start, end = spans[number]
            one = bytearray(avml_file([(start, memory[start:end])] if start < end else []))
            at = 32 + len(IDENTIFIER)
            for low in range(start, end, CHUNK):
                if rng.random() < 0.1:
                    one[at + 4] ^= 1
                    lost.update(range(low // PAGE, -(-min(low + CHUNK, end) // PAGE)))
                at += 4 + int.from_bytes(one[at + 1 : at + 4], "little")
            whole += one
        found = pages_of(save(tmp_path / "x", whole))
        pages = [memory[n * PAGE : (n + 1) * PAGE] for n in range(60)]
        assert found == {n * PAGE: None if n in lost else content for n, content in enumerate(pages)}


def test_chunks_of_other_kinds(tmp_path: Path) -> None:
    """Padding and what may be passed over, identifiers that come again, chunks without checksums."""
    extra = b"\xfe\x03\0\0abc" + b"\x80\0\0\0" + IDENTIFIER
    assert pages_of(save(tmp_path / "x", avml_file(RAGGED, extra))) == TRUTH
    packed = chunk(page(1))
    assert packed[0] == 0
    bare = b"\x02" + (len(packed) - 8).to_bytes(3, "little") + packed[8:]
    plain = b"\x03" + PAGE.to_bytes(3, "little") + page(2)
    stream = IDENTIFIER + bare + plain
    whole = lime_header(0, 2 * PAGE - 1, b"AVML", 2) + stream + struct.pack("<Q", len(stream))
    assert pages_of(save(tmp_path / "x", whole)) == {0: page(1), PAGE: page(2)}


def test_streams_that_do_not_add_up(tmp_path: Path) -> None:
    head = lime_header(0, PAGE - 1, b"AVML", 2)
    assert "no snappy stream at byte 32" in error(tmp_path, head + bytes(64))
    assert "unknown type 5" in error(tmp_path, head + IDENTIFIER + b"\x05\x10\0\0" + bytes(64))
    assert "more than their range" in error(tmp_path, head + IDENTIFIER + chunk(page(1) * 2) + bytes(8))
    for length in (0, 3, 4, 1 << 20):
        bad = head + IDENTIFIER + b"\0" + length.to_bytes(3, "little")
        assert f"chunk of {length} bytes" in error(tmp_path, bad + bytes(64))
    # Fewer bytes than the range: the length behind the stream is taken for a chunk, and then there is nothing.
    short = lime_header(0, 2 * PAGE - 1, b"AVML", 2) + IDENTIFIER + chunk(page(1)) + struct.pack("<Q", 0x11223305)
    assert "byte" in error(tmp_path, short + bytes(64))


def test_a_chunk_never_unpacks_past_its_size(tmp_path: Path) -> None:
    """A bomb says that it holds more than it can: 64 KiB of 12 bytes, or 2 GiB."""
    for preamble in (b"\x80\x80\x04", b"\xff\xff\xff\xff\x07"):
        body = preamble + b"\xfe\x01\0" * 2
        bomb = b"\0" + (len(body) + 4).to_bytes(3, "little") + bytes(4) + body
        whole = lime_header(0, CHUNK - 1, b"AVML", 2) + IDENTIFIER + bomb + bytes(8)
        found = pages_of(save(tmp_path / "x", whole))
        assert found == {n * PAGE: None for n in range(16)}
    many = lime_header(0, 2**40, b"AVML", 2) + IDENTIFIER + bomb * 2000
    assert "is damaged" in error(tmp_path, many)
    small = lime_header(0, 2**40, b"AVML", 2) + IDENTIFIER + b"\x01\x05\0\0" + bytes(5)
    assert "more chunks" in error(tmp_path, small + (b"\x01\x05\0\0" + bytes(5)) * 100)
    assert "more chunks" in error(tmp_path, small + b"\xfe\0\0\0" * 100)


def test_joined_pieces_against_a_simple_truth() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        edges = np.unique(rng.integers(0, 40, 12)).astype(np.uint64)
        keep = rng.random(len(edges) - 1) < 0.8
        some = segments.Segments(edges[:-1][keep], edges[1:][keep], edges[:-1][keep] + np.uint64(1000))
        extents, partial = segments.cut_pages(some, 8)
        inside = {n for low, high in zip(some.start.tolist(), some.end.tolist(), strict=True) for n in range(low, high)}
        whole = [n for n in range(5) if inside.issuperset(range(8 * n, 8 * n + 8))]
        assert [
            p + k for p, c in zip(extents.page.tolist(), extents.count.tolist(), strict=True) for k in range(c)
        ] == whole
        assert partial.tolist() == [n for n in range(5) if n not in whole and inside & set(range(8 * n, 8 * n + 8))]
        for run, pieces in extents.pieces.items():
            at = 8 * int(extents.page[run]) + 1000
            for offset, nbytes in pieces:
                assert offset == at
                at += nbytes
            assert at == 8 * int(extents.page[run]) + 1008


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lime")


@pytest.mark.parametrize("name", MAKERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_mutated_files(folder: Path, name: str, data: Any) -> None:
    whole = bytearray(MAKERS[name]([(0x1000, SOME[21] + page(1) * 17), (0x30000 + 5, page(2) * 2), (0x2000, page(4))]))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(4, len(whole) - 1) | st.integers(4, 60))
        kind = data.draw(st.sampled_from(["byte", "word", "cut", "double"]))
        if kind == "byte":
            whole[at] = data.draw(st.integers(0, 255))
        elif kind == "word":
            number = data.draw(st.sampled_from([0, 1, PAGE, 2**31, 2**52, 2**63, 2**64 - 1, 2**64 - PAGE]))
            whole[at : at + 8] = struct.pack("<Q", number)
        elif kind == "cut":
            del whole[at : at + data.draw(st.integers(1, 64))]
        else:
            whole[at:at] = whole[at : at + data.draw(st.integers(1, 64))]
    exercise(save(folder / name, bytes(whole)))


@given(
    ranges=st.lists(
        st.tuples(st.integers(0, 6 * PAGE), st.integers(1, 3 * PAGE)) | st.tuples(st.integers(0, 6), st.just(PAGE)),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_ranges_give_the_pages_they_cover(folder: Path, ranges: list[tuple[int, int]]) -> None:
    """All ranges are of one memory, so that it does not matter which of two wins."""
    memory = b"".join(SOME[20:30])
    whole = [(start, memory[start : start + nbytes]) for start, nbytes in ranges]
    inside = {at for start, nbytes in ranges for at in range(start, start + nbytes)}
    truth: Found = {}
    for number in range(10):
        span = range(number * PAGE, (number + 1) * PAGE)
        if inside.issuperset(span):
            truth[span.start] = memory[span.start : span.stop]
        elif not inside.isdisjoint(span):
            truth[span.start] = None
    for name, maker in MAKERS.items():
        assert pages_of(save(folder / name, maker(whole))) == truth


def test_a_changed_bit_of_a_chunk_is_noticed(tmp_path: Path) -> None:
    pages = [np.random.default_rng(n).bytes(PAGE) for n in range(32)]
    whole = bytearray(avml_file([(0, b"".join(pages))]))
    at = whole.index(pages[3])  # random bytes are stored as they are
    whole[at] ^= 1
    path = tmp_path / "x.avml"
    path.write_bytes(whole)
    found = pages_of(path)
    assert all(content in (None, pages[number]) for number, content in enumerate(found.values()))
    assert found[3 * PAGE] is None
    assert found[31 * PAGE] == pages[31]
