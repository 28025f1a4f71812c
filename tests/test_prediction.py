"""Predictions against what kernels answered (tests/kernel-truth.jsonl, Linux 6.12.117), and against the slow way."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import ksmdist
from ksmdist.layouts import Experiment, Process, random_experiment
from ksmdist.settings import Settings
from ksmdist.store import read_table
from ksmdist.tables import KSM_STAT

from . import kernel_oracle
from .layouts import layout_images

TRUTH = [json.loads(line) for line in (Path(__file__).parent / "kernel-truth.jsonl").read_text().splitlines()]


def test_there_are_350_layouts_118_of_them_with_forks() -> None:
    assert len(TRUTH) == 350
    assert sum(any("forked_from" in p for p in row["processes"]) for row in TRUTH) == 118


@pytest.mark.parametrize("part", range(10))
def test_every_counter_is_the_kernels(part: int, tmp_path: Path) -> None:
    differences = []
    for number, row in list(enumerate(TRUTH))[part::10]:
        folder = tmp_path / str(number)
        folder.mkdir()
        settings = Settings(
            use_zero_pages=bool(row["use_zero_pages"]),
            max_page_sharing=row["max_page_sharing"],
            full_scans=row["full_scans"],
            smart_scan=bool(row["smart_scan"]),
            kernel="6.12",
            shard_pages=[None, 7, 32][number % 3],
            ranges=[1, 4][number % 2],
        )
        run = ksmdist.run(layout_images(folder, row["processes"]), folder / "run", settings, "inline")
        counters: Any = run.summary["counters"]
        stats = read_table(run.path, KSM_STAT).to_pylist()
        found = {name: counters[name] for name in row["counters"]}
        if found != row["counters"]:
            differences.append((number, found, row["counters"]))
        for stat, process in zip(stats, row["processes"], strict=True):
            names = [name for name in process if name not in ("layout", "forked_from")]
            if {name: stat[name] for name in names} != {name: process[name] for name in names}:
                differences.append((number, stat, process))
    assert differences == []


def _against_the_oracle(experiment: Experiment, folder: Path, shard_pages: int | None = None) -> None:
    processes = [asdict(process) for process in experiment.processes]
    across = experiment.merge_across_nodes
    knobs = {
        "max_page_sharing": experiment.max_page_sharing,
        "use_zero_pages": experiment.use_zero_pages,
        "smart_scan": experiment.smart_scan,
        "full_scans": experiment.full_scans,
    }
    folder.mkdir()
    settings = Settings(**knobs, merge_across_nodes=across, shard_pages=shard_pages)  # type: ignore[arg-type]
    run = ksmdist.run(layout_images(folder, processes), folder / "run", settings, "inline")
    truth = kernel_oracle.predict(processes, **knobs, merge_across_nodes=across)  # type: ignore[arg-type]
    counters: Any = run.summary["counters"]
    del truth["counters"]["full_scans"]
    assert {name: counters[name] for name in truth["counters"]} == truth["counters"]
    for stat, process in zip(read_table(run.path, KSM_STAT).to_pylist(), truth["processes"], strict=True):
        assert {name: stat[name] for name in process} == process


@pytest.mark.parametrize("part", range(6))
def test_random_layouts_equal_the_oracle(part: int, tmp_path: Path) -> None:
    for number in range(15):
        experiment = random_experiment(random.Random(1000 * part + number))
        _against_the_oracle(experiment, tmp_path / str(number), [None, 50][number % 2])


@pytest.mark.parametrize("part", range(3))
def test_random_layouts_on_two_nodes_equal_the_oracle(part: int, tmp_path: Path) -> None:
    for number in range(10):
        rng = random.Random(77 * part + number)
        experiment = random_experiment(rng)
        apart = tuple(replace(process, node=rng.randrange(2)) for process in experiment.processes)
        experiment = replace(experiment, processes=apart, merge_across_nodes=False)
        _against_the_oracle(experiment, tmp_path / str(number), [None, 50][number % 2])


@pytest.mark.parametrize("limit", [2, 3, 7, 20])
@pytest.mark.parametrize("over", [0, 1, 2])
@pytest.mark.parametrize("letter", "a0")
def test_at_the_borders_of_max_page_sharing(limit: int, over: int, letter: str, tmp_path: Path) -> None:
    for scans in (1, 2, 3, 8):
        for number, nodes in enumerate((1, 2, 3)):
            processes = (Process(letter * (nodes * limit + over - 1)), Process("U" + letter))
            experiment = Experiment(processes, limit, smart_scan=scans == 8, full_scans=scans)
            _against_the_oracle(experiment, tmp_path / f"{scans}-{number}")
