"""CRIU checkpoints: pages, parents, mappings, and what is wrong with them."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmdist import images
from ksmdist.columns import values
from ksmdist.errors import ImageError
from ksmdist.images import Hole
from ksmdist.images.criu import is_checkpoint_part
from ksmdist.images.pagemaps import MOST_PARENTS
from ksmdist.images.protobuf_messages import fields_of, numbers_of, records_of
from ksmdist.tables import PAGE_FLAGS

from .conftest import PAGE, ZERO, page
from .criu_files import (
    ANON_PRIVATE,
    ANON_SHARED,
    FILE_PRIVATE,
    GUARD,
    HEAP,
    HUGETLB,
    LAZY,
    LOCKED,
    MERGEABLE,
    PARENT,
    PRESENT,
    PRIVATE,
    REGULAR,
    SHARED,
    STACK,
    VDSO,
    VSYSCALL,
    Vma,
    checkpoint,
    img,
    message,
    mm,
    pagemap,
    varint,
)
from .readers import Found, exercise, pages_of
from .stores import Proxy

HEAP_AT, ANON_AT, STACK_AT = 0x555500000000, 0x7F0000000000, 0x7FFC00000000


def content(*numbers: int) -> bytes:
    return b"".join(page(number) for number in numbers)


def rows(path: Path) -> dict[int, tuple[int, str | None]]:
    """Flags and region of each page, by address."""
    image = images.open_image(str(path))
    found: dict[int, tuple[int, str | None]] = {}
    for batch in image.batches(0, image.info.pages):
        assert not isinstance(batch, Hole)
        columns = (values(batch.column("address")).tolist(), values(batch.column("flags")).tolist())
        for address, flags, region in zip(*columns, batch.column("region").to_pylist(), strict=True):
            found[address] = flags, region
    image.close()
    return found


def error(path: Path) -> str:
    with pytest.raises(ImageError) as raised:
        images.open_image(str(path))
    return str(raised.value)


@pytest.mark.parametrize("old", [False, True])
def test_pages_lie_back_to_back_in_the_order_of_the_entries(tmp_path: Path, old: bool) -> None:
    runs = [(ANON_AT, 3, PRESENT), (STACK_AT, 1, PRESENT | LAZY), (HEAP_AT, 2, PRESENT)]
    path = checkpoint(tmp_path, runs, content(1, 2, 3, 4, 5) + ZERO, old=old)
    expected = {HEAP_AT: page(5), HEAP_AT + PAGE: ZERO, STACK_AT: page(4)}
    expected |= {ANON_AT + n * PAGE: page(n + 1) for n in range(3)}
    assert pages_of(path) == dict(sorted(expected.items()))
    info = images.open_image(str(path)).info
    assert (info.format, info.kind, info.producer, info.pages_absent) == ("criu", "process", "CRIU", 0)
    assert "zero page" in info.filter_level
    assert "count as mergeable" in info.caveats[0]
    assert info.nbytes == path.stat().st_size + 6 * PAGE
    assert [name for name, _ in info.parts] == [str(tmp_path / "pages-1.img")]
    assert images.reopen(info).info == info
    assert {flags for flags, _ in rows(path).values()} == {PAGE_FLAGS["eligible"]}


def test_mappings_say_what_may_be_merged_and_where_it_is(tmp_path: Path) -> None:
    """Only private mappings that are marked; of a private file's mapping the checkpoint has the copied pages."""
    at = iter(range(HEAP_AT, HEAP_AT + 1000 * PAGE, 100 * PAGE))
    kinds: list[tuple[dict[str, Any], set[str], str | None]] = [
        ({"status": REGULAR | HEAP | ANON_PRIVATE, "madv": MERGEABLE}, {"eligible"}, "[heap]"),
        ({"madv": MERGEABLE | 1 << 14, "flags": PRIVATE | LOCKED}, {"eligible", "locked"}, "[anon]"),
        ({"madv": 1 << 14}, set(), "[anon]"),
        ({"status": REGULAR | FILE_PRIVATE, "shmid": 3, "madv": MERGEABLE}, {"eligible"}, "/usr/lib/libc.so.6"),
        ({"status": REGULAR | FILE_PRIVATE, "shmid": 4}, set(), None),
        ({"status": REGULAR | STACK | ANON_PRIVATE}, set(), "[stack]"),
        ({"status": REGULAR | ANON_SHARED, "flags": SHARED, "madv": MERGEABLE}, {"file"}, "/dev/zero (deleted)"),
        ({"flags": PRIVATE | HUGETLB, "madv": MERGEABLE}, {"file"}, "[anon]"),
        ({"status": VDSO | REGULAR | ANON_PRIVATE, "madv": MERGEABLE}, {"file"}, "[vdso]"),
    ]
    mappings = [Vma(start, start + 5 * PAGE, **options) for (options, _, _), start in zip(kinds, at, strict=False)]
    vsyscall = 0xFFFFFFFFFF600000
    mappings.append(Vma(vsyscall, vsyscall + PAGE, status=VSYSCALL))
    mappings.append(Vma(mappings[0].start, mappings[0].end, status=GUARD))  # lies over another
    runs = [(vma.start + PAGE, 2, PRESENT) for vma in mappings[: len(kinds)]] + [(0x1000, 1, PRESENT)]
    path = checkpoint(
        tmp_path,
        runs,
        content(*range(2 * len(kinds) + 1)),
        mappings[::-1],
        command="my\ndaemon",
        names={3: "/usr/lib/libc.so.6", 8: "/etc/passwd"},
    )
    found = rows(path)
    assert found.pop(0x1000) == (0, None)  # in no mapping
    for vma, (_, flags, region) in zip(mappings, kinds, strict=False):
        for address in (vma.start + PAGE, vma.start + 2 * PAGE):
            assert found.pop(address) == (sum(PAGE_FLAGS[name] for name in flags), region), hex(address)
    assert not found
    info = images.open_image(str(path)).info
    assert info.producer == "CRIU (mydaemon)"
    assert info.pages_absent == 3 * len(kinds) + 1
    assert info.caveats == ()
    assert str(tmp_path / "mm-7.img") in dict(info.parts)
    assert len(pages_of(path)) == info.pages


