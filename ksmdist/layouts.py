"""Processes whose memory is laid out to order, for experiments with the kernel's own KSM.

A layout is a string, one character a page of one private anonymous mapping:
    0  written, full of zeros        .  never touched
    U  unlike any other page         r  read, never written: maps the shared zero page
    -  as its parent left it         any other letter or digit: filled with that byte
Children are made by fork, once the parent has its pages, and rewrite all but `-`. In a mapping with
huge pages a page of a touched huge page is there whatever its letter: `.` and `r` are zeros then.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from ksmdist.errors import EngineError, SettingsError

__all__ = ["Experiment", "Process", "Running", "page_content", "parse_process", "random_experiment", "running"]

_SPECIAL = "0.rU-"
_FILLS = string.ascii_letters + string.digits
_START_S = 60
_GRACE_S = 2


@dataclass(frozen=True, slots=True)
class Process:
    """A process and its pages.

    layout:       as the module says, one page or more; `-` only in a child
    forked_from:  index of the parent, an earlier process with as many pages
    huge:         MADV_HUGEPAGE and aligned to 2 MiB, where the others are MADV_NOHUGEPAGE
    locked:       mlock the mapping: then no page is untouched, none maps the zero page, none is the parent's
    node:         NUMA node its frames must be on, None for any
    """

    layout: str
    forked_from: int | None = None
    huge: bool = False
    locked: bool = False
    node: int | None = None


@dataclass(frozen=True, slots=True)
class Experiment:
    """Processes in scan order, KSM's knobs, and the full scans to let pass with all pages there.

    full_scans None: as many as it takes until no counter changes; not with smart_scan.

    Raises SettingsError for a layout or knob that cannot be.
    """

    processes: tuple[Process, ...]
    max_page_sharing: int = 256
    use_zero_pages: bool = False
    smart_scan: bool = False
    merge_across_nodes: bool = True
    full_scans: int | None = 4

    def __post_init__(self) -> None:
        if self.smart_scan and self.full_scans is None:
            raise SettingsError("never comes to rest", "smart_scan", "give a number of full scans")
        no_scan = self.full_scans is not None and self.full_scans < 1
        if not self.processes or self.max_page_sharing < 2 or no_scan:
            raise SettingsError(
                "has no process, no scan, or a max_page_sharing below 2", "experiment", "give one or more of each"
            )
        for index, process in enumerate(self.processes):
            self._check(index, process)

    def _check(self, index: int, process: Process) -> None:
        where, parent = f"process {index}", process.forked_from
        letters = set(process.layout)
        if not letters or not letters <= set(_FILLS) | set(_SPECIAL):
            raise SettingsError(
                f"has the layout {process.layout!r}", where, "use one or more letters, digits, `.` and `-`"
            )
        if parent is None and "-" in letters:
            raise SettingsError("has `-` in its layout but no parent", where, "use `-` in forked processes only")
        if parent is not None and not 0 <= parent < index:
            raise SettingsError(f"cannot be forked from process {parent}", where, "list a parent before its children")
        if parent is not None and len(self.processes[parent].layout) != len(process.layout):
            raise SettingsError("is not as long as its parent", where, "use `-` where the child leaves a page alone")

    def knobs(self) -> dict[str, int]:
        """The knobs of /sys/kernel/mm/ksm this experiment needs, by name."""
        names = ("max_page_sharing", "merge_across_nodes", "smart_scan", "use_zero_pages")
        return {name: int(getattr(self, name)) for name in names}

    def describe(self) -> str:
        """The experiment in a line: processes, pages, knobs, scans."""
        forked = sum(process.forked_from is not None for process in self.processes)
        pages = sum(len(process.layout) for process in self.processes)
        scans = "until nothing changes" if self.full_scans is None else f"{self.full_scans} scans"
        knobs = ", ".join(f"{name}={value}" for name, value in self.knobs().items())
        return f"{len(self.processes)} processes ({forked} forked), {pages:,} pages, {knobs}, {scans}"


def parse_process(text: str) -> Process:
    """`LAYOUT`, or `N:LAYOUT` for one forked from process N, counted from 0; raises SettingsError."""
    parent, colon, layout = text.rpartition(":")
    if not colon:
        return Process(layout)
    if not (parent.isascii() and parent.isdigit()):
        raise SettingsError(f"has the parent {parent!r}", text, "write the number of an earlier process before `:`")
    return Process(layout, forked_from=int(parent))


@dataclass(frozen=True, slots=True)
class Running:
    """A process of an experiment, running: its mapping is [start, end), bytes, in its address space."""

    pid: int
    start: int
    end: int


def page_content(experiment: Experiment, process: int, page: int, page_size: int = 4096) -> bytes | None:
    """What running() writes to a page, followed up through parents; None where nothing is written."""
    one = experiment.processes[process]
    letter = one.layout[page]
    if letter == "-":
        assert one.forked_from is not None
        return page_content(experiment, one.forked_from, page, page_size)
    if letter in ".r":
        return None
    if letter == "0":
        return bytes(page_size)
    if letter == "U":
        return ((process + 1).to_bytes(8, "little") + (page + 1).to_bytes(8, "little")) * (page_size // 16)
    return letter.encode() * page_size


# Each process reads `fork INDEX` lines from a pipe of its own and answers on another; at the end of
# the pipe, which also comes when the experimenter dies, it waits for its children and ends.
_CHILD = r"""
import ctypes, json, mmap, os, sys
plan = json.load(sys.stdin)
me, pipes = plan["index"], plan["pipes"]
one = plan["processes"][me]
page, huge = mmap.PAGESIZE, 2 << 20
libc = ctypes.CDLL(None, use_errno=True)
if one["node"] is not None:
    mask = (ctypes.c_ulong * 16)()
    mask[one["node"] // 64] = 1 << one["node"] % 64
    number = {"x86_64": 238, "aarch64": 237, "s390x": 270, "ppc64le": 261}[os.uname().machine]
    if libc.syscall(number, 2, mask, 1024):
        raise OSError(ctypes.get_errno(), "set_mempolicy")
size = len(one["layout"]) * page
memory = mmap.mmap(-1, size + (huge if one["huge"] else 0), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
skip = -base % huge if one["huge"] else 0
memory.madvise(mmap.MADV_HUGEPAGE if one["huge"] else mmap.MADV_NOHUGEPAGE, skip, size)
memory.madvise(mmap.MADV_MERGEABLE, skip, size)
def fill(index):
    for number, letter in enumerate(plan["processes"][index]["layout"]):
        at = skip + number * page
        if letter == "-":
            continue
        if index != me and letter in ".r":
            memory.madvise(mmap.MADV_DONTNEED, at, page)
        if letter == "r":
            memory[at]
        elif letter == "0":
            memory[at : at + page] = bytes(page)
        elif letter == "U":
            words = (index + 1).to_bytes(8, "little") + (number + 1).to_bytes(8, "little")
            memory[at : at + page] = words * (page // 16)
        elif letter != ".":
            memory[at : at + page] = letter.encode() * page
    if plan["processes"][index]["locked"] and libc.mlock(ctypes.c_void_p(base + skip), ctypes.c_size_t(size)):
        raise OSError(ctypes.get_errno(), "mlock")
def serve(index):
    fill(index)
    commands, answers = pipes[index]
    os.write(answers, b"%d %d %d\n" % (os.getpid(), base + skip, base + skip + size))
    with open(commands, closefd=False) as lines:
        for line in iter(lines.readline, ""):
            child = int(line)
            if os.fork() == 0:
                return child
    while True:
        try:
            os.wait()
        except ChildProcessError:
            os._exit(0)
index = me
while True:
    index = serve(index)
"""


@contextmanager
def running(processes: Sequence[Process]) -> Iterator[list[Running]]:
    """Start the processes, one after the other, each with its pages; end and reap them with the block.

    They register with KSM in the order of the list, which is then the order of a scan. Raises
    EngineError where one cannot be started.
    """
    family = _Family(processes)
    try:
        yield [family.start(index) for index in range(len(processes))]
    finally:
        family.end()


class _Family:
    """The processes of an experiment, and a pair of pipes to each."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self._processes = processes
        self._roots: list[subprocess.Popen[bytes]] = []
        self._commands, self._answers, self._theirs = [], [], []
        for _ in processes:
            reading, writing = os.pipe()
            answered, answering = os.pipe()
            self._commands.append(writing)
            self._answers.append(answered)
            self._theirs.append((reading, answering))

    def start(self, index: int) -> Running:
        parent = self._processes[index].forked_from
        if parent is not None:
            os.write(self._commands[parent], b"%d\n" % index)
        else:
            plan = {"index": index, "pipes": self._theirs, "processes": [asdict(p) for p in self._processes]}
            root = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[end for pair in self._theirs for end in pair],
                start_new_session=True,  # an interrupt from the terminal is the experimenter's alone
            )
            self._roots.append(root)
            assert root.stdin is not None
            with contextlib.suppress(BrokenPipeError), root.stdin:
                root.stdin.write(json.dumps(plan).encode())
        pid, start, end = map(int, self._answer(index).split())
        return Running(pid, start, end)

    def _answer(self, index: int) -> bytes:
        """The line that says where a process's pages are; a dead one leaves none."""
        line = b""
        ready = select.poll()
        ready.register(self._answers[index], select.POLLIN)
        for _ in range(_START_S * 20):
            if ready.poll(50):
                line += os.read(self._answers[index], 4096)
            if line.endswith(b"\n"):
                return line
            if any(root.poll() is not None for root in self._roots):
                break
        raise EngineError(self._complaint(), f"process {index} of the experiment", "free some memory and try again")

    def _complaint(self) -> str:
        for root in self._roots:
            if root.poll() is not None and root.stderr is not None:
                return "did not start: " + root.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
        return f"had not written its pages after {_START_S} s"

    def end(self) -> None:
        """A process ends when its pipe does and its children have; one that is stuck is killed."""
        for descriptor in [*self._commands, *self._answers, *(end for pair in self._theirs for end in pair)]:
            os.close(descriptor)
        deadline = time.monotonic() + _GRACE_S
        for root in self._roots:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(root.pid, signal.SIGCONT)
            try:
                root.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(root.pid, signal.SIGKILL)
                root.wait()
            if root.stderr is not None:
                root.stderr.close()


def random_experiment(rng: random.Random) -> Experiment:
    """An experiment over one to five processes; the same generator state gives the same one."""
    few = rng.random() < 0.3  # few contents with many copies each: they exceed any max_page_sharing
    fills = "".join(rng.sample(_FILLS.replace("0", "").replace("r", "").replace("U", ""), rng.randint(1, 6)))
    if few:
        letters, pages = fills[:2] + "0", rng.randint(100, 700)
        max_page_sharing = rng.choice([2, 3, 7, rng.randint(8, 300), rng.randint(50, 300)])
    else:
        letters, pages = fills + "0" * rng.randint(0, 3) + "U" * rng.randint(0, 3) + ".r", rng.randint(1, 70)
        max_page_sharing = rng.choice([2, 3, 4, rng.randint(2, 9), rng.randint(2, 300)])
    processes: list[Process] = []
    for index in range(rng.randint(1, 5)):
        if index and rng.random() < 0.5:
            parent = rng.randrange(index)
            kept = rng.choice([0.5, 0.8, 0.95, 1.0])
            layout = "".join("-" if rng.random() < kept else rng.choice(letters) for _ in processes[parent].layout)
            processes.append(Process(layout, forked_from=parent))
        else:
            length = max(1, pages * rng.randint(1, 4) // 4)
            processes.append(Process("".join(rng.choice(letters) for _ in range(length))))
    return Experiment(
        tuple(processes),
        max_page_sharing=max_page_sharing,
        use_zero_pages=rng.random() < 0.5,
        smart_scan=rng.random() < 0.5,
        full_scans=rng.randint(3, 12),
    )
