"""Predictions beside the kernel's own KSM, every figure, no tolerance.

Skipped where KSM cannot be switched on; KSMDIST_FORCE_KERNEL=1 makes that a failure.
"""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest

from ksmdist.errors import EngineError
from ksmdist.layouts import Experiment, Process, random_experiment, running
from ksmdist.sysfs import Ksm
from ksmdist.verify import (
    COUNTERS,
    PROCESS_FIGURES,
    Comparison,
    Predict,
    Prediction,
    Row,
    live,
    mergeable_processes,
    predict_captured,
    render,
    verify,
)

from . import kernel_oracle
from .kernel_scenarios import EDGES, FORKS, HUGE, SCENARIOS, Scenario

TRUTH = [json.loads(line) for line in (Path(__file__).parent / "kernel-truth.jsonl").read_text().splitlines()]
EXPERIMENTS = {"oracle": 10, "captured": 200}


def predict_from_layout(pids: Sequence[int], experiment: Experiment | None) -> Prediction:
    """The oracle: from what the processes were told to write, not from their memory."""
    assert experiment is not None
    values = asdict(experiment)
    return cast(Prediction, kernel_oracle.predict(values.pop("processes"), **values))


PREDICTORS: dict[str, Predict] = {"oracle": predict_from_layout, "captured": predict_captured}


def knobs(ksm: Ksm) -> dict[str, str]:
    with ksm.locked():
        return ksm.knobs()


def table(comparison: Comparison) -> str:
    out = io.StringIO()
    render(comparison, out)
    return out.getvalue()


@pytest.mark.parametrize("truth", TRUTH, ids=range(len(TRUTH)))
def test_the_oracle_gives_what_kernels_gave(truth: dict[str, Any]) -> None:
    knobs = ("max_page_sharing", "use_zero_pages", "smart_scan", "full_scans")
    predicted = kernel_oracle.predict(truth["processes"], *(truth[name] for name in knobs))
    assert {name: predicted["counters"][name] for name in truth["counters"]} == truth["counters"]
    for process, figures in zip(truth["processes"], predicted["processes"], strict=True):
        assert figures == {name: process[name] for name in PROCESS_FIGURES}


@pytest.mark.kernel
@pytest.mark.parametrize(("predictor", "seed"), [(name, seed) for name, n in EXPERIMENTS.items() for seed in range(n)])
def test_random_experiments_twice_in_a_row(ksm: Ksm, predictor: str, seed: int) -> None:
    experiment = random_experiment(random.Random(seed))
    before = knobs(ksm)
    for _ in range(2):
        comparison = verify(experiment, PREDICTORS[predictor])
        assert comparison.equal, f"{experiment}\n{table(comparison)}"
        assert len(comparison.rows) == len(COUNTERS) + len(PROCESS_FIGURES) * len(experiment.processes)
    assert knobs(ksm) == before


@pytest.mark.kernel
@pytest.mark.parametrize("seed", range(10))
def test_until_nothing_changes(ksm: Ksm, seed: int) -> None:
    experiment = replace(random_experiment(random.Random(500 + seed)), smart_scan=False, full_scans=None)
    comparison = verify(experiment, predict_captured)
    assert comparison.equal, f"{experiment}\n{table(comparison)}"
    assert len(comparison.rows) == len(COUNTERS) - 2 + len(PROCESS_FIGURES) * len(experiment.processes)


@pytest.mark.kernel
@pytest.mark.parametrize("scenario", SCENARIOS + EDGES + FORKS, ids=lambda scenario: scenario.name)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_what_the_kernels_tests_and_ltp_expect(ksm: Ksm, predictor: str, scenario: Scenario) -> None:
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1
    if nodes < scenario.nodes:
        pytest.skip(f"needs {scenario.nodes} NUMA nodes, this machine has {nodes}")
    comparison = verify(scenario.experiment, PREDICTORS[predictor])
    counted = {row.name: row.kernel for row in comparison.rows if row.scope == "kernel"}
    assert {name: counted[name] for name in scenario.expected} == scenario.expected
    assert comparison.equal, table(comparison)


