"""The whole flow against the oracle: engine x ranges x shard size x order of the images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ksmdist
from ksmdist import pipeline
from ksmdist.engines import choose
from ksmdist.errors import RunDirectoryError, SettingsError
from ksmdist.plan import UNPACK_S_PER_GIB
from ksmdist.settings import Settings
from ksmdist.store import read_table
from ksmdist.tables import MAPPINGS, SPECTRUM, STABLE_TREE

from . import kdump_files
from .conftest import KEPT, PAGE, ZERO, MakeImage, digest, manifest, oracle, page, table_files
from .layouts import layout_images

POOL: list[bytes | None] = [None, ZERO, b"\xff" * PAGE, b"\x6b" * PAGE, *(page(n) for n in range(6))]
PAGES = st.lists(st.sampled_from(range(len(POOL))), min_size=1, max_size=24)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray of two workers, as an address."""
    from ray.cluster_utils import Cluster

    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield running.address
    ray.shutdown()
    running.shutdown()  # type: ignore[no-untyped-call]


def _images(folder: Path, chosen: list[list[int]]) -> dict[str, list[bytes | None]]:
    """Raw images named so that their order as text is their order here; every one has a last page."""
    made = {}
    for number, indices in enumerate(chosen):
        pages = [POOL[i] for i in indices] + [page(99)]
        name = f"image{number}"
        with open(folder / f"{name}.raw", "wb") as sink:
            for at, content in enumerate(pages):
                if content is not None:
                    sink.seek(at * PAGE)
                    sink.write(content)
        made[name] = pages
    return made


def _check(run: ksmdist.Run, truth: dict[str, Any]) -> None:
    summary: Any = run.summary
    for name in ("zero", "duplicate", "unique", "absent"):
        assert summary["pages"][name] == truth[name], name
    assert summary["contents"] == truth["contents"]
    assert summary["kinds"]["same_filled"] == truth["same_filled"]
    stable = read_table(run.path, STABLE_TREE)
    expected = {
        digest(content): (copies, images, *first) for content, (copies, images, first) in truth["stable"].items()
    }
    columns = [stable.column(n).to_pylist() for n in ("digest", "copies", "images", "first_image", "first_address")]
    found = {digest: tuple(rest) for digest, *rest in zip(*columns, strict=True)}
    assert found == expected
    assert columns[0] == sorted(columns[0])
    assert all(identity["holds"] for identity in manifest(run.path)["identities"])


