"""What /proc says, parsed; and what is made of it."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from ksmdist.images import proc

from .targets import NOHUGE, PAGE, linux


@linux
def test_scans_of_many_runs_have_each_run_once() -> None:
    # PAGEMAP_SCAN's walk_end is of an earlier lap where the last one meets the end with a full vector.
    count = 16384
    memory = mmap.mmap(-1, (2 * count + 600) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(NOHUGE)
    pages = np.frombuffer(memory, np.uint8).reshape(-1, PAGE)
    pages[::2, 0] = 1
    first = pages.ctypes.data
    if not proc.has_pagemap_scan():
        pytest.skip("needs PAGEMAP_SCAN, Linux 6.7")
    with open("/proc/self/pagemap", "rb") as pagemap:
        scanner = proc.PagemapScanner(pagemap.fileno())
        for runs in (1, 511, 512, 513, 5000, count - 1, count, count + 1, count + 300):
            found = scanner.scan(first, first + (2 * runs - 1) * PAGE)
            assert found[:, 0].tolist() == list(range(first, first + 2 * runs * PAGE, 2 * PAGE))
            assert (found[:, 1] - found[:, 0] == PAGE).all()


@pytest.mark.parametrize(
    ("pages", "sure", "count", "placed", "caveat"),
    [
        ([], [], 0, [], ""),
        ([3, 2], [False, False], 0, [0, 0], ""),
        ([3, 2], [False, False], 5, [3, 2], ""),
        ([3, 2], [False, False], 4, [3, 1], "4 of the 5"),
        ([3, 2, 4], [False, True, False], 2, [0, 2, 0], ""),
        ([3, 2, 4], [False, True, False], 6, [3, 2, 1], "6 of the 9"),
        ([3, 2, 4], [False, True, False], 1, [0, 1, 0], "1 of the 9"),
        ([3, 2], [False, True], 7, [3, 2], "7 zero pages by ksm_stat, and only 5"),
        ([], [], 2, [], "only 0"),
    ],
)
def test_which_zero_pages_ksm_placed(
    pages: list[int], sure: list[bool], count: int, placed: list[int], caveat: str
) -> None:
    found, said = proc.place_zero_pages(np.array(pages, np.int64), np.array(sure, bool), count)
    assert found.tolist() == placed
    assert caveat in said
    assert bool(said) == bool(caveat)


def test_node_of_a_frame(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/block_size_bytes").write_text("8000000\n")
    for node, numbers in ((0, (0, 1, 9)), (2, (1, 3))):
        for block in numbers:
            (tmp_path / f"node/node{node}/memory{block}").mkdir(parents=True)
    (tmp_path / "node/node0/meminfo").touch()
    blocks = proc.memory_blocks(tmp_path)
    frames = np.array([0, 3, 2, 9, 10, 1 << 40], np.uint64) * np.uint64(0x8000000 // PAGE)
    assert blocks.nodes(frames).tolist() == [0, 2, 0, 0, 0, 0]
    assert blocks.nodes(frames).dtype == np.int16
    assert proc.memory_blocks(tmp_path / "nothing").nodes(frames).tolist() == [0] * 6


def mapping(name: str, flags: str, fields: Mapping[str, int], kib: int = 64, start: int = 0x1000) -> str:
    head = f"{start:x}-{start + kib * 1024:x} rw-p 00000000 00:00 0 {name}\n"
    return head + "".join(f"{key}: {value:>8} kB\n" for key, value in fields.items()) + f"VmFlags: {flags} \n"


@pytest.mark.parametrize(
    ("flags", "fields", "passed"),
    [
        ("rd wr mr mw me ac sd mg lo", {"Rss": 8, "KSM": 4}, ("", 0)),
        ("rd wr sh mr mw me ms sd", {"Rss": 8}, ("shared_mapping", 2)),
        ("rd mr me ms", {"Rss": 4}, ("shared_mapping", 1)),
        ("rd wr mr de ht", {"Rss": 0, "Private_Hugetlb": 16}, ("hugetlb", 4)),
        ("rd wr sh mr ms de ht", {"Rss": 0, "Shared_Hugetlb": 8, "Private_Hugetlb": 8}, ("hugetlb", 4)),
        *((f"rd wr {word}", {"Rss": 0}, ("special", 16)) for word in ("io", "pf", "mm", "de", "dp")),
    ],
)
def test_mappings_that_have_no_rows(flags: str, fields: dict[str, int], passed: tuple[str, int]) -> None:
    [vma] = proc.parse_smaps(mapping("/a file (deleted)", flags, fields).encode())
    assert vma.passed_over(4096) == passed
    assert (vma.name, vma.end - vma.start) == ("/a file (deleted)", 64 << 10)
    assert vma.ksm == (fields["KSM"] << 10 if "KSM" in fields else None)


def test_smaps_and_stat_are_read_to_the_letter() -> None:
    text = mapping("", "rd", {"Rss": 4}) + mapping("[anon:VmFlags: mg]", "wr", {"Rss": 8}, start=0x100000)
    assert [(v.name, v.rss, v.flags) for v in proc.parse_smaps(text.encode())] == [
        ("[anon]", 4096, frozenset({"rd"})),
        ("[anon:VmFlags: mg]", 8192, frozenset({"wr"})),
    ]
    assert proc.parse_smaps(b"") == []
    fields = " ".join(str(n) for n in range(4, 53))
    stat = proc.parse_stat(f"12 (a) b (R) 5) T {fields}\n".encode())
    assert stat == proc.Stat("a) b (R) 5", "T", 22, 23)
