"""What contents are, sets of images, huge frames: beside plain Python."""

from __future__ import annotations

import gzip
import itertools
import random
import struct
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ksmdist
from ksmdist import Settings, contents, plan, stages
from ksmdist.digests import Digester
from ksmdist.errors import EngineError
from ksmdist.huge import HugeFrames, count_frames
from ksmdist.pairs import Pairs, find_sets
from ksmdist.store import read_table
from ksmdist.tables import CONTENTS, HUGE, SHARING, WHATS

from .conftest import PAGE, ZERO, MakeImage, Row, arrow_image, eligible, page, table_files


def look(content: bytes) -> tuple[str, str]:
    ((what, meaning),) = contents.look(np.frombuffer(content, np.uint8).reshape(1, -1))
    return WHATS[what], meaning


def _text() -> bytes:
    return Path(__file__).read_bytes()[:PAGE]


def _page_table(attributes: int) -> bytes:
    entries = [0] * 100 + [(0x12345 + n) << 12 | attributes for n in range(300)] + [0] * 112
    return struct.pack("<512Q", *entries)


@pytest.mark.parametrize(
    ("content", "what", "meaning"),
    [
        (ZERO, "zero", "the zero page"),
        (b"\x6b" * PAGE, "fill_word", "POISON_FREE"),
        (b"\xff" * PAGE, "fill_word", "all ones"),
        (struct.pack("<I", 0xFEEEFEEE) * 1024, "fill_word", "HeapFree"),
        (struct.pack("<Q", 0x0123456789ABCDEF) * 512, "fill_word", ""),
        (b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HH", 3, 62) + bytes(range(236)) * 17 + bytes(64), "elf", "x86-64"),
        (_page_table(0x67), "page_table", ""),
        (_page_table(0x8000000000000025), "page_table", ""),
        (_page_table(0x00E8000000000F43), "page_table", ""),
        (_page_table(0x0068000000000703), "page_table", ""),
        (_page_table(1 << 47 | 0x67), "low_entropy", ""),
        (random.Random(1).randbytes(PAGE), "high_entropy", "8.0 bits"),
        (gzip.compress(random.Random(2).randbytes(2 * PAGE))[20 : 20 + PAGE], "high_entropy", ""),
        (b"\0" * 4000 + b"\1\2\3" * 32, "low_entropy", "96 bytes not zero"),
        (_text(), "text", ""),
        (_text()[:2000] + bytes(PAGE - 2000), "text", ""),
    ],
    ids=range(16),
)
def test_what_a_content_is(content: bytes, what: str, meaning: str) -> None:
    assert len(content) == PAGE
    found = look(content)
    assert found[0] == what
    assert meaning in found[1]
    if not meaning and what == "fill_word":
        assert found[1] == ""


def test_machine_code_is_known() -> None:
    """The code of this very interpreter, by its section headers."""
    library = sysconfig.get_config_var("LDLIBRARY")
    paths = [Path(sys.executable).resolve(), Path(sysconfig.get_config_var("LIBDIR") or "/") / (library or "")]
    data = max((path.read_bytes() for path in paths if path.is_file()), key=len)
    table, count, names = *struct.unpack_from("<Q", data, 0x28), *struct.unpack_from("<HH", data, 0x3C)
    headers = [struct.unpack_from("<IIQQQQ", data, table + 64 * number) for number in range(count)]
    base = headers[names][4]
    (start, size) = next((h[4], h[5]) for h in headers if data[base + h[0] :].startswith(b".text\0"))
    rows = np.frombuffer(data[start : start + size - size % PAGE], np.uint8).reshape(-1, PAGE)[:400]
    kinds = Counter(WHATS[what] for what, _ in contents.look(rows))
    assert kinds["code"] >= 0.9 * len(rows), kinds


def test_contents_are_those_of_the_images(make_raw: MakeImage, tmp_path: Path) -> None:
    text = _text()
    rows = [(0, text, eligible(), None, "[heap]", 0), (PAGE, page(1), eligible(), None, "/lib/x.so", 0)]
    arrow = arrow_image(tmp_path / "b.arrow", rows)
    raw = make_raw("a.raw", [None, ZERO, text, ZERO, text, b"\x5a" * PAGE, b"\x5a" * PAGE, page(1), page(9)])
    done = ksmdist.run([arrow, raw], tmp_path / "out", engine="inline")
    table = read_table(done.path, CONTENTS).to_pylist()
    short = [(r["what"], r["copies"], r["images"], r["first_image"], r["first_address"], r["region"]) for r in table]
    assert short[0] == ("text", 3, 2, "a", 2 * PAGE, None)
    assert sorted(short[1:], key=str) == [
        ("fill_word", 2, 1, "a", 5 * PAGE, None),
        ("high_entropy" if look(page(1))[0] == "high_entropy" else look(page(1))[0], 2, 2, "a", 7 * PAGE, None),
        ("zero", 2, 1, "a", PAGE, None),
    ]
    few = ksmdist.run([arrow, raw], tmp_path / "few", Settings(contents=1), "inline")
    assert read_table(few.path, CONTENTS).to_pylist() == table[:1]
    none = ksmdist.run([arrow, raw], tmp_path / "none", Settings(contents=0), "inline")
    assert len(read_table(none.path, CONTENTS)) == 0


def test_the_region_of_a_content_is_that_of_its_first_page(tmp_path: Path) -> None:
    rows: list[Row] = [(n * PAGE, page(n // 2), eligible(), None, f"region {n}", 0) for n in range(6)]
    rows.append((7 * PAGE, None, eligible("zero_mapped", "pte_dirty"), None, "[zeros]", 0))
    rows.append((8 * PAGE, ZERO, eligible(), None, "[stack]", 0))
    done = ksmdist.run([arrow_image(tmp_path / "a.arrow", rows)], tmp_path / "out", engine="inline")
    found = {row["first_address"] // PAGE: row["region"] for row in read_table(done.path, CONTENTS).to_pylist()}
    assert found == {0: "region 0", 2: "region 2", 4: "region 4", 7: "[zeros]"}


def test_a_page_that_is_there_no_more_is_not_known(make_raw: MakeImage, tmp_path: Path) -> None:
    path = make_raw("a.raw", [page(1), page(1), ZERO, ZERO])
    real = stages.merge

    def merge(*args: object) -> object:
        path.write_bytes(page(2) * 4)
        return real(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "merge", merge)
        done = ksmdist.run([path], tmp_path / "out", engine="inline")
    assert {row["kind"]: row["what"] for row in read_table(done.path, CONTENTS).to_pylist()} == {
        "zero": "zero",  # as its word says
        "other": None,
    }
    assert done.summary["pages"]["duplicate"] == 2
    assert any("1 of 2 could not be read again" in caveat for caveat in done.caveats)


SETS = st.lists(st.sets(st.integers(0, 6), min_size=1), max_size=30)


@given(held=SETS, groups=st.sampled_from([[0, 7], [0, 1, 7], [0, 3, 4, 6, 7]]), parts=st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_pairs_equal_a_dict(held: list[set[int]], groups: list[int], parts: int) -> None:
    rng = random.Random(len(held))
    contents_of: Counter[tuple[int, int]] = Counter()
    pages_of: Counter[tuple[int, int]] = Counter()
    tables = []
    for part in range(parts):
        rows = []
        for number, images in enumerate(held[part::parts]):
            pages = {image: rng.randint(1, 5) for image in images}
            rows += [(number, image, pages[image]) for image in sorted(images)]
            for one in images:
                for other in images - {one}:
                    contents_of[one, other] += 1
                    pages_of[one, other] += pages[one]
        columns = np.array(rows, np.int64).reshape(-1, 3).T
        sets = find_sets(*columns)
        assert len({tuple(g) for g in _grouped(sets)}) == len(_grouped(sets)), "a set comes once"
        tables.append(sets)
    within = np.zeros((7, 2), np.int64)
    found = []
    for first, last in itertools.pairwise(groups):
        pairs = Pairs(first, last, 7)
        for table in tables:
            pairs.add(table)
        found += pa.concat_tables(pairs.tables([f"i{n}" for n in range(7)], within)).to_pylist()
    assert [(r["image"], r["other"], r["contents"], r["pages"], r["other_pages"]) for r in found] == [
        (one, other, count, pages_of[one, other], pages_of[other, one])
        for (one, other), count in sorted(contents_of.items())
        if one < other
    ]


def _grouped(sets: pa.Table) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for row in sets.to_pylist():
        found.setdefault(row["set"], []).append(row["image"])
    return list(found.values())


def test_many_pairs_are_added_up_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    member = rng.random((200, 40)) < 0.4
    content, image = np.nonzero(member)
    pages = rng.integers(1, 9, len(image))
    expected = None
    for most in (1, 7, 1 << 20):
        monkeypatch.setattr("ksmdist.pairs._PAIRS_AT_ONCE", most)
        monkeypatch.setattr("ksmdist.pairs._ROWS_A_TABLE", most)
        pairs = Pairs(0, 40, 40)
        pairs.add(find_sets(content, image, pages))
        table = pa.concat_tables(pairs.tables([str(n) for n in range(40)], np.zeros((40, 2), np.int64)))
        table = table.combine_chunks()
        assert expected is None or table.equals(expected)
        expected = table
    assert expected is not None
    together = member.T.astype(int) @ member
    assert expected.column("contents").to_pylist() == [together[a, b] for a in range(40) for b in range(a + 1, 40)]


FRAMES = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 511, 512, 513, 1 << 20, 1 << 42]), st.integers(1, 40)),
    max_size=40,
)


@given(rows=FRAMES, parts=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_huge_frames_equal_a_dict(rows: list[tuple[int, int, int]], parts: int, seed: int) -> None:
    rng = random.Random(seed)
    frames: dict[tuple[int, int], list[int]] = {}
    found: list[dict[str, object]] = []
    marked = [(*row, rng.random() < 0.5, rng.random() < 0.3, rng.random() < 0.2) for row in rows]
    for row in marked:
        sums = frames.setdefault(row[:2], [0, 0, 0, 0])
        for place, counts in enumerate((True, *row[3:])):
            sums[place] += row[2] * counts
    for first, last in ((0, 2), (2, 4)):
        huge = HugeFrames(first, last)
        for part in range(parts):
            some = [row for row in marked[part::parts] if first <= row[0] < last]
            image, number, pages = (np.array([row[at] for row in some], np.int64) for at in range(3))
            mergeable, zero, thp = (np.array([row[at] for row in some], bool) for at in range(3, 6))
            huge.add(count_frames(image, number, pages, mergeable, zero, thp))
        found += huge.table([f"i{n}" for n in range(4)], 512).to_pylist()
    expected: dict[tuple[int, int], list[int]] = {}
    for (image_number, _), (held, merges, zeros, huge_pages) in frames.items():
        bucket = 1 << (merges.bit_length() - 1) if merges else 0
        sums = expected.setdefault((image_number, bucket), [0] * 6)
        for place, value in enumerate((1, huge_pages > 0, zeros == 512, held, merges, zeros)):
            sums[place] += int(value)
    names = ("frames", "huge_frames", "zero_frames", "pages", "mergeable_pages", "zero_pages")
    got = [((row["image"], row["mergeable"]), [row[name] for name in names]) for row in found]
    assert got == sorted(expected.items())


def test_groups_of_images_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    paths = []
    for number in range(9):
        rows = [(int(n) * PAGE * 300, page(int(rng.integers(0, 12))), eligible()) for n in range(15)]
        paths.append(arrow_image(tmp_path / f"{number}.arrow", rows))
    plain = table_files(ksmdist.run(paths, tmp_path / "plain", engine="inline").path)
    assert len(read_table(tmp_path / "plain", SHARING)) == 45
    assert len(read_table(tmp_path / "plain", HUGE)) > 9
    for name, value in (("_GROUP_PAIRS", 9), ("_GROUP_PAGES", 31)):
        with monkeypatch.context() as patch:
            patch.setattr(plan, name, value)
            assert len(plan.groups([15] * 9)) == (10 if name == "_GROUP_PAIRS" else 6)
            out = ksmdist.run(paths, tmp_path / name, Settings(ranges=4), "inline")
        for table, content in table_files(out.path).items():
            if table == SHARING.file:  # its row groups are those of images
                assert read_table(out.path, SHARING).equals(read_table(tmp_path / "plain", SHARING))
            elif not table.startswith("stable_tree/"):
                assert content == plain[table], (name, table)


def test_contents_of_a_node_that_has_left_are_not_known(make_raw: MakeImage, tmp_path: Path) -> None:
    def gone(digester: Digester, task: stages.Inspect) -> dict[int, contents.Seen]:
        raise EngineError("has left the cluster", "node host7", "start it again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "inspect", gone)
        done = ksmdist.run([make_raw("a.raw", [page(1), page(1)])], tmp_path / "out", engine="inline")
    assert [row["what"] for row in read_table(done.path, CONTENTS).to_pylist()] == [None]
    assert any("1 of 1 could not be read again" in caveat for caveat in done.caveats)