@pytest.mark.kernel
@pytest.mark.parametrize("scenario", HUGE, ids=lambda scenario: scenario.name)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_huge_pages(ksm: Ksm, predictor: str, scenario: Scenario) -> None:
    """All figures but pages_scanned: in the scan after a split the tree's order decides who is looked at."""

    def predict(pids: Sequence[int], experiment: Experiment | None) -> Prediction:
        smaps = "".join(Path(f"/proc/{pid}/smaps").read_text() for pid in pids)
        nbytes = sum(int(line.split()[1]) << 10 for line in smaps.splitlines() if line.startswith("AnonHugePages:"))
        if nbytes >> 21 != sum(process.huge for process in scenario.experiment.processes):
            pytest.skip("the kernel gave no huge pages for madvise(MADV_HUGEPAGE)")
        return PREDICTORS[predictor](pids, experiment)

    comparison = verify(scenario.experiment, predict)
    counted = {row.name: row.kernel for row in comparison.rows if row.scope == "kernel"}
    assert {name: counted[name] for name in scenario.expected} == scenario.expected
    assert {row.name for row in comparison.different} <= {"pages_scanned"}, table(comparison)


def random_huge(rng: random.Random) -> Experiment:
    """Huge pages and small ones with few zero pages and few copies, where it counts which is first."""
    processes = []
    for _ in range(rng.randint(1, 4)):
        huge = rng.random() < 0.6
        pages = ["U"] * (512 * rng.randint(1, 2) if huge else rng.randint(2, 200))
        for letters, count in (("0", rng.choice([0, 0, 1, 1, 2, 50])), ("abc", rng.choice([0, 0, 1, 3, 20]))):
            for _ in range(count):
                pages[rng.randrange(len(pages))] = rng.choice(letters)
        processes.append(Process("".join(pages), huge=huge, locked=rng.random() < 0.1))
    return Experiment(tuple(processes), use_zero_pages=rng.random() < 0.5, full_scans=8)


@pytest.mark.kernel
@pytest.mark.parametrize("seed", range(30))
def test_random_huge_pages(ksm: Ksm, seed: int) -> None:
    comparison = verify(random_huge(random.Random(seed)), predict_captured)
    assert {row.name for row in comparison.different} <= {"pages_scanned"}, table(comparison)


@pytest.mark.kernel
def test_unmerging_leaves_nothing(ksm: Ksm) -> None:
    """LTP ksm01, phases 5 and 6: run=2, then run=0."""
    with ksm.restored(), running([Process("d" * 256)] * 3):
        ksm.unmerge()
        ksm.scan(3)
        assert (ksm.read("pages_shared"), ksm.read("pages_sharing")) == (3, 765)
        for _ in range(2):
            ksm.unmerge()
            names = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "full_scans")
            assert {ksm.read(name) for name in names} == {0}
            ksm.stop()


@pytest.mark.kernel
def test_it_converges(ksm: Ksm) -> None:
    with ksm.restored(), running([Process("aab0U")]):
        ksm.unmerge()
        ksm.write("smart_scan", 0)
        assert ksm.converge() == 4
        assert ksm.read("pages_unshared") == 3


@pytest.mark.kernel
def test_a_wrong_prediction_shows_figure_by_figure(ksm: Ksm) -> None:
    def predict(pids: Sequence[int], experiment: Experiment | None) -> Prediction:
        right = predict_from_layout(pids, experiment)
        return {"counters": {**right["counters"], "pages_sharing": 7}, "processes": right["processes"]}

    comparison = verify(Experiment((Process("aab"),)), predict)
    assert not comparison.equal
    assert comparison.different == (Row("kernel", "pages_sharing", 7, 1),)
    assert table(comparison).startswith("1 of 16 figures differ from the prediction.")
    assert ["pages_sharing", "7", "1", "+6"] in [line.split() for line in table(comparison).splitlines()]


