"""Whole runs on clusters: where images are scanned, and what happens when a worker, a node or a host dies."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import cloudpickle

import ksmdist
from ksmdist import pipeline, plan, scans, stages
from ksmdist.engines import ray as engine
from ksmdist.errors import EngineError, SettingsError
from ksmdist.settings import Settings
from ksmdist.store import read_table
from ksmdist.tables import HOLES, IMAGES
from ksmdist.timings import NoProgress

from . import clusters, conftest, faults
from .conftest import manifest, table_files, unavailable

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SETTINGS = faults.SETTINGS

# Workers do not have the tests on their path.
for module in (sys.modules[__name__], faults, conftest):
    cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]


@pytest.fixture
def unharmed(tmp_path: Path) -> dict[str, bytes]:
    """The tables of the run that nothing happens to."""
    folder = tmp_path / "unharmed"
    folder.mkdir()
    return table_files(ksmdist.run(faults.images(folder), folder / "run", SETTINGS, "inline").path)


@pytest.fixture(scope="module")
def two() -> Iterator[str]:
    """A cluster of two nodes, blue and green, that stay."""
    with clusters.raylets(["blue", "green"]) as (address, _, _):
        yield address


def _noting(log: Path) -> stages.Reader:
    """read_shards that notes task and node."""

    def before(scan: stages.Scan) -> None:
        node = ray.get_runtime_context().get_node_id()
        (log / f"{scan.task.number}").write_text(node)

    return faults.reader(before)


def test_a_killed_worker(two: str, tmp_path: Path, unharmed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    made = faults.images(tmp_path)
    flag = tmp_path / "died"
    monkeypatch.setattr(stages, "read_shards", faults.reader(faults.once(flag, 3, faults.die)))
    run = ksmdist.run(made, tmp_path / "run", SETTINGS, "ray", two)
    assert flag.exists()
    assert table_files(run.path) == unharmed


def test_a_worker_killed_in_a_merge(
    two: str, tmp_path: Path, unharmed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "died"
    merge = stages.merge

    def dying(*arguments: Any) -> Any:
        found = merge(*arguments)
        if arguments[-1].piece.number == 2 and not flag.exists():
            flag.touch()
            faults.die()
        return found

    monkeypatch.setattr(stages, "merge", dying)
    run = ksmdist.run(faults.images(tmp_path), tmp_path / "run", SETTINGS, "ray", two)
    assert flag.exists()
    assert table_files(run.path) == unharmed


def test_images_are_scanned_where_they_are(two: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = faults.images(tmp_path)
    log = tmp_path / "log"
    log.mkdir()
    monkeypatch.setattr(stages, "read_shards", _noting(log))
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        f"- {{image: first, uri: 'node://blue{one}', tenant: t1}}\n- {{image: second, uri: '{other}', host: green}}\n"
    )
    with pytest.raises(SettingsError, match=rf"node://(blue|green){tmp_path}/.* is named by a manifest"):
        ksmdist.run([], tmp_path / "run", SETTINGS, "ray", two, manifest=str(fleet))
    run = ksmdist.run(
        [],
        tmp_path / "run",
        SETTINGS,
        "ray",
        two,
        manifest=str(fleet),
        manifest_roots=[f"node://blue{tmp_path}", tmp_path],
    )
    names = {node["NodeID"]: node["Labels"].get("ksmdist-host") for node in _nodes(two)}
    where = {int(path.name): names[path.read_text()] for path in log.iterdir()}
    assert where == {n: "blue" if n < 4 else "green" for n in range(8)}
    images = read_table(run.path, IMAGES).to_pylist()
    assert [(row["image_id"], row["host"], row["tenant"]) for row in images] == [
        ("first", "blue", "t1"),
        ("second", "green", ""),
    ]
    assert run.complete


def _nodes(address: str) -> list[Any]:
    with_ray: list[Any] = []
    ray.init(address=address, log_to_driver=False)
    try:
        with_ray = ray.nodes()  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()
    return with_ray


def test_images_of_a_host_that_is_not_there_are_holes(two: str, tmp_path: Path) -> None:
    one, other = faults.images(tmp_path)
    alone = ksmdist.run([one], tmp_path / "alone", SETTINGS, "inline")
    for name, options in (("run", []), ("strict", ["--strict"])):
        command = [sys.executable, "-m", "ksmdist", "run", str(one), f"node://red{other}", "-o", str(tmp_path / name)]
        command += ["--address", two, "--shard-pages", "4", "--ranges", "4", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if options:
            assert done.returncode == 1
            assert "1 images are on nodes that are not in the cluster: red" in done.stderr
            assert not (tmp_path / name).exists()
            continue
        assert done.returncode == 3, done.stderr
        assert "1 images are on nodes that are not in the cluster: node://red" in done.stderr
        assert "INCOMPLETE: 1 images are on nodes that are not in the cluster" in done.stdout
    run = tmp_path / "run"
    assert read_table(run, HOLES).to_pylist() == [
        {"image_id": f"node://red{other}", "address": 0, "pages": None, "reason": "no_node"}
    ]
    missing = read_table(run, IMAGES).to_pylist()[1]
    assert (missing["host"], missing["total"], missing["unreadable"]) == ("red", 0, None)
    assert json.loads((run / "run.json").read_text())["summary"]["holes"]["images"] == [f"node://red{other}"]
    for table in ("spectrum", "counters"):
        assert (run / f"{table}.parquet").read_bytes() == (alone.path / f"{table}.parquet").read_bytes()
    assert ksmdist.load(run).out_of_reach == (f"node://red{other}",)


def test_progress_of_all_nodes_comes_to_one_place(two: str, tmp_path: Path) -> None:
    """What a bar on the driver's terminal is moved by."""
    seen: list[int] = []
    lines: list[str] = []

    class Watch(NoProgress):
        def scanned(self, pages: int) -> None:
            seen.append(pages)

        def stage(self, line: str) -> None:
            lines.append(line.split(":")[0])

    one, other = faults.images(tmp_path)
    sources = [f"node://blue{one}", f"node://green{other}"]
    ksmdist.run(sources, tmp_path / "run", SETTINGS, "ray", two, progress=Watch())
    assert seen == [4] * faults.TASKS
    assert lines == ["start", "open", "scan", "confirm", "merge", "relate", "count"]


