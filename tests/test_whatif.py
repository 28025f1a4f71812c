"""Other settings from one run: they equal a run of their own, and what is made of them adds up."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

import ksmdist
from ksmdist import counters
from ksmdist.errors import RunDirectoryError, SettingsError
from ksmdist.explain import ADVICE, explain
from ksmdist.ksmd import OWN_FRAMES, Stretch, is_processed, processed_scans, settle
from ksmdist.settings import Settings
from ksmdist.sharing import Sharing
from ksmdist.store import read_table
from ksmdist.tables import ACCOUNTINGS, IMAGE_SPECTRUM, IMAGES, KSM_STAT, MAPPINGS, POLICY_SPECTRUM, SPECTRUM, WHATIF
from ksmdist.unmerge import unmerge
from ksmdist.whatif import best, grid, present, profit

from .conftest import PAGE, ZERO, MakeImage, Row, arrow_image, eligible, page
from .layouts import layout_images

FORKED: list[dict[str, Any]] = [
    {"layout": "00aabbUUr.abc0"},
    {"layout": "-----U-a-.---0", "forked_from": 0},
    {"layout": "000aab0"},
    {"layout": "--U----", "forked_from": 2},
]
SETTINGS = [
    Settings(),
    Settings(use_zero_pages=True, max_page_sharing=2),
    Settings(max_page_sharing=None, merge_across_nodes=False),
    Settings(max_page_sharing=3, full_scans=1),
    Settings(use_zero_pages=True, full_scans=2),
    Settings(max_page_sharing=2, full_scans=7, smart_scan=True, kernel="6.12"),
    Settings(use_zero_pages=True, kernel="6.1"),
]


@pytest.fixture
def forked(tmp_path: Path) -> ksmdist.Run:
    return ksmdist.run(layout_images(tmp_path, FORKED), tmp_path / "run")


def two_nodes(folder: Path) -> list[Path]:
    """Two processes on two NUMA nodes, the second forked from the first, with regions and huge pages."""
    huge, own = eligible("huge"), eligible("exclusive")
    first: list[Row] = [
        (0 * PAGE, ZERO, own, 1, "[heap]", 0),
        (1 * PAGE, ZERO, huge, 2, "[heap]", 1),
        (2 * PAGE, page(1), own, 3, "[stack]", 0),
        (3 * PAGE, page(1), eligible(), 4, None, 1),
        (4 * PAGE, page(2), eligible(), 5, "[heap]", 0),
        (5 * PAGE, ZERO, eligible(), 6, "[heap]", 0),
        (6 * PAGE, page(1), own, 7, "[heap]", 1),
        (7 * PAGE, page(3), own, 8, "/lib/x", 1),
        (8 * PAGE, None, eligible("zero_mapped"), None, "[heap]", 0),
        (9 * PAGE, None, eligible("zero_mapped", "pte_dirty"), None, "[heap]", 0),
        (10 * PAGE, page(4), 0, 9, "[stack]", 0),
        (11 * PAGE, None, eligible("swapped"), None, "[heap]", 0),
    ]
    second: list[Row] = [
        (3 * PAGE, page(1), eligible(), 4, None, 1),
        (4 * PAGE, page(2), eligible(), 5, "[heap]", 0),
        (5 * PAGE, ZERO, eligible(), 6, "[heap]", 0),
        (6 * PAGE, page(3), own, 20, "[heap]", 1),
    ]
    over = [{"region": "[heap]", "reason": "untouched", "pages": 100}, {"region": "", "reason": "hugetlb", "pages": 7}]
    keys = {"ksmdist.passed_over": json.dumps(over), "ksmdist.pages_absent": "110", "ksmdist.kind": "process"}
    return [
        arrow_image(folder / "first.arrow", first, keys),
        arrow_image(folder / "second.arrow", second, {"ksmdist.scan_order": "1"}),
    ]


@pytest.mark.parametrize("other", SETTINGS, ids=str)
@pytest.mark.parametrize("numa", [False, True])
def test_a_whatif_is_a_run_under_those_settings(tmp_path: Path, other: Settings, numa: bool) -> None:
    paths = two_nodes(tmp_path) if numa else layout_images(tmp_path, FORKED)
    one = ksmdist.run(paths, tmp_path / "one", Settings(max_page_sharing=5))
    two: Any = ksmdist.run(paths, tmp_path / "two", other)
    for again in (one, tmp_path / "one"):
        told = ksmdist.whatif(again, other)
        for key in ("merges", "counters", "bounds", "physical", "estimate"):
            assert told[key] == two.summary[key], key
        assert told["processes"] == read_table(two.path, KSM_STAT).to_pylist()


def test_a_run_reads_back_as_it_was(tmp_path: Path) -> None:
    run = ksmdist.run(two_nodes(tmp_path), tmp_path / "run")
    again = ksmdist.load(tmp_path / "run")
    assert again.settings == run.settings
    assert again.caveats == run.caveats
    tables = {t.name: read_table(run.path, t) for t in (IMAGES, SPECTRUM, IMAGE_SPECTRUM, POLICY_SPECTRUM, MAPPINGS)}
    back = Sharing.from_tables(tables).tables()
    for name, table in back.items():
        assert table.equals(tables[name]), name
    assert grid(again.sharing, again.settings).equals(read_table(run.path, WHATIF))


def test_shards_and_batches_do_not_show(tmp_path: Path) -> None:
    found = []
    for number, (shard_pages, ranges, batch) in enumerate([(None, 1, 100), (1, 4, 1), (3, 2, 2), (5, 1, 4)]):
        for made in ("numa", "forked"):
            folder = tmp_path / f"{number}{made}"
            folder.mkdir()
            paths = two_nodes(folder) if made == "numa" else layout_images(folder, FORKED, batch)
            run = ksmdist.run(paths, folder / "run", Settings(shard_pages=shard_pages, ranges=ranges))
            found.append([made, *(read_table(run.path, t) for t in (SPECTRUM, IMAGE_SPECTRUM, MAPPINGS, KSM_STAT))])
    for other in found[2:]:
        assert other == next(tables for tables in found if tables[0] == other[0])


def test_frames_of_two_hosts_are_not_one(tmp_path: Path) -> None:
    rows: list[Row] = [(0, page(1), eligible(), 7, None, 0)]
    for host in ("one", "two"):
        arrow_image(tmp_path / f"{host}.arrow", rows, {"ksmdist.host": host})
    run: Any = ksmdist.run(sorted(tmp_path.glob("*.arrow")), tmp_path / "run")
    assert run.summary["counters"]["pages_sharing"] == 1
    assert run.summary["physical"]["frames_saved"] == 1


def test_what_fork_shares_already_saves_nothing(tmp_path: Path) -> None:
    # Linux 6.18: 5 pages shared by fork, each of another content: unshared 5, volatile 5, nothing merged
    layouts: list[dict[str, Any]] = [{"layout": "UUUUU"}, {"layout": "-----", "forked_from": 0}]
    run: Any = ksmdist.run(layout_images(tmp_path, layouts), tmp_path / "run")
    shown = run.summary["counters"]
    assert (shown["pages_shared"], shown["pages_unshared"], shown["pages_volatile"]) == (0, 5, 5)
    merging: list[dict[str, Any]] = [{"layout": "aa"}, {"layout": "--", "forked_from": 0}]
    (tmp_path / "two").mkdir()
    run = ksmdist.run(layout_images(tmp_path / "two", merging), tmp_path / "two" / "run")
    assert run.summary["counters"]["pages_sharing"] == 3
    assert run.summary["physical"]["frames_saved"] == 1  # two frames before, one after


def test_physical_profit_is_unknown_without_frames(make_raw: MakeImage, tmp_path: Path) -> None:
    run: Any = ksmdist.run([make_raw("a.raw", [page(1), page(1)])], tmp_path / "run")
    assert run.summary["physical"] == {"frames_saved": None, "profit": None}
    pages = [(0, page(1), eligible("ksm"), 1, None, 0), (PAGE, page(1), eligible("ksm"), 1, None, 0)]
    merged: Any = ksmdist.run([arrow_image(tmp_path / "m.arrow", pages)], tmp_path / "merged")
    assert merged.summary["physical"]["frames_saved"] is None  # whose frames KSM took is not known any more
    assert merged.summary["counters"]["pages_sharing"] == 1


def test_each_accounting_by_its_rules(tmp_path: Path) -> None:
    rows: list[Row] = [(n * PAGE, ZERO if n < 100 else page(n), eligible(), None, None, 0) for n in range(110)]
    rows += [(n * PAGE, None, eligible("zero_mapped"), None, None, 0) for n in range(110, 130)]
    run = ksmdist.run([arrow_image(tmp_path / "x.arrow", rows)], tmp_path / "run")
    table = {
        row["accounting"]: row
        for row in read_table(run.path, WHATIF).to_pylist()
        if row["max_page_sharing"] == 256 and row["merge_across_nodes"]
    }
    assert set(table) == set(ACCOUNTINGS)
    expected = {  # counted, sharing, rmap items, general_profit, true profit, given back
        "stable_tree": (0, 99, 110, 99 * 4096 - 110 * 64, 99 * 4096 - 110 * 64, 100),
        "untracked": (None, 0, 10, -640, 100 * 4096 - 640, 0),
        "rmap_tracked": (100, 0, 110, 100 * 4096 - 110 * 64, 100 * 4096 - 110 * 64, 100),
        "all_zero_mappings": (120, 0, 10, 120 * 4096 - 640, 100 * 4096 - 640, 120),
        "pte_dirty": (100, 0, 10, 408960, 408960, 100),  # measured on 6.18
    }
    names = ("zero_pages_counted", "pages_sharing", "rmap_items", "general_profit", "profit", "zero_pages_given_back")
    assert {name: tuple(row[n] for n in names) for name, row in table.items()} == expected
    assert table["rmap_tracked"]["pages_volatile"] == 100
    assert table["stable_tree"]["unmerge_frames"] == 99


def test_the_grid_is_whole_and_names_the_best(forked: ksmdist.Run) -> None:
    rows = read_table(forked.path, WHATIF).to_pylist()
    assert len(rows) == 7 * 2 * 5
    assert present(rows)["max_page_sharing"] == 256
    assert present(rows)["accounting"] == "stable_tree"
    top = best(rows, forked.settings)
    assert top["accounting"] in ("stable_tree", "pte_dirty")
    assert profit(top) == max(profit(row) for row in rows if row["accounting"] in ("stable_tree", "pte_dirty"))
    odd = grid(forked.sharing, replace(forked.settings, max_page_sharing=3)).to_pylist()
    assert len(odd) == 8 * 2 * 5
    assert present(odd)["max_page_sharing"] == 3


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_explain_counts_every_page_once(tmp_path: Path, settings: Settings) -> None:
    run: Any = ksmdist.run(two_nodes(tmp_path), tmp_path / "run", settings)
    prediction = counters.predict(run.sharing, settings)
    rows = explain(run.sharing, run.regions, prediction).to_pylist()
    assert {row["reason"] for row in rows} <= set(ADVICE)
    assert sum(row["pages"] for row in rows) == run.summary["pages"]["total"] + run.summary["pages"]["absent"]
    total: Counter[str] = Counter()
    for row in rows:
        total[row["reason"]] += row["pages"]
    merges = run.summary["merges"]
    assert total["merged"] == merges["zero"] + merges["content"]
    assert total["thp_zero"] == merges["thp_zero"]
    found = {(row["image_id"], row["region"], row["reason"]): row["pages"] for row in rows}
    assert found["first", "[heap]", "untouched"] == 100
    assert found["first", None, "hugetlb"] == 7
    assert found["first", None, "absent"] == 3
    assert found["first", "[stack]", "not_marked"] == 1
    assert found["first", "[heap]", "swapped"] == 1
    assert found["first", "[heap]", "zero_mapped_fault"] == 1
    assert found["first", "[heap]", "fork_twin"] == found["second", "[heap]", "fork_twin"] == 1


def test_explain_finds_the_leftover_of_a_full_chain(tmp_path: Path) -> None:
    rows: list[Row] = [(n * PAGE, page(1), eligible(), None, "ab"[n > 1], 0) for n in range(3)]
    run = ksmdist.run([arrow_image(tmp_path / "x.arrow", rows)], tmp_path / "run", Settings(max_page_sharing=2))
    told = explain(run.sharing, run.regions, counters.predict(run.sharing, run.settings)).to_pylist()
    assert [(row["region"], row["reason"], row["pages"]) for row in told] == [
        ("a", "merged", 2),
        ("b", "full_chain", 1),
    ]


def test_unmerge_by_image_and_by_kernel(tmp_path: Path) -> None:
    layouts = [{"layout": "00aabbU"}, {"layout": "0aU"}]
    run = ksmdist.run(layout_images(tmp_path, layouts), tmp_path / "run")
    knobs = Settings(use_zero_pages=True)
    rows = unmerge(run.sharing, counters.predict(run.sharing, knobs), knobs).to_pylist()
    names = ("pages_unshared", "zero_pages_given_back", "frames_freed", "frames_needed")
    # a: three copies on one KSM page; b: two, in the first process alone
    assert [tuple(row[name] for name in names) for row in rows] == [(8, 3, 2, 6), (6, 2, 1, 5), (2, 1, 0, 2)]
    old = replace(knobs, kernel="6.1")
    rows = unmerge(run.sharing, counters.predict(run.sharing, old), old).to_pylist()
    assert (rows[0]["frames_needed"], rows[0]["zero_pages_kept"]) == (3, 3)


def test_what_old_kernels_do_not_have(forked: ksmdist.Run) -> None:
    shown = ksmdist.whatif(forked, Settings(kernel="6.1", use_zero_pages=True))
    for name in ("ksm_zero_pages", "general_profit", "pages_skipped", "pages_scanned"):
        assert shown["counters"][name] is None, name
    assert shown["merges"]["zero"] == 13
    assert {row["ksm_zero_pages"] for row in shown["processes"]} == {None}
    middle = ksmdist.whatif(forked, Settings(kernel="6.6", full_scans=3))["counters"]
    assert middle["pages_skipped"] is None
    assert middle["pages_scanned"] is not None
    with pytest.raises(SettingsError, match=r"not in Linux 6\.6"):
        Settings(kernel="6.6", full_scans=3, smart_scan=True)
    with pytest.raises(SettingsError, match="never comes to rest"):
        Settings(smart_scan=True)


def test_zero_pages_in_huge_pages_by_kernel(tmp_path: Path) -> None:
    # 256 zero and 256 unique pages of a huge page. 6.1: shared 1, sharing 255. 6.12 and up: nothing is merged,
    # the zero pages leave every counter, and the memory is freed all the same.
    rows: list[Row] = [
        (n * PAGE, ZERO if n % 2 else page(n), eligible("huge", "exclusive"), n, None, 0) for n in range(512)
    ]
    run = ksmdist.run([arrow_image(tmp_path / "x.arrow", rows)], tmp_path / "run")
    for zero in (False, True):
        new = ksmdist.whatif(run, Settings(use_zero_pages=zero))
        assert [new["counters"][n] for n in ("pages_shared", "pages_sharing", "pages_unshared", "ksm_zero_pages")] == [
            *(0, 0, 256, 0)
        ]
        assert (new["merges"]["thp_zero"], new["physical"]["frames_saved"]) == (256, 256)
    old = ksmdist.whatif(run, Settings(kernel="6.1"))
    assert (old["counters"]["pages_shared"], old["counters"]["pages_sharing"]) == (1, 255)
    locked: list[Row] = [(at, content, flags | eligible("locked"), *rest) for at, content, flags, *rest in rows]  # type: ignore[misc]
    run = ksmdist.run([arrow_image(tmp_path / "l.arrow", locked)], tmp_path / "locked")
    assert ksmdist.whatif(run, Settings(use_zero_pages=True))["counters"]["ksm_zero_pages"] == 256


# The only zero pages are in huge pages: how many each has, by process; how many stay, and in which process.
# Measured on Linux 6.18.44.
LONE_ZEROS = [
    ([[1]], [1]),
    ([[1], [1]], [1, 0]),
    ([[1], [1], [1]], [1, 0, 0]),
    ([[2], [1]], [0, 1]),
    ([[1], [2]], [1, 0]),
    ([[2]], [0]),
    ([[1, 1]], [1]),
]


@pytest.mark.parametrize(("zeros", "stay"), LONE_ZEROS)
@pytest.mark.parametrize("shard_pages", [None, 100])
def test_zero_pages_of_huge_pages_alone(
    zeros: list[list[int]], stay: list[int], shard_pages: int | None, tmp_path: Path
) -> None:
    paths = []
    for number, counts in enumerate(zeros):
        rows: list[Row] = []
        for huge, count in enumerate(counts):
            for at in range(512):
                content = ZERO if at >= 512 - count else page(10000 * number + 1000 * huge + at)
                rows.append(((huge * 512 + at) * PAGE, content, eligible("huge", "exclusive"), None, "a", 0))
        paths.append(arrow_image(tmp_path / f"{number}.arrow", rows, batch=64))
    run: Any = ksmdist.run(paths, tmp_path / "run", Settings(shard_pages=shard_pages))
    total = sum(map(sum, zeros))
    assert run.summary["merges"]["thp_zero"] == total - sum(stay)
    assert run.summary["counters"]["pages_unshared"] == sum(511 * len(c) + len(c) - sum(c) for c in zeros) + sum(stay)
    told = explain(run.sharing, run.regions, counters.predict(run.sharing, run.settings)).to_pylist()
    assert sum(row["pages"] for row in told if row["reason"] == "thp_zero") == total - sum(stay)
    on = ksmdist.whatif(run, Settings(use_zero_pages=True))
    assert (on["merges"]["thp_zero"], on["counters"]["ksm_zero_pages"]) == (total, 0)


@pytest.mark.parametrize("shard_pages", [None, 100, 7])
@pytest.mark.parametrize("ranges", [1, 4])
def test_the_one_zero_page_of_a_huge_page_that_is_split_anyway(shard_pages: int, ranges: int, tmp_path: Path) -> None:
    # Measured on Linux 6.18.44: H aa + one zero: shared 1, sharing 1, unshared 509, the zero page freed
    rows: list[Row] = [(n * PAGE, page(max(n, 2)), eligible("huge", "exclusive"), None, None, 0) for n in range(1, 512)]
    rows += [(512 * PAGE, ZERO, eligible("huge", "exclusive"), None, None, 0)]
    rows += [(n * PAGE, page(n), eligible("huge", "exclusive"), None, None, 0) for n in range(513, 1024)]
    paths = [arrow_image(tmp_path / "x.arrow", rows, batch=64)]
    run: Any = ksmdist.run(paths, tmp_path / "run", Settings(shard_pages=shard_pages, ranges=ranges))
    assert run.summary["merges"]["thp_zero"] == 0  # the first huge page is split, the second holds the zero page
    rows[511 + 100] = (rows[511 + 100][0], page(2), *rows[0][2:])
    (tmp_path / "split").mkdir()
    paths = [arrow_image(tmp_path / "split" / "x.arrow", rows, batch=64)]
    run = ksmdist.run(paths, tmp_path / "split" / "run", Settings(shard_pages=shard_pages, ranges=ranges))
    assert run.summary["merges"]["thp_zero"] == 1
    assert run.summary["counters"]["pages_sharing"] == 2


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_page_sizes_and_colours_of_zero_pages(tmp_path: Path, page_size: int) -> None:
    pages = [bytes(page_size)] * 5 + [page(1)[:8] * (page_size // 8)] * 2
    (tmp_path / "a.raw").write_bytes(b"".join(pages))
    settings = Settings(page_size=page_size, zero_page_colors=2, use_zero_pages=True)
    run: Any = ksmdist.run([tmp_path / "a.raw"], tmp_path / "run", settings)
    assert run.summary["merges"]["saved_bytes"] == 6 * page_size
    assert [(row["color"], row["zero"]) for row in run.summary["zero_colors"]] == [(0, 3), (1, 2)]
    assert ksmdist.whatif(run, replace(settings, use_zero_pages=False))["counters"]["pages_sharing"] == 5
    prediction = counters.predict(run.sharing, settings)
    assert sum(row["pages"] for row in explain(run.sharing, run.regions, prediction).to_pylist()) == 7
    (total, _) = unmerge(run.sharing, prediction, settings).to_pylist()
    assert total["bytes_needed"] == 6 * page_size
    with pytest.raises(SettingsError, match="page_size"):
        ksmdist.whatif(run, Settings(page_size=131072, zero_page_colors=2))


def test_what_is_no_run(tmp_path: Path, forked: ksmdist.Run) -> None:
    with pytest.raises(RunDirectoryError, match="is no run directory"):
        ksmdist.load(tmp_path / "nothing")
    spectrum = (forked.path / "image_spectrum.parquet").read_bytes()
    (forked.path / "image_spectrum.parquet").write_bytes((forked.path / "counters.parquet").read_bytes())
    with pytest.raises(RunDirectoryError, match="not what they should be"):
        ksmdist.load(forked.path)
    (forked.path / "image_spectrum.parquet").write_bytes(spectrum[:-20])
    with pytest.raises(RunDirectoryError, match="no readable table image_spectrum"):
        ksmdist.load(forked.path)
    (forked.path / "image_spectrum.parquet").write_bytes(spectrum)
    manifest = json.loads((forked.path / "run.json").read_text())
    for change, message in (
        ({"run_version": 1}, "of version 1"),
        ({"settings": {"pages": 3}}, "not what it should be"),
    ):
        (forked.path / "run.json").write_text(json.dumps(manifest | change))
        with pytest.raises(RunDirectoryError, match=message):
            ksmdist.load(forked.path)


def test_when_smart_scan_looks() -> None:
    assert [scan for scan in range(1, 43) if is_processed(scan)] == [1, 2, 3, 4, 6, 9, 14, 23, 32, 41]
    for scans in range(1, 60):
        assert processed_scans(scans) == sum(map(is_processed, range(1, scans + 1)))


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 3), st.integers(1, 30)), min_size=1, max_size=12),
    st.integers(2, 9),
)
@example_settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_long_stretches_are_their_pages_one_by_one(found: list[tuple[int, int, int]], limit: int) -> None:
    stretches = [Stretch(image, -1, frame, pages if frame == OWN_FRAMES else 1) for image, frame, pages in found]
    single = [stretch._replace(pages=1) for stretch in stretches for _ in range(stretch.pages)]
    one, other = settle(stretches, limit), settle(single, limit)
    assert (one.nodes, one.merged, one.within, one.unshared, one.frames, one.left_pages) == (
        *(other.nodes, other.merged, other.within, other.unshared, other.frames, other.left_pages),
    )