def test_an_entry_that_reaches_over_mappings_is_cut_at_their_borders(tmp_path: Path) -> None:
    first, second = Vma(ANON_AT, ANON_AT + 2 * PAGE, madv=MERGEABLE), Vma(ANON_AT + 2 * PAGE, ANON_AT + 3 * PAGE)
    path = checkpoint(tmp_path, [(ANON_AT - PAGE, 5, PRESENT)], content(0, 1, 2, 3, 4), [first, second])
    one, none = (PAGE_FLAGS["eligible"], "[anon]"), (0, "[anon]")
    assert list(rows(path).values()) == [(0, None), one, one, none, (0, None)]
    assert list(pages_of(path).values()) == [page(n) for n in range(5)]


def test_no_mapping_is_marked(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, [(ANON_AT, 1, PRESENT)], page(1), [Vma(ANON_AT, ANON_AT + 9 * PAGE)])
    info = images.open_image(str(path)).info
    assert "none of its mappings is marked" in info.caveats[0]
    assert info.pages_absent == 8


def test_pages_of_parents(tmp_path: Path) -> None:
    """The newest has what changed; the rest is in the checkpoints before, or in none."""
    checkpoint(tmp_path / "1", [(ANON_AT, 8, PRESENT)], content(*range(10, 18)), pages_id=1)
    runs = [(ANON_AT, 2, PARENT), (ANON_AT + 2 * PAGE, 2, PRESENT), (ANON_AT + 4 * PAGE, 4, PARENT)]
    checkpoint(tmp_path / "2", runs, content(20, 21), pages_id=5, parent="../1")
    runs = [
        (ANON_AT, 1, PRESENT),
        (ANON_AT + PAGE, 5, PARENT),
        (ANON_AT + 6 * PAGE, 1, PRESENT),
        (ANON_AT + 7 * PAGE, 3, PARENT),
    ]
    path = checkpoint(tmp_path / "3", runs, content(30, 31), parent="../2")
    contents: list[bytes | None] = [page(n) for n in (30, 11, 20, 21, 14, 15, 31, 17)]
    expected: Found = {ANON_AT + n * PAGE: part for n, part in enumerate([*contents, None, None])}
    assert pages_of(path) == expected
    image = images.open_image(str(path))
    assert image.holes == (Hole(ANON_AT + 8 * PAGE, 2, "missing"),)
    assert len(image.info.parts) == 5
    assert images.reopen(image.info).info == image.info

    (tmp_path / "2" / "pages-5.img").write_bytes(page(20))
    assert pages_of(path) == expected | {ANON_AT + 3 * PAGE: None}
    assert Hole(ANON_AT + 3 * PAGE, 1, "truncated") in images.open_image(str(path)).holes
    (tmp_path / "2" / "pages-5.img").unlink()
    lost = dict.fromkeys((ANON_AT + 2 * PAGE, ANON_AT + 3 * PAGE))
    assert pages_of(path) == expected | lost
    (tmp_path / "2" / "parent").unlink()
    lost |= dict.fromkeys(ANON_AT + n * PAGE for n in (1, 4, 5, 7))
    assert pages_of(path) == dict(sorted((expected | lost).items()))
    (tmp_path / "3" / "pages-1.img").unlink()
    assert set(pages_of(path).values()) == {None}


