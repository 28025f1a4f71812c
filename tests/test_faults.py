"""What goes wrong on one machine: the same bytes as without it, or a clear error and a run that can be resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ksmdist
from ksmdist import checkpoint, pipeline, plan, stages
from ksmdist.checkpoint import Checkpoint
from ksmdist.errors import ImageError, RunDirectoryError, SettingsError
from ksmdist.settings import Settings
from ksmdist.store import read_table
from ksmdist.tables import STABLE_TREE

from . import faults
from .conftest import KEPT, PAGE, ZERO, page, table_files, unavailable

PLAIN = [table.file for table in KEPT]


@pytest.fixture
def unharmed(tmp_path: Path) -> dict[str, bytes]:
    """The tables of the run that nothing happens to."""
    folder = tmp_path / "unharmed"
    folder.mkdir()
    return table_files(ksmdist.run(faults.images(folder), folder / "run", faults.SETTINGS, "inline").path)


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "unharmed")


DIES = """
def before(scan):
    if scan.task.number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
read = stages.read_shards
def dying(names, settings, digester, scan):
    before(scan)
    return read(names, settings, digester, scan)
stages.read_shards = dying
pipeline.run(sys.argv[2:], sys.argv[1], Settings(shard_pages=4, ranges=4), "inline")
"""


def test_a_killed_driver_costs_no_finished_scan(
    tmp_path: Path, unharmed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = faults.images(tmp_path)
    killed = faults.driver(DIES, tmp_path / "run", *made)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert _left(tmp_path) == ["image0.raw", "image1.raw", "run.partial"]
    log = tmp_path / "log"
    monkeypatch.setattr(stages, "read_shards", faults.reader(faults.counted(log)))
    run = pipeline.resume(tmp_path / "run", "inline")
    assert log.read_text().split() == ["5", "6", "7"]
    assert table_files(run.path) == unharmed
    assert _left(tmp_path) == ["image0.raw", "image1.raw", "log", "run"]
    prom = (run.path / "metrics.prom").read_text()
    assert "ksmdist_run_tasks_taken_up 5" in prom


def test_the_same_run_again_takes_up_too_and_another_is_refused(
    tmp_path: Path, unharmed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = faults.images(tmp_path)
    faults.driver(DIES, tmp_path / "run", *made).communicate(timeout=60)
    with pytest.raises(RunDirectoryError, match="an unfinished run of other images or settings is here, with 5 fin"):
        ksmdist.run(made[:1], tmp_path / "run", faults.SETTINGS, "inline")
    log = tmp_path / "log"
    monkeypatch.setattr(stages, "read_shards", faults.reader(faults.counted(log)))
    run = ksmdist.run(made, tmp_path / "run", faults.SETTINGS, "inline")
    assert log.read_text().split() == ["5", "6", "7"]
    assert table_files(run.path) == unharmed


@pytest.mark.parametrize("suffix", [".arrow", ".json", "run.json", "plan.json", "00002.parquet"])
def test_a_crash_between_write_and_rename(tmp_path: Path, unharmed: dict[str, bytes], suffix: str) -> None:
    made = faults.images(tmp_path)
    code = """
replace = os.replace
seen = []
def dying(source, target):
    if str(target).endswith(sys.argv[2]):
        seen.append(target)
        if len(seen) == (3 if sys.argv[2] in (".arrow", ".json") else 1):
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dying
pipeline.run(sys.argv[3:], sys.argv[1], Settings(shard_pages=4, ranges=4), "inline")
"""
    killed = faults.driver(code, tmp_path / "run", suffix, *made)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "run").exists()
    if suffix == "plan.json":  # before anything was planned: nothing to take up, and nothing in the way
        with pytest.raises(RunDirectoryError, match=r"no plan\.json"):
            pipeline.resume(tmp_path / "run", "inline")
        run = ksmdist.run(made, tmp_path / "run", faults.SETTINGS, "inline")
    else:
        run = pipeline.resume(tmp_path / "run", "inline")
    assert table_files(run.path) == unharmed
    assert _left(tmp_path) == ["image0.raw", "image1.raw", "run"]
    assert not [path.name for path in run.path.rglob(".*")], "leftovers of the crash"


def test_a_crash_before_the_last_rename(tmp_path: Path, unharmed: dict[str, bytes]) -> None:
    made = faults.images(tmp_path)
    code = """
