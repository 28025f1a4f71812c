"""Flattened files are read as what they hold, cut off or not."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmdist import images
from ksmdist.errors import ImageError
from ksmdist.images.files import LocalFile
from ksmdist.images.flattened import FlattenedFile

from .conftest import PAGE, ZERO, elf_core, page
from .kdump_files import (
    EXPECTED,
    NOISE,
    PAGES,
    flattened,
    flattened_records,
    info_of,
    kdump,
    written,
)
from .readers import exercise, pages_of


@pytest.mark.parametrize("record", [1, 24, 1000, 16 << 10, 1 << 30])
def test_flattened(tmp_path: Path, record: int) -> None:
    pages = {n: PAGES[n] for n in (0, 1, 2, 44, 45)}
    path = written(tmp_path, flattened(kdump(pages, dump_level=1), record))
    assert pages_of(path) == {n * PAGE: pages[n] for n in sorted(pages)}
    assert info_of(path).nbytes == path.stat().st_size


def test_flattened_elf(tmp_path: Path) -> None:
    data = b"".join(map(page, range(40)))
    path = written(tmp_path, flattened(elf_core([(0x100000, data, len(data))]), 5000))
    assert pages_of(path) == {0x100000 + n * PAGE: page(n) for n in range(40)}


Records = st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=60)), max_size=30)


@settings(max_examples=200, deadline=None)
@given(Records, st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=8), st.booleans())
def test_the_last_writer_of_a_byte_wins(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[tuple[int, bytes]],
    reads: list[tuple[int, int]],
    whole: bool,
) -> None:
    truth = bytearray(max((offset + len(data) for offset, data in records), default=0))
    given_ = bytearray(len(truth))
    for offset, data in records:
        truth[offset : offset + len(data)] = data
        given_[offset : offset + len(data)] = b"\1" * len(data)
    path = written(tmp_path_factory.getbasetemp(), flattened_records(records, struct.pack(">qq", -1, -1) * whole))
    file = FlattenedFile(LocalFile(str(path)))
    assert (file.nbytes, file.truncated) == (len(truth), not whole)
    covered = np.zeros(len(truth), bool)
    for low, high in file.data_extents().tolist():
        covered[low:high] = True
    assert bytes(covered.astype(np.uint8)) == given_
    for (offset, nbytes), span in zip(reads, file.read_spans(reads), strict=True):
        assert bytes(span) == truth[offset : offset + nbytes]
        found = file.read(offset, nbytes)
        missing = given_.find(0, offset, offset + nbytes)
        end = len(truth) if whole or missing < 0 else missing
        assert found == truth[offset : min(end, offset + nbytes)]
        held = bool(file.holds(np.array([offset]), nbytes)[0])
        if nbytes:
            inside = offset + nbytes <= len(truth)
            assert held == (inside and (whole or given_.find(0, offset, offset + nbytes) < 0))
    file.close()


def test_headers_that_are_written_again(tmp_path: Path) -> None:
    data = kdump(PAGES)
    records = [(at, data[at : at + 5000]) for at in range(0, len(data), 5000)]
    records.reverse()
    path = written(tmp_path, flattened_records([(0, b"X" * 9000), *records, (4090, data[4090:4200])]))
    assert pages_of(path) == EXPECTED


@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 42, 44, 45], [0, 1, 2, 1024, 33000, 33001, 40000]])
def test_a_flattened_file_cut_off_anywhere(tmp_path: Path, kept: list[int]) -> None:
    pages = {n: PAGES[n] for n in kept}
    data = kdump(pages, [*range(0, 50), *range(32990, 33010)] if 40000 in kept else range(50), dump_level=1)
    whole = flattened(data, 700)
    known = 0
    for size in sorted({*range(0, 4097, 512), *range(4097, len(whole), 89), len(whole) - 1}):
        found = exercise(written(tmp_path, whole[:size]))
        if isinstance(found, ImageError):
            assert not known, size
            continue
        known = size
        # Nothing is made up: what is not there is a hole; without all of a bitmap, all memory may have been dumped.
        assert all(content in (None, pages.get(at // PAGE)) for at, content in found.items()), size
        assert {n * PAGE for n in pages} <= found.keys()
        assert None in found.values() or size > len(whole) - 17
    assert known
    with pytest.raises(ImageError, match="flattened twice"):
        images.open_image(str(written(tmp_path, flattened(whole))))


def test_a_flattened_file_damaged_or_of_another_kind(tmp_path: Path) -> None:
    whole = bytearray(flattened(kdump(PAGES), 100_000))
    for version in (0, 2):
        path = written(tmp_path, bytes(whole[:24]) + struct.pack(">q", version) + bytes(whole[32:]))
        with pytest.raises(ImageError, match="unknown type or version"):
            images.open_image(str(path))
    path = written(tmp_path, bytes(whole[:100]))
    with pytest.raises(ImageError, match="cut off in its header"):
        images.open_image(str(path))
    for offset, nbytes in ((-2, 5), (5, -1), (5, 0), ((1 << 63) - 5, 10), (-1, 5)):
        path = written(tmp_path, flattened_records([(0, kdump(PAGES)[:-10])], struct.pack(">qq", offset, nbytes)))
        found = pages_of(path)
        assert [at for at, content in found.items() if content is None] == [max(found)]


def test_many_records_are_indexed_in_bounded_time(tmp_path: Path) -> None:
    far = 1 << 62
    records = [(far + (n * 7919) % 90_001, b"xy" * 3) for n in range(100_000)]  # all over one another
    file = FlattenedFile(LocalFile(str(written(tmp_path, flattened_records(records)))))
    assert file.nbytes == far + 90_006
    assert len(file.data_extents()) == 1
    assert file.read(far - 4, 4) == bytes(4)
    file.close()


def test_pages_behind_one_that_is_not_known_are_read_wherever_a_batch_ends(tmp_path: Path) -> None:
    data = b"".join(map(page, range(5)))
    core = elf_core([(0, data, len(data))])
    at = core.index(data)
    records = [(0, core[: at + PAGE + 9]), (at + 2 * PAGE, core[at + 2 * PAGE : at + 4 * PAGE - 9])]
    path = written(tmp_path, flattened_records([*records, (at + 4 * PAGE, core[at + 4 * PAGE :])], b""))
    assert pages_of(path) == {0: page(0), PAGE: None, 2 * PAGE: page(2), 3 * PAGE: None, 4 * PAGE: page(4)}


@pytest.mark.parametrize("level", [1, 31])
def test_pages_that_were_dumped_before_the_second_bitmap_was_whole(level: int, tmp_path: Path) -> None:
    """makedumpfile writes it in parts, each with the pages of it: of the first part all that there is can be read.

    Where their data begins, and whether a zero page of all is there, depends on how many descriptors there are.
    """
    pages = {n: NOISE[n % 7 :] + NOISE[: n % 7] for n in range(0, 60_000, 30)} | {5: ZERO, 7: ZERO}
    data = kdump(pages, range(60_000), dump_level=level, compression="raw")
    second, table = 4 * PAGE, 6 * PAGE  # two blocks of bits for each bitmap; of the second the last is not there
    path = written(tmp_path, flattened_records([(0, data[: second + PAGE]), (table, data[table:])], b""))
    image = images.open_image(str(path))
    found: dict[int, bytes] = {}
    for item in image.batches(0, image.info.pages):
        if isinstance(item, images.Hole):
            assert (item.address >= 32768 * PAGE, item.reason) == (True, "truncated")
            continue
        found |= zip(item.column("address").to_pylist(), item.column("content").to_pylist(), strict=True)
    assert found == {n * PAGE: content for n, content in pages.items() if n < 32768}
    known = sum(n < 32768 for n in pages)
    assert (image.info.pages, image.info.pages_absent) == (known + 60_000 - 32768, 32768 - known)


def test_many_records_over_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [(n % 7, b"xyz") for n in range(1000)]
    path = written(tmp_path, flattened_records(records))
    monkeypatch.setattr("ksmdist.images.flattened._MOST_OVERLAPPING", 1000)
    FlattenedFile(LocalFile(str(path))).close()
    monkeypatch.setattr("ksmdist.images.flattened._MOST_OVERLAPPING", 999)
    with pytest.raises(ImageError, match="with 1000 records that lie over each other"):
        images.open_image(str(path))


def test_segments_of_a_flattened_core_may_lie_in_any_order(tmp_path: Path) -> None:
    core = elf_core([(n * PAGE, page(n), PAGE) for n in reversed(range(200))])
    assert pages_of(written(tmp_path, flattened(core, 999))) == {n * PAGE: page(n) for n in range(200)}
