"""Live processes -> one memory_image file each, the processes left as they were.

Which processes, standing still or not, and the files; how a process is read is images/live.py.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from ksmdist.errors import ImageReadError, RunDirectoryError, SettingsError
from ksmdist.images import Hole, write_image
from ksmdist.images.live import LiveImage
from ksmdist.images.proc import Machine, Stat, parse_stat
from ksmdist.signals import Signals

__all__ = ["Captured", "Progress", "capture", "members", "select", "stand_still"]

_STOP_SECONDS = 5.0


class Progress(Protocol):
    """Told what is read, as it is read; timings.Progress is one."""

    def scanning(self, pages: int, page_size: int) -> None:
        """So many pages will be read."""

    def scanned(self, pages: int) -> None:
        """So many pages more are read."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A captured process: its file, name, rows, how many of those could not be read, and what to know of it."""

    path: Path
    image_id: str
    pid: int
    pages: int
    unreadable: int
    caveats: tuple[str, ...]


def select(pids: Sequence[int] = (), cgroup: str | None = None, comm: str | None = None) -> list[int]:
    """The processes named, those of a cgroup and below, and those of that comm: all of them, ascending.

    A thread stands for its process. Never this process, nor, of cgroup and comm, kernel threads.
    Raises SettingsError where nothing matches or this process is named, ImageReadError for a pid
    that does not exist.
    """
    found: set[int] = set()
    for pid in pids:
        process = _process_of(pid)
        if process == os.getpid():
            raise SettingsError("is this very process", f"--pid {pid}", "name another process")
        found.add(process)
    if cgroup is not None:
        found |= _of(cgroup, members(cgroup))
    if comm is not None:
        everyone = {int(name) for name in os.listdir("/proc") if name.isdecimal()}
        found |= _of(comm, {pid for pid in _with_memory(everyone) if _comm(pid) == comm})
    if not found:
        raise SettingsError("no process was named", "ksmdist capture", "give --pid, --cgroup or --comm")
    return sorted(found)


def members(cgroup: str) -> set[int]:
    """Processes of the cgroup directory and those below it, this one too if it is there; raises SettingsError."""
    if not os.path.isfile(os.path.join(cgroup, "cgroup.procs")):
        raise SettingsError("is no cgroup", cgroup, "give its directory, as /sys/fs/cgroup/system.slice")
    found: set[int] = set()
    for directory, _, _ in os.walk(cgroup):
        try:
            with open(os.path.join(directory, "cgroup.procs")) as file:
                found.update(map(int, file.read().split()))
        except OSError:  # a threaded cgroup, whose processes its parent names; or one that has just gone
            continue
    return found - {0}  # 0: a process outside our pid namespace


def capture(
    pids: Sequence[int],
    out: Path,
    mergeable_only: bool = False,
    pause: bool = False,
    cgroup: str | None = None,
    progress: Progress | None = None,
) -> list[Captured]:
    """Write out/<comm>-<pid>.arrow for each process: files 0600, a new directory 0700.

    mergeable_only: mappings marked with MADV_MERGEABLE alone; pause: all stand still until the last
    is read; cgroup: the one that `pids` were selected by, looked at again once it stands still, and
    frozen as a whole where it can be. A process of it that ends before its turn is left out.
    Raises ImageReadError for a process that cannot be read or stopped, RunDirectoryError where a
    file exists or cannot be written: what was written before stays, no part of a file does.
    """
    machine = Machine.here()

    def has_left(pid: int) -> bool:
        return cgroup is not None and not _comm(pid)

    with ExitStack() as stack:
        stack.callback(machine.close)
        for pid in pids:
            _refuse_existing(out, pid)
        if pause:
            stack.enter_context(stand_still(pids, cgroup))
        if cgroup is not None:
            pids = sorted(_with_memory({*pids, *members(cgroup)}) - {os.getpid()})
        if not pids:
            raise SettingsError("has no process any more", cgroup or "ksmdist capture", "name processes that last")
        for pid in pids:  # what is refused is refused before anything is written
            _refuse_existing(out, pid)
            try:
                LiveImage(pid, machine).close()
            except ImageReadError:
                if not has_left(pid):
                    raise
        try:
            out.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _not_written(error, out) from None
        if progress is not None:
            progress.scanning(sum(map(_anonymous_pages, pids)), os.sysconf("SC_PAGE_SIZE"))
        done = []
        for pid in pids:
            try:
                done.append(_captured(pid, machine, out, mergeable_only, pause, progress))
            except ImageReadError:
                if not has_left(pid):
                    raise
        return done


class _Source(LiveImage):
    """A LiveImage that tells `progress` of each batch."""

    progress: Progress | None = None

    def batches(self, start: int, end: int) -> Iterator[pa.RecordBatch | Hole]:
        """As LiveImage does."""
        for item in super().batches(start, end):
            yield item
            if self.progress is not None and end == self.info.pages and isinstance(item, pa.RecordBatch):
                self.progress.scanned(item.num_rows - item.column("content").null_count)


def _captured(
    pid: int, machine: Machine, out: Path, mergeable_only: bool, stopped: bool, progress: Progress | None
) -> Captured:
    target = _target(out, pid)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    image = _Source(pid, machine)
    image.progress = progress
    try:
        at = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        image.look(mergeable_only, stopped)
        # A process chooses its name; it is printed on a terminal.
        image_id = "".join(c if c.isprintable() else "_" for c in f"{image.stat.comm}-{pid}")
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        write_image([image], str(partial), image_id, at, f"Linux {os.uname().release}")
        os.replace(partial, target)
    except OSError as error:
        raise _not_written(error, target) from None
    finally:
        image.close()
        partial.unlink(missing_ok=True)
    return Captured(target, image_id, pid, image.rows, image.unreadable, image.info.caveats)