def test_pages_on_two_nodes_are_compared(
    two: str, tmp_path: Path, unharmed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = faults.images(tmp_path)
    run, tasks = scans._run, dict[str, int]()

    def noted(runner: Any, stage: Any, some: Sequence[Any]) -> Any:
        tasks[stage.name] = tasks.get(stage.name, 0) + len(some)
        return run(runner, stage, some)

    monkeypatch.setattr(scans, "_run", noted)
    chosen = replace(SETTINGS, verify="bytes")
    done = ksmdist.run([f"node://blue{one}", f"node://green{other}"], tmp_path / "run", chosen, "ray", two)
    found = table_files(done.path)
    assert {name for name in found if found[name] != unharmed[name]} == {"images.parquet"}  # it names the hosts
    assert tasks["ship"] > 0 < tasks["compare"]
    assert (done.summary["verified"]["unread"], done.summary["verified"]["collided"]) == (0, 0)


def test_metrics_of_tasks_are_rays_metrics(two: str, tmp_path: Path) -> None:
    """Scraped as Prometheus would, from the agents of the nodes."""
    ksmdist.run(faults.images(tmp_path), tmp_path / "run", SETTINGS, "ray", two)
    ports = [node["MetricsExportPort"] for node in _nodes(two)]

    def scraped() -> str:
        found = ""
        for port in ports:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                found += answer.read().decode()
        return found

    def pages() -> float:
        lines = [line for line in scraped().splitlines() if line.startswith("ray_ksmdist_pages")]
        return sum(float(line.split()[-1]) for line in lines if 'stage="scan"' in line)

    faults.wait_for(lambda: pages() >= 32, 60)
    assert "ray_ksmdist_task_seconds_bucket" in scraped()


def test_little_object_store_is_enough(
    tmp_path: Path, unharmed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_OBJECT_STORE_BYTES", 80 << 20)
    out = tmp_path / "run"
    # Results that are a quarter of the store each, all at once: Ray makes the tasks wait.
    merge = stages.merge

    def large(*arguments: Any) -> Any:
        found = merge(*arguments)
        return LargeResult(found, np.ones(20 << 20, np.uint8))

    class LargeResult:
        def __init__(self, found: Any, ballast: Any) -> None:
            self.found, self.ballast = found, ballast

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return getattr(self.__dict__["found"], name)

    monkeypatch.setattr(stages, "merge", large)
    run = ksmdist.run(faults.images(tmp_path), out, Settings(shard_pages=4, ranges=4), "ray")
    assert table_files(run.path) == unharmed


def test_a_killed_node(tmp_path: Path, unharmed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    made = faults.images(tmp_path)
    flag = tmp_path / "is there"

    def linger() -> None:
        time.sleep(100)  # the node dies meanwhile

    monkeypatch.setattr(stages, "read_shards", faults.reader(faults.once(flag, 2, linger)))
    with clusters.raylets(["blue", "green"]) as (address, _, nodes):
        by_id = {node.unique_id: node for node in nodes.values()}
        killed: list[Any] = []

        def killer() -> None:
            faults.wait_for(flag.exists, 90)
            for node in by_id.values():
                if _runs_task(node):
                    killed.append(node)
                    clusters.kill(node)

        killing = threading.Thread(target=killer)
        killing.start()
        run = ksmdist.run(made, tmp_path / "run", SETTINGS, "ray", address)
        killing.join()
    assert len(killed) == 1
    assert table_files(run.path) == unharmed


def _runs_task(node: Any) -> bool:
    """Whether a worker of this raylet is at task 2, which lingers."""
    return any("scan image0 [8, 12)" in doing for doing in clusters.workers(node).values())


def test_a_host_that_dies_with_its_images(
    tmp_path: Path, unharmed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = faults.images(tmp_path)
    flag = tmp_path / "is there"
    monkeypatch.setattr(engine, "_NODE_PATIENCE_S", 3.0)
    monkeypatch.setattr(stages, "read_shards", faults.reader(faults.once(flag, 6, lambda: time.sleep(100))))
    sources = [str(one), f"node://green{other}"]
    with clusters.raylets(["blue", "green"]) as (address, cluster, nodes):

        def killer() -> None:
            faults.wait_for(flag.exists, 90)
            clusters.kill(nodes["green"])

        killing = threading.Thread(target=killer)
        killing.start()
        with pytest.raises(EngineError, match=r"node green: has left the cluster.* of 8 tasks are done and kept: ksm"):
            ksmdist.run(sources, tmp_path / "run", SETTINGS, "ray", address)
        killing.join()
        with pytest.raises(EngineError, match="node green: has images of this run, and is not in the cluster"):
            pipeline.resume(tmp_path / "run", "inline")
        for result in list((tmp_path / "run.partial" / "work").glob("0-00004.arrow")):
            result.write_bytes(b"")  # one of green's: damaged, it must be scanned there again
        clusters.add(cluster, "green")
        log = tmp_path / "log"
        log.mkdir()
        monkeypatch.setattr(stages, "read_shards", _noting(log))
        run = pipeline.resume(tmp_path / "run", "ray", address)
        assert "6" in {path.name for path in log.iterdir()}
        assert len(list(log.iterdir())) < 8
    found = table_files(run.path)
    different = {name for name, data in found.items() if data != unharmed[name]}
    assert different <= {"images.parquet"}  # where the host is named


def test_a_driver_killed_on_a_cluster(
    two: str, tmp_path: Path, unharmed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = faults.images(tmp_path)
    code = f"""
from ksmdist.engines import ray as engine
seen = []
inner = engine._Flight.run
def run(self, on_done):
    def dying(number, result):
        on_done(number, result)
        seen.extend([number] * (self._stage.name == "scan"))
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    inner(self, dying)
engine._Flight.run = run
engine._TASKS_A_SLOT = 1
pipeline.run(sys.argv[2:], sys.argv[1], Settings(shard_pages=4, ranges=4), "ray", "{two}")
"""
    killed = faults.driver(code, tmp_path / "run", *made)
    _, said = killed.communicate(timeout=120)
    assert killed.returncode == -9, said
    log = tmp_path / "log"
    log.mkdir()
    marks = {int(path.stem[2:]) for path in (tmp_path / "run.partial" / "work").glob("0-*.json")}
    assert len(marks) >= 4
    monkeypatch.setattr(stages, "read_shards", _noting(log))
    run = pipeline.resume(tmp_path / "run", "ray", two)
    assert {int(path.name) for path in log.iterdir()} & marks == set()
    assert table_files(run.path) == unharmed


def test_what_a_task_does_is_its_name(two: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tmp_path / "names"
    names.mkdir()

    def before(scan: stages.Scan) -> None:
        (names / str(scan.task.number)).write_text(str(ray.get_runtime_context().get_task_name()))

    monkeypatch.setattr(stages, "read_shards", faults.reader(before))
    ksmdist.run(faults.images(tmp_path), tmp_path / "run", SETTINGS, "ray", two)
    assert (names / "1").read_text() == "scan image0 [4, 8)"
    assert (
        pipeline._describe_merge(64, stages.Merge(plan.Piece(2, 0, 0, 0, 0), np.zeros(0), np.zeros(0)))
        == "merge range 3/64"
    )


def test_hosts_with_disks_of_their_own(tmp_path: Path) -> None:
    """Three hosts in network namespaces: the head and driver have no image, the other two have one each."""
    if os.geteuid() != 0:
        unavailable("network namespaces take root")
    with clusters.hosts(tmp_path, ["head", "north", "south"]) as (address, made):
        for (name, image), host in zip(
            (
                ("north", faults.images(made["north"].images, 1)[0]),
                ("south", faults.images(made["south"].images, 2)[1]),
            ),
            (made["north"], made["south"]),
            strict=True,
        ):
            image.rename(host.images / "vm.raw")
            assert name == host.name
        (made["south"].images / "image0.raw").unlink()
        out = tmp_path / "run"
        sources = [f"node://{name}{clusters.MOUNT}/*.raw" for name in ("north", "south", "west")]
        command = [sys.executable, "-m", "ksmdist", "run", *sources, "-o", str(out), "--address", address]
        command += ["--shard-pages", "4", "--ranges", "4"]
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        until = time.monotonic() + 90
        while True:  # until both hosts have joined
            done = subprocess.run(
                made["head"].command(command), capture_output=True, text=True, timeout=120, env=environment
            )
            if "images are on nodes that are not in the cluster: node://west" in done.stderr:
                break
            assert time.monotonic() < until, done.stderr
            subprocess.run(["rm", "-rf", str(out), f"{out}.partial"], check=True)
            time.sleep(1)
        assert done.returncode == 3, done.stderr
    local = tmp_path / "local"
    local.mkdir()
    plain = ksmdist.run(faults.images(local), local / "run", SETTINGS, "inline")
    assert (out / "spectrum.parquet").read_bytes() == (plain.path / "spectrum.parquet").read_bytes()
    images = read_table(out, IMAGES)
    assert images.column("image_id").to_pylist() == [
        f"node://west{clusters.MOUNT}/*.raw",
        f"north{clusters.MOUNT}/vm.raw",
        f"south{clusters.MOUNT}/vm.raw",
    ]
    assert images.column("host").to_pylist() == ["west", "north", "south"]
    assert manifest(out)["summary"]["pages"]["total"] == 32