@given(
    chosen=st.lists(PAGES, min_size=1, max_size=3),
    shard_pages=st.sampled_from([1, 2, 5, None]),
    ranges=st.sampled_from([1, 4, 16]),
    backwards=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_inline_equals_the_oracle(
    chosen: list[list[int]], shard_pages: int | None, ranges: int, backwards: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth = oracle(_images(folder, chosen))
        paths = sorted(folder.glob("*.raw"), reverse=backwards)
        plain = ksmdist.run(sorted(paths), folder / "plain", Settings(ranges=1), "inline")
        other = ksmdist.run(paths, folder / "other", Settings(shard_pages=shard_pages, ranges=ranges), "inline")
        _check(plain, truth)
        _check(other, truth)
        one, two = table_files(plain.path), table_files(other.path)
        for table in KEPT:
            assert one[table.file] == two[table.file], table.name
        assert read_table(plain.path, STABLE_TREE).equals(read_table(other.path, STABLE_TREE))


@pytest.mark.ray
def test_ray_gives_the_same_bytes(cluster: str, tmp_path: Path) -> None:
    truth = oracle(_images(tmp_path, [[1, 1, 4, 5, 0, 2], [4, 4, 6, 7, 1], [3, 3, 8, 9, 5, 5, 5]]))
    paths = sorted(tmp_path.glob("*.raw"))
    for ranges in (1, 4):
        inline = ksmdist.run(paths, tmp_path / f"inline{ranges}", Settings(ranges=ranges), "inline")
        _check(inline, truth)
        for shard_pages in (1, 3, None):
            wanted = Settings(ranges=ranges, shard_pages=shard_pages)
            out = tmp_path / f"ray{ranges}-{shard_pages}"
            run = ksmdist.run(list(reversed(paths)), out, wanted, "ray", cluster)
            assert run.summary["engine"] == "ray"
            assert table_files(run.path) == table_files(inline.path)


@pytest.mark.ray
def test_ray_follows_forked_processes_too(cluster: str, tmp_path: Path) -> None:
    layouts: list[dict[str, Any]] = [
        {"layout": "00aabbUUr.abc0"},
        {"layout": "-----U-a-.---0", "forked_from": 0},
        {"layout": "000aab0"},
    ]
    paths = layout_images(tmp_path, layouts)
    for ranges in (1, 4):
        inline = ksmdist.run(paths, tmp_path / f"inline{ranges}", Settings(ranges=ranges, max_page_sharing=2), "inline")
        wanted = Settings(ranges=ranges, max_page_sharing=2, shard_pages=5)
        run = ksmdist.run(paths[::-1], tmp_path / f"ray{ranges}", wanted, "ray", cluster)
        assert table_files(run.path) == table_files(inline.path)
        assert len(read_table(run.path, MAPPINGS)) > 10


@pytest.mark.ray
def test_a_workers_error_arrives_as_it_is(cluster: str, tmp_path: Path) -> None:
    from .conftest import arrow_image, eligible

    bad = arrow_image(tmp_path / "bad.arrow", [(0, ZERO, eligible()), (0, ZERO, eligible())])
    with pytest.raises(ksmdist.KsmdistError, match=r"row 1: address 0x0 comes twice"):
        ksmdist.run([bad], tmp_path / "out", engine="ray", address=cluster)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.arrow"]


def test_every_file_conforms_to_its_schema(make_raw: MakeImage, tmp_path: Path) -> None:
    run = ksmdist.run(
        [make_raw("a.raw", [ZERO, page(1), page(1), None, page(2)])], tmp_path / "out", Settings(ranges=4)
    )
    import pyarrow.parquet as pq

    seen = 0
    for table in (STABLE_TREE, *KEPT):
        for file in sorted(run.path.glob(table.file)):
            assert pq.read_schema(file).equals(table.schema, check_metadata=True), file
            rows = pq.read_table(file, partitioning=None)
            order = [(name, "ascending") for name in table.sort]
            if order and not any(rows.column(name).null_count for name in table.sort):  # where nulls go is not said
                assert rows.equals(rows.sort_by(order)), file
            seen += 1
    assert seen == 4 + len(KEPT) == 4 + 19
    written = {str(file.relative_to(run.path)) for file in run.path.rglob("*.parquet")}
    assert {name for name in written if "/" not in name} == {table.file for table in KEPT}


def test_no_file_stays_open(make_raw: MakeImage, tmp_path: Path) -> None:
    from .conftest import arrow_image, eligible

    images = [make_raw(f"{n}.raw", [page(n)]) for n in range(6)]
    images += [arrow_image(tmp_path / f"{n}.arrow", [(0, page(n), eligible())], {}) for n in range(6, 12)]
    ksmdist.run(images, tmp_path / "first")  # opens what stays: the cache holds a few images
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        ksmdist.run(images, tmp_path / f"out{number}")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_two_runs_write_the_same_bytes(make_raw: MakeImage, tmp_path: Path) -> None:
    image = make_raw("a.raw", [ZERO, page(1), page(1), page(2)])
    first, second = (ksmdist.run([image], tmp_path / name) for name in ("one", "two"))
    assert table_files(first.path) == table_files(second.path)


def test_a_directory_in_use_is_refused_and_kept(make_raw: MakeImage, tmp_path: Path) -> None:
    image = make_raw("a.raw", [ZERO])
    ksmdist.run([image], tmp_path / "out")
    before = table_files(tmp_path / "out")
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        ksmdist.run([image], tmp_path / "out")
    assert table_files(tmp_path / "out") == before
    (tmp_path / "empty").mkdir()
    ksmdist.run([image], tmp_path / "empty")


def test_files_are_for_their_owner_alone(make_raw: MakeImage, tmp_path: Path) -> None:
    run = ksmdist.run([make_raw("a.raw", [page(1)])], tmp_path / "out")
    modes = {oct(path.stat().st_mode & 0o777) for path in run.path.rglob("*") if path.is_file()}
    assert modes == {"0o600"}
    assert run.path.stat().st_mode & 0o777 == 0o700


def test_names_of_images_do_not_depend_on_their_order(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mem.raw").write_bytes(page(1))
    (tmp_path / "mem.bin").write_bytes(page(1))
    paths = [tmp_path / "a" / "mem.raw", tmp_path / "b" / "mem.raw", tmp_path / "mem.bin"]
    for number, order in enumerate((paths, paths[::-1])):
        run = ksmdist.run(order, tmp_path / f"out{number}")
        assert run.images.column("image_id").to_pylist() == ["a/mem.raw", "b/mem.raw", "mem.bin"]


def test_an_image_given_twice_is_refused(make_raw: MakeImage, tmp_path: Path) -> None:
    image = make_raw("a.raw", [ZERO])
    with pytest.raises(SettingsError, match="given twice"):
        ksmdist.run([image, image], tmp_path / "out")


def test_auto_says_which_engine_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert choose("auto", None, 1 << 30, cpus=2).name == "inline"
    big = choose("auto", None, 1 << 40, cpus=2)
    assert big.name == "ray"
    assert "1024.0 GiB on 2 CPUs" in big.why
    assert choose("auto", None, 1 << 40, cpus=1).name == "inline"
    assert choose("auto", "10.0.0.1:6379", 1, cpus=2).name == "ray"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert choose("auto", None, 1, cpus=2).address == "10.0.0.2:6379"
    assert choose("inline", None, 1 << 40).name == "inline"


def test_auto_weighs_what_is_to_be_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert choose("auto", None, 8 << 30, cpus=2).name == "inline"
    assert choose("auto", None, 8 << 30, cpus=2, unpack_s=10.0).name == "ray"


def test_a_kdump_is_estimated_to_take_longer_than_raw_memory(make_raw: MakeImage, tmp_path: Path) -> None:
    raw = make_raw("a.raw", [page(n) for n in range(2000)])
    dump = tmp_path / "a.kdump"
    dump.write_bytes(kdump_files.kdump({n: page(n) for n in range(2000)}))
    taken = [pipeline.estimate([path], cpus=1).estimate.seconds for path in (raw, dump)]
    assert taken[1] - taken[0] == pytest.approx(2000 * PAGE / (1 << 30) * UNPACK_S_PER_GIB)


def test_nothing_is_eligible(tmp_path: Path) -> None:
    from .conftest import arrow_image

    image = arrow_image(tmp_path / "x.arrow", [(n * PAGE, ZERO, 0) for n in range(4)])
    run: Any = ksmdist.run([image], tmp_path / "out")
    assert run.summary["pages"]["ineligible"] == 4
    assert run.summary["counters"]["rmap_items"] == 0
    assert len(read_table(run.path, STABLE_TREE)) == 0
    assert isinstance(read_table(run.path, SPECTRUM), pa.Table)
    marked: Any = ksmdist.run([image], tmp_path / "all", Settings(eligible="all"))
    assert marked.summary["pages"]["zero"] == 4