def test_in_a_store(s3: Proxy, tmp_path: Path) -> None:
    """Where the parent's files are copied to the place of the link."""
    runs = [(ANON_AT, 2, PRESENT), (ANON_AT + 2 * PAGE, 2, PARENT)]
    checkpoint(tmp_path / "1", [(ANON_AT, 3, PRESENT)], content(1, 2, 3))
    vmas = [Vma(ANON_AT, ANON_AT + PAGE, madv=MERGEABLE)]
    path = checkpoint(tmp_path / "2", runs, content(4, 5), vmas, parent="../1", command="x")
    for name in (
        "pagemap-7.img",
        "pages-1.img",
        "mm-7.img",
        "core-7.img",
        "parent/pagemap-7.img",
        "parent/pages-1.img",
    ):
        s3.server.put(f"checkpoint/{name}", (tmp_path / "2" / name).read_bytes())
    uri = s3.uri("checkpoint/pagemap-7.img")
    assert pages_of(uri) == pages_of(path)
    info, local = images.open_image(uri).info, images.open_image(str(path)).info
    assert (info.producer, info.regions, info.pages_absent) == (local.producer, local.regions, local.pages_absent)
    assert images.reopen(info).info == info


def test_old_entries_that_are_in_the_parent(tmp_path: Path) -> None:
    checkpoint(tmp_path / "1", [(ANON_AT, 2, PRESENT)], content(1, 2), old=True)
    runs = [(ANON_AT, 2, PARENT), (ANON_AT + 2 * PAGE, 1, PRESENT)]
    path = checkpoint(tmp_path / "2", runs, page(3), parent="../1", old=True)
    assert list(pages_of(path).values()) == [page(1), page(2), page(3)]


def test_lazy_pages_that_were_not_sent(tmp_path: Path) -> None:
    path = checkpoint(
        tmp_path, [(ANON_AT, 2, LAZY), (ANON_AT + 2 * PAGE, 1, PRESENT), (ANON_AT + 3 * PAGE, 1, 0)], page(1)
    )
    assert images.open_image(str(path)).holes == (
        Hole(ANON_AT, 2, "missing"),
        Hole(ANON_AT + 3 * PAGE, 1, "missing"),
    )
    assert pages_of(path)[ANON_AT + 2 * PAGE] == page(1)


def test_shared_memory_never_counts(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, [(0, 1, PRESENT), (5 * PAGE, 1, PRESENT)], content(1, 2), pid="shmem-4660")
    assert pages_of(path) == {0: page(1), 5 * PAGE: page(2)}
    assert {flags for flags, _ in rows(path).values()} == {PAGE_FLAGS["file"]}
    assert "never merges" in images.open_image(str(path)).info.caveats[0]


def test_a_pages_file_with_holes_or_with_more_than_is_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, [(ANON_AT, 64, PRESENT)], b"")
    with open(tmp_path / "pages-1.img", "wb") as sink:
        sink.seek(63 * PAGE)
        sink.write(content(1, 2))
    found = pages_of(path)
    assert list(found.values()) == [ZERO] * 63 + [page(1)]
    caveats = " ".join(images.open_image(str(path)).info.caveats)
    assert "pages-1.img has holes" in caveats
    assert "1 pages more" in caveats


def test_a_hole_that_a_later_checkpoint_fills_is_not_said(tmp_path: Path) -> None:
    """As `criu dedup` leaves the parent of a checkpoint: by itself it lacks a page, and with its child none."""
    old = checkpoint(tmp_path / "1", [(ANON_AT, 48, PRESENT)], content(*range(48)))
    runs = [(ANON_AT, 16, PARENT), (ANON_AT + 16 * PAGE, 16, PRESENT), (ANON_AT + 32 * PAGE, 16, PARENT)]
    new = checkpoint(tmp_path / "2", runs, content(*range(100, 116)), parent="../1")
    with open(tmp_path / "1" / "pages-1.img", "wb") as sink:
        sink.write(content(*range(16)))
        sink.seek(32 * PAGE)
        sink.write(content(*range(32, 48)))
    assert "pages-1.img has holes, in which 16 of the pages lie" in str(images.open_image(str(old)).info.caveats)
    assert "has holes" not in str(images.open_image(str(new)).info.caveats)
    expected = [*range(16), *range(100, 116), *range(32, 48)]
    assert list(pages_of(new).values()) == [page(number) for number in expected]


