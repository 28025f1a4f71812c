"""KSM's directory in sysfs: counters, knobs, and scans counted one by one.

Rules: mm/ksm.c of Linux 6.18, ksm_scan_thread: a wake-up scans up to pages_to_scan pages and never
beyond the end of a full scan; a different value of sleep_millisecs wakes the thread; writing `run`
waits for the batch under way. Files that this kernel lacks are left out, never asked for by version.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ksmdist.errors import EngineError
from ksmdist.signals import Signals

__all__ = ["KNOBS_FROZEN_BY_MERGES", "Ksm"]

KNOBS_FROZEN_BY_MERGES = ("max_page_sharing", "merge_across_nodes")
"""EBUSY while pages_shared > 0 (max_page_sharing_store, merge_across_nodes_store)."""

_STOP, _SCAN, _UNMERGE = 0, 1, 2
_ALL_PAGES = 1 << 30
_LONG_MS = 1 << 30
_POLL_S = 0.0002
_NUDGE_S = 0.05


def _lock_file() -> Path:
    return Path(tempfile.gettempdir()) / "ksm.lock"


@dataclass(frozen=True, slots=True)
class Ksm:
    """KSM as one directory shows it.

    root: the directory; lock: held, exclusively, by whoever changes knobs through restored().
    Every method raises EngineError where a file is absent or not writable.
    """

    root: Path = Path("/sys/kernel/mm/ksm")
    lock: Path = field(default_factory=_lock_file)

    def read(self, name: str) -> int:
        """A counter, or a knob that is a number."""
        return int(self._text(name))

    def write(self, name: str, value: int | str) -> None:
        """Set a knob. OSError where the kernel refuses the value."""
        try:
            descriptor = os.open(self.root / name, os.O_WRONLY | os.O_TRUNC)
        except OSError as error:
            raise self._error(name, error, "run as root, on the host itself") from None
        try:
            os.write(descriptor, str(value).encode())
        finally:
            os.close(descriptor)

    def counters(self) -> dict[str, int]:
        """Every counter this kernel has, by name, in pages but for general_profit (bytes) and full_scans.

        Only with run=0 do they belong together: in mid-scan a page is between the trees.
        """
        return {name: self.read(name) for name in self._names(writable=False)}

    def knobs(self) -> dict[str, str]:
        """Every knob by name, with the value that restores it; of a choice, the one in brackets."""
        knobs = {}
        for name in self._names(writable=True):
            text = self._text(name)
            knobs[name] = text.partition("[")[2].partition("]")[0] if "[" in text else text
        return knobs

    def unmerge(self) -> None:
        """Give every process its own pages back and forget all items; full_scans is 0 afterwards."""
        self.write("run", _UNMERGE)

    def stop(self) -> None:
        """Stop ksmd where it is, once it is through with its batch."""
        self.write("run", _STOP)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock, waiting for it, for a block with mergeable memory that changes no knob."""
        try:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise EngineError(
                f"cannot be locked: {os.strerror(error.errno or 0)}", str(self.lock), "remove what is there"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A block that may change any knob: every one is put back, `run` last, however the block ends.

        Waits for the lock. The first of SIGINT, SIGTERM and SIGHUP leaves the block as KeyboardInterrupt
        or SystemExit (in the main thread), further ones wait until all is put back. SIGKILL is beyond help.
        """
        if "run" not in self.knobs() or not os.access(self.root / "run", os.W_OK):
            raise EngineError("KSM cannot be switched on", str(self.root / "run"), "run as root, on the host itself")
        with self.locked(), Signals() as signals:
            knobs = self.knobs()
            # Only one signal is ever raised: where it falls between the block and hold(), the outer one is left.
            try:
                try:
                    yield
                finally:
                    signals.hold()
            finally:
                self._restore(knobs)

    def scan(self, full_scans: int, limit_s: float = 60) -> None:
        """Let ksmd do exactly this many full scans and stop between the last and the next.

        Uses pages_to_scan and sleep_millisecs, and takes the advisor out: call it inside restored().
        Raises EngineError where a scan takes longer than limit_s.
        """
        self.stop()
        if (self.root / "advisor_mode").exists():
            self.write("advisor_mode", "none")
        self.write("pages_to_scan", _ALL_PAGES)
        # ksmd compares with the value it went to sleep with: never one written before.
        sleep_ms = max(_LONG_MS, self.read("sleep_millisecs") + 1)
        self.write("sleep_millisecs", sleep_ms)
        start = self.read("full_scans")
        try:
            for done in range(1, full_scans + 1):
                self.write("run", _SCAN)  # the first begins; later ones, this waits until the last has ended
                if done > 1:
                    sleep_ms += 1
                    self.write("sleep_millisecs", sleep_ms)
                sleep_ms = self._await_scan(start + done, sleep_ms, limit_s)
        finally:
            self.stop()
        if self.read("full_scans") != start + full_scans:
            raise EngineError(
                f"ksmd did {self.read('full_scans') - start} full scans where {full_scans} were asked for",
                str(self.root),
                "leave its knobs alone meanwhile, and try again",
            )

    def _await_scan(self, number: int, sleep_ms: int, limit_s: float) -> int:
        """Wait for full scan `number`; the sleep_millisecs last written."""
        deadline = time.monotonic() + limit_s
        nudge_at = time.monotonic() + _NUDGE_S
        while self.read("full_scans") < number:
            now = time.monotonic()
            if now > deadline:
                raise EngineError(
                    f"full scan {number} did not end in time",
                    str(self.root / "full_scans"),
                    "see that a process has mergeable memory (`mg` in /proc/PID/smaps) and that ksmd runs",
                )
            if now > nudge_at:
                # The wake-up may have fallen between the end of a scan and ksmd going to sleep.
                self.write("run", _SCAN)  # returns when no batch is under way
                if self.read("full_scans") < number:
                    sleep_ms += 1
                    self.write("sleep_millisecs", sleep_ms)
                nudge_at = time.monotonic() + _NUDGE_S
            time.sleep(_POLL_S)
        return sleep_ms

    def converge(self, quiet_scans: int = 2, max_scans: int = 64, limit_s: float = 60) -> int:
        """Scan until `quiet_scans` full scans in a row leave every counter of pages as it was; the scans done.

        Meant for smart_scan=0: with it on, unmerged pages go in and out of the trees for ever.
        Raises EngineError after max_scans, as where memory keeps changing.
        """
        before, quiet = None, 0
        for done in range(1, max_scans + 1):
            self.scan(1, limit_s)
            counters = self.counters()
            state = {name: value for name, value in counters.items() if name not in _EVER_RISING}
            # One scan more than is quiet by itself: the first only records checksums.
            quiet = quiet + 1 if state == before and done > 2 else 0
            if quiet == quiet_scans:
                return done
            before = state
        raise EngineError(
            f"counters still change after {max_scans} full scans",
            str(self.root),
            "stop the processes that write to mergeable memory, and set smart_scan to 0",
        )

    def _names(self, writable: bool) -> list[str]:
        try:
            entries = sorted(os.scandir(self.root), key=lambda entry: entry.name)
        except OSError as error:
            raise self._error("", error, "use a kernel built with CONFIG_KSM") from None
        return [e.name for e in entries if e.is_file() and bool(e.stat().st_mode & stat.S_IWUSR) is writable]

    def _text(self, name: str) -> str:
        try:
            return (self.root / name).read_text(encoding="ascii").strip()
        except OSError as error:
            raise self._error(name, error, "use a kernel built with CONFIG_KSM") from None

    def _error(self, name: str, error: OSError, hint: str) -> EngineError:
        return EngineError(os.strerror(error.errno or 0), str(self.root / name), hint)

    def _restore(self, knobs: dict[str, str]) -> None:
        """Write back what differs: the advisor owns pages_to_scan while it is on, and `run` starts ksmd."""
        if self.knobs() == knobs:
            return
        self.stop()
        advised = knobs.get("advisor_mode", "none") != "none"
        if advised or self._differs("advisor_mode", knobs):
            self.write("advisor_mode", "none")
        last = [name for name in ("advisor_mode", "run") if name in knobs]
        for name in [name for name in knobs if name not in last] + last:
            if self._differs(name, knobs) and not (name == "pages_to_scan" and advised):
                self._put_back(name, knobs[name])

    def _put_back(self, name: str, value: str) -> None:
        try:
            self.write(name, value)
        except OSError as error:
            if error.errno != errno.EBUSY or name not in KNOBS_FROZEN_BY_MERGES:
                raise
            self.unmerge()
            self.write(name, value)

    def _differs(self, name: str, knobs: dict[str, str]) -> bool:
        return name in knobs and self.knobs()[name] != knobs[name]


_EVER_RISING = ("full_scans", "pages_scanned", "pages_skipped")
