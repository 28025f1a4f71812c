"""The soak in short, and what it takes for growth."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

import ksmdist
from ksmdist.errors import EngineError

from . import clusters, faults
from .conftest import table_files

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def growth() -> Any:
    spec = importlib.util.spec_from_file_location("growth", ROOT / "benchmarks" / "growth.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["growth"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_growth_is_a_line_through_what_follows_the_warm_up(growth: Any) -> None:
    series = growth.Series("driver", "MiB", 10)
    for second in range(100):
        series.add(second, 500 if second < 20 else 100 + second / 5 + second % 2)
    grown = series.growth(20)
    assert (grown["samples"], grown["held"]) == (80, False)
    assert grown["rise"] == pytest.approx(79 / 5, abs=0.1)
    assert grown["an_hour"] == pytest.approx(720, abs=5)
    assert grown["scatter"] == pytest.approx(0.5, abs=0.01)
    series.bound = 16
    assert series.growth(20)["held"] is True
    assert series.growth(97)["held"] is None, "three samples tell nothing"
    said = growth.table([grown, series.growth(97)])
    assert said.count("| 10 | NO |") == said.count("| 16 | UNKNOWN |") == 1


def test_what_a_process_holds(growth: Any) -> None:
    before = growth.held(os.getpid())
    with open(os.devnull), open(os.devnull):
        assert growth.held(os.getpid()).files == before.files + 2
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert child.pid in growth.descendants(os.getpid())
    finally:
        child.kill()
        child.wait()
    assert child.pid not in growth.descendants(os.getpid())
    assert growth.held(child.pid) is None


def test_runs_in_one_process_leave_nothing_behind(tmp_path: Path) -> None:
    """Without Ray: after a warm-up no file, no thread, and no memory that each run would add to."""
    made = faults.images(tmp_path)
    code = """
import gc, json, shutil
out, *images = sys.argv[1:]
for number in range(60):
    pipeline.run(images, out, Settings(shard_pages=4, ranges=4), "inline")
    shutil.rmtree(out)
    gc.collect()
    if number in (19, 59):
        status = Path("/proc/self/status").read_text()
        kib, threads = (int(status.split(f"{name}:")[1].split()[0]) for name in ("VmRSS", "Threads"))
        print(json.dumps([kib, threads, len(os.listdir("/proc/self/fd"))]))
"""
    done = faults.driver(code, tmp_path / "run", *made)
    said, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    (kib, threads, files), (more_kib, more_threads, more_files) = map(json.loads, said.splitlines())
    assert more_kib - kib < 4096, "100 KiB a run"
    assert (more_threads, more_files) == (threads, files)


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_that_has_joined_stays(tmp_path: Path) -> None:
    """For run after run in one process: the cluster is used, not left; another is refused."""
    made = faults.images(tmp_path)
    plain = table_files(ksmdist.run(made, tmp_path / "plain", faults.SETTINGS, "inline").path)
    with clusters.raylets(["blue"]) as (address, _, _):
        ray.init(address=address, log_to_driver=False)
        for name, named in (("named", address), ("auto", "auto"), ("unnamed", None)):
            run = ksmdist.run(made, tmp_path / name, faults.SETTINGS, "ray", named)
            assert ray.is_initialized()
            assert table_files(run.path) == plain
        with pytest.raises(EngineError, match=r"198\.51\.100\.9:1: cannot be joined; leave "):
            ksmdist.run(made, tmp_path / "other", faults.SETTINGS, "ray", "198.51.100.9:1")
        assert ray.is_initialized()


@pytest.mark.ray
@pytest.mark.slow
def test_a_short_soak(tmp_path: Path) -> None:
    """`make soak` for less than a minute: kills in a scan and a merge, raylets too; tables equal, nothing left."""
    command = [sys.executable, "benchmarks/soak.py", "--seconds", "30", "--every", "7", "--seed", "1"]
    # Two ranges: a merge that is seen while it lasts.
    command += ["--pages", "16384", "--links", "24", "--ranges", "2", "--out", str(tmp_path / "soak")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "soak" / "result.json").read_text())
    assert result["broken"] == []
    assert result["runs"] == result["runs_alike"] > 2
    at = [kill["at"] for kill in result["each_kill"]]
    assert at[:2] == ["scan", "merge"]
    assert {kill["kind"] for kill in result["each_kill"]} == {"worker", "raylet"}
    assert result["raylets_replaced"] > 0
    assert all(one["held"] for one in result["growth"])
    left = sorted(path.name for path in (tmp_path / "soak").iterdir())
    assert left == ["driver.log", "result.json", "result.md"], "no images, no runs"
    table = subprocess.run(
        [*command[:2], "--table", str(tmp_path / "soak" / "result.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert table.stdout == (tmp_path / "soak" / "result.md").read_text()