def test_more_records_than_can_be_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path, [(ANON_AT + 2 * n * PAGE, 1, PRESENT) for n in range(9)], content(*range(9)))
    monkeypatch.setattr("ksmdist.images.protobuf_messages._MOST_RECORDS", 10)
    assert len(pages_of(path)) == 9
    monkeypatch.setattr("ksmdist.images.protobuf_messages._MOST_RECORDS", 9)
    assert "more than 9 records" in error(path)


@pytest.mark.parametrize("page_size", [16384, 65536])
def test_larger_pages(tmp_path: Path, page_size: int) -> None:
    data = content(*range(2 * page_size // PAGE))
    path = checkpoint(tmp_path, [(ANON_AT, 2, PRESENT)], data, [Vma(ANON_AT, ANON_AT + 9 * page_size)])
    image = images.open_image(str(path), page_size)
    assert image.info.pages_absent == 7
    (batch,) = image.batches(0, 2)
    assert not isinstance(batch, Hole)
    assert b"".join(batch.column("content").to_pylist()) == data
    checkpoint(tmp_path, [(ANON_AT + PAGE, 2, PRESENT)], data, [])
    with pytest.raises(ImageError, match="--page-size"):
        images.open_image(str(path), page_size)
    checkpoint(tmp_path, [(ANON_AT, 2, PRESENT)], data, [Vma(ANON_AT, ANON_AT + PAGE)])
    with pytest.raises(ImageError, match="--page-size"):
        images.open_image(str(path), page_size)


def test_a_checkpoint_that_is_its_own_parent(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "1", [(ANON_AT, 1, PARENT)], b"", parent=".")
    assert "its own parent" in error(path)
    path = checkpoint(tmp_path / "2", [(ANON_AT, 1, PARENT)], b"", parent="../3")
    checkpoint(tmp_path / "3", [(ANON_AT, 1, PARENT)], b"", parent="../2")
    assert "its own parent" in error(path)


def test_a_long_chain_of_parents(tmp_path: Path) -> None:
    for number in range(MOST_PARENTS + 1):
        runs = [(ANON_AT, 1, PARENT if number else PRESENT), (ANON_AT + PAGE, 1, PRESENT)]
        parent = f"../{number - 1}" if number else None
        path = checkpoint(tmp_path / str(number), runs, content(number, number), parent=parent)
    before = len(os.listdir("/proc/self/fd"))
    assert pages_of(path) == {ANON_AT: page(0), ANON_AT + PAGE: page(MOST_PARENTS)}
    assert len(os.listdir("/proc/self/fd")) == before
    path = checkpoint(tmp_path / "more", runs, content(1, 2), parent=f"../{MOST_PARENTS}")
    assert "parents" in error(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_overlapping_entries_give_a_page_once(tmp_path: Path) -> None:
    runs = [(ANON_AT + PAGE, 2, PRESENT), (ANON_AT, 2, PRESENT), (ANON_AT, 4, PRESENT)]
    path = checkpoint(tmp_path, runs, content(*range(8)))
    assert list(pages_of(path).values()) == [page(2), page(3), page(6), page(7)]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pagemap(1, [])[:8], "no record"),
        (pagemap(1, [(ANON_AT, 1, PRESENT)])[:-1], "cut off in its record at byte"),
        (pagemap(1, []) + b"\x05", "cut off"),
        (pagemap(1, []) + struct.pack("<I", 0xFFFFFFFF), "cut off"),
        (img(pagemap(1, [])[4:8], [message([(2, 1)]), message([(1, 0), (2, 1)])]), "must have"),
        (img(pagemap(1, [])[4:8], [message([(1, 1)]), message([(1, 0)])]), "must have"),
        (img(pagemap(1, [])[4:8], [message([(1, 1)]), b""]), "must have"),
        (img(pagemap(1, [])[4:8], [message([(1, 1)]), bytes(300)]), "record of 300 bytes"),
        (img(pagemap(1, [])[4:8], [message([(1, 1)]), b"\x0b\x01"]), "no message"),
        (img(pagemap(1, [])[4:8], [message([(1, 1)]), b"\x08" + b"\xff" * 12]), "does not end"),
        (img(pagemap(1, [])[4:8], [message([(1, 1)]), b"\x0a\x70abc"]), "no message"),
        (pagemap(1, [(5, 1, PRESENT)]), "4096-byte pages"),
        (pagemap(1, [(2**64 - PAGE, 1, PRESENT)]), "past the end of the address space"),
        (pagemap(1, [(0, 2**64 - 1, PRESENT)]), "past the end of the address space"),
        (pagemap(1, [(0, 2**51, PRESENT)] * 3), "past the end of the address space"),
    ],
)
def test_broken_pagemaps(tmp_path: Path, data: bytes, said: str) -> None:
    path = checkpoint(tmp_path, [], page(1))
    path.write_bytes(data)
    assert said in error(path)


