"""Predictions against what kernels answered: tests/kernel-truth.jsonl, 350 layouts on Linux 6.12.117."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ksmdist
from ksmdist.settings import Settings
from ksmdist.store import read_table
from ksmdist.tables import KSM_STAT

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
