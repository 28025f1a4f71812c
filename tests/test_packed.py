"""Compressed images are read as what they hold, forwards, whatever is in them."""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import ksmdist
from ksmdist import images
from ksmdist.errors import ImageError
from ksmdist.images import packed
from ksmdist.images.files import LocalFile
from ksmdist.images.packed import PackedFile, codec_of
from ksmdist.settings import Settings

from .conftest import PAGE, ZERO, elf_core, page, table_files, unavailable
from .readers import exercise, pages_of


def _pyarrow(codec: str) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:  # writes no size into its header
            stream.write(data)
        return bytes(sink.getvalue())

    return pack


def _sized_zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data))  # its frame says how much is in it


def _sized_lz4(data: bytes) -> bytes:
    """With the size in the frame's header, as `lz4 --content-size` writes it (LZ4 frame format 1.6)."""
    frame = _pyarrow("lz4")(data)
    descriptor = bytes([frame[4] | 8]) + frame[5:6] + len(data).to_bytes(8, "little")
    check = xxhash.xxh32_intdigest(descriptor) >> 8 & 0xFF
    return frame[:4] + descriptor + bytes([check]) + frame[7:]


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": _pyarrow("zstd"),
    "sized zstd": _sized_zstd,
    "xz": lzma.compress,
    "lz4": _pyarrow("lz4"),
    "sized lz4": _sized_lz4,
}
PAGES = [page(n) for n in range(30)] + [ZERO] * 20 + [np.random.default_rng(n).bytes(PAGE) for n in range(400)]
RAW = b"".join(PAGES)
EXPECTED = {n * PAGE: content for n, content in enumerate(PAGES)}