os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
pipeline.run(sys.argv[2:], sys.argv[1], Settings(shard_pages=4, ranges=4), "inline")
"""
    faults.driver(code, tmp_path / "run", *made).communicate(timeout=60)
    assert _left(tmp_path) == ["image0.raw", "image1.raw", "run.partial"]
    with pytest.raises(RunDirectoryError, match="a finished run that has not got its name yet"):
        ksmdist.run(made, tmp_path / "run", faults.SETTINGS, "inline")
    assert table_files(pipeline.resume(tmp_path / "run").path) == unharmed
    assert _left(tmp_path) == ["image0.raw", "image1.raw", "run"]


def test_merges_of_another_cut_of_the_ranges_do_not_stay(tmp_path: Path, unharmed: dict[str, bytes]) -> None:
    made = faults.images(tmp_path)
    code = """
merge = stages.merge
def dying(*arguments):
    if arguments[-1].piece.number == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return merge(*arguments)
stages.merge = dying
from ksmdist import plan
plan.share = lambda memory: 2
pipeline.run(sys.argv[2:], sys.argv[1], Settings(shard_pages=4, ranges=4), "inline")
"""
    faults.driver(code, tmp_path / "run", *made).communicate(timeout=60)
    assert len(list((tmp_path / "run.partial" / "stable_tree").glob("*.parquet"))) > 4
    run = pipeline.resume(tmp_path / "run", "inline", task_memory=512 << 20)
    assert table_files(run.path) == unharmed


@pytest.mark.parametrize("harm", ["bit", "cut", "gone"])
def test_a_damaged_result_is_scanned_again(tmp_path: Path, unharmed: dict[str, bytes], harm: str) -> None:
    made = faults.images(tmp_path)
    faults.driver(DIES, tmp_path / "run", *made).communicate(timeout=60)
    result = tmp_path / "run.partial" / "work" / "0-00002.arrow"
    data = bytearray(result.read_bytes())
    data[len(data) // 2] ^= 1
    if harm == "gone":
        result.unlink()
    else:
        result.write_bytes(data if harm == "bit" else data[:-9])
    assert table_files(pipeline.resume(tmp_path / "run", "inline").path) == unharmed


def test_an_image_that_changed_meanwhile_is_no_part_of_the_run(tmp_path: Path) -> None:
    made = faults.images(tmp_path)
    faults.driver(DIES, tmp_path / "run", *made).communicate(timeout=60)
    made[1].write_bytes(b"".join(page(n) for n in range(16)))
    with pytest.raises(ksmdist.KsmdistError, match=r"changed while it was scanned.*5 of 8 tasks are done and kept: ks"):
        pipeline.resume(tmp_path / "run", "inline")


def test_two_drivers_on_one_run_directory(tmp_path: Path) -> None:
    (image,) = faults.images(tmp_path, 1)
    held = Checkpoint.begin(tmp_path / "run", {})
    for arguments in ([str(image), "-o", str(tmp_path / "run")], ["--resume", str(tmp_path / "run")]):
        second = faults.driver("cli.main()", "run", *arguments, "-q")
        _, said = second.communicate(timeout=60)
        assert second.returncode == 11
        assert f"is being written by another ksmdist (process {os.getpid()} on " in said
    held.close()
    assert _left(tmp_path) == ["image0.raw"]
    assert ksmdist.run([image], tmp_path / "run", engine="inline").complete


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, unharmed: dict[str, bytes]) -> None:
    made = faults.images(tmp_path)
    code = """
read = stages.read_shards
def slow(names, settings, digester, scan):
    if scan.task.number == 5:
        Path(sys.argv[0] + "ready").touch()
        time.sleep(60)
    return read(names, settings, digester, scan)
