"""Processes laid out to order: their pages, their order, and that none outlives the experiment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ksmdist.errors import EngineError, SettingsError
from ksmdist.layouts import Experiment, Process, page_content, parse_process, random_experiment, running
from ksmdist.sysfs import Ksm

from .conftest import unavailable

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def alone() -> Iterator[None]:
    """Mergeable memory would show in the counts of an experiment going on elsewhere."""
    ksm = Ksm()
    if not ksm.root.exists():
        unavailable(f"no KSM in this kernel: {ksm.root} is not there")
    with ksm.locked():
        yield


def is_there(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def present(pid: int, start: int, end: int) -> list[bool]:
    """Whether each page has a PTE (bit 63 of pagemap)."""
    with open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        pagemap.seek(start // PAGE * 8)
        entries = pagemap.read((end - start) // PAGE * 8)
    return [bool(entries[at + 7] & 0x80) for at in range(0, len(entries), 8)]


@pytest.mark.usefixtures("alone")
def test_pages_hold_what_the_layout_says() -> None:
    processes = (Process("0a.rU9"), Process("UUbb"), Process("-c0--.", forked_from=0), Process("U-----", forked_from=2))
    experiment = Experiment(processes)
    with running(processes) as found:
        assert len({process.pid for process in found}) == 4
        for index, process in enumerate(found):
            pages = (process.end - process.start) // PAGE
            want = [page_content(experiment, index, page, PAGE) for page in range(pages)]
            there = present(process.pid, process.start, process.end)
            # Read-touched pages are there too; what a parent touched is so in its child.
            letters = [processes[index].layout, "-c0-UU", "U-0-.."][0 if index < 2 else index - 1]
            assert [content is not None for content in want] == [
                is_present and letter != "r" and not (letter == "-" and page == 3)
                for page, (is_present, letter) in enumerate(zip(there, letters, strict=True))
            ]
            with open(f"/proc/{process.pid}/mem", "rb") as memory:
                for page, content in enumerate(want):
                    if content is not None:
                        memory.seek(process.start + page * PAGE)
                        assert memory.read(PAGE) == content
        smaps = Path(f"/proc/{found[3].pid}/smaps").read_text()
        flags = smaps.partition(f"{found[3].start:x}-")[2].partition("VmFlags:")[2].splitlines()[0].split()
        assert {"mg", "nh"} <= set(flags)
        (ours,) = {os.getpgid(found[0].pid), os.getpgid(found[2].pid)}
        assert ours == found[0].pid
    assert not any(is_there(process.pid) for process in found)


def test_contents_are_told_apart_by_process_and_page() -> None:
    experiment = Experiment((Process("U0aU"), Process("U--.", forked_from=0)))
    contents = [page_content(experiment, *place) for place in ((0, 0), (0, 3), (1, 0))]
    assert len(set(contents)) == 3
    assert page_content(experiment, 1, 2) == b"a" * 4096
    assert page_content(experiment, 1, 1) == bytes(4096)
    assert page_content(experiment, 1, 3) is None


@pytest.mark.usefixtures("alone")
def test_a_process_that_is_stopped_or_whose_experiment_fails_is_ended() -> None:
    pids = []

    def fail() -> None:
        with running([Process("ab"), Process("--", forked_from=0)]) as found:
            for process in reversed(found):
                pids.append(process.pid)
                os.kill(process.pid, signal.SIGSTOP)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(pids) == 2
    assert not any(map(is_there, pids))


@pytest.mark.usefixtures("alone")
def test_a_process_that_does_not_start_is_an_error_that_says_why() -> None:
    with pytest.raises(EngineError, match="set_mempolicy"), running([Process("ab"), Process("ab", node=1023)]):
        pass


@pytest.mark.usefixtures("alone")
def test_processes_end_with_an_experimenter_that_is_killed() -> None:
    script = """if True:
        import time
        from ksmdist.layouts import Process, running
        with running([Process("ab"), Process("--", forked_from=0)]) as found:
            print(*(process.pid for process in found), flush=True)
            time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as experimenter:
        assert experimenter.stdout is not None
        pids = list(map(int, experimenter.stdout.readline().split()))
        experimenter.kill()
    deadline = time.monotonic() + 10
    while any(map(is_there, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(pids) == 2
    assert not any(map(is_there, pids))


@pytest.mark.parametrize(
    ("processes", "knobs", "complaint"),
    [
        ((), {}, "no process"),
        ((Process("a"),), {"max_page_sharing": 1}, "below 2"),
        ((Process("a"),), {"full_scans": 0}, "no scan"),
        ((Process(""),), {}, "layout ''"),
        ((Process("a*"),), {}, "layout"),
        ((Process("a-"),), {}, "no parent"),
        ((Process("a"), Process("-", forked_from=1)), {}, "process 1"),
        ((Process("ab"), Process("-", forked_from=0)), {}, "as long as"),
    ],
)
def test_an_experiment_that_cannot_be_is_refused(
    processes: tuple[Process, ...], knobs: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(SettingsError, match=complaint):
        Experiment(processes, **knobs)


def test_a_process_is_read_from_the_command_line() -> None:
    assert [parse_process(text) for text in ("a0.", "0:--U", "12:-")] == [
        Process("a0."),
        Process("--U", forked_from=0),
        Process("-", forked_from=12),
    ]
    for text in (":ab", "x:ab", "-1:ab", "0:1:ab"):
        with pytest.raises(SettingsError, match="parent"):
            parse_process(text)


def test_an_experiment_describes_itself() -> None:
    experiment = Experiment((Process("a0."), Process("---", forked_from=0)), 7, True)
    knobs = "max_page_sharing=7, merge_across_nodes=1, smart_scan=0, use_zero_pages=1"
    assert experiment.describe() == f"2 processes (1 forked), 6 pages, {knobs}, 4 scans"


def test_a_seed_gives_one_experiment() -> None:
    assert random_experiment(random.Random(7)) == random_experiment(random.Random(7))
    assert len({random_experiment(random.Random(seed)) for seed in range(100)}) == 100


def test_random_experiments_cover_what_they_are_for() -> None:
    experiments = [random_experiment(random.Random(seed)) for seed in range(300)]
    layouts = [process.layout for experiment in experiments for process in experiment.processes]
    assert {len(e.processes) for e in experiments} == {1, 2, 3, 4, 5}
    assert {e.full_scans for e in experiments} == set(range(3, 13))
    assert {(e.use_zero_pages, e.smart_scan) for e in experiments} == {
        (a, b) for a in (False, True) for b in (False, True)
    }
    for letter in "0.rU-":
        assert sum(letter in layout for layout in layouts) > 50, letter
    over = sum(
        any(
            process.layout.count(fill) > e.max_page_sharing
            for process in e.processes
            for fill in set(process.layout) - set(".r-U")
        )
        for e in experiments
    )
    assert over > 80
    assert max(e.max_page_sharing for e in experiments) > 250
    assert min(e.max_page_sharing for e in experiments) == 2
