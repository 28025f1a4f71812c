"""Whole runs on images in an object store that fails: the same bytes, or an error and a run to be resumed."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

import ksmdist
from ksmdist import pipeline, stages
from ksmdist.errors import ImageReadError
from ksmdist.images import stores

from . import faults
from .conftest import manifest, table_files
from .stores import Proxy, Server


@pytest.fixture
def stored(tmp_path: Path, s3: Proxy) -> tuple[list[str], dict[str, bytes]]:
    """URIs of images in the store, and the tables of the run that nothing happens to."""
    folder = tmp_path / "unharmed"
    folder.mkdir()
    local = ksmdist.run(faults.images(folder), folder / "run", faults.SETTINGS, "inline")
    for path in faults.images(folder):
        s3.server.put(path.name, path.read_bytes())
    return [s3.uri(f"image{number}.raw") for number in range(2)], table_files(local.path)


def _same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert {name for name in expected if found.get(name) != expected[name]} == set()


def test_a_run_on_stored_images(tmp_path: Path, stored: tuple[list[str], dict[str, bytes]], s3: Proxy) -> None:
    uris, expected = stored
    run = ksmdist.run(uris, tmp_path / "run", faults.SETTINGS, "inline")
    _same(table_files(run.path), expected)
    assert [image["path"] for image in manifest(run.path)["images"]] == uris
    pattern = ksmdist.run([s3.uri("image*.raw")], tmp_path / "pattern", faults.SETTINGS, "inline")
    _same(table_files(pattern.path), expected)


def test_a_store_that_goes_and_comes_back(
    tmp_path: Path, stored: tuple[list[str], dict[str, bytes]], s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris, expected = stored
    back: list[threading.Timer] = []

    def before(scan: stages.Scan) -> None:
        if scan.task.number == 3:
            s3.down()
            back.append(threading.Timer(2, s3.up))
            back[0].start()

    monkeypatch.setattr(stages, "read_shards", faults.reader(before))
    run = ksmdist.run(uris, tmp_path / "run", faults.SETTINGS, "inline")
    back[0].join()
    _same(table_files(run.path), expected)


def test_a_slow_store(
    tmp_path: Path, stored: tuple[list[str], dict[str, bytes]], s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris, expected = stored

    def before(scan: stages.Scan) -> None:
        s3.pause_s = 0.3 if scan.task.number == 2 else 0.0

    monkeypatch.setattr(stages, "read_shards", faults.reader(before))
    _same(table_files(ksmdist.run(uris, tmp_path / "run", faults.SETTINGS, "inline").path), expected)


def test_a_store_that_stays_away(
    tmp_path: Path, stored: tuple[list[str], dict[str, bytes]], s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris, expected = stored
    monkeypatch.setattr(stores, "RULES", replace(stores.RULES, patience_s=1.0, stall_s=1.0, connect_s=1.0))

    def before(scan: stages.Scan) -> None:
        if scan.task.number == 5:
            s3.down()

    with monkeypatch.context() as patch:
        patch.setattr(stages, "read_shards", faults.reader(before))
        with pytest.raises(ImageReadError, match=r"5 of 8 tasks are done and kept: ksmdist run --resume"):
            ksmdist.run(uris, tmp_path / "run", faults.SETTINGS, "inline")
    s3.up()
    s3.clear()
    read: list[int] = []
    monkeypatch.setattr(stages, "read_shards", faults.reader(lambda scan: read.append(scan.task.number)))
    run = pipeline.resume(tmp_path / "run", "inline")
    _same(table_files(run.path), expected)
    assert read == [5, 6, 7]


def test_a_server_that_is_killed(
    tmp_path: Path, stored: tuple[list[str], dict[str, bytes]], s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris, expected = stored
    server: Server = s3.server

    def before(scan: stages.Scan) -> None:
        if scan.task.number == 4:
            s3.down()
            server.kill()
            restarted.start()

    def restart() -> None:
        server.start()  # moto keeps objects in memory: until they are put again, nobody may ask for them
        s3.up()

    restarted = threading.Timer(0.5, restart)
    monkeypatch.setattr(stages, "read_shards", faults.reader(before))
    run = ksmdist.run(uris, tmp_path / "run", faults.SETTINGS, "inline")
    restarted.join()
    _same(table_files(run.path), expected)


def test_a_fleet_of_a_manifest(tmp_path: Path, stored: tuple[list[str], dict[str, bytes]], s3: Proxy) -> None:
    uris, expected = stored
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        "images:\n"
        f"  - {{image: image0, uri: '{uris[0]}'}}\n"
        "  - {image: image1, uri: unharmed/image1.raw, tenant: t, kind: guest, pass: 1}\n"
    )
    done = faults.driver(
        *("cli.main()", "run", "--manifest", fleet, "--manifest-root", uris[0]),
        *("-o", tmp_path / "run", "--shard-pages", 4, "--ranges", 4),
    )
    _, said = done.communicate(timeout=60)
    assert done.returncode == 0, said
    found = table_files(tmp_path / "run")
    of_tenants = {"images.parquet", "contents.parquet", "policy.parquet", "policy_spectrum.parquet"}
    of_tenants |= {"exposure.parquet"}
    assert {name for name in expected if found[name] != expected[name]} == of_tenants