stages.read_shards = slow
out, ready, *images = sys.argv[1:]
sys.argv = [ready, "run", *images, "-o", out, "--shard-pages", "4", "--ranges", "4", "--engine", "inline"]
cli.main()
"""
    running = faults.driver(code, tmp_path / "run", tmp_path / "is", *made)
    faults.wait_for((tmp_path / "isready").exists)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert f"interrupted; 5 finished tasks are kept: ksmdist run --resume {tmp_path / 'run'}" in said
    assert "Traceback" not in said
    resumed = faults.driver("cli.main()", "run", "--resume", tmp_path / "run", "--engine", "inline")
    out, said = resumed.communicate(timeout=60)
    assert resumed.returncode == 0
    assert "scan: 8 tasks, 5 of them finished before, 32 pages" in said
    assert "KSM would save" in out
    assert table_files(tmp_path / "run") == unharmed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, which root can make larger."""
    if os.geteuid() != 0:
        unavailable("mounting a small file system takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "ksmdist-test", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(tmp_path: Path, unharmed: dict[str, bytes], small_disk: Path) -> None:
    made = faults.images(tmp_path)
    failed = faults.driver(
        "cli.main()", "run", *made, "-o", small_disk / "run", "--shard-pages", 4, "--ranges", 4, "--engine", "inline"
    )
    _, said = failed.communicate(timeout=60)
    assert failed.returncode == 11
    assert "cannot be written: No space left on device; free some space; " in said
    assert f"of 8 tasks are done and kept: ksmdist run --resume {small_disk / 'run'}" in said
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    assert table_files(pipeline.resume(small_disk / "run", "inline").path) == unharmed


def test_what_cannot_be_resumed_says_so(tmp_path: Path) -> None:
    (image,) = faults.images(tmp_path, 1)
    with pytest.raises(RunDirectoryError, match="is not there, finished or unfinished"):
        pipeline.resume(tmp_path / "run")
    ksmdist.run([image], tmp_path / "run", engine="inline")
    with pytest.raises(RunDirectoryError, match="is finished"):
        pipeline.resume(tmp_path / "run")
    for arguments in ([image], ["-o", "other"], ["--manifest", "fleet.yaml"], ["--use-zero-pages"], ["--fan-in", "9"]):
        done = faults.driver("cli.main()", "run", "--resume", tmp_path / "run", *arguments)
        assert "goes with no images, no -o and no settings" in done.communicate(timeout=60)[1]
        assert done.returncode == 2


@pytest.mark.parametrize("broken", ["{}", "[1]", '{"plan_version": 1, "settings": {"x": 1}}', "not json"])
def test_a_plan_that_is_none(tmp_path: Path, broken: str) -> None:
    made = faults.images(tmp_path)
    faults.driver(DIES, tmp_path / "run", *made).communicate(timeout=60)
    (tmp_path / "run.partial" / "plan.json").write_text(broken)
    with pytest.raises(RunDirectoryError, match=r"plan\.json"):
        pipeline.resume(tmp_path / "run")


def test_an_early_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = faults.images(tmp_path)

    def fail(_: stages.Scan) -> None:
        raise RunDirectoryError("a", "b", "c")

    monkeypatch.setattr(stages, "read_shards", faults.reader(fail))
    with pytest.raises(RunDirectoryError):
        ksmdist.run(made, tmp_path / "run", faults.SETTINGS, "inline")
    assert _left(tmp_path) == ["image0.raw", "image1.raw"]


def test_what_is_no_unfinished_run_stays(tmp_path: Path) -> None:
    (image,) = faults.images(tmp_path, 1)
    foreign = tmp_path / "run.partial"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(RunDirectoryError, match=r"holds thesis\.txt, which is not of an unfinished run"):
        ksmdist.run([image], tmp_path / "run", engine="inline")
    (foreign / "thesis.txt").rename(tmp_path / "kept")
    foreign.rmdir()
    foreign.symlink_to(tmp_path)
    with pytest.raises(RunDirectoryError, match="is no directory of this user"):
        ksmdist.run([image], tmp_path / "run", engine="inline")
    foreign.unlink()
    foreign.touch()
    with pytest.raises(RunDirectoryError, match=r"run\.partial: cannot be made: File exists"):
        ksmdist.run([image], tmp_path / "run", engine="inline")
    foreign.unlink()
    foreign.mkdir(mode=0o777)
    run = ksmdist.run([image], tmp_path / "run", engine="inline")
    assert run.path.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "kept").read_text() == "precious"


def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        unavailable("giving a directory away takes root")
    (image,) = faults.images(tmp_path, 1)
    (tmp_path / "run.partial").mkdir()
    os.chown(tmp_path / "run.partial", 65534, 65534)
    with pytest.raises(RunDirectoryError, match="is no directory of this user"):
        ksmdist.run([image], tmp_path / "run", engine="inline")


