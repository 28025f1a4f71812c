"""KSM's directory, on a made-up one: what is read, what is written, and that all of it is put back."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest

from ksmdist.errors import EngineError
from ksmdist.sysfs import Ksm

KNOBS = {
    "run": "0",
    "pages_to_scan": "100",
    "sleep_millisecs": "20",
    "max_page_sharing": "256",
    "merge_across_nodes": "1",
    "use_zero_pages": "0",
    "smart_scan": "1",
    "advisor_mode": "[none] scan-time",
}
COUNTERS = {"full_scans": "7", "pages_shared": "3", "general_profit": "-4096"}


@pytest.fixture
def ksm(tmp_path: Path) -> Ksm:
    root = tmp_path / "ksm"
    root.mkdir()
    for values, mode in ((KNOBS, 0o644), (COUNTERS, 0o444)):
        for name, value in values.items():
            (root / name).write_text(value + "\n")
            (root / name).chmod(mode)
    return Ksm(root, tmp_path / "ksm.lock")


def texts(ksm: Ksm) -> dict[str, str]:
    """The tree's knobs as written; the made-up one keeps `none` where sysfs shows the choice."""
    return {name: (ksm.root / name).read_text().strip().removeprefix("[none] ") for name in KNOBS}


def test_counters_and_knobs_are_told_apart_by_their_mode(ksm: Ksm) -> None:
    assert ksm.counters() == {"full_scans": 7, "pages_shared": 3, "general_profit": -4096}
    assert ksm.knobs() == KNOBS | {"advisor_mode": "none"}


@pytest.mark.parametrize("stop", [ValueError(), KeyboardInterrupt(), SystemExit(3)])
def test_every_knob_is_put_back_however_the_block_ends(ksm: Ksm, stop: BaseException) -> None:
    before = ksm.knobs()

    def change() -> None:
        with ksm.restored():
            for name, value in (("run", 2), ("max_page_sharing", 5), ("smart_scan", 0), ("sleep_millisecs", 0)):
                ksm.write(name, value)
            raise stop

    with pytest.raises(type(stop)):
        change()
    assert ksm.knobs() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_block_and_the_knobs_are_put_back(ksm: Ksm, number: int) -> None:
    before, handler = ksm.knobs(), signal.getsignal(number)

    def change() -> None:
        with ksm.restored():
            ksm.write("max_page_sharing", 5)
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(SystemExit) as left:
        change()
    assert left.value.code == 128 + number
    assert ksm.knobs() == before
    assert signal.getsignal(number) is handler


