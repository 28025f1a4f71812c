"""Passes of the same images: what changed is volatile, by the kernel's own test."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ksmdist
from ksmdist import Settings, stages
from ksmdist.capture import capture
from ksmdist.errors import EngineError, RunDirectoryError, SettingsError
from ksmdist.runs import Run
from ksmdist.store import read_table
from ksmdist.sysfs import Ksm
from ksmdist.tables import CHECKSUMS, COUNTERS, PASSES

from .conftest import PAGE, ZERO, MakeImage, Row, arrow_image, eligible, page, table_files
from .targets import MERGEABLE, NOHUGE, Start

POOL: list[bytes | None] = [None, ZERO, b"\x6b" * PAGE, *(page(n) for n in range(4))]
PASSES_OF_ONE = st.lists(st.lists(st.sampled_from(range(len(POOL))), min_size=8, max_size=8), min_size=2, max_size=4)


def checksum(content: bytes) -> int:
    """mm/ksm.c, calc_checksum."""
    return xxhash.xxh64_intdigest(content) & 0xFFFFFFFF


def write(folder: Path, pages: Sequence[bytes | None], name: str = "a") -> Path:
    """An image of these pages, and one more, its own, far off: no image is empty."""
    folder.mkdir(exist_ok=True)
    rows = [(number * PAGE, content, eligible()) for number, content in enumerate(pages) if content is not None]
    return arrow_image(folder / f"{name}.arrow", [*rows, (1 << 30, page(1000 + ord(name)), eligible())])


def fleet(folder: Path, passes: Mapping[str, Sequence[Sequence[bytes | None]]]) -> Path:
    """A manifest of these passes of these images."""
    entries = [
        {"uri": str(write(folder / f"{number}", pages, name)), "image": name, "pass": number}
        for name, of_image in passes.items()
        for number, pages in enumerate(of_image, 1)
    ]
    path = folder / "fleet.yaml"
    path.write_text(json.dumps(entries))
    return path


def run(manifest: Path, out: Path, **options: Any) -> Run:
    return ksmdist.run([], out, Settings(**options), "inline", manifest=str(manifest))


def volatile(before: Sequence[bytes | None], now: Sequence[bytes | None]) -> list[bool]:
    """The oracle: rmap_item->oldchecksum is 0 for a page that was not there."""
    return [
        new is not None and checksum(new) != (0 if old is None else checksum(old))
        for old, new in zip(before, now, strict=True)
    ]


def counters(of: Run) -> dict[str, dict[str, Any]]:
    return {row["volatile"]: row for row in read_table(of.path, COUNTERS).to_pylist()}


@given(chosen=PASSES_OF_ONE, other=st.lists(st.sampled_from(range(len(POOL))), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_passes_equal_an_oracle(
    chosen: list[list[int]], other: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("passes")
    passes = [[POOL[number] for number in pages] for pages in chosen]
    beside = [POOL[number] for number in other]
    manifest = fleet(folder, {"a": passes, "b": [beside]})
    done = run(manifest, folder / "out")

    changed = volatile(passes[-2], passes[-1])
    still = ksmdist.run(
        [write(folder / "last", passes[-1]), write(folder / "last", beside, "b")], folder / "still", engine="inline"
    )
    gone = [None if moved else content for moved, content in zip(changed, passes[-1], strict=True)]
    kept = ksmdist.run(
        [write(folder / "kept", beside, "b"), write(folder / "kept", gone)], folder / "without", engine="inline"
    )
    found = counters(done)
    assert found["included"] == counters(still)["excluded"] | {"volatile": "included"}
    expected, got = counters(kept)["excluded"], found["excluded"]
    for name in ("pages_shared", "pages_sharing", "pages_unshared", "zero_merges", "content_merges", "saved_bytes"):
        assert got[name] == expected[name], name
    assert got["pages_volatile"] == sum(changed)
    assert got["rmap_items"] == expected["rmap_items"] + sum(changed)
    assert done.images.column("volatile").to_pylist() == [sum(changed), 0]
    assert sum(row["volatile"] for row in done.regions.to_pylist()) == sum(changed)

    rows = read_table(done.path, PASSES).to_pylist()
    assert [row["pass"] for row in rows] == list(range(1, len(passes) + 1))
    for number, (row, now) in enumerate(zip(rows, passes, strict=True)):
        there = [content is not None for content in now]
        assert row["pages"] == sum(there) + 1
        if number == 0:
            assert (row["changed"], row["appeared"], row["gone"]) == (None, None, None)
            continue
        was = [content is not None for content in passes[number - 1]]
        both = [a and b for a, b in zip(was, there, strict=True)]
        moved = volatile(passes[number - 1], now)
        assert row["changed"] == sum(m for m, b in zip(moved, both, strict=True) if b)
        assert row["appeared"] == sum(there) - sum(both)
        assert row["gone"] == sum(was) - sum(both)
    same = [all(one[at] == passes[0][at] for one in passes) and passes[0][at] is not None for at in range(8)]
    assert rows[-1]["stable"] == sum(same) + 1


def series(tmp_path: Path, count: int = 3) -> dict[str, list[list[bytes | None]]]:
    """Two images of several passes, large enough for several shards."""
    rng = np.random.default_rng(5)
    held: dict[str, list[list[bytes | None]]] = {"a": [], "b": []}
    for name, passes in held.items():
        pages = [POOL[number] for number in rng.integers(0, len(POOL), 40)]
        for number in range(count):
            pages = list(pages)
            for at in rng.integers(0, 40, 6).tolist():
                pages[at] = POOL[int(rng.integers(0, len(POOL)))]
            passes.append(pages if name == "a" or number else [*pages[:30], *[None] * 10])
    return held


def test_the_tables_are_the_same_bytes_however_it_is_cut(tmp_path: Path) -> None:
    manifest = fleet(tmp_path, series(tmp_path))
    plain = table_files(run(manifest, tmp_path / "plain").path)
    cut = table_files(run(manifest, tmp_path / "cut", shard_pages=3).path)
    for name in plain:
        if not name.startswith("checksums/"):
            assert plain[name] == cut[name], name
    rows = [read_checksums(tmp_path / name) for name in ("plain", "cut")]
    assert rows[0] == rows[1]


def read_checksums(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows = [row for file in sorted(path.glob(CHECKSUMS.file)) for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: (row["image"], row["address"]))


def test_runs_that_follow_each_other_are_a_series_of_passes(tmp_path: Path) -> None:
    held = series(tmp_path)
    whole = run(fleet(tmp_path, held), tmp_path / "whole")
    previous = None
    for number in range(3):
        images = [tmp_path / str(number + 1) / f"{name}.arrow" for name in held]
        out = tmp_path / f"run{number}"
        kept = Settings(checksums=True, shard_pages=7)
        previous = ksmdist.run(images, out, kept, "inline", previous=None if previous is None else previous.path)
    assert previous is not None
    one, two = table_files(whole.path), table_files(previous.path)
    for name in one:
        if not name.startswith("checksums/"):
            assert one[name] == two[name], name
    assert read_checksums(whole.path) == read_checksums(previous.path)


def test_a_previous_run_without_checksums_has_its_images_read_again(tmp_path: Path) -> None:
    held = series(tmp_path, 2)
    whole = run(fleet(tmp_path, held), tmp_path / "whole")
    first, second = ([tmp_path / number / f"{name}.arrow" for name in held] for number in ("1", "2"))
    before = ksmdist.run(first, tmp_path / "before", engine="inline")
    done = ksmdist.run(second, tmp_path / "done", engine="inline", previous=before.path)
    for name, content in table_files(whole.path).items():
        assert table_files(done.path)[name] == content, name

    os.utime(first[0], ns=(1, 1))
    with pytest.raises(RunDirectoryError, match="has changed since") as error:
        ksmdist.run(second, tmp_path / "more", engine="inline", previous=before.path)
    assert "--checksums" in str(error.value)
    assert not (tmp_path / "more").exists()


def test_a_page_that_changed_and_kept_its_checksum_is_not_volatile(tmp_path: Path) -> None:
    seen: dict[int, int] = {}
    tail = bytes(PAGE - 8)
    for number in itertools.count(1):  # by the odds of birthdays after some 80,000
        one = checksum(number.to_bytes(8, "little") + tail)
        if one in seen:
            break
        seen[one] = number
    before, now = (other.to_bytes(8, "little") + tail for other in (seen[one], number))
    assert before != now
    assert checksum(before) == checksum(now)
    done = run(fleet(tmp_path, {"a": [[before, page(1)], [now, page(2)]]}), tmp_path / "out")
    assert done.images.column("volatile").to_pylist() == [1]


def test_what_cannot_be_compared_is_said(make_raw: MakeImage, tmp_path: Path) -> None:
    before = ksmdist.run([make_raw("a.raw", [page(1)])], tmp_path / "before", Settings(checksums=True), "inline")
    with pytest.raises(SettingsError, match="has none of these images"):
        ksmdist.run([make_raw("b.raw", [page(1)])], tmp_path / "b", engine="inline", previous=before.path)
    again = ksmdist.run(
        [tmp_path / "a.raw", tmp_path / "b.raw"], tmp_path / "both", engine="inline", previous=before.path
    )
    assert again.caveats == ("b: it has one pass: none of its pages is known to change",)
    with pytest.raises(SettingsError, match="pages of 4096 bytes"):
        ksmdist.run([tmp_path / "b.raw"], tmp_path / "c", Settings(page_size=8192), "inline", previous=before.path)
    with pytest.raises(RunDirectoryError, match="is no run directory"):
        ksmdist.run([tmp_path / "b.raw"], tmp_path / "c", engine="inline", previous=tmp_path)


@pytest.mark.parametrize("kept", [True, False])
def test_a_previous_run_of_more_and_of_other_images(kept: bool, tmp_path: Path) -> None:
    one = {name: write(tmp_path / "1", [page(1), page(n)], name) for n, name in enumerate("abc", 5)}
    two = {name: write(tmp_path / "2", [page(1), page(9)], name) for name in "bcd"}
    before = ksmdist.run(list(one.values()), tmp_path / "before", Settings(checksums=kept), "inline")
    one["a"].unlink()
    done = ksmdist.run(list(two.values()), tmp_path / "done", engine="inline", previous=before.path)
    assert done.images.column("image_id").to_pylist() == ["b", "c", "d"]
    assert done.images.column("total").to_pylist() == [3, 3, 3]
    assert done.images.column("volatile").to_pylist() == [1, 1, 0]
    assert done.caveats == ("d: it has one pass: none of its pages is known to change",)
    assert json.loads((done.path / "run.json").read_text())["previous"] == str(before.path)


def test_frames_of_pages_that_changed_are_known_too(tmp_path: Path) -> None:
    held = {1: [page(1), page(2), page(3)], 2: [page(1), page(1), page(1)]}
    paths = []
    for number, pages in held.items():
        (tmp_path / str(number)).mkdir()
        rows = [(at * PAGE, content, eligible("exclusive")) for at, content in enumerate(pages)]
        paths.append(arrow_image(tmp_path / str(number) / "a.arrow", rows))
    first = ksmdist.run(paths[:1], tmp_path / "first", Settings(checksums=True), "inline")
    done = ksmdist.run(paths[1:], tmp_path / "done", engine="inline", previous=first.path)
    alone = ksmdist.run(paths[1:], tmp_path / "alone", engine="inline")
    assert counters(done)["included"]["frames_saved"] == counters(alone)["excluded"]["frames_saved"] == 2
    assert counters(done)["excluded"]["frames_saved"] == 0


def test_another_previous_run_in_its_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ksmdist import pipeline

    path = write(tmp_path / "1", [page(1), page(2)])
    before = ksmdist.run([path], tmp_path / "before", Settings(checksums=True), "inline")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "merge", faults_at_once)
        with pytest.raises(EngineError):
            ksmdist.run([path], tmp_path / "out", engine="inline", previous=before.path)
    before.path.rename(tmp_path / "away")
    ksmdist.run([path], tmp_path / "before", Settings(checksums=True, contents=7), "inline")
    with pytest.raises(RunDirectoryError, match="is another run than when this one was begun"):
        pipeline.resume(tmp_path / "out", "inline")


def faults_at_once(*_: Any) -> Any:
    raise EngineError("broke", "merge", "go on")


def test_damaged_checksums_are_an_error(tmp_path: Path) -> None:
    first = write(tmp_path / "1", [page(1), page(2)])
    before = ksmdist.run([first], tmp_path / "before", Settings(checksums=True), "inline")
    (file,) = before.path.glob(CHECKSUMS.file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        ksmdist.run([first], tmp_path / "out", engine="inline", previous=before.path)
    file.unlink()
    with pytest.raises(RunDirectoryError, match="has checksums of 0 of the 3 pages of image a"):
        ksmdist.run([first], tmp_path / "out", engine="inline", previous=before.path)


def test_holes_of_an_earlier_pass_count_as_changed_and_are_said(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    rows: list[Row] = [(0, page(1), eligible()), (PAGE, None, eligible("unreadable")), (2 * PAGE, page(3), eligible())]
    rows.append((1 << 30, page(1000 + ord("a")), eligible()))  # as write() has it
    arrow_image(tmp_path / "1" / "a.arrow", rows)
    write(tmp_path / "2", [page(1), page(2), page(3)])
    entries = [{"uri": f"{number}/a.arrow", "image": "a", "pass": number} for number in (1, 2)]
    (tmp_path / "m.json").write_text(json.dumps(entries))
    done = run(tmp_path / "m.json", tmp_path / "out")
    assert done.images.column("volatile").to_pylist() == [1]
    assert done.caveats == ("a: 1 pages of earlier passes could not be read: what is there now counts as volatile",)


@pytest.mark.parametrize("stage", ["checksum", "scan", "merge"])
def test_a_run_of_passes_that_failed_goes_on(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ksmdist import pipeline

    manifest = fleet(tmp_path, series(tmp_path))
    whole = run(manifest, tmp_path / "whole", shard_pages=9)
    real: Callable[..., Any] = getattr(stages, stage)
    calls: list[object] = []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3 or stage == "merge":
            raise EngineError("broke", stage, "go on")
        return real(*args)

    monkeypatch.setattr(stages, stage, failing)
    with pytest.raises(EngineError) as error:
        run(manifest, tmp_path / "out", shard_pages=9)
    monkeypatch.setattr(stages, stage, real)
    assert f"{_finished(tmp_path)} of " in str(error.value)
    done = pipeline.resume(tmp_path / "out", "inline")
    assert table_files(done.path) == table_files(whole.path)


def _finished(folder: Path) -> int:
    work = folder / "out.partial" / "work"
    return len([*work.glob("pass-*.parquet"), *work.glob("0-*.json")])


@pytest.mark.kernel
@pytest.mark.parametrize("use_zero_pages", [False, True])
def test_the_kernel_finds_the_same_pages_volatile(ksm: Ksm, start: Start, tmp_path: Path, use_zero_pages: bool) -> None:
    """A scan, changes, a second scan: two captures predict what the kernel then shows."""
    with ksm.restored():
        ksm.unmerge()
        ksm.write("use_zero_pages", int(use_zero_pages))
        if (ksm.root / "smart_scan").exists():
            ksm.write("smart_scan", 0)
        target = start(
            f"memory = anon('memory', 64, {NOHUGE}, {MERGEABLE})\n"
            "write(memory, 0, 0, 8)\n"  # zero pages
            "write(memory, 8, 5, 6)\n"  # six copies
            "for n in range(14, 40): write(memory, n, 100 + n)\n"  # each its own
        )
        try:
            ksm.scan(1)
            capture([target.pid], tmp_path / "1", mergeable_only=True, pause=True)
            target.do(
                "write(memory, 0, 7); write(memory, 8, 9); write(memory, 14, 5); write(memory, 15, 0); "
                "write(memory, 16, 116); write(memory, 17, 900); write(memory, 40, 5, 2); write(memory, 42, 0, 2)"
            )
            capture([target.pid], tmp_path / "2", mergeable_only=True, pause=True)
            ksm.scan(1)
            shown = ksm.counters()
        finally:
            target.close()
            ksm.unmerge()
    first = ksmdist.run([*(tmp_path / "1").glob("*.arrow")], tmp_path / "r1", Settings(checksums=True), "inline")
    knobs = Settings(full_scans=2, use_zero_pages=use_zero_pages)
    done = ksmdist.run([*(tmp_path / "2").glob("*.arrow")], tmp_path / "r2", knobs, "inline", previous=first.path)
    predicted = done.summary["counters"]
    for name in ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "ksm_zero_pages"):
        assert predicted[name] == shown[name], name
    assert done.images.column("volatile").to_pylist() == [9]


def test_a_plan_knows_of_earlier_passes(tmp_path: Path) -> None:
    from ksmdist import pipeline

    manifest = fleet(tmp_path, series(tmp_path))
    planned = pipeline.estimate([], manifest=str(manifest))
    done = run(manifest, tmp_path / "out")
    rows = read_table(done.path, PASSES).to_pylist()
    last = sum(row["pages"] for row in rows if row["pass"] == 3)
    assert planned.estimate.pages == last
    assert planned.estimate.earlier_pages == sum(row["pages"] for row in rows) - last