@pytest.mark.parametrize("codec", PACKERS)
def test_a_compressed_raw_image_is_the_image(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "x.raw.packed"
    path.write_bytes(PACKERS[codec](RAW))
    assert codec_of(path.read_bytes()) == codec.split()[-1]
    assert pages_of(path) == EXPECTED
    info = images.open_image(str(path)).info
    assert (info.format, info.pages, info.unpacked, info.nbytes) == ("raw", 450, len(RAW), path.stat().st_size)


@pytest.mark.parametrize("codec", PACKERS)
def test_members_and_frames_laid_end_to_end_are_one(tmp_path: Path, codec: str) -> None:
    pack = PACKERS[codec]
    path = tmp_path / "x"
    path.write_bytes(b"".join(pack(RAW[at : at + 100 * PAGE]) for at in range(0, len(RAW), 100 * PAGE)))
    assert pages_of(path) == EXPECTED


@pytest.mark.parametrize("codec", PACKERS)
def test_a_compressed_core(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "core.1234"
    path.write_bytes(PACKERS[codec](elf_core([(0x100000, RAW, len(RAW) + PAGE), (0, page(7), PAGE)])))
    assert pages_of(path) == {0: page(7)} | {0x100000 + at: content for at, content in EXPECTED.items()}
    assert images.open_image(str(path)).info.pages_absent == 1


def test_runs_on_a_packed_and_an_unpacked_image_are_alike(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "vm.raw").write_bytes(RAW)
    (tmp_path / "b" / "vm.raw.zst").write_bytes(_sized_zstd(RAW))
    runs = [
        table_files(ksmdist.run([source], tmp_path / f"out-{source.parent.name}", Settings(shard_pages=shard)).path)
        for source, shard in ((tmp_path / "a" / "vm.raw", None), (tmp_path / "b" / "vm.raw.zst", 37))
    ]
    for name in ("counters.parquet", "spectrum.parquet"):
        assert runs[0][name] == runs[1][name]


@pytest.mark.parametrize("codec", PACKERS)
def test_truncated_at_any_byte(tmp_path: Path, codec: str) -> None:
    whole = PACKERS[codec](RAW[: 40 * PAGE])
    path = tmp_path / "x"
    for size in sorted({*range(1, min(len(whole), 64)), *range(64, len(whole), len(whole) // 25), len(whole) - 1}):
        path.write_bytes(whole[:size])
        found = exercise(path)
        if isinstance(found, ImageError):
            continue
        # Where the size is known, what was cut off is holes; nothing may be made up, and nothing be missing.
        assert codec in ("sized zstd", "sized lz4"), size
        assert list(found) == [n * PAGE for n in range(40)]
        assert None in found.values()
        assert all(content in (None, EXPECTED[at]) for at, content in found.items())


def test_a_file_that_holds_more_than_it_says(tmp_path: Path) -> None:
    xz = bytearray(lzma.compress(RAW[: 8 * PAGE]))
    path = tmp_path / "x"
    path.write_bytes(xz + b"\0" * 8)  # stream padding
    assert len(pages_of(path)) == 8
    image = images.open_image(str(path), unpacked=4 * PAGE)  # as if its index lied
    with pytest.raises(ImageError, match="holds more bytes than it says"):
        list(image.batches(0, 4))


def test_frames_that_say_their_size_are_not_unpacked_to_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedFile, "_counted", None)
    for codec in ("sized zstd", "sized lz4", "xz"):
        pack = PACKERS[codec]
        skipped = b"" if codec == "xz" else b"\x50\x2a\x4d\x18\3\0\0\0abc"
        path = tmp_path / "x"
        path.write_bytes(pack(RAW[: 3 * PAGE]) + skipped + pack(RAW[3 * PAGE : 5 * PAGE]))
        assert pages_of(path) == {n * PAGE: PAGES[n] for n in range(5)}


@pytest.mark.parametrize("lie", [-PAGE, -1, 1, PAGE, 1 << 40])
def test_a_frame_that_lies_of_its_size(tmp_path: Path, lie: int) -> None:
    """A claim that is not so is an error, or holes where there is nothing; never fewer pages with nothing said."""
    whole = bytearray(_sized_lz4(RAW[: 8 * PAGE]))
    whole[6:14] = (8 * PAGE + lie).to_bytes(8, "little")
    whole[14] = xxhash.xxh32_intdigest(bytes(whole[4:14])) >> 8 & 0xFF
    path = tmp_path / "x"
    path.write_bytes(whole)
    found = exercise(path)
    assert isinstance(found, ImageError) or None in found.values()


def test_trailing_garbage_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(gzip.compress(RAW[:PAGE]) + b"\0" * 512)
    assert len(pages_of(path)) == 1
    path.write_bytes(gzip.compress(RAW[:PAGE]) + b"garbage!")
    assert isinstance(exercise(path), ImageError)


def test_a_bomb_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"".join([gzip.compress(bytes(1 << 22))] * 8))
    largest = 0
    real = packed._gunzip

    def watched(*arguments: Any) -> Any:
        nonlocal largest
        for piece in real(*arguments):
            largest = max(largest, len(piece))
            yield piece

    monkeypatch.setattr(packed, "_gunzip", watched)
    monkeypatch.setattr(packed, "MOST_BYTES", 1 << 24)
    with pytest.raises(ImageError, match="holds more than 16777216 bytes"):
        images.open_image(str(path))
    assert largest <= 1 << 20


def test_compressed_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "x"
    data = RAW[: 4 * PAGE]
    for times in range(1, 6):
        data = gzip.compress(data)
        path.write_bytes(data)
        if times < 4:
            assert len(pages_of(path)) == 4
    with pytest.raises(ImageError, match="compressed more than"):
        images.open_image(str(path))


def test_pages_that_lie_backwards_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    core = elf_core([(n * 2 * PAGE, page(n), PAGE) for n in reversed(range(100))])
    path.write_bytes(gzip.compress(core))
    with pytest.raises(ImageError, match="do not lie in it by address"):
        images.open_image(str(path))


def test_reading_back_and_forth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_GROUP_BYTES", 100 * PAGE)
    path = tmp_path / "x"
    path.write_bytes(b"".join(_sized_zstd(RAW[at : at + 100 * PAGE]) for at in range(0, len(RAW), 100 * PAGE)))
    file = PackedFile(LocalFile(str(path)), "zstd")
    assert len(file._starts) == 5  # frames are entered by themselves
    for offset, nbytes in ((1_700_000, 50_000), (10, 20), (0, 5), (1_843_190, 100), (409_600, 1), (3, 1_000_000)):
        assert file.read(offset, nbytes) == RAW[offset : offset + nbytes]
    file.close()


@pytest.mark.producers
@pytest.mark.parametrize(
    ("tool", "options"),
    [
        ("gzip", ("-1",)),
        ("zstd", ("-q", "-19", "--long=27")),
        ("xz", ("-0", "-T2", "--block-size=65536")),
        ("lz4", ("-q",)),
        ("lz4", ("-q", "--content-size", "-BX", "-B4")),
        ("pzstd", ("-q",)),
    ],
)
def test_what_the_tools_write(tmp_path: Path, tool: str, options: tuple[str, ...]) -> None:
    if shutil.which(tool) is None:
        unavailable(f"{tool} is not installed: run tests/producers/install.sh", "KSMDIST_FORCE_PRODUCERS")
    path = tmp_path / "x.raw"
    path.write_bytes(RAW)
    done = subprocess.run([tool, *options, "-c", str(path)], capture_output=True, check=True, timeout=60)
    (tmp_path / "x.packed").write_bytes(done.stdout)
    assert pages_of(tmp_path / "x.packed") == EXPECTED


SMALL = {codec: bytearray(pack(RAW[20 * PAGE : 36 * PAGE])) for codec, pack in PACKERS.items()}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SMALL)), st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=4))
def test_changed_bytes(tmp_path_factory: pytest.TempPathFactory, codec: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(SMALL[codec])
    for at, value in changes:
        data[at % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "changed-packed"
    path.write_bytes(data)
    exercise(path)


def test_what_follows_damage_is_not_unpacked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(5).bytes(64 * PAGE)
    whole = bytearray(_sized_zstd(data) + _sized_zstd(data))
    at = len(whole) // 4
    whole[at : at + 200_000] = b"\xff" * min(200_000, len(whole) // 4)
    path = tmp_path / "x"
    path.write_bytes(whole)
    begun = []
    real = packed._decompressed

    def watched(*arguments: Any) -> Any:
        begun.append(arguments[1])
        return real(*arguments)

    monkeypatch.setattr(packed, "_decompressed", watched)
    file = PackedFile(LocalFile(str(path)), "zstd", 128 * PAGE)
    for number in range(128):
        found = file.read(number * PAGE, PAGE)
        assert found in (b"", data[number % 64 * PAGE :][:PAGE]) or len(found) < PAGE
    assert len(begun) <= 4
    file.close()


def test_frames_behind_a_damaged_one_are_read_wherever_a_batch_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_GROUP_BYTES", 1)
    numbers = np.arange(180 * PAGE // 8, dtype="<u8") * 0x9E3779B1
    raw, cut = numbers.tobytes(), 60 * PAGE + 100
    frames = [bytearray(_sized_zstd(raw[at : at + cut])) for at in range(0, len(raw), cut)]
    frames[1][40:60] = bytes(20)
    path = tmp_path / "x"
    path.write_bytes(b"".join(frames))
    found = pages_of(path)  # by several ways, which must agree
    lost = [n for n in range(180) if found[n * PAGE] is None]
    assert lost == list(range(60, 121))  # the pages at its ends too
    assert all(found[n * PAGE] == raw[n * PAGE : (n + 1) * PAGE] for n in range(180) if n not in lost)


@pytest.mark.parametrize("codec", ["zstd", "lz4", "xz"])
def test_what_a_checksum_denies_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    """It comes after the last page, in a piece of its own where the size is a multiple of a piece's."""
    monkeypatch.setattr(packed, "_PIECE", 4 * PAGE)
    monkeypatch.setattr(packed, "_PIECE_ARROW", 4 * PAGE)
    path = tmp_path / "x"
    if codec == "xz":
        whole = bytearray(lzma.compress(RAW[: 16 * PAGE], check=lzma.CHECK_CRC64))
        at = len(whole) - 12 - 4 * (int.from_bytes(whole[-8:-4], "little") + 1) - 8
    elif shutil.which(codec) is None:
        unavailable(f"{codec} is not installed: run tests/producers/install.sh", "KSMDIST_FORCE_PRODUCERS")
    else:
        (tmp_path / "raw").write_bytes(RAW[: 16 * PAGE])
        size = ["--content-size"] if codec == "lz4" else []
        whole = bytearray(subprocess.run([codec, "-q", *size, "-c", tmp_path / "raw"], capture_output=True).stdout)
        at = len(whole) - 4
    path.write_bytes(whole)
    assert None not in pages_of(path).values()
    whole[at] ^= 1
    path.write_bytes(whole)
    found = exercise(path)
    assert isinstance(found, ImageError) or None in found.values()


@pytest.mark.parametrize("claim", [1 << 44, 1 << 62])
def test_a_few_bytes_do_not_claim_terabytes(tmp_path: Path, claim: int) -> None:
    """A zstd frame, cut off, whose header claims more than any file of its size can hold."""
    path = tmp_path / "vm.raw.zst"
    path.write_bytes((0xFD2FB528).to_bytes(4, "little") + b"\xe0" + claim.to_bytes(8, "little") + b"\1\2\3")
    with pytest.raises(ImageError, match="damaged or truncated"):
        images.open_image(str(path), PAGE)