def test_cut_off_at_every_byte(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, [(ANON_AT, 2, PRESENT), (STACK_AT, 1, PRESENT)], content(1, 2, 3))
    whole = path.read_bytes()
    truth = pages_of(path)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        found = exercise(path) if size >= 8 else None
        if isinstance(found, dict):
            assert found.items() <= truth.items()
            assert any("more than its pagemap names" in text for text in images.open_image(str(path)).info.caveats)
    path.write_bytes(whole)
    for size in (0, 1, PAGE - 1, PAGE, 2 * PAGE + 1):
        (tmp_path / "pages-1.img").write_bytes(content(1, 2, 3)[:size])
        lost = list(truth)[size // PAGE :]
        assert pages_of(path) == truth | dict.fromkeys(lost)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no mm image"),
        (mm([])[:-1], "cut off"),
        (mm([Vma(5, 7)]), "4096-byte pages"),
        (mm([Vma(2 * PAGE, PAGE)]), "before they begin"),
        (img(mm([])[4:8], [message([(14, b"")])]), "without addresses"),
        (img(mm([])[4:8], [message([(14, b"\x08\xff")])]), "does not end"),
        (img(mm([])[4:8], [b"\x72\x70abc"]), "goes on behind"),
        (img(mm([])[4:8], [b"\x73\x70abc"]), "wire type"),
    ],
)
def test_broken_mappings_name_their_file(tmp_path: Path, data: bytes, said: str) -> None:
    path = checkpoint(tmp_path, [(ANON_AT, 1, PRESENT)], page(1), [])
    (tmp_path / "mm-7.img").write_bytes(data)
    assert said in error(path)
    assert "mm-7.img" in error(path)


def test_names_are_not_worth_an_error(tmp_path: Path) -> None:
    vma = Vma(ANON_AT, ANON_AT + PAGE, status=REGULAR | FILE_PRIVATE, shmid=3)
    path = checkpoint(tmp_path, [(ANON_AT, 1, PRESENT)], page(1), [vma], command="x", names={3: "/x"})
    assert rows(path) == {ANON_AT: (0, "/x")}
    for name in ("files.img", "core-7.img"):
        whole = (tmp_path / name).read_bytes()
        for size in range(len(whole)):
            (tmp_path / name).write_bytes(whole[:size])
            images.open_image(str(path)).close()
    assert rows(path) == {ANON_AT: (0, None)}


def test_names_can_be_shown(tmp_path: Path) -> None:
    vma = Vma(ANON_AT, ANON_AT + PAGE, status=REGULAR | FILE_PRIVATE, shmid=3)
    path = checkpoint(tmp_path, [(ANON_AT, 1, PRESENT)], page(1), [vma], names={3: "/é x\x1b[31m\n\0"})
    assert images.open_image(str(path)).info.regions == ("/é x?[31m??",)


def test_a_million_entries_are_bounded(tmp_path: Path) -> None:
    """Here fewer: see the figures in pagemaps and protobuf_messages."""
    count = 20_000
    runs = [(ANON_AT + 2 * n * PAGE, 1, PRESENT) for n in range(count)]
    vmas = [Vma(at, at + PAGE) for at, _, _ in runs]
    path = checkpoint(tmp_path, runs, page(1) * 8, vmas)
    image = images.open_image(str(path))
    assert (image.info.pages, len(image.holes)) == (8, count - 8)


