"""kdump-compressed dumps: the pages of every kind, and what is left out is neither zero nor forgotten."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import ksmdist
from ksmdist import images
from ksmdist.errors import ImageError, ImageReadError, SettingsError
from ksmdist.images import Hole, packed
from ksmdist.images.files import LocalFile
from ksmdist.images.kdump_header import MAGICS
from ksmdist.settings import Settings

from .conftest import PAGE, ZERO, elf_core, page, table_files, unavailable
from .kdump_files import (
    EXPECTED,
    FLAGS,
    OF_QEMU,
    PAGES,
    flattened,
    info_of,
    kdump,
    split_kdump,
    written,
)
from .readers import pages_of
from .stores import Proxy


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", FLAGS)
def test_every_compression(tmp_path: Path, compression: str, order: str) -> None:
    path = written(tmp_path, kdump(PAGES, compression=compression, order=order, dump_level=1))
    assert pages_of(path) == EXPECTED
    info = info_of(path)
    assert (info.format, info.kind, info.pages, info.pages_absent) == ("kdump", "guest", len(PAGES), 0)
    assert (info.producer, info.filter_level, info.pages_excluded, info.caveats) == ("makedumpfile", "", 0, ())


@pytest.mark.parametrize("version", range(8))
def test_every_version(tmp_path: Path, version: int) -> None:
    lie = {"max_mapnr": 1} if version >= 6 else {"max_mapnr_64": 1, "start_pfn_64": 7, "end_pfn_64": 7}
    path = written(tmp_path, kdump(PAGES, range(40001), dump_level=31, version=version, fields=lie))
    assert pages_of(path) == EXPECTED
    assert info_of(path).pages_absent == 40001 - len(PAGES)
    assert info_of(path).pages_excluded == 40001 - len(PAGES)
    assert info_of(path).filter_level.startswith(
        "makedumpfile -d 31" if version else "pages were left out, and"
    )  # no level yet


def test_pages_of_another_size(tmp_path: Path) -> None:
    path = written(tmp_path, kdump({n: page(n) * 4 for n in range(20)}, page_size=4 * PAGE, sub_blocks=2))
    with pytest.raises(SettingsError, match=r"has pages of 16384 bytes, this run has 4096.*--page-size 16384"):
        images.open_image(str(path))
    arm64 = written(
        tmp_path, kdump({0: page(0) * 16}, page_size=16 * PAGE, utsname=("", "", "", "", "aarch64", "")), "y"
    )
    with pytest.raises(SettingsError, match="--page-size 65536, or to count pages of 4096 bytes dump the guest as ELF"):
        images.open_image(str(arm64))
    image = images.open_image(str(path), 4 * PAGE)
    (batch,) = image.batches(0, 20)
    assert isinstance(batch, pa.RecordBatch)
    assert batch.column("content").to_pylist() == [page(n) * 4 for n in range(20)]


def test_diskdumps(tmp_path: Path) -> None:
    for single in (True, False):
        options: Any = {"magic": MAGICS[1], "compression": "raw", "version": 1, "single_bitmap": single}
        path = written(tmp_path, kdump(PAGES, PAGES if single else range(40001), **options))
        assert pages_of(path) == EXPECTED
        info = info_of(path)
        assert info.pages_absent == info.pages_excluded == (0 if single else 40001 - len(PAGES))
        assert ("does not say which" in info.filter_level) != single


# Absent pages


def test_a_page_that_was_left_out_is_absent(tmp_path: Path) -> None:
    path = written(tmp_path, kdump(PAGES, range(40001), dump_level=31))
    assert pages_of(path) == EXPECTED
    info = info_of(path)
    assert info.pages_absent == info.pages_excluded == 40001 - len(PAGES)
    # Zero pages are kept, in a level that has them: the others are what is missing.
    assert info.filter_level == "makedumpfile -d 31: cache, cache private, user and free pages were left out"
    path = written(tmp_path, kdump(PAGES, range(40001), dump_level=31, zero_page=False))
    assert info_of(path).filter_level == (
        "makedumpfile -d 31: zero, cache, cache private, user and free pages were left out"
    )


@pytest.mark.parametrize(
    ("level", "said"),
    [
        (2, "cache"),
        (4, "cache and cache private"),
        (8, "user"),
        (16, "free"),
        (17, "free"),
        (24, "user and free"),
        (64, "some"),
        (-1, None),
    ],
)
def test_levels(tmp_path: Path, level: int, said: str | None) -> None:
    info = info_of(written(tmp_path, kdump(PAGES, range(40001), dump_level=level)))
    assert info.pages_excluded == info.pages_absent
    text = f"makedumpfile -d {level}: {said} pages were left out"
    assert info.filter_level == (text if said else "pages were left out, and the dump does not say which")


def test_what_was_left_out_at_level_1_was_zero(tmp_path: Path) -> None:
    kept = {n: content for n, content in PAGES.items() if content != ZERO}
    path = written(tmp_path, kdump(kept, range(40001), dump_level=1, zero_page=False))
    found = pages_of(path)
    assert found == {n * PAGE: kept.get(n, ZERO) for n in range(40001)}
    info = info_of(path)
    assert (info.pages, info.pages_absent, info.pages_excluded, info.filter_level) == (40001, 0, 0, "")


@pytest.mark.parametrize("level", [0, 1])
def test_what_no_level_leaves_out_is_not_zero(tmp_path: Path, level: int) -> None:
    """makedumpfile keeps zero pages at level 1; poisoned, offline (ballooned) and never dumped pages it does not."""
    path = written(tmp_path, kdump(PAGES, range(40001), dump_level=level))
    assert pages_of(path) == EXPECTED
    info = info_of(path)
    assert (info.pages_absent, info.pages_excluded, info.filter_level) == (40001 - len(PAGES), 0, "")


def test_qemu_says_level_1_and_leaves_out_nothing(tmp_path: Path) -> None:
    data = kdump(PAGES, dump_level=1, utsname=OF_QEMU)
    for path in (written(tmp_path, data), written(tmp_path, flattened(data), "x.flat")):
        assert pages_of(path) == EXPECTED
        info = info_of(path)
        assert (info.format, info.producer, info.filter_level, info.pages_absent) == ("kdump", "QEMU", "", 0)


def test_what_else_a_header_tells(tmp_path: Path) -> None:
    options: Any = {"status": 1 | 0x8 | 0x10, "fields": {"size_eraseinfo": 100}, "dump_level": 16}
    info = info_of(written(tmp_path, kdump(PAGES, range(40001), **options)))
    assert info.filter_level == "makedumpfile -d 16: free and unused vmemmap pages were left out"
    assert [text.split()[:3] for text in info.caveats] == [["makedumpfile", "had", "no"], ["data", "in", "it"]]


# Split dumps


def cut(folder: Path, **options: Any) -> list[Path]:
    return split_kdump(folder, PAGES, [0, 42, 1000, 1024, 40001], **options)


@pytest.mark.parametrize("name", ["piece.0", "piece.1", "piece.2", "piece.3", "a link"])
def test_any_piece_is_the_whole(tmp_path: Path, name: str) -> None:
    pieces = cut(tmp_path, memory=range(40001), dump_level=31)
    written(tmp_path, b"something else", "README")
    written(tmp_path, kdump(PAGES, range(40001), dump_level=31), "not split")
    written(tmp_path, kdump(PAGES, range(40001), dump_level=31, timestamp=5, split=(0, 42)), "another")
    written(tmp_path, b"KDUMP   ", "a stub")
    os.symlink(pieces[1], tmp_path / "a link")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    opened = tmp_path / name
    assert pages_of(opened) == EXPECTED
    info = info_of(opened)
    first, *others = [images.files.LocalFile(str(path)) for path in pieces]
    assert (info.path, info.fingerprint) == (first.path, first.fingerprint)
    assert [fingerprint for _, fingerprint in info.parts] == [other.fingerprint for other in others]
    assert info.nbytes == sum(path.stat().st_size for path in pieces)
    assert images.reopen(info).info == info


def test_a_piece_that_is_not_there(tmp_path: Path) -> None:
    pieces = cut(tmp_path)
    pieces[1].unlink()
    found = pages_of(pieces[2])
    assert found == {at: None if 42 <= at // PAGE < 1000 else content for at, content in EXPECTED.items()}
    image = images.open_image(str(pieces[2]))
    holes = [item for item in image.batches(0, image.info.pages) if isinstance(item, Hole)]
    assert holes == [Hole(42 * PAGE, 1, "missing"), Hole(44 * PAGE, 2, "missing")]
    pieces[0].unlink()
    assert info_of(pieces[2]).path == str(pieces[2])
    info = info_of(pieces[3])
    pieces[3].unlink()
    with pytest.raises(ImageError, match="changed while it was scanned"):
        images.reopen(info)


def test_pieces_that_do_not_fit_together(tmp_path: Path) -> None:
    pieces = cut(tmp_path)
    shutil.copy(pieces[1], tmp_path / "copy")
    for path in (pieces[0], pieces[1]):
        with pytest.raises(ImageError, match=r"holds pages of the split dump that .* holds, too.*keep one copy"):
            images.open_image(str(path))
    (tmp_path / "copy").unlink()
    other = dict(PAGES)
    del other[44]
    split_kdump(tmp_path, other, [0, 42, 1000], memory=[44])
    with pytest.raises(ImageError, match="pieces of different dumps"):
        images.open_image(str(pieces[0]))
    for start, end in ((1, 0), (0, 50000), (1 << 63, 5)):
        lie = {"start_pfn_64": start, "end_pfn_64": end}
        path = written(tmp_path, kdump(PAGES, split=(0, 1), fields=lie), "alone")
        with pytest.raises(ImageError, match=r"a piece of a split kdump.*damaged"):
            images.open_image(str(path))


def test_a_piece_that_is_cut_off(tmp_path: Path) -> None:
    pieces = cut(tmp_path)
    os.truncate(pieces[3], pieces[3].stat().st_size - 10)
    found = pages_of(pieces[0])
    assert found == EXPECTED | {40000 * PAGE: None}
    os.truncate(pieces[3], 4 * PAGE)
    with pytest.raises(ImageError, match="cut off in its bitmaps"):
        images.open_image(str(pieces[0]))


def test_pieces_named_from_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = cut(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert pages_of(pieces[2].name) == EXPECTED
    assert info_of("./piece.2").path == "./piece.0"


# Files of other kinds


@pytest.mark.parametrize("flat", [False, True])
def test_compressed_again_it_is_read_forwards(tmp_path: Path, flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    pages = {n: ZERO if n % 3 == 0 else rng.bytes(PAGE) for n in range(3000)}
    data = kdump(pages, dump_level=1)
    path = written(tmp_path, gzip.compress(flattened(data, 16000) if flat else data, 1))
    info = info_of(path)
    assert (info.format, info.unpacked > 0) == ("kdump", True)
    begun = []
    real = packed._gunzip

    def watched(*arguments: Any) -> Iterator[memoryview]:
        begun.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(packed, "_gunzip", watched)
    image = images.reopen(info)
    begun.clear()
    found: dict[int, bytes] = {}
    for batch in image.batches(0, 3000):
        assert isinstance(batch, pa.RecordBatch)
        found |= zip(batch.column("address").to_pylist(), batch.column("content").to_pylist(), strict=True)
    assert found == {n * PAGE: content for n, content in pages.items()}
    assert len(begun) <= 2
    image.close()


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = kdump(PAGES, compression="raw")
    number = sorted(PAGES).index(41)
    table = data.index(struct.pack("<QIIQ", _raw_at(data, 0), PAGE, 0, 0))
    broken = [(_raw_at(data, number) + 100, 1), (table + 24 * 3 + 5, 2)]
    real = LocalFile.read

    def read(self: LocalFile, offset: int, nbytes: int) -> bytes:
        if any(offset < at + n and at < offset + nbytes for at, n in broken):
            raise ImageReadError("cannot be read", self.path, "check the disk")
        return real(self, offset, nbytes)

    for path in (written(tmp_path, data), written(tmp_path, data, "another")):
        image = images.open_image(str(path))
        with monkeypatch.context() as patch:
            patch.setattr(LocalFile, "read", read)
            got: dict[int, Any] = {}
            for item in image.batches(0, image.info.pages):
                if isinstance(item, Hole):
                    got |= {item.address + n * PAGE: item.reason for n in range(item.pages)}
                else:
                    got |= zip(item.column("address").to_pylist(), item.column("content").to_pylist(), strict=True)
        assert got == EXPECTED | {3 * PAGE: "unreadable", 41 * PAGE: "unreadable"}
        image.close()


def _raw_at(dump: bytes, number: int) -> int:
    count = len(PAGES)
    return len(dump) - (count - number) * PAGE


@pytest.mark.parametrize("kind", ["plain", "flattened", "split"])
def test_stored(s3: Proxy, tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(2)
    pages = {n: ZERO if n % 5 == 0 else rng.bytes(PAGE // 2) * 2 for n in range(3000)}
    expected = {n * PAGE: content for n, content in pages.items()}
    keys = [f"{kind}/x.kdump"]
    if kind == "split":
        pieces = split_kdump(tmp_path, pages, [0, 1000, 2500, 3000], dump_level=1)
        keys = [f"{kind}/{path.name}" for path in pieces]
        for key, path in zip(keys, pieces, strict=True):
            s3.server.put(key, path.read_bytes())
        s3.server.put("split/other", b"x" * 9000)
    else:
        data = kdump(pages, dump_level=1)
        s3.server.put(keys[0], flattened(data, 16000) if kind == "flattened" else data)
    assert pages_of(s3.uri(keys[-1])) == expected
    info = info_of(s3.uri(keys[-1]))
    assert info.path == s3.uri(keys[0])
    assert [path for path, _ in info.parts] == [s3.uri(key) for key in keys[1:]]


def test_runs_on_a_dump_and_on_raw_memory_are_alike(tmp_path: Path) -> None:
    pages = {n: PAGES.get(n, page(n % 7)) for n in range(500)}
    for name, data in (
        ("a", b"".join(pages[n] for n in range(500))),
        ("b", kdump(pages, dump_level=1)),
        ("c", flattened(kdump(pages, dump_level=1, compression="zstd"), 777)),
    ):
        (tmp_path / name).mkdir()
        written(tmp_path / name, data, "vm")
    runs = [
        table_files(ksmdist.run([tmp_path / name / "vm"], tmp_path / f"out {name}", Settings(shard_pages=shard)).path)
        for name, shard in (("a", None), ("b", 37), ("c", None))
    ]
    for name in ("counters.parquet", "spectrum.parquet"):
        assert runs[0][name] == runs[1][name] == runs[2][name]


# What makedumpfile makes


def _makedumpfile(*arguments: str | Path, source: Path | None = None, sink: Path | None = None) -> None:
    if shutil.which("makedumpfile") is None:
        unavailable("makedumpfile is not installed: run tests/producers/install.sh", "KSMDIST_FORCE_PRODUCERS")
    with open(source or os.devnull, "rb") as given_, open(sink or os.devnull, "wb") as taken:
        subprocess.run(
            ["makedumpfile", *map(str, arguments)],
            stdin=given_,
            stdout=taken,
            stderr=subprocess.DEVNULL,
            check=True,
            timeout=60,
        )


@pytest.mark.producers
@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("option", ["-c", "-l", ""])
def test_what_makedumpfile_makes(tmp_path: Path, option: str, level: int) -> None:
    data = b"".join(PAGES.get(n, page(n % 11)) for n in range(3000))
    core = written(tmp_path, elf_core([(0, data, len(data) + 5 * PAGE)], note=b"CORE"), "vmcore")
    expected = {n * PAGE: data[n * PAGE : (n + 1) * PAGE] for n in range(3000)}
    options = [*filter(None, [option]), "-d", str(level)]
    makers: dict[str, Callable[[], None]] = {
        "plain": lambda: _makedumpfile(*options, core, tmp_path / "plain"),
        "flat": lambda: _makedumpfile(*options, "-F", core, sink=tmp_path / "flat"),
        "again": lambda: _makedumpfile("-R", tmp_path / "again", source=tmp_path / "flat"),
        "second": lambda: _makedumpfile(
            *options, "--splitblock-size", "4096", "--split", core, tmp_path / "first", tmp_path / "second"
        ),
    }
    for name, make in makers.items():
        make()
        assert pages_of(tmp_path / name) == expected, name
        info = info_of(tmp_path / name)
        assert (info.format, info.producer, info.pages_absent, info.pages_excluded) == ("kdump", "makedumpfile", 5, 0)
    assert zlib.crc32((tmp_path / "plain").read_bytes()) == zlib.crc32((tmp_path / "again").read_bytes())


@pytest.mark.producers
def test_an_elf_core_that_makedumpfile_filtered(tmp_path: Path) -> None:
    """It leaves out runs of 256 pages and more, and says neither which nor of what kind."""
    data = bytes(400 * PAGE) + b"".join(map(page, range(10))) + bytes(100 * PAGE) + page(11)
    core = written(tmp_path, elf_core([(0, data, len(data))], note=b"QEMU"), "vmcore")
    _makedumpfile("-E", "-d", "1", core, tmp_path / "filtered")
    kept = [*range(400, 410), *range(410, 511)]
    assert pages_of(tmp_path / "filtered") == {n * PAGE: data[n * PAGE : (n + 1) * PAGE] for n in kept}
    info = info_of(tmp_path / "filtered")
    assert (info.format, info.pages_absent, info.pages_excluded) == ("elf", 400, 400)
    assert "memory was left out" in info.filter_level
