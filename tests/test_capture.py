"""Capturing live processes: what is read, what is left alone, and what stands still meanwhile."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ksmdist.capture import capture, select, stand_still
from ksmdist.errors import ImageReadError, RunDirectoryError, SettingsError
from ksmdist.images import Hole, proc
from ksmdist.images.live import LiveImage
from ksmdist.images.proc import Machine
from ksmdist.sysfs import Ksm
from ksmdist.tables import PAGE_FLAGS

from .conftest import unavailable
from .targets import HUGE, NOHUGE, PAGE, Rows, Start, linux, root


@pytest.fixture
def merge(ksm: Ksm) -> Iterator[Callable[[], None]]:
    """merge(): let KSM, with use_zero_pages on, go over everything three times; put back afterwards."""

    def go() -> None:
        ksm.unmerge()
        ksm.write("use_zero_pages", 1)
        ksm.scan(3)

    with ksm.restored():
        yield go
        ksm.unmerge()


def filled(word: int) -> bytes:
    return word.to_bytes(8, "little") * (PAGE // 8)


def walking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture as on a kernel before 6.7."""
    monkeypatch.setattr(Machine, "here", classmethod(_walking_machine))


_here = Machine.here


def _walking_machine(_: type[Machine]) -> Machine:
    return replace(_here(), pagemap_scan=False)


EVERY_KIND = """
import tempfile
m = anon("plain", 20, 15)
write(m, 0, 7); write(m, 1, 0); write(m, 2, 9, 4); touch(m, 8, 12)
m = anon("marked", 6, 15, 12)
write(m, 0, 7, 2); touch(m, 3, 4)
m = anon("locked", 2, 15)
libc.mlock(ctypes.c_void_p(told["locked"]), 2 * P); write(m, 0, 3, 2)
m = anon("hidden", 2, 15)
write(m, 0, 5, 2); libc.mprotect(ctypes.c_void_p(told["hidden"]), 2 * P, 0)
file = open(sys.argv[1] if len(sys.argv) > 1 else os.environ["BACKING"], "w+b"); file.write(b"f" * 8 * P); file.flush()
m = mmap.mmap(file.fileno(), 8 * P, flags=mmap.MAP_PRIVATE); m.madvise(1)
told["file"] = at(m); kept.append(m); write(m, 2, 11); m[4 * P]
m = mmap.mmap(-1, 4 * P); told["shared"] = at(m); kept.append(m); write(m, 0, 13, 3)
m = anon("guarded", 4, 15)
write(m, 0, 4, 4)
told["guard"] = libc.madvise(ctypes.c_void_p(told["guarded"] + P), 2 * P, 102)
"""