@pytest.mark.kernel
def test_a_figure_left_out_does_not_pass(ksm: Ksm) -> None:
    before = knobs(ksm)
    with pytest.raises(KeyError, match="pages_shared"):
        verify(Experiment((Process("aab"),)), lambda pids, experiment: {"counters": {}, "processes": [{}]})
    assert knobs(ksm) == before
    assert mergeable_processes() == []


@pytest.mark.kernel
def test_it_keeps_away_from_other_mergeable_memory(ksm: Ksm, tmp_path: Path) -> None:
    unlocked = Ksm(lock=tmp_path / "ksm.lock")
    with ksm.restored(), running([Process("ab")]) as (other,):
        assert mergeable_processes() == [other.pid]
        with pytest.raises(EngineError, match=f"processes {other.pid}: other processes have mergeable memory"):
            verify(Experiment((Process("aab"),)), predict_from_layout, unlocked)


@pytest.mark.kernel
def test_two_at_once_wait_for_each_other(ksm: Ksm) -> None:
    experiments = [random_experiment(random.Random(seed)) for seed in (3, 4, 5)]
    before = knobs(ksm)
    with ThreadPoolExecutor(3) as threads:
        for comparison in threads.map(lambda experiment: verify(experiment, predict_from_layout), experiments):
            assert comparison.equal, table(comparison)
    assert knobs(ksm) == before


@pytest.mark.kernel
def test_live_compares_running_processes_and_writes_no_knob(ksm: Ksm, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment((Process("aab0U"), Process("-a--U", forked_from=0)))
    with ksm.restored(), running(experiment.processes) as found:
        ksm.unmerge()
        ksm.write("smart_scan", 0)
        ksm.scan(4)
        with monkeypatch.context() as patched:
            patched.delattr(Ksm, "write")
            comparison = live([process.pid for process in found], lambda pids, _: predict_from_layout(pids, experiment))
    assert comparison.equal, table(comparison)
    assert [row.scope for row in comparison.rows[:: len(PROCESS_FIGURES)]] == [f"process {p.pid}" for p in found]
    with pytest.raises(EngineError, match="cannot be looked at"):
        live([found[0].pid], lambda pids, _: predict_from_layout(pids, experiment))


INTERRUPTED = """if True:
    import signal, sys, time
    from ksmdist.layouts import Experiment, Process
    from ksmdist.verify import verify
    signal.signal(signal.SIGINT, signal.default_int_handler)
    def predict(pids, experiment):
        print(*pids, flush=True)
        time.sleep({seconds})
        return {{}}
    verify(Experiment((Process("aab0U."), Process("-a----", 0)), 7, True, full_scans=1000000), predict)
"""


@pytest.fixture
def interrupted(ksm: Ksm) -> Iterator[Callable[[float], tuple[subprocess.Popen[str], list[int]]]]:
    """Start an experiment; the program and the pids of its processes."""
    started = []

    def start(seconds: float) -> tuple[subprocess.Popen[str], list[int]]:
        program = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED.format(seconds=seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        started.append(program)
        assert program.stdout is not None
        return program, list(map(int, program.stdout.readline().split()))

    yield start
    for program in started:
        program.kill()
        program.wait()
        assert program.stdout is not None
        program.stdout.close()


@pytest.mark.kernel
@pytest.mark.parametrize("moment", ["before the first scan", "in mid-scan"])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_interrupted_it_restores_every_knob_and_ends_its_processes(
    ksm: Ksm,
    interrupted: Callable[[float], tuple[subprocess.Popen[str], list[int]]],
    number: int,
    code: int,
    moment: str,
) -> None:
    before = knobs(ksm)
    program, pids = interrupted(60 if moment == "before the first scan" else 0)
    assert len(pids) == 2
    assert ksm.read("max_page_sharing") == 7
    deadline = time.monotonic() + 10
    while moment == "in mid-scan" and ksm.read("full_scans") < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    program.send_signal(number)
    assert program.wait(20) == code
    assert knobs(ksm) == before
    assert mergeable_processes() == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert ksm.read("pages_shared") == ksm.read("pages_unshared") == 0