def _target(out: Path, pid: int) -> Path:
    comm = re.sub(r"[^A-Za-z0-9._-]", "_", _comm(pid)).lstrip(".")
    return out / f"{comm or '_'}-{pid}.arrow"


def _refuse_existing(out: Path, pid: int) -> None:
    target = _target(out, pid)
    if target.exists():
        raise RunDirectoryError("exists", str(target), "choose another directory with -o, or remove it")


def _not_written(error: OSError, path: Path) -> RunDirectoryError:
    what = os.strerror(error.errno) if error.errno else str(error)
    return RunDirectoryError(f"cannot be written: {what}", str(path), "choose another -o")


def _stat(pid: int) -> Stat | None:
    """None of a process that is not there."""
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_bytes())
    except OSError:
        return None


def _comm(pid: int) -> str:
    """Empty where the process is not there, or has no memory."""
    stat = _stat(pid)
    return stat.comm if stat is not None and stat.vsize else ""


def _with_memory(pids: set[int]) -> set[int]:
    return {pid for pid in pids if _comm(pid)}


def _of(name: str, pids: set[int]) -> set[int]:
    found = _with_memory(pids) - {os.getpid()}
    if not found:
        raise SettingsError("has no process that can be captured", name, "`ps -e -o pid,comm,cgroup` lists them")
    return found


def _process_of(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        raise ImageReadError("does not exist", f"process {pid}", "`ps -e` lists the processes") from None
    return int(re.findall(r"^Tgid:\s*(\d+)", text, re.M)[0])


def _anonymous_pages(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return int(fields[1]) - int(fields[2])  # resident, less those of files


@contextmanager
def stand_still(pids: Sequence[int], cgroup: str | None = None) -> Iterator[None]:
    """The processes stopped, and `cgroup` frozen where it has a freezer and this process is not in it.

    Undone when it ends, however it ends: a process or cgroup that stood still before goes on to.
    Raises ImageReadError without permission, or where one does not stop in time.
    """
    undo: list[Callable[[], None]] = []
    with Signals() as signals:
        try:
            try:
                _freeze_or_stop(set(pids), cgroup, undo)
                yield
            finally:
                signals.hold()
        finally:
            for step in reversed(undo):
                with suppress(OSError):  # ended meanwhile
                    step()


def _freeze_or_stop(pids: set[int], cgroup: str | None, undo: list[Callable[[], None]]) -> None:
    if cgroup is not None and os.getpid() not in members(cgroup) and _freeze(cgroup, undo):
        pids -= members(cgroup)
        cgroup = None
    stopped: set[int] = set()
    while new := pids - stopped:
        for pid in new:
            _stop(pid, undo)
        stopped |= new
        for pid in new:
            _wait(lambda pid=pid: _stands(pid), f"process {pid}")  # type: ignore[misc]
        if cgroup is not None:  # children that were forked before their parent stopped
            pids = _with_memory(members(cgroup)) - {os.getpid()}


def _stop(pid: int, undo: list[Callable[[], None]]) -> None:
    if _stands(pid):
        return
    undo.append(lambda: os.kill(pid, signal.SIGCONT))
    try:
        os.kill(pid, signal.SIGSTOP)
    except ProcessLookupError:
        return
    except PermissionError:
        undo.pop()
        raise ImageReadError(
            "may not be stopped: permission denied", f"process {pid}", "run as its owner or root, or without --pause"
        ) from None


def _stands(pid: int) -> bool:
    """Whether all its threads are stopped, traced or have ended."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return True
    for task in tasks:
        with suppress(OSError):
            if parse_stat(Path(f"/proc/{pid}/task/{task}/stat").read_bytes()).state not in "TtZX":
                return False
    return True


def _freeze(cgroup: str, undo: list[Callable[[], None]]) -> bool:
    """Freeze it by cgroup.freeze (version 2) or freezer.state (version 1); False where it has neither."""
    v2, v1 = Path(cgroup, "cgroup.freeze"), Path(cgroup, "freezer.state")
    if v2.exists():
        knob, words, was = v2, ("1", "0"), v2.read_text().strip() == "1"
        events = Path(cgroup, "cgroup.events")
    elif v1.exists():
        knob, words, was = v1, ("FROZEN", "THAWED"), Path(cgroup, "freezer.self_freezing").read_text().strip() == "1"
        events = v1
    else:
        return False
    if not was:
        undo.append(lambda: _write(knob, words[1]))
        try:
            _write(knob, words[0])
        except OSError as error:
            undo.pop()
            raise ImageReadError(
                f"may not be frozen: {error.strerror}", cgroup, "run as root, or without --pause"
            ) from None
    _wait(lambda: bool({"frozen 1", "FROZEN"} & set(events.read_text().splitlines())), cgroup)
    return True


def _write(knob: Path, text: str) -> None:
    knob.write_text(text)


def _wait(done: Callable[[], bool], where: str) -> None:
    limit = time.monotonic() + _STOP_SECONDS
    while not done():
        if time.monotonic() > limit:
            raise ImageReadError(
                f"does not stand still after {_STOP_SECONDS:.0f} s", where, "try again later, or without --pause"
            )
        time.sleep(0.001)
