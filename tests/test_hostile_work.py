"""Files of an unfinished run, and checksums of a finished one, as a peer or a stranger might write them."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ksmdist
from ksmdist import checkpoint, checksums, stages
from ksmdist.errors import KsmdistError, RunDirectoryError
from ksmdist.passes import Compared
from ksmdist.tables import CHECKSUMS, IMAGE_SET, SHARD_CONTENT

from .conftest import in_a_process, page, table_files

ROWS = 20


def rows(schema: pa.Schema, count: int = ROWS) -> pa.Table:
    """Rows of a table that are as its schema has them, and mean nothing."""
    columns = []
    for field in schema:
        if pa.types.is_fixed_size_binary(field.type):
            columns.append(pa.array([bytes([number]) * field.type.byte_width for number in range(count)], field.type))
        elif pa.types.is_boolean(field.type):
            columns.append(pa.array([False] * count))
        else:
            columns.append(pa.array([None if field.nullable and n % 2 else n for n in range(count)], field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def written(folder: Path) -> checkpoint.Written:
    """A result of two ranges in a directory like that of an unfinished run."""
    (folder / "work").mkdir(exist_ok=True)
    table = rows(SHARD_CONTENT.schema)
    return checkpoint.write_content([table, table.slice(0, 3)], folder, 0, 0, {"x": 1})


def read(folder: Path, of: checkpoint.Written) -> list[int]:
    """Rows of each range of the result."""
    found = []
    for start, end in zip(of.offsets[:-1], of.offsets[1:], strict=True):
        tables = list(checkpoint.read_range(folder, [(0, 0)], np.array([start]), np.array([end])))
        found.append(sum(map(len, tables)))
    return found


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "offsets past the end": lambda mark: mark.update(offsets=[0, 8, 1 << 60]),
    "offsets below zero": lambda mark: mark.update(offsets=[-8, *mark["offsets"][1:]]),
    "offsets that fall": lambda mark: mark.update(offsets=mark["offsets"][::-1]),
    "offsets too many": lambda mark: mark.update(offsets=[*mark["offsets"], mark["nbytes"]]),
    "offsets that are lists": lambda mark: mark.update(offsets=[[0], [8], [16]]),
    "offsets that are texts": lambda mark: mark.update(offsets=["0", "8", "16"]),
    "offsets that are no integers": lambda mark: mark.update(offsets=[0.5, 8.5, 16.5]),
    "offsets that no integer holds": lambda mark: mark.update(offsets=[0, 8, 1 << 70]),
    "no offsets": lambda mark: mark.pop("offsets"),
    "rows below zero": lambda mark: mark.update(rows=[-1, 3]),
    "rows that are null": lambda mark: mark.update(rows=None),
    "no bytes": lambda mark: mark.update(nbytes="many"),
    "another checksum": lambda mark: mark.update(xxh3_64="0" * 16),
    "a checksum that is a list": lambda mark: mark.update(xxh3_64=[1]),
}


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_mark_counts_as_none(tmp_path: Path, how: str) -> None:
    written(tmp_path)
    path = tmp_path / "work" / "0-00000.json"
    mark = json.loads(path.read_text())
    assert checkpoint.read_mark(tmp_path, 0, 0) is not None
    FORGED[how](mark)
    path.write_text(json.dumps(mark))
    assert checkpoint.read_mark(tmp_path, 0, 0) is None


@pytest.mark.parametrize("data", [b"[" * 200_000, b"[]", b"7", b'{"rows": NaN}', b"\xff", b""])
def test_a_mark_that_is_no_mark(tmp_path: Path, data: bytes) -> None:
    written(tmp_path)
    (tmp_path / "work" / "0-00000.json").write_bytes(data)
    assert checkpoint.read_mark(tmp_path, 0, 0) is None


@pytest.mark.parametrize("name", ["0-00000.arrow", "0-00000.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_results_are_files_of_the_run(tmp_path: Path, name: str, kind: str) -> None:
    of = written(tmp_path)
    path = tmp_path / "work" / name
    path.rename(tmp_path / "elsewhere")
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert checkpoint.read_mark(tmp_path, 0, 0) is None
    if name.endswith(".arrow"):
        with pytest.raises(RunDirectoryError, match="which is a"):
            read(tmp_path, of)
    with pytest.raises(RunDirectoryError):
        checkpoint.Results(tmp_path, [(0, 0)])


def test_a_work_folder_that_is_a_link(tmp_path: Path) -> None:
    of = written(tmp_path)
    (tmp_path / "work").rename(tmp_path / "elsewhere")
    (tmp_path / "work").symlink_to("elsewhere")
    assert checkpoint.read_mark(tmp_path, 0, 0) is None
    with pytest.raises(RunDirectoryError, match="has work, which is a symbolic link"):
        read(tmp_path, of)


def test_places_that_are_not_in_the_file(tmp_path: Path) -> None:
    written(tmp_path)
    for start, end in ((0, 1 << 60), (-8, 8), (16, 8), (1 << 62, 1 << 62)):
        with pytest.raises(RunDirectoryError):
            list(checkpoint.read_range(tmp_path, [(0, 0)], np.array([start]), np.array([end])))


def test_nulls_where_none_may_be(tmp_path: Path) -> None:
    schema = pa.schema([field.with_nullable(True) for field in SHARD_CONTENT.schema])
    table = rows(SHARD_CONTENT.schema).cast(schema)
    gone = pa.nulls(ROWS, table.schema.field("image").type)
    table = table.set_column(table.schema.get_field_index("image"), "image", gone)
    (tmp_path / "work").mkdir()
    of = checkpoint.write_batches(tmp_path / "work" / "0-00000.arrow", table.schema, [table])
    with pytest.raises(RunDirectoryError, match="nulls"):
        read(tmp_path, of)


@pytest.mark.parametrize("said", [1 << 62, 1 << 40, 1 << 31, -2])
def test_a_packed_buffer_holds_what_its_bytes_can(tmp_path: Path, said: int) -> None:
    (tmp_path / "work").mkdir()
    path = checkpoint.related_file(tmp_path, IMAGE_SET.name, 0)
    table = rows(IMAGE_SET.schema, 5000)
    of = checkpoint.write_related(path, IMAGE_SET.schema, [table])
    start, end = of.offsets.tolist()
    assert checkpoint.read_batch(path, IMAGE_SET.schema, start, end).equals(table)
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<q", 5000 * 8), start)
    data[at : at + 8] = struct.pack("<q", said)
    path.write_bytes(data)
    with pytest.raises(RunDirectoryError, match="more than it can"):
        checkpoint.read_batch(path, IMAGE_SET.schema, start, end)


def flip(folder: Path, seeds: range) -> None:
    """What a child does: read results of which bytes are others, whatever the mark says of them."""
    of = written(folder)
    path = folder / "work" / "0-00000.arrow"
    related = checkpoint.related_file(folder, IMAGE_SET.name, 0)
    packed = checkpoint.write_related(related, IMAGE_SET.schema, [rows(IMAGE_SET.schema, 300)])
    whole = {path: path.read_bytes(), related: related.read_bytes()}
    ended = {"read": 0, "refused": 0}
    for seed in seeds:
        rng = random.Random(seed)
        for name, data in whole.items():
            changed = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 8))):
                at = rng.randrange(len(changed))
                changed[at] = rng.choice((0, 1, 127, 128, 255, changed[at] ^ 1 << rng.randrange(8)))
            if rng.random() < 0.2:
                at = rng.randrange(len(changed) - 8)
                changed[at : at + 8] = struct.pack("<q", rng.choice((-1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))))
            name.write_bytes(changed)
        for what in (
            lambda: read(folder, of),
            lambda: checkpoint.read_batch(related, IMAGE_SET.schema, *packed.offsets.tolist()).to_pylist(),
        ):
            try:
                what()
                ended["read"] += 1
            except RunDirectoryError:
                ended["refused"] += 1
    print(json.dumps(ended))


def test_other_bytes_are_refused_or_read(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tests.test_hostile_work import flip; "
    code += "flip(Path(sys.argv[1]), range(1500))"
    ended = in_a_process(code, tmp_path)
    assert min(ended.values()) > 100


def test_checksums_that_are_forged(tmp_path: Path) -> None:
    path = tmp_path / "checksums" / "00000.parquet"
    table = rows(CHECKSUMS.schema, 4)
    table = table.set_column(0, table.schema.field(0), pa.array([0] * 4, table.schema.field(0).type))
    checksums.write(path, [table], {0: Compared(pages=4)})
    assert checksums.read_summary(path) == {0: Compared(pages=4)}
    whole = pq.read_table(path)
    metadata = dict(whole.schema.metadata)
    for said in (
        b"[",
        b"[]",
        b'{"0": {"pages": -1}}',
        b'{"0": {"pages": "x"}}',
        b'{"0": {"y": 1}}',
        b'{"x": {}}',
        b'{"0": 1}',
    ):
        pq.write_table(whole.replace_schema_metadata(metadata | {b"ksmdist.compared": said}), path)
        assert checksums.read_summary(path) is None
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert checksums.read_summary(path) is None
    with pytest.raises(RunDirectoryError, match="which is a symbolic link"):
        checksums.find([path])
    path.unlink()
    pq.write_table(whole, path, write_statistics=False)
    with pytest.raises(RunDirectoryError):
        checksums.find([path])
    address = whole.schema.get_field_index("address")
    nulls = whole.set_column(address, "address", pa.array([None, 1, 2, None], pa.uint64()))
    pq.write_table(nulls, path)
    found = checksums.find([path])
    with pytest.raises(RunDirectoryError, match="null"):
        checksums.read(found[0], 0, 9)


SUMMARIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no images": lambda said: said.pop("images"),
    "images of others": lambda said: said.update(images={"99": said["images"]["0"]}),
    "other classes": lambda said: said["images"]["0"].update(classes=[1, 2]),
    "texts": lambda said: said["images"]["0"].update(kinds=["a", "b", "c"]),
    "a region that is none": lambda said: said["images"]["0"].update(regions=[[1 << 40, 0, 1]]),
    "holes that are none": lambda said: said.update(holes=[[0, {"x": 1}]]),
    "other pages": lambda said: said.update(pages=1),
    "a list": lambda said: said.clear(),
}


@pytest.mark.parametrize("how", SUMMARIES)
def test_what_a_mark_says_is_of_its_task_or_is_done_again(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "a.raw"
    image.write_bytes(b"".join(map(page, (1, 1, 2, 3, 3, 3))))
    settings = ksmdist.Settings(shard_pages=3, ranges=2)
    whole = table_files(ksmdist.run([image], tmp_path / "whole", settings, "inline").path)

    def failing(*_: object) -> None:
        raise RunDirectoryError("stops here", "merge", "go on")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "merge", failing)
        with pytest.raises(RunDirectoryError, match="stops here"):
            ksmdist.run([image], tmp_path / "run", settings, "inline")
    path = tmp_path / "run.partial" / "work" / "0-00000.json"
    mark = json.loads(path.read_text())
    SUMMARIES[how](mark["summary"])
    path.write_text(json.dumps(mark))
    assert table_files(ksmdist.pipeline.resume(tmp_path / "run", "inline").path) == whole


PLANS = [
    b"[" * 100_000,
    b'{"plan_version": NaN}',
    b"\xff",
    b'{"plan_version": ' + b"9" * 10_000 + b"}",
]


@pytest.mark.parametrize("data", PLANS)
def test_a_plan_that_is_forged(tmp_path: Path, data: bytes) -> None:
    image = tmp_path / "a.raw"
    image.write_bytes(page(1))
    partial = tmp_path / "run.partial"
    partial.mkdir(mode=0o700)
    (partial / "plan.json").write_bytes(data)
    with pytest.raises(KsmdistError):
        ksmdist.pipeline.resume(tmp_path / "run", "inline")
    (partial / "plan.json").unlink()
    (tmp_path / "elsewhere").write_bytes(b"{}")
    (partial / "plan.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunDirectoryError, match="symbolic link"):
        ksmdist.pipeline.resume(tmp_path / "run", "inline")
    assert (tmp_path / "elsewhere").read_bytes() == b"{}"


def test_an_unfinished_run_that_is_a_link_is_not_taken_up(tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    image.write_bytes(page(1))
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    (tmp_path / "run.partial").symlink_to(other)
    with pytest.raises(RunDirectoryError, match="is no directory of this user"):
        ksmdist.run([image], tmp_path / "run", engine="inline")
    assert other.stat().st_mode & 0o777 == 0o755
    assert not any(other.iterdir())
