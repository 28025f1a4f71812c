"""Few bytes that claim much memory: refused at once, while what an almost empty guest makes is read."""

from __future__ import annotations

import gzip
import lzma
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from ksmdist import images
from ksmdist.errors import ImageError
from ksmdist.images import claims, frames
from ksmdist.images.files import LocalFile

from .conftest import PAGE, ZERO, elf_core, page
from .qemu_files import mapped_ram
from .readers import pages_of

GIB = 1 << 30
TIB = 1 << 40
_MISLEADS = "made to mislead"


def refused(path: Path) -> ImageError:
    with pytest.raises(ImageError) as raised:
        images.open_image(str(path), PAGE)
    return raised.value


def sparse_core(path: Path, nbytes: int) -> Path:
    """A guest's core of one segment that is a hole of the file."""
    sizes = struct.pack("<QQ", 0, nbytes), struct.pack("<QQ", nbytes, nbytes)  # in the file, in memory
    path.write_bytes(elf_core([(0, b"", nbytes)]).replace(*sizes))
    os.truncate(path, path.stat().st_size + nbytes)
    return path


def sparse_mapped_ram(path: Path, nbytes: int) -> Path:
    """A file of mapped-ram with one block of zeros, whose bitmap and pages are holes."""
    data = bytearray(mapped_ram({"pc.ram": [ZERO]}))
    data = data.replace(struct.pack(">Q", PAGE | 4), struct.pack(">Q", nbytes | 4))
    at = data.index(b"pc.ram") + 6
    tail = data[int.from_bytes(data[at + 28 : at + 36], "big") + PAGE :]
    bitmap = at + 8 + 28
    pages = -(-(bitmap + nbytes // PAGE // 8) // PAGE) * PAGE
    data[at : at + 8] = struct.pack(">Q", nbytes)
    data[at + 20 : at + 36] = struct.pack(">QQ", bitmap, pages)
    with open(path, "wb") as sink:
        sink.write(data[:bitmap])
        sink.seek(pages + nbytes)
        sink.write(tail)
    return path


SPARSE: dict[str, Callable[[Path, int], Path]] = {"elf": sparse_core, "mapped-ram": sparse_mapped_ram}


@pytest.mark.parametrize("kind", SPARSE)
def test_holes_of_terabytes_that_count_as_zeros_are_refused(tmp_path: Path, kind: str) -> None:
    error = refused(SPARSE[kind](tmp_path / "vm", 8 * TIB))
    assert _MISLEADS in error.hint
    assert f"{8 * TIB} bytes of memory" in error.what


@pytest.mark.parametrize("kind", SPARSE)
def test_an_empty_guest_of_many_gigabytes_is_read(tmp_path: Path, kind: str) -> None:
    image = images.open_image(str(SPARSE[kind](tmp_path / "vm", 60 * GIB)), PAGE)
    assert image.info.pages == 60 * GIB // PAGE
    image.close()


def test_a_raw_file_may_have_holes_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "vm.raw"
    path.write_bytes(page(1))
    os.truncate(path, 8 * TIB)
    image = images.open_image(str(path), PAGE)
    assert image.info.pages_absent == 8 * TIB // PAGE - image.info.pages
    image.close()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, preset=0),
    "zstd": lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
}


@pytest.mark.parametrize("codec", PACKERS)
def test_zeros_pack_as_well_as_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    """A guest of zeros is right with a thousand times its file, and more."""
    monkeypatch.setattr(claims, "FREE_BYTES", 0)
    path = tmp_path / "vm.raw.packed"
    path.write_bytes(PACKERS[codec](bytes(16 << 20)))
    assert path.stat().st_size < 1 << 15
    image = images.open_image(str(path), PAGE)
    assert image.info.pages == (16 << 20) // PAGE
    image.close()


def test_layers_that_each_unpack_to_a_thousand_times_are_counted_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(gzip.compress(bytes(64 << 20))))
    ratio = (64 << 20) // path.stat().st_size
    assert ratio > 2 * 1032  # which one layer does not reach
    monkeypatch.setattr(claims, "FREE_BYTES", 0)
    monkeypatch.setattr(claims, "MOST_RATIO", ratio - 1)
    error = refused(path)
    assert _MISLEADS in error.hint


def test_a_sparse_compressed_file_counts_by_what_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\1" * 4096)
    os.truncate(path, TIB)
    assert claims.most_claimed(str(path), TIB) < claims.FREE_BYTES + claims.MOST_RATIO * (1 << 20)
    assert claims.most_claimed("s3://bucket/a", 10) == claims.FREE_BYTES + 10 * claims.MOST_RATIO


def test_frames_of_nothing_take_no_memory(tmp_path: Path) -> None:
    """Each frame that holds nothing would be a start of its own."""
    empty = bytes.fromhex("28b52ffd2000010000")
    path = tmp_path / "x.zst"
    path.write_bytes(empty * 10_000)
    file = LocalFile(str(path))
    assert frames.zstd_frames(file, 1 << 20) == (0, [(0, 0)])
    file.close()


def test_xz_of_padding_is_given_up_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_MOST_PADDING", 64)
    path = tmp_path / "x.xz"
    whole = lzma.compress(page(1))
    for padding, size in ((64, PAGE), (68, 0)):
        path.write_bytes(whole + bytes(padding))
        file = LocalFile(str(path))
        assert frames.xz_size(file) == size
        file.close()
    assert pages_of(path) == {0: page(1)}  # then it is counted by unpacking it