@linux
@root
@pytest.mark.parametrize("way", ["PAGEMAP_SCAN", "pagemap and kpageflags"])
def test_rows_are_the_pages_of_the_process(
    way: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backing = tmp_path / "backing file"
    target = start(EVERY_KIND, env={"BACKING": str(backing)})
    if way != "PAGEMAP_SCAN":
        walking(monkeypatch)
    [captured] = capture(select([target.pid]), tmp_path / "out")
    rows, told = Rows(captured), target.told
    plain = rows.at(told["plain"], 20)
    assert [row[0] for row in plain] == [filled(7), filled(0), *[filled(9)] * 4, *[None] * 4]
    assert rows.flags(told["plain"], 20) == [{"exclusive"}] * 6 + [{"zero_mapped"}] * 4
    assert all((frame is not None) == (content is not None) for content, _, frame, _ in rows.rows.values())
    assert rows.flags(told["marked"], 6) == [{"eligible", "exclusive"}] * 2 + [{"eligible", "zero_mapped"}]
    assert rows.flags(told["locked"], 2) == [{"exclusive", "locked"}] * 2
    assert [row[0] for row in rows.at(told["hidden"], 2)] == [filled(5)] * 2
    assert [(row[0], row[3]) for row in rows.at(told["file"], 8)] == [(filled(11), str(backing))]
    passed = rows.passed_over(str(backing))
    assert passed["not_anonymous"] >= 1
    assert passed["not_anonymous"] + passed.get("untouched", 0) == 7
    assert rows.at(told["shared"], 4) == []
    shared = [
        pages
        for name, reason, pages in rows.info.passed_over
        if (name, reason) == ("/dev/zero (deleted)", "shared_mapping")
    ]
    assert shared == [3]
    assert rows.passed_over("[vdso]").keys() == {"special"}
    assert rows.info.pages_absent == sum(pages for _, _, pages in rows.info.passed_over)
    assert rows.passed_over("[anon]")["untouched"] >= 10 + 3 + 2 * (told["guard"] == 0)
    if told["guard"] == 0:
        assert len(rows.at(told["guarded"], 4)) == 2
    assert {"[heap]", "[stack]"} <= {row[3] for row in rows.rows.values()}
    assert (captured.unreadable, captured.pages) == (0, len(rows.rows)) == (0, rows.info.pages)


@linux
@root
def test_both_ways_of_looking_give_the_same_rows(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = EVERY_KIND + 'm, o = aligned("huge", 4, 14)\nm[o] = 1\nm[o + (2 << 20)]\nm[o + (3 << 20)] = 1'
    target = start(code, env={"BACKING": str(tmp_path / "backing")})
    with stand_still([target.pid]):  # over both: when it goes on, the kernel writes its restartable sequence's CPU
        [captured] = capture([target.pid], tmp_path / "scan", pause=True)
        walking(monkeypatch)
        [walked] = capture([target.pid], tmp_path / "walk", pause=True)
    assert Rows(captured).rows == Rows(walked).rows
    assert Rows(captured).info.passed_over == Rows(walked).info.passed_over
    assert captured.caveats == walked.caveats == ()


@linux
@root
@pytest.mark.parametrize("advice", [NOHUGE, HUGE], ids=["small pages", "huge pages"])
def test_a_capture_changes_nothing(advice: int, start: Start, tmp_path: Path) -> None:
    target = start(
        f'aligned("untouched", 64, {advice})\n'
        f'm, o = aligned("read", 32, {advice})\nfor p in range(0, 32 << 20, P): m[o + p]\n'
        f'm, o = aligned("written", 8, {advice})\nfor p in range(0, 8 << 20, P): m[o + p] = 1\n'
        f'm, o = aligned("half", 8, {advice})\nfor p in range(0, 8 << 20, 2 * P): m[o + p] = 1\n'
    )

    def zero_pages() -> int:
        kpageflags = proc.Kpageflags()
        zero = 0
        for name, mib in (("untouched", 64), ("read", 32), ("written", 8), ("half", 8)):
            frames = np.array([f for f in target.frames(name, mib << 8) if f], np.uint64)
            zero += int(((kpageflags.of(frames) & proc.KPF_ZERO_PAGE) != 0).sum())
        kpageflags.close()
        return zero

    before, zeros = target.memory(), zero_pages()
    assert zeros >= 32 << 8
    [captured] = capture([target.pid], tmp_path / "out")
    assert (target.memory(), zero_pages()) == (before, zeros)
    rows = Rows(captured)
    assert rows.at(target.told["untouched"], 64 << 8) == []
    huge = {"huge"} if advice == HUGE else set()
    assert rows.flags(target.told["read"], 32 << 8) == [{"zero_mapped"} | huge] * (32 << 8)
    assert rows.flags(target.told["written"], 8 << 8) == [{"exclusive"} | huge] * (8 << 8)
    assert len(rows.at(target.told["half"], 8 << 8)) == (8 << 8 if advice == HUGE else 4 << 8)


@linux
@root
def test_huge_pages_mapped_by_small_entries_are_huge_too(start: Start, tmp_path: Path) -> None:
    target = start(
        'm, o = aligned("huge", 2, 14)\nfor p in range(512): m[o + p * P] = 1\n'
        'libc.mprotect(ctypes.c_void_p(told["huge"]), P, 1)'
    )
    [captured] = capture([target.pid], tmp_path / "out")
    assert all("huge" in flags for flags in Rows(captured).flags(target.told["huge"], 512))
    with open(f"/proc/{target.pid}/pagemap", "rb") as pagemap:
        regions = proc.PagemapScanner(pagemap.fileno()).scan(target.told["huge"], target.told["huge"] + (2 << 20))
    assert not (regions[:, 2] & np.uint64(proc.CATEGORIES["huge"])).any()


@linux
@root
def test_older_pagemap_scans(start: Start, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until 6.15 the ioctl refuses PAGE_IS_GUARD, until 6.17 it does not take the huge zero page for zero."""
    target = start('m, o = aligned("read", 2, 14)\nm[o]')
    ioctl, scan = fcntl.ioctl, proc.PagemapScanner.scan

    def older_ioctl(fd: int, request: int, argument: memoryview, mutate: bool) -> int:
        if argument.cast("Q")[11] & proc.CATEGORIES["guard"]:
            raise OSError(errno.EINVAL, "Invalid argument")
        return int(ioctl(fd, request, argument, mutate))

    def older_scan(scanner: proc.PagemapScanner, first: int, last: int) -> np.ndarray:
        found = scan(scanner, first, last)
        huge = (found[:, 2] & np.uint64(proc.CATEGORIES["huge"])) != 0
        found[huge, 2] &= ~np.uint64(proc.CATEGORIES["zero"])
        return found

    monkeypatch.setattr("ksmdist.images.proc.fcntl.ioctl", older_ioctl)
    monkeypatch.setattr(proc.PagemapScanner, "scan", older_scan)
    assert proc.has_pagemap_scan()
    image = live(target.pid, machine)
    found = contents(image)
    assert [found[target.told["read"] + n * PAGE] for n in range(512)] == [(None, False)] * 512
    image.close()


@linux
@root
def test_forked_processes_go_on_sharing_their_frames(start: Start, tmp_path: Path) -> None:
    target = start(
        'm = anon("both", 8, 15)\nwrite(m, 0, 5, 8)\n'
        'told["child"] = os.fork()\nif not told["child"]: import signal; signal.pause()\nwrite(m, 0, 6, 2)'
    )
    child = target.told["child"]
    try:
        before = target.frames("both", 8)
        parents, childs = (Rows(c) for c in capture([target.pid, child], tmp_path / "out"))
        assert target.frames("both", 8) == before
        there = parents.at(target.told["both"], 8), childs.at(target.told["both"], 8)
        assert [row[2] for row in there[0]] == before
        assert [one[2] == other[2] for one, other in zip(*there, strict=True)] == [False] * 2 + [True] * 6
        assert parents.flags(target.told["both"], 8) == [{"exclusive"}] * 2 + [set()] * 6
        assert parents.info.scan_order <= childs.info.scan_order
    finally:
        os.kill(child, signal.SIGKILL)


@linux
@root
@pytest.mark.kernel
def test_what_ksm_merged_stays_merged_and_is_told(
    start: Start, merge: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = start(
        'm = anon("merged", 20, 15, 12)\nwrite(m, 0, 7, 10); write(m, 10, 100); write(m, 11, 101)\n'
        'm = anon("zero", 12, 15, 12)\ntouch(m, 0, 3); write(m, 4, 0, 6)\n'
    )
    merge()
    stat = Path(f"/proc/{target.pid}/ksm_stat")
    before, told, frames = target.memory(), stat.read_text(), target.frames("merged", 12)
    assert "ksm_zero_pages 6\n" in told
    assert len(set(frames[:10])) == 1
    [captured] = capture([target.pid], tmp_path / "out")
    assert (target.memory(), stat.read_text(), target.frames("merged", 12)) == (before, told, frames)
    rows = Rows(captured)
    assert [row[0] for row in rows.at(target.told["merged"], 10)] == [filled(7)] * 10
    assert rows.flags(target.told["merged"], 12) == [{"eligible", "ksm"}] * 10 + [{"eligible", "exclusive"}] * 2
    zero = rows.flags(target.told["zero"], 12)
    assert [("pte_dirty" in flags, "zero_mapped" in flags) for flags in zero] == [(True, True)] * 6 + [
        (False, True)
    ] * 3
    assert any("6 of the 9 zero pages" in caveat for caveat in captured.caveats)
    assert dict(rows.info.ksm_stat)["ksm_zero_pages"] == "6"

    lying = replace(_here(), kpf_ksm=False)
    monkeypatch.setattr(Machine, "here", classmethod(lambda _: lying))
    [guessed] = capture([target.pid], tmp_path / "guessed")
    assert Rows(guessed).rows == rows.rows
    assert guessed.caveats == captured.caveats
    target.do("told['child'] = os.fork() or __import__('signal').pause()")  # now 101 and 100 are shared as well
    child = int(Path(f"/proc/{target.pid}/task/{target.pid}/children").read_text())
    monkeypatch.setattr(Machine, "here", classmethod(lambda _: replace(_here(), kpf_ksm=False)))
    try:
        [guessed] = capture([target.pid], tmp_path / "wrong")
        assert any("12 pages are taken for KSM pages" in c and "smaps counts 10" in c for c in guessed.caveats)
        monkeypatch.undo()
        assert (
            Rows(capture([target.pid], tmp_path / "right")[0]).flags(target.told["merged"], 12)[10:]
            == [{"eligible"}] * 2
        )
    finally:
        os.kill(child, signal.SIGKILL)


@linux
@root
@pytest.mark.kernel
def test_zero_pages_that_are_all_ksms(start: Start, merge: Callable[[], None], tmp_path: Path) -> None:
    target = start('m = anon("zero", 9, 15, 12)\nwrite(m, 0, 0, 9)\nm = anon("other", 4, 15)\ntouch(m, 0, 4)')
    merge()
    [captured] = capture([target.pid], tmp_path / "out", pause=True)
    rows = Rows(captured)
    assert rows.flags(target.told["zero"], 9) == [{"eligible", "zero_mapped", "pte_dirty"}] * 9
    assert rows.flags(target.told["other"], 4) == [{"zero_mapped"}] * 4
    assert captured.caveats == ()


@linux
@root
def test_mergeable_is_what_the_mapping_says_under_prctl_too(start: Start, tmp_path: Path) -> None:
    target = start(
        'told["prctl"] = libc.prctl(67, 1, 0, 0, 0)\nm = anon("all", 2, 15)\nwrite(m, 0, 1, 2)\n'
        'm = anon("not", 2, 15, 13)\nwrite(m, 0, 1, 2)'
    )
    if target.told["prctl"]:
        pytest.skip("needs PR_SET_MEMORY_MERGE, Linux 6.4")
    [captured] = capture([target.pid], tmp_path / "out")
    rows = Rows(captured)
    assert all("eligible" in flags for flags in rows.flags(target.told["all"], 2))
    assert not any("eligible" in flags for flags in rows.flags(target.told["not"], 2))


@linux
@root
def test_mergeable_only(start: Start, tmp_path: Path) -> None:
    target = start('m = anon("marked", 4, 15, 12)\nwrite(m, 0, 1, 3)\nm = mmap.mmap(-1, P); kept.append(m); m[0] = 1')
    [captured] = capture([target.pid], tmp_path / "out", mergeable_only=True)
    rows = Rows(captured)
    assert sorted(rows.rows) == [target.told["marked"] + PAGE * n for n in range(3)]
    assert rows.passed_over("[anon]") == {"untouched": 1}
    assert rows.passed_over("/dev/zero (deleted)") == {"shared_mapping": 1}
    assert any("left out" in caveat for caveat in captured.caveats)


def live(pid: int, machine: Machine) -> LiveImage:
    image = LiveImage(pid, machine)
    image.look()
    return image


def contents(image: LiveImage) -> dict[int, tuple[bytes | None, bool]]:
    found = {}
    for item in image.batches(0, image.info.pages):
        assert not isinstance(item, Hole)
        columns = (item.column(name).to_pylist() for name in ("address", "content", "flags"))
        for address, content, flags in zip(*columns, strict=True):
            found[address] = (content, bool(flags & PAGE_FLAGS["unreadable"]))
    return found


@linux
@root
@pytest.mark.parametrize("when", ["before the second look", "while it is read"])
def test_a_process_that_ends_midway(when: str, start: Start, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    target = start('m = anon("pages", 9, 15)\nwrite(m, 0, 5, 5); touch(m, 6, 9)')
    image = live(target.pid, machine)
    whole = contents(image)
    assert image.unreadable == 0
    if when == "while it is read":
        monkeypatch.setattr(LiveImage, "_read", before(LiveImage._read, target.close))
    else:
        target.close()
    after = contents(image)
    assert after.keys() == whole.keys()
    assert all(after[address] == (None, content is not None) for address, (content, _) in whole.items())
    assert image.unreadable == sum(content is not None for content, _ in whole.values()) >= 5
    image.close()


def before(method: Callable[..., Any], act: Callable[[], object]) -> Callable[..., Any]:
    def wrapped(*arguments: Any) -> Any:
        act()
        return method(*arguments)

    return wrapped


@linux
@root
@pytest.mark.parametrize("how", ["m.madvise(4, 2 * P, P)", "libc.munmap(ctypes.c_void_p(at(m) + 2 * P), P)"])
def test_pages_that_vanish_before_they_are_read(
    how: str, start: Start, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = start('m = anon("pages", 5, 15)\nwrite(m, 0, 5, 5)')
    image = live(target.pid, machine)
    monkeypatch.setattr(LiveImage, "_read", before(LiveImage._read, lambda: target.do(how)))
    found = contents(image)
    rows = [found[target.told["pages"] + n * PAGE] for n in range(5)]
    assert rows == [(filled(5), False)] * 2 + [(None, True)] + [(filled(5), False)] * 2
    assert image.unreadable == 1
    image.close()


@linux
@root
def test_pages_that_come_and_go_between_the_looks(start: Start, machine: Machine) -> None:
    target = start('m = anon("pages", 9, 15)\nwrite(m, 0, 5, 3); write(m, 6, 5, 3)')
    image = live(target.pid, machine)
    target.do("m.madvise(4, 0, P); write(m, 4, 6); write(m, 7, 8)")
    found = contents(image)
    rows = [found.get(target.told["pages"] + n * PAGE) for n in range(9)]
    five = (filled(5), False)
    assert rows == [None, five, five, None, (filled(6), False), None, five, (filled(8), False), five]
    assert image.unreadable == 0
    image.close()


@linux
@root
def test_more_pages_than_a_stretch_holds(
    start: Start, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ksmdist.images.proc._BUFFER_BYTES", 8 * PAGE)
    machine = replace(machine, buffers=machine.buffers[:, : 8 * PAGE])
    target = start(
        'm = anon("pages", 100, 15)\nfor n in range(0, 100, 3): write(m, n, n + 1)\n'
        "for n in range(1, 30): write(m, n, n + 1)"
    )
    seen: list[int] = []

    class Bar:
        def scanning(self, pages: int, page_size: int) -> None:
            seen.append(pages * page_size)

        def scanned(self, pages: int) -> None:
            seen.append(pages)

    [captured] = capture([target.pid], tmp_path / "out", progress=Bar())
    rows = Rows(captured)
    there = sorted({*range(0, 100, 3), *range(1, 30)})
    assert [row[0] for row in rows.at(target.told["pages"], 100)] == [filled(n + 1) for n in there]
    assert sum(seen[1:]) == sum(row[0] is not None for row in rows.rows.values())
    image = live(target.pid, machine)
    target.do("for n in range(100): write(m, n, n + 1)")
    found = contents(image)
    now = {n: found[at][0] for n in range(100) if (at := target.told["pages"] + n * PAGE) in found}
    assert now == {n: filled(n + 1) for n in now}
    assert now.keys() > set(there)
    image.close()


@linux
def test_processes_that_cannot_be_captured(tmp_path: Path, machine: Machine) -> None:
    with pytest.raises(ImageReadError, match="does not exist"):
        select([1 << 22])
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ImageReadError, match="no memory of its own"):
        LiveImage(ended.pid, machine)
    ended.wait()
    with pytest.raises(ImageReadError, match="does not exist"):
        capture([ended.pid], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if Path("/proc/2/comm").read_text() == "kthreadd\n":
        with pytest.raises(ImageReadError, match="kernel thread"):
            LiveImage(2, machine)
    with pytest.raises(SettingsError, match="very process"):
        select([os.getpid()])


@linux
@root
def test_without_privilege(start: Start, tmp_path: Path) -> None:
    target = start("")

    def checks() -> None:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        import ctypes

        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, which setuid takes away
        machine = Machine.here()
        assert (machine.kpageflags, machine.kpf_ksm) == (None, False)
        with pytest.raises(ImageReadError, match="permission denied"):
            LiveImage(target.pid, machine)
        with pytest.raises(ImageReadError, match="permission denied"), stand_still([target.pid]):
            pass
        with pytest.raises(ImageReadError, match="no PAGEMAP_SCAN"):
            LiveImage(os.getpid(), replace(machine, pagemap_scan=False))
        image = live(os.getpid(), machine)
        assert any("CAP_SYS_ADMIN" in caveat for caveat in image.info.caveats)
        item = next(iter(image.batches(0, image.info.pages)))
        assert isinstance(item, pa.RecordBatch)
        assert item.column("frame").null_count == item.num_rows
        assert item.column("content").null_count < item.num_rows

    child = os.fork()
    if child == 0:
        code = 1
        try:
            checks()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@linux
def test_select_by_comm_and_of_threads(start: Start) -> None:
    target = start(
        "libc.prctl(15, b'odd na) me', 0, 0, 0)\nimport threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    assert select(comm="odd na) me") == [target.pid]
    threads = [int(name) for name in os.listdir(f"/proc/{target.pid}/task")]
    assert len(threads) == 2
    assert select(threads) == [target.pid]
    with pytest.raises(SettingsError, match="no process that can be captured"):
        select(comm="no such comm")
    with pytest.raises(SettingsError, match="no process that can be captured"):
        select(comm="kthreadd")
    with pytest.raises(SettingsError, match="is no cgroup"):
        select(cgroup="/proc")
    with pytest.raises(SettingsError, match="no process was named"):
        select()


@linux
@root
def test_files(start: Start, tmp_path: Path) -> None:
    target = start("libc.prctl(15, b'../a b/', 0, 0, 0)")
    out = tmp_path / "new"
    [captured] = capture([target.pid], out)
    assert captured.path == out / f"_a_b_-{target.pid}.arrow"
    assert captured.image_id == f"../a b/-{target.pid}"
    assert (out.stat().st_mode & 0o777, captured.path.stat().st_mode & 0o777) == (0o700, 0o600)
    with pa.ipc.open_file(str(captured.path)) as file:
        metadata = {key.decode(): value.decode() for key, value in file.schema.metadata.items()}
    assert metadata["ksmdist.image_id"] == captured.image_id
    assert metadata["ksmdist.kind"] == "process"
    assert metadata["ksmdist.host"] == os.uname().nodename
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", metadata["ksmdist.captured_at"])
    source = json.loads(metadata["ksmdist.source"])
    assert (source["format"], source["producer"]) == ("live", f"Linux {os.uname().release}")
    stat = proc.parse_stat(Path(f"/proc/{target.pid}/stat").read_bytes())
    assert metadata["ksmdist.scan_order"] == str((stat.starttime << 22) + target.pid)
    with pytest.raises(RunDirectoryError, match="exists"):
        capture([target.pid], out)
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        capture([target.pid], captured.path / "below")
    assert os.listdir(out) == [captured.path.name]


@linux
@root
def test_a_full_disk_leaves_no_part_of_a_file(start: Start, tmp_path: Path) -> None:
    target = start('m = anon("pages", 2000, 15)\nwrite(m, 0, 5, 2000)')
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=False).returncode:
        unavailable("cannot mount a tmpfs")
    try:
        with pytest.raises(RunDirectoryError, match="cannot be written: No space left"):
            capture([target.pid], small)
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