def test_targets_that_no_run_can_be_renamed_to(tmp_path: Path, small_disk: Path) -> None:
    (image,) = faults.images(tmp_path, 1)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for out, why in (
        (tmp_path / "link", "is a symbolic link"),
        (small_disk, "cannot be renamed to"),
        (Path("/"), "is not an empty directory"),
        (tmp_path / ("x" * 300), "cannot be made: File name too long"),
    ):
        with pytest.raises(RunDirectoryError, match=why):
            ksmdist.run([image], out, engine="inline")
        if out != Path("/"):
            with pytest.raises(RunDirectoryError):
                pipeline.resume(out, "inline")


def test_paths_are_those_of_the_command_not_of_who_takes_it_up(
    tmp_path: Path, unharmed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = faults.images(tmp_path)
    monkeypatch.chdir(tmp_path)
    faults.driver(DIES, "run", *(path.name for path in made)).communicate(timeout=60)
    monkeypatch.chdir("/")
    assert table_files(pipeline.resume(tmp_path / "run", "inline").path) == unharmed


def test_an_image_that_changes_while_it_is_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = faults.images(tmp_path)

    def rewrite(scan: stages.Scan) -> None:
        if scan.task.number == 2:
            made[0].write_bytes(b"".join(page(n) for n in range(16)))

    monkeypatch.setattr(stages, "read_shards", faults.reader(rewrite))
    with pytest.raises(ImageError, match=r"image0\.raw: changed while it was scanned"):
        ksmdist.run(made, tmp_path / "run", faults.SETTINGS, "inline")


def test_a_full_output_is_no_traceback(tmp_path: Path) -> None:
    (image,) = faults.images(tmp_path, 1)
    for number, redirect in enumerate((">/dev/full", "--json >/dev/full", "2>/dev/full", ">&-")):
        command = f"{sys.executable} -m ksmdist run {image} -o {tmp_path / f'run{number}'} --engine inline {redirect}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stderr, redirect
        assert done.returncode == (0 if redirect in ("2>/dev/full", ">&-") else 1), redirect
        assert (tmp_path / f"run{number}" / "run.json").exists(), redirect


def test_shards_are_no_larger_than_a_task_may_be() -> None:
    with pytest.raises(SettingsError, match="take more than the 256 MiB of a task"):
        plan.fill(Settings(shard_pages=1 << 20, task_memory=256 << 20), 1 << 28, 1 << 30)


def test_a_fleet_in_any_order_is_as_many_tasks() -> None:
    nodes = [f"host{number % 10}" for number in range(1000)]
    planned = plan.plan([1024] * 1000, nodes, plan.fill(Settings(shard_pages=1 << 14), 1 << 20, 2 << 30))
    assert len(planned.tasks) == 10 * -(-100 * 1024 // (1 << 14))
    assert {nodes[shard.image] for task in planned.tasks for shard in task.shards if task.node == "host3"} == {"host3"}


@given(
    chosen=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=24), min_size=1, max_size=3),
    fan_in=st.integers(2, 4),
    most_rows=st.integers(1, 9),
    ranges=st.sampled_from([1, 2, 8]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_tree_of_merges_and_split_ranges_change_nothing(
    chosen: list[list[int]], fan_in: int, most_rows: int, ranges: int
) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        made = []
        for number, words in enumerate(chosen):
            made.append(folder / f"{number}.raw")
            made[-1].write_bytes(b"".join(ZERO if word == 0 else page(word) for word in words))
        plainly = ksmdist.run(made, folder / "plain", Settings(ranges=1), "inline")
        patch.setattr(plan, "share", lambda memory: most_rows)
        wanted = Settings(ranges=ranges, shard_pages=2, fan_in=fan_in)
        other = ksmdist.run(made, folder / "other", wanted, "inline")
        one, two = table_files(plainly.path), table_files(other.path)
        for table in PLAIN:
            assert one[table] == two[table], table
        assert read_table(plainly.path, STABLE_TREE).equals(read_table(other.path, STABLE_TREE))


@given(results=st.integers(1, 5000), fan_in=st.integers(2, 64))
def test_combinations_cover_every_result_once(results: int, fan_in: int) -> None:
    levels = plan.combinations(results, fan_in)
    left = results
    for level in levels:
        assert [at for c in level for at in range(c.first, c.last)] == list(range(left))
        left = len(level)
    assert left <= fan_in
    for number in range(0, results, 97):
        below = number
        for (depth, above), combined in zip(plan.ancestors(levels, number), levels, strict=True):
            assert combined[above].level == depth
            assert combined[above].first <= below < combined[above].last
            below = above


@given(rows=st.lists(st.integers(0, 1000), min_size=1, max_size=8), most=st.integers(1, 300))
def test_ranges_that_outgrow_their_share_are_split(rows: list[int], most: int) -> None:
    pieces = plan.cut_ranges(np.array(rows), most)
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    for number, count in enumerate(rows):
        mine = [piece for piece in pieces if piece.range == number]
        assert [piece.index for piece in mine] == list(range(1 << mine[0].bits))
        assert all(piece.rows <= most for piece in mine)
        assert len(mine) == 1 or count > most


def test_a_driver_that_dies_after_combining_takes_up_from_there(
    tmp_path: Path, unharmed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = faults.images(tmp_path)
    code = """
stages.merge = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
pipeline.run(sys.argv[2:], sys.argv[1], Settings(shard_pages=4, ranges=4, fan_in=2), "inline")
"""
    faults.driver(code, tmp_path / "run", *made).communicate(timeout=60)
    work = tmp_path / "run.partial" / "work"
    assert sorted(path.name for path in work.glob("*.arrow")) == ["2-00000.arrow", "2-00001.arrow"]
    log = tmp_path / "log"
    monkeypatch.setattr(stages, "read_shards", faults.reader(faults.counted(log)))
    kept = shutil.copytree(tmp_path / "run.partial", tmp_path / "again.partial", dirs_exist_ok=True)
    assert table_files(pipeline.resume(tmp_path / "run", "inline").path) == unharmed
    assert not log.exists()
    # A combination that is damaged is made again, and for that its scans are.
    (kept / "work" / "2-00001.arrow").write_bytes(b"no")
    with pytest.raises(RunDirectoryError, match="holds a result that cannot be read"):
        pipeline.resume(tmp_path / "again", "inline")
    assert table_files(pipeline.resume(tmp_path / "again", "inline").path) == unharmed
    assert sorted(log.read_text().split()) == ["4", "5", "6", "7"]


def test_marks_of_an_older_kind_are_no_marks(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    checkpoint.content_file(tmp_path, 0, 0).with_suffix(".json").write_text("[]")
    assert checkpoint.read_mark(tmp_path, 0, 0) is None
    assert checkpoint.read_mark(tmp_path, 0, 1) is None


def test_settings_of_the_plan_are_checked() -> None:
    for wrong in ({"task_memory": 1 << 20}, {"fan_in": 1}):
        with pytest.raises(SettingsError):
            replace(Settings(), **wrong)  # type: ignore[arg-type]


def test_plans_follow_the_machines_memory() -> None:
    small, usual, large = (plan.fill(Settings(), 1 << 28, gib << 30) for gib in (0, 2, 64))
    assert (small.task_memory, usual.task_memory, large.task_memory) == (256 << 20, 1 << 30, 1 << 30)
    assert usual == large
    assert small.ranges is not None
    assert usual.ranges is not None
    assert small.ranges > usual.ranges
    for filled in (small, usual):
        assert filled.task_memory is not None
        assert filled.ranges is not None
        assert filled.shard_pages is not None
        assert (1 << 28) / filled.ranges <= plan.share(filled.task_memory)
        assert filled.shard_pages * plan.SCAN_BYTES + plan.BATCH_MEMORY <= filled.task_memory


def test_plan_prints_what_a_run_would_do(tmp_path: Path) -> None:
    made = faults.images(tmp_path)
    asked: list[Any] = ["plan", *made, "--shard-pages", 4, "--ranges", 4, "--engine", "inline"]
    text = faults.driver("cli.main()", *asked).communicate(timeout=60)[0]
    for said in ("32 in 2 images", "8 shards of up to 4 pages, 8 tasks", "4 ranges", "memory of a merge", "network"):
        assert said in text, text
    planned = json.loads(faults.driver("cli.main()", *asked, "--json").communicate(timeout=60)[0])
    assert planned["plan"]["tasks"] == 8
    run = ksmdist.run(made, tmp_path / "run", faults.SETTINGS, "inline")
    assert planned["settings"] == run.summary["settings"]
    assert planned["plan"]["rows"] == 2 * 16 * PAGE // PAGE
