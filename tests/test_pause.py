"""Processes that stand still while they are captured, and go on as they were."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

import ksmdist.capture
from ksmdist.capture import capture, members, select, stand_still
from ksmdist.errors import ImageReadError, SettingsError
from ksmdist.images import proc

from .targets import Start, Target, linux, root


def state(pid: int) -> str:
    return proc.parse_stat(Path(f"/proc/{pid}/stat").read_bytes()).state


@linux
def test_stopped_processes_go_on_and_those_that_were_stopped_do_not(start: Start) -> None:
    running, stopped = start(""), start("")
    os.kill(stopped.pid, signal.SIGSTOP)
    while state(stopped.pid) != "T":
        time.sleep(0.001)
    for error in (None, ValueError, KeyboardInterrupt):
        with suppress(ValueError, KeyboardInterrupt), stand_still([running.pid, stopped.pid]):
            assert (state(running.pid), state(stopped.pid)) == ("T", "T")
            if error is not None:
                raise error
        assert (state(running.pid) in "RS", state(stopped.pid)) == (True, "T")
    with suppress(KeyboardInterrupt), stand_still([running.pid]):
        os.kill(os.getpid(), signal.SIGINT)
    assert state(running.pid) in "RS"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_pause(number: int, start: Start) -> None:
    target = start("")
    code = (
        "import sys, time\nfrom ksmdist.capture import stand_still\n"
        f"with stand_still([{target.pid}]):\n    print('still', flush=True)\n    time.sleep(60)"
    )
    paused = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert paused.stdout is not None
    assert paused.stdout.readline() == "still\n"
    assert state(target.pid) == "T"
    paused.send_signal(number)
    assert paused.wait(10) in (128 + number, -number)
    paused.stdout.close()
    assert state(target.pid) in "RS"


@linux
def test_a_process_that_does_not_stop_in_time(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    target = start("")
    monkeypatch.setattr(ksmdist.capture, "_STOP_SECONDS", 0.0)
    monkeypatch.setattr(ksmdist.capture, "_stands", lambda pid: False)
    with pytest.raises(ImageReadError, match="does not stand still"), stand_still([target.pid]):
        pass
    assert state(target.pid) in "RS"


def hierarchies() -> dict[str, str]:
    found = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup2":
            found["cgroup2"] = where
        elif kind == "cgroup":
            found["freezer" if "freezer" in options.split(",") else "other"] = where
    return found


@pytest.fixture(params=["cgroup2", "freezer", "other"])
def cgroup(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cgroup with one below it, in each kind of hierarchy: frozen in two ways, and not at all."""
    if os.geteuid() or request.param not in hierarchies():
        pytest.skip(f"needs root and a mounted cgroup hierarchy: {request.param}")
    outer = Path(hierarchies()[request.param]) / f"ksmdist-test-{os.getpid()}"
    with ExitStack() as stack:
        for path in (outer, outer / "inner"):
            path.mkdir()
            stack.callback(remove, path)
        yield outer


def remove(cgroup: Path) -> None:
    for pid in (cgroup / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    limit = time.monotonic() + 5
    while time.monotonic() < limit:
        with suppress(OSError):
            return cgroup.rmdir()
        time.sleep(0.005)


@linux
def test_cgroups_stand_still_and_go_on(cgroup: Path, tmp_path: Path) -> None:
    tick = 'import threading, time\ntold["x"] = 1\n'
    busy = "def go():\n    while True: time.sleep(0.001)\nthreading.Thread(target=go, daemon=True).start()"
    targets = [Target(tick + busy) for _ in range(2)]
    try:
        for target, where in zip(targets, (cgroup, cgroup / "inner"), strict=True):
            (where / "cgroup.procs").write_text(str(target.pid))
        pids = sorted(target.pid for target in targets)
        assert select(cgroup=str(cgroup)) == pids
        assert members(str(cgroup / "inner")) == {targets[1].pid}
        with stand_still(pids, str(cgroup)):
            time.sleep(0.02)  # a thread counts as frozen before its last switch is counted
            before = [threads(pid) for pid in pids]
            time.sleep(0.05)
            assert [threads(pid) for pid in pids] == before
        time.sleep(0.05)
        assert all(threads(pid) != was for pid, was in zip(pids, before, strict=True))
        captured = capture(pids[:1], tmp_path / "out", pause=True, cgroup=str(cgroup))
        assert [one.pid for one in captured] == pids
        assert all(one.caveats == () and one.unreadable == 0 for one in captured)
        knob = next((cgroup / name for name in ("cgroup.freeze", "freezer.state") if (cgroup / name).exists()), None)
        if knob is not None:  # frozen before: frozen afterwards
            knob.write_text("1" if knob.name == "cgroup.freeze" else "FROZEN")
            with stand_still(pids, str(cgroup)):
                pass
            assert knob.read_text().strip() in ("1", "FROZEN", "FREEZING")
            knob.write_text("0" if knob.name == "cgroup.freeze" else "THAWED")
    finally:
        for target in targets:
            target.close()


def threads(pid: int) -> list[int]:
    """How often each thread has run."""
    texts = [Path(f"/proc/{pid}/task/{task}/status").read_text() for task in os.listdir(f"/proc/{pid}/task")]
    return [sum(map(int, re.findall(r"ctxt_switches:\s*(\d+)", text))) for text in texts]


@linux
def test_a_cgroup_that_this_process_is_in_is_not_frozen(cgroup: Path) -> None:
    code = (
        "import os, sys\nfrom ksmdist.capture import members, select, stand_still\n"
        f"pids = select(cgroup={str(cgroup)!r})\nassert os.getpid() not in pids\n"
        f"with stand_still(pids, {str(cgroup)!r}): print('still', pids[0], flush=True)"
    )
    target = Target("")
    try:
        (cgroup / "cgroup.procs").write_text(str(target.pid))
        inside = f"import os; open({str(cgroup / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        done = subprocess.run([sys.executable, "-c", inside + code], capture_output=True, text=True, timeout=20)
        assert done.stdout == f"still {target.pid}\n", done.stderr
        assert state(target.pid) in "RS"
    finally:
        target.close()


@linux
@root
def test_a_process_of_a_cgroup_that_has_ended_is_left_out(cgroup: Path, start: Start, tmp_path: Path) -> None:
    stays, goes = start(""), start("")
    for target in (stays, goes):
        (cgroup / "cgroup.procs").write_text(str(target.pid))
    pids = select(cgroup=str(cgroup))
    goes.close()
    assert [one.pid for one in capture(pids, tmp_path / "out", cgroup=str(cgroup))] == [stays.pid]
    stays.close()
    with pytest.raises(SettingsError, match="has no process any more"):
        capture(pids, tmp_path / "none", cgroup=str(cgroup))