def test_numbers_of_messages_against_reading_each() -> None:
    rng = np.random.default_rng(5)
    messages: list[bytes] = []
    for _ in range(500):
        fields: list[tuple[int, int | bytes]] = []
        for _ in range(rng.integers(0, 6)):
            number = int(rng.integers(1, 20))
            value = int(rng.integers(0, 2**63)) >> int(rng.integers(0, 63))
            fields.append((number, value if rng.random() < 0.8 else bytes(int(rng.integers(0, 9)))))
        messages.append(message(fields) + (varint(7 << 3 | 5) + b"abcd" if rng.random() < 0.3 else b""))
    data = b"".join(struct.pack("<I", len(each)) + each for each in messages)
    start, end = records_of(data, 0)
    found = numbers_of(np.frombuffer(data, np.uint8), start, end, range(1, 20), 256)
    for row, each in enumerate(messages):
        said = {number: value for number, value, _ in fields_of(memoryview(each)) if isinstance(value, int)}
        assert said == {number: int(column[row]) for number, (column, there) in found.items() if there[row]}


PARTS = (
    "inventory.img pages-1.img mm-7.img core-7.img files.img stats-dump fdinfo-2.img tmpfs-dev-74.tar.gz.img "
    "seccomp.img netns-ct-9.img route6-9.img ids-1.img pstree.img ipcns-shm-10.img ghost-file-a1.img timens-0.img"
)


def test_names_of_files_that_are_no_images() -> None:
    assert all(is_checkpoint_part(name) for name in PARTS.split())
    others = "pagemap-1.img pagemap-shmem-4.img guest.img disk.img pages.raw memory-1.img core.7 x-pages-1.img"
    assert not any(is_checkpoint_part(name) for name in others.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("criu")
    checkpoint(at / "old", [(ANON_AT, 4, PRESENT)], content(1, 2, 3, 4))
    runs = [(ANON_AT, 1, PRESENT), (ANON_AT + PAGE, 4, PARENT), (STACK_AT, 2, PRESENT)]
    vmas = [Vma(ANON_AT, ANON_AT + 8 * PAGE, madv=MERGEABLE), Vma(STACK_AT, STACK_AT + 2 * PAGE)]
    checkpoint(at / "new", runs, content(5, 6, 7), vmas, parent="../old", command="x", names={1: "/x"})
    return at


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_mutated_files(folder: Path, data: Any) -> None:
    new = folder / "new"
    target = new / data.draw(st.sampled_from(["pagemap-7.img", "mm-7.img", "parent/pagemap-7.img", "files.img"]))
    whole = target.read_bytes()
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(8, len(changed) - 1))
        if data.draw(st.booleans()):
            changed[at] = data.draw(st.integers(0, 255) | st.sampled_from([0x7F, 0x80, 0xFF]))
        else:
            changed[at:at] = varint(data.draw(st.sampled_from([0, 2**31, 2**52, 2**63, 2**64 - 1])))
    try:
        target.write_bytes(bytes(changed))
        exercise(new / "pagemap-7.img")
    finally:
        target.write_bytes(whole)


Entries = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 5), st.sampled_from([PRESENT, PARENT, LAZY, PRESENT | LAZY, None])),
    max_size=6,
)


@given(levels=st.lists(Entries, min_size=1, max_size=3), lost=st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_chains_against_reading_page_by_page(tmp_path_factory: pytest.TempPathFactory, levels: Any, lost: int) -> None:
    """levels: from the oldest on; lost: pages cut off at the end of the newest's file."""
    at = tmp_path_factory.mktemp("chain")
    known: dict[int, bytes | None] = {}
    for number, runs in enumerate(levels):
        total = sum(count for _, count, flags in runs if flags is None or flags & PRESENT)
        kept = max(0, total - lost) if number == len(levels) - 1 else total
        now: dict[int, bytes | None] = {}
        used = 0
        placed = []
        for address, count, flags in runs:
            present = flags is None or flags & PRESENT
            placed.append((address, count, flags, used))
            used += count if present else 0
        for address, count, flags, first in sorted(placed, key=lambda run: run[0]):
            for n in range(count):
                if flags == PARENT:
                    there = known.get(address + n)
                elif flags is None or flags & PRESENT:
                    there = page(100 * number + first + n) if first + n < kept else None
                else:
                    there = None
                now.setdefault(address + n, there)
        pages = content(*(100 * number + n for n in range(kept)))
        parent = f"../{number - 1}" if number else None
        path = checkpoint(at / str(number), [(a * PAGE, c, f) for a, c, f in runs], pages, parent=parent)
        known = now
    assert pages_of(path) == {address * PAGE: there for address, there in sorted(known.items())}