def test_a_signal_while_knobs_are_put_back_waits(ksm: Ksm, monkeypatch: pytest.MonkeyPatch) -> None:
    before, put_back = ksm.knobs(), Ksm._put_back

    def interrupted(self: Ksm, name: str, value: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        put_back(self, name, value)

    monkeypatch.setattr(Ksm, "_put_back", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def change() -> None:
        with ksm.restored():
            ksm.write("max_page_sharing", 5)
            ksm.write("use_zero_pages", 1)

    try:
        with pytest.raises(KeyboardInterrupt):
            change()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ksm.knobs() == before


def test_it_unmerges_where_the_kernel_refuses_a_knob_while_pages_are_merged(
    ksm: Ksm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's EBUSY, which a plain file does not give."""
    write, written = Ksm.write, []

    def busy(self: Ksm, name: str, value: int | str) -> None:
        if name == "max_page_sharing" and ("run", 2) not in written:
            raise OSError(errno.EBUSY, "busy")
        written.append((name, value))
        write(self, name, value)

    before = ksm.knobs()
    with ksm.restored():
        ksm.write("max_page_sharing", 5)
        monkeypatch.setattr(Ksm, "write", busy)
    assert ksm.knobs() == before
    assert written.index(("run", 2)) < written.index(("max_page_sharing", "256")) < written.index(("run", "0"))


def test_an_advisor_that_was_on_is_switched_on_again_and_keeps_pages_to_scan(ksm: Ksm) -> None:
    (ksm.root / "advisor_mode").write_text("none [scan-time]")
    with ksm.restored():
        ksm.write("advisor_mode", "none")
        ksm.write("pages_to_scan", 7)
    assert texts(ksm) == KNOBS | {"advisor_mode": "scan-time", "pages_to_scan": "7"}


def test_nothing_is_written_where_nothing_was_changed(ksm: Ksm, monkeypatch: pytest.MonkeyPatch) -> None:
    with ksm.restored():
        monkeypatch.delattr(Ksm, "write")


def test_the_second_waits_for_the_lock(ksm: Ksm) -> None:
    entered = threading.Event()

    def second() -> None:
        with ksm.restored():
            entered.set()

    with ksm.locked():
        assert stat.S_IMODE(ksm.lock.stat().st_mode) == 0o600
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.1)
    thread.join(10)
    assert entered.is_set()
    with open(ksm.lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_link_in_place_of_the_lock_is_not_followed(ksm: Ksm, tmp_path: Path) -> None:
    ksm.lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="cannot be locked"), ksm.restored():
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_kernel_without_ksm_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="CONFIG_KSM"), Ksm(tmp_path / "none", tmp_path / "lock").restored():
        pass


class Ksmd(threading.Thread):
    """Scans as the kernel's thread does: once when switched on, then whenever sleep_millisecs differs."""

    def __init__(self, ksm: Ksm, deaf_to: int = 0) -> None:
        super().__init__(daemon=True)
        self._ksm, self._deaf_to, self.ended, self.slept_on = ksm, deaf_to, threading.Event(), list[str]()

    def run(self) -> None:
        slept = ""
        while not self.ended.wait(0.0005):
            now = (self._ksm.root / "sleep_millisecs").read_text()
            if (self._ksm.root / "run").read_text() != "1" or not now or now == slept:
                continue
            slept = now
            self.slept_on.append(now)
            if self._deaf_to and len(self.slept_on) == self._deaf_to:
                continue  # woken before it slept: the wake-up is lost
            (self._ksm.root / "full_scans.new").write_text(str(self._ksm.read("full_scans") + 1))
            (self._ksm.root / "full_scans.new").chmod(0o444)
            os.rename(self._ksm.root / "full_scans.new", self._ksm.root / "full_scans")


@pytest.mark.parametrize("deaf_to", [0, 3])
def test_scans_are_counted_one_by_one_even_where_a_wake_up_is_lost(ksm: Ksm, deaf_to: int) -> None:
    ksmd = Ksmd(ksm, deaf_to)
    ksmd.start()
    try:
        with ksm.restored():
            ksm.scan(5)
            assert ksm.read("full_scans") == 12
            assert ksm.read("run") == 0
    finally:
        ksmd.ended.set()
        ksmd.join()
    assert len(set(ksmd.slept_on)) == len(ksmd.slept_on) == 5 + bool(deaf_to)
    assert ksm.knobs() == KNOBS | {"advisor_mode": "none"}


def test_it_converges_when_two_scans_change_nothing(ksm: Ksm, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = iter([0, 2, 5, 6, 6, 6, 6])

    def scan(self: Ksm, full_scans: int, limit_s: float) -> None:
        (ksm.root / "pages_shared").write_text(str(next(shared)))

    monkeypatch.setattr(Ksm, "scan", scan)
    assert ksm.converge() == 6
    shared = iter(range(100))
    with pytest.raises(EngineError, match="still change after 9"):
        ksm.converge(max_scans=9)


def test_a_scan_that_does_not_end_is_an_error_and_ksmd_is_stopped(ksm: Ksm) -> None:
    with pytest.raises(EngineError, match="did not end in time"), ksm.restored():
        ksm.scan(2, limit_s=0.1)
    assert ksm.read("run") == 0
