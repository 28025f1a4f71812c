"""Images in object stores: the same pages as from a file, whatever the store does meanwhile.

S3 against a real server process on loopback, through a proxy that breaks.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ksmdist import images
from ksmdist.errors import ImageError, ImageReadError, SettingsError
from ksmdist.images import Hole, stores
from ksmdist.images.extents import StoredExtentImage
from ksmdist.images.files import LocalFile
from ksmdist.images.stores import StoredFile, store_of
from ksmdist.images.uris import local_path, parse_uri
from ksmdist.tables import MEMORY_IMAGE

from .conftest import PAGE, ZERO, arrow_image, elf_core, eligible, page
from .stores import ENVIRONMENT, UNSET, Proxy

Got = list[tuple[int, bytes | None]]


def pages_of(path: str, start: int = 0, end: int | None = None) -> Got:
    """(address, content) of every page, and of holes (address, None)."""
    image = images.open_image(path)
    found: Got = []
    for item in image.batches(start, image.info.pages if end is None else end):
        if isinstance(item, Hole):
            found.append((item.address, None))
        else:
            assert item.num_rows * PAGE <= 64 << 20
            item.validate(full=True)
            found += zip(item.column("address").to_pylist(), item.column("content").to_pylist(), strict=True)
    image.close()
    return sorted(found, key=lambda row: row[0])  # a batch's holes come after it


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> stores.Rules:
    """Small blocks, and little patience."""
    rules = replace(
        stores.RULES, block_bytes=64 << 10, in_flight=4, patience_s=1.0, wait_s=0.05, longest_wait_s=0.2, stall_s=1.0
    )
    monkeypatch.setattr(stores, "RULES", rules)
    return rules


def raw_image(path: Path, count: int, seed: int = 1) -> Path:
    """`count` random pages."""
    path.write_bytes(np.random.default_rng(seed).bytes(count * PAGE))
    return path


def every_column(path: Path, count: int = 700, batch: int = 100, **options: Any) -> Path:
    """An Arrow image with all there is: nulls, flags, frames, regions, pages its producer could not read."""
    rows = []
    for n in range(count):
        content = None if n % 5 == 0 else (ZERO if n % 7 == 0 else page(n))
        flags = eligible("unreadable") if n % 35 == 0 else eligible("zero_mapped") if n % 5 == 0 else eligible("huge")
        rows.append((n * PAGE, content, flags, n if n % 3 else None, f"region {n // 200}" if n % 4 else None, n % 2))
    return arrow_image(path, rows, batch=batch, **options)


def image_files(folder: Path) -> dict[str, Path]:
    """An image of each format, by key."""
    segments = [(n * 0x100000, np.random.default_rng(n).bytes((40 + n) * PAGE), 64 * PAGE) for n in range(5)]
    segments += [(0x900000 + 2 * n * PAGE, page(n), PAGE) for n in range(60)]
    segments += [(0xA00000, (page(1) + page(2))[:5000], 5000), (0xA00000 + 5000, (page(1) + page(2))[5000:], 3192)]
    elf, process = folder / "guest.elf", folder / "process.core"
    elf.write_bytes(elf_core(segments))
    process.write_bytes(elf_core(segments, note=b"CORE", physical=False, xnum=True))
    return {
        "guest.raw": raw_image(folder / "guest.raw", 300),
        "guest.elf": elf,
        "process.core": process,
        "every.arrow": every_column(folder / "every.arrow"),
        "one.arrow": every_column(folder / "one.arrow", batch=1000),
    }


@pytest.mark.parametrize("key", ["guest.raw", "guest.elf", "process.core", "every.arrow", "one.arrow"])
def test_a_stored_image_is_that_of_the_file(s3: Proxy, hasty: stores.Rules, tmp_path: Path, key: str) -> None:
    path = image_files(tmp_path)[key]
    s3.server.put(key, path.read_bytes())
    uri = s3.uri(key)
    local, stored = images.open_image(str(path)), images.open_image(uri)
    assert replace(stored.info, path="", fingerprint="") == replace(local.info, path="", fingerprint="")
    assert (stored.info.path, stored.holes) == (uri, local.holes)
    whole = pages_of(str(path))
    count = local.info.pages
    cuts = sorted({0, 1, 7, 8, 9, 99, 100, 101, count // 3, count - 1, count})
    for start, end in [(0, count), *itertools.pairwise(cuts), (3, count - 3)]:
        assert pages_of(uri, start, end) == pages_of(str(path), start, end)
    assert pages_of(uri) == whole


@pytest.mark.parametrize("key", ["guest.raw", "guest.elf", "process.core", "every.arrow", "packed.arrow"])
def test_a_page_is_found_by_its_address(s3: Proxy, hasty: stores.Rules, tmp_path: Path, key: str) -> None:
    if key == "packed.arrow":
        path = packed(every_column(tmp_path / "plain.arrow"), tmp_path / key, "lz4")
    else:
        path = image_files(tmp_path)[key]
    s3.server.put(key, path.read_bytes())
    there = {address for address, _ in pages_of(str(path))}
    asked = np.array([0, PAGE, 7 * PAGE, 0x600000, 1 << 60, *sorted(there)[::13]], np.uint64)
    for uri in (str(path), s3.uri(key)):
        image = images.open_image(uri)
        for address, row in zip(asked.tolist(), image.find(asked).tolist(), strict=True):
            assert (row >= 0) == (address in there), address
            if row >= 0:
                (item,) = image.batches(row, row + 1)
                assert (item.address if isinstance(item, Hole) else item.column("address")[0].as_py()) == address
        found = image.find(asked)
        taken: Got = []
        for item in image.take(np.unique(found[found >= 0])):
            if isinstance(item, Hole):
                taken.append((item.address, None))
            else:
                taken += zip(item.column("address").to_pylist(), item.column("content").to_pylist(), strict=True)
        image.close()
        held = dict(pages_of(str(path)))
        assert dict(taken) == {address: held[address] for address in asked.tolist() if address in held}


def packed(path: Path, target: Path, compression: str) -> Path:
    """An Arrow image written again, its bodies compressed."""
    written = pa.ipc.open_file(str(path))
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, written.schema, options=options) as writer:
        for index in range(written.num_record_batches):
            writer.write_batch(written.get_batch(index))
    return target


def rows_of(image: images.Image, start: int, end: int) -> list[dict[str, Any]]:
    """All columns."""
    found: list[dict[str, Any]] = []
    for item in image.batches(start, end):
        if isinstance(item, Hole):
            found.append({"hole": item})
        else:
            assert (item.schema.metadata or {})[b"ksmdist.table"] == b"memory_image"
            found += item.to_pylist()
    return sorted(found, key=lambda row: row["hole"].address if "hole" in row else row["address"])


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_every_column_of_a_stored_arrow_image(
    s3: Proxy, hasty: stores.Rules, tmp_path: Path, compression: str | None
) -> None:
    path = every_column(tmp_path / "plain.arrow")
    if compression:
        path = packed(path, tmp_path / "packed.arrow", compression)
    s3.server.put("x.arrow", path.read_bytes())
    local, stored = images.open_image(str(path)), images.open_image(s3.uri("x.arrow"))
    assert stored.info.regions == local.info.regions
    for start, end in ((0, 700), (0, 1), (99, 101), (333, 334), (350, 601)):
        assert rows_of(stored, start, end) == rows_of(local, start, end)


def test_names_that_are_added_to_an_arrow_images_dictionary(s3: Proxy, tmp_path: Path) -> None:
    metadata = {"ksmdist.table": "memory_image", "ksmdist.version": "1", "ksmdist.page_size": str(PAGE)}
    schema = MEMORY_IMAGE.schema.with_metadata(metadata)
    path = tmp_path / "delta.arrow"
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        for n, names in enumerate((["a"], ["a", "b"], ["a", "b", "c"])):
            row: dict[str, Any] = {"address": [n * PAGE], "content": [page(n)], "flags": [1], "numa_node": [0]}
            row |= {"frame": [None], "region": pa.DictionaryArray.from_arrays(pa.array([n], pa.int32()), names)}
            arrays = [row[f.name] if f.name == "region" else pa.array(row[f.name], f.type) for f in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    s3.server.put("delta.arrow", path.read_bytes())
    local, stored = images.open_image(str(path)), images.open_image(s3.uri("delta.arrow"))
    assert stored.info.regions == local.info.regions == ("a", "b", "c")
    assert rows_of(stored, 0, 3) == rows_of(local, 0, 3)


def test_damaged_stored_arrow_images(s3: Proxy, tmp_path: Path) -> None:
    whole = every_column(tmp_path / "x.arrow", count=60, batch=30).read_bytes()
    for size in (8, 100, len(whole) // 2, len(whole) - 1):
        s3.server.put("x.arrow", whole[:size])
        with pytest.raises(ImageError, match="truncated or damaged"):
            images.open_image(s3.uri("x.arrow"))
    rng = np.random.default_rng(3)
    tail = len(whole) - 1500  # the footer: offsets of all kinds
    for n in range(40):
        broken = bytearray(whole)
        for at in [*rng.integers(tail if n % 2 else 8, len(whole), 4).tolist(), tail + 20 * n]:
            broken[at % len(whole)] = int(rng.integers(256))
        s3.server.put("x.arrow", bytes(broken))
        try:
            pages_of(s3.uri("x.arrow"))
        except (ImageError, SettingsError):
            continue


def test_bad_rows_of_a_stored_arrow_image(s3: Proxy, hasty: stores.Rules, tmp_path: Path) -> None:
    for name, rows in (
        ("address 0x1000 comes twice", [(0, ZERO, 1), (PAGE, ZERO, 1), (PAGE, ZERO, 1)]),
        (
            "address 0x2000 is out of order after 0x3000",
            [(0, ZERO, 1), (PAGE, ZERO, 1), (3 * PAGE, ZERO, 1), (2 * PAGE, ZERO, 1)],
        ),
        ("content of 12 bytes, not 4096", [(0, ZERO, 1), (PAGE, b"x" * 12, 1)]),
        ("record batch 0 is damaged: contents of 20001 bytes", [(0, b"x" * 20000, 1), (PAGE, b"x", 1)]),
    ):
        s3.server.put("x.arrow", arrow_image(tmp_path / "x.arrow", rows).read_bytes())
        for start in range(len(rows)):
            image = images.open_image(s3.uri("x.arrow"))
            # From row 2 on, the row that a first one follows badly is another shard's.
            if start == 0 or (start == len(rows) - 1 and "address" in name):
                with pytest.raises(ImageError, match=name):
                    list(image.batches(start, len(rows)))


@pytest.mark.parametrize("format", ["raw", "elf", "arrow"])
def test_only_the_bytes_of_a_shard_are_read(s3: Proxy, tmp_path: Path, format: str) -> None:
    count = 4096
    data = np.random.default_rng(1).bytes(count * PAGE)
    path = tmp_path / format
    if format == "arrow":
        rows = [(n * PAGE, data[n * PAGE : (n + 1) * PAGE], 1) for n in range(count)]
        arrow_image(path, rows, batch=1000)
    else:
        path.write_bytes(data if format == "raw" else elf_core([(0, data, len(data))]))
    s3.server.put("big", path.read_bytes())
    s3.clear()
    image = images.open_image(s3.uri("big"))
    assert s3.sent < 200_000
    for start in (0, count // 2 - 100):
        s3.clear()
        got = [item for item in image.batches(start, start + count // 16) if not isinstance(item, Hole)]
        assert sum(map(len, got)) == count // 16
        assert s3.sent < len(data) // 16 + (1 << 20) // 4
        asked = [request.span for request in s3.requests if request.span]
        assert sum(last - first + 1 for first, last in asked) < len(data) // 16 + (1 << 20) // 4
    image.close()


def test_blocks_come_in_flight_and_in_order(s3: Proxy, hasty: stores.Rules, tmp_path: Path) -> None:
    path = raw_image(tmp_path / "x.raw", 320)
    s3.server.put("x.raw", path.read_bytes())
    image = images.open_image(s3.uri("x.raw"))
    assert isinstance(image, StoredExtentImage)
    handle, together = image._objects[0]._handle, threading.Barrier(hasty.in_flight)

    class Waiting:
        def read_at(self, nbytes: int, offset: int) -> bytes:
            together.wait(30)  # for all that are in flight
            return bytes(handle.read_at(nbytes, offset))

    image._objects[0]._handle = Waiting()
    assert contents(image.batches(0, 320)) == path.read_bytes()  # 20 blocks, four by four

    def slow_first(n: int, _: threading.Event) -> int:
        time.sleep(0.02 * (4 - n % 4))
        return n

    found = list(stores.in_order((functools.partial(slow_first, n) for n in range(16)), 4))
    assert found == list(range(16))


def test_reads_that_nobody_wants_any_more_are_not_begun() -> None:
    begun: list[int] = []

    def task(n: int, stop: threading.Event) -> int:
        begun.append(n)
        if n == 2:
            raise ImageReadError("gone", "x", "y")
        if n > 2:
            assert stop.wait(10)
        return n

    results = stores.in_order((functools.partial(task, n) for n in range(100)), 4)
    with pytest.raises(ImageReadError):
        list(results)
    assert len(begun) <= 8


def contents(items: Iterable[pa.RecordBatch | Hole]) -> bytes:
    """All pages end to end."""
    return b"".join(b"" if isinstance(item, Hole) else b"".join(item.column("content").to_pylist()) for item in items)


def test_a_connection_cut_in_the_middle_of_an_answer(s3: Proxy, hasty: stores.Rules, tmp_path: Path) -> None:
    for key, path in image_files(tmp_path).items():
        s3.server.put(key, path.read_bytes())
        s3.clear()
        s3.cut_at(3_000, 70_000, 150_000, 400_000, 900_000)
        assert pages_of(s3.uri(key)) == pages_of(str(path))
        assert len(s3._cuts) < 5


def test_a_server_that_is_gone_for_two_seconds(
    s3: Proxy, hasty: stores.Rules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "RULES", replace(hasty, patience_s=20.0))
    path = raw_image(tmp_path / "x.raw", 400)
    s3.server.put("x.raw", path.read_bytes())
    image = images.open_image(s3.uri("x.raw"))
    batches = image.batches(0, 400)
    found = [next(batches)]
    s3.down()
    threading.Timer(2.0, s3.up).start()
    begun = time.monotonic()
    found += list(batches)
    assert time.monotonic() - begun > 1.5
    assert contents(found) == path.read_bytes()


def test_a_server_that_is_killed_and_started_again(
    s3: Proxy, hasty: stores.Rules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "RULES", replace(hasty, patience_s=30.0))
    path = raw_image(tmp_path / "x.raw", 400)
    s3.server.put("x.raw", path.read_bytes())
    image = images.open_image(s3.uri("x.raw"))
    batches = image.batches(0, 400)
    found = [next(batches)]
    s3.down()  # until the objects are there again: moto keeps them in memory
    s3.server.kill()

    def again() -> None:
        s3.server.start()
        s3.up()

    thread = threading.Thread(target=again)
    thread.start()
    found += list(batches)
    thread.join()
    assert contents(found) == path.read_bytes()


def test_a_server_that_stays_dead(s3: Proxy, hasty: stores.Rules, tmp_path: Path) -> None:
    s3.server.put("x.raw", raw_image(tmp_path / "x.raw", 400).read_bytes())
    image = images.open_image(s3.uri("x.raw"))
    batches = image.batches(0, 400)
    next(batches)
    s3.down()
    begun = time.monotonic()
    with pytest.raises(
        ImageReadError, match=r"x\.raw\?.* bytes \d+ to \d+: cannot be read, \d+ tries in 1 s"
    ) as caught:
        list(batches)
    assert time.monotonic() - begun < 20
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(ImageReadError, match=r"cannot be read, \d+ tries"):
        images.open_image(s3.uri("x.raw"))


def test_a_server_that_hangs(s3: Proxy, hasty: stores.Rules, tmp_path: Path) -> None:
    path = raw_image(tmp_path / "x.raw", 100)
    s3.server.put("x.raw", path.read_bytes())
    image = images.open_image(s3.uri("x.raw"))
    s3.hanging = True
    begun = time.monotonic()
    with pytest.raises(ImageReadError, match="tries in 1 s"):
        list(image.batches(0, 100))
    assert time.monotonic() - begun < 30
    wake = threading.Timer(1.5, lambda: setattr(s3, "hanging", False))
    wake.start()
    assert pages_of(s3.uri("x.raw")) == pages_of(str(path))
    wake.join()


def test_no_such_object_is_said_at_once(s3: Proxy, tmp_path: Path) -> None:
    s3.server.put("folder/x.raw", page(1))
    begun = time.monotonic()
    for key in ("none.raw", "folder/none.raw"):
        with pytest.raises(ImageReadError, match="no such object"):
            images.open_image(s3.uri(key))
    with pytest.raises(ImageReadError, match="no such object"):
        images.open_image(s3.uri("x").replace("s3://images", "s3://elsewhere"))
    with pytest.raises(ImageReadError, match="not an object but a folder"):
        images.open_image(s3.uri("folder/"))
    s3.server.put("going.raw", page(1) * 4)
    image = images.open_image(s3.uri("going.raw"))
    s3.server.delete("going.raw")
    with pytest.raises(ImageReadError, match="no such object"):
        list(image.batches(0, 4))
    assert time.monotonic() - begun < 20


def test_bad_credentials_are_said_at_once(s3: Proxy, tmp_path: Path) -> None:
    s3.server.put("x.raw", page(1) * 4)
    image = images.open_image(s3.uri("x.raw"))
    s3.server.authenticate(True)
    begun = time.monotonic()
    try:
        with pytest.raises(ImageReadError, match=r"access denied.*check the credentials"):
            images.open_image(s3.uri("x.raw"))
        with pytest.raises(ImageReadError, match="access denied"):
            list(image.batches(0, 4))
        assert time.monotonic() - begun < 20
    finally:
        s3.server.authenticate(False)


@pytest.mark.parametrize("key", ["guest.raw", "every.arrow"])
def test_an_object_that_changes_while_it_is_scanned(s3: Proxy, hasty: stores.Rules, tmp_path: Path, key: str) -> None:
    data = image_files(tmp_path)[key].read_bytes()
    s3.server.put(key, data)
    for other in (data[:-1] + b"x", data[: len(data) // 2]):
        image = images.open_image(s3.uri(key))
        batches = image.batches(0, image.info.pages)
        next(batches)
        s3.server.put(key, other)
        with pytest.raises(ImageError, match="changed while it was scanned"):
            list(batches)
        s3.server.put(key, data)  # the same bytes again are the same object
        assert images.open_image(s3.uri(key)).info.fingerprint == image.info.fingerprint


CODE = """
import re, sys
from ksmdist import images

def peak():  # not ru_maxrss, which begins with that of the parent
    return int(re.search("VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

image = images.open_image(sys.argv[1])
before = peak()
pages = sum(len(item) for item in image.batches(0, image.info.pages))
print(pages, before, peak())
{end}
"""


def reader(s3: Proxy, key: str, end: str = "") -> tuple[subprocess.CompletedProcess[str], list[int]]:
    """A process that reads a whole object; the pages it had, and its peak before and after, in KiB."""
    environment = {name: value for name, value in os.environ.items() if name not in UNSET} | ENVIRONMENT
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", CODE.format(end=end), s3.uri(key)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, [int(word) for word in done.stdout.split()]


def test_a_forked_process_reads_too(s3: Proxy, tmp_path: Path) -> None:
    s3.server.put("x.raw", raw_image(tmp_path / "x.raw", 50).read_bytes())
    code = """
import os, sys, warnings
from ksmdist import images
warnings.simplefilter("ignore")
def read():
    image = images.open_image(sys.argv[1])
    return sum(len(item) for item in image.batches(0, image.info.pages))
assert read() == 50
child = os.fork()
if not child:
    sys.exit(read() - 50)
assert os.waitpid(child, 0)[1] == 0
assert read() == 50
"""
    done = subprocess.run([sys.executable, "-c", code, s3.uri("x.raw")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.ray
def test_ray_workers_read_and_end(s3: Proxy, tmp_path: Path) -> None:
    s3.server.put("x.raw", raw_image(tmp_path / "x.raw", 50).read_bytes())
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:

        def read(uri: str) -> tuple[int, int]:
            image = images.open_image(uri)
            return os.getpid(), len(contents(image.batches(0, image.info.pages))) // PAGE

        remote: Any = ray.remote(read)
        pid, count = ray.get(remote.remote(s3.uri("x.raw")))
        assert count == 50
        with pytest.raises(ray.exceptions.RayTaskError, match="no such object") as caught:
            ray.get(remote.remote(s3.uri("none.raw")))
        assert isinstance(caught.value.cause, ImageReadError)  # as it was raised there
    finally:
        ray.shutdown()
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline, "the worker does not end"
        time.sleep(0.1)


@pytest.mark.parametrize("end", ["", "import os; sys.stdout.flush(); os._exit(0)", "image.close()", "del image"])
def test_a_process_that_read_from_s3_ends_cleanly(s3: Proxy, tmp_path: Path, end: str) -> None:
    s3.server.put("x.raw", raw_image(tmp_path / "x.raw", 50).read_bytes())
    done, (count, _, _) = reader(s3, "x.raw", end)
    assert (done.returncode, done.stderr, count) == (0, "", 50)


@pytest.mark.slow
def test_memory_is_bounded(s3: Proxy) -> None:
    nbytes = 256 << 20
    s3.server.put("big.raw", np.random.default_rng(1).bytes(1 << 20) * 256)
    try:
        done, (count, before, peak) = reader(s3, "big.raw")
        assert done.returncode == 0, done.stderr
        assert count == nbytes // PAGE
        # Eight blocks in flight and the one in use are 72 MiB; the client has buffers of its own.
        assert (peak - before) >> 10 < 180, (before, peak)
        assert peak >> 10 < 300
    finally:
        s3.server.delete("big.raw")


def test_an_s3_endpoint_from_the_environment(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.server.put("x.raw", page(1))
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{s3.port}/")
        assert pages_of("s3://images/x.raw") == [(0, page(1))]
        monkeypatch.delenv(name)


@pytest.mark.parametrize("key", ["a b/é.raw", "a%20b.raw", "x?y=z/w.raw", "what?.raw", "[1]*.raw", "a#b.raw"])
def test_names_of_objects_with_any_characters(s3: Proxy, key: str) -> None:
    uri = parse_uri(s3.uri("x"))
    text = str(replace(uri, path=key))
    assert parse_uri(text) == replace(uri, path=key)
    _, path = store_of(parse_uri(text))
    assert path == f"images/{key}"


def test_a_file_uri_is_a_path(tmp_path: Path) -> None:
    path = raw_image(tmp_path / "a b.raw", 2)
    image = images.open_image(f"file://{tmp_path}/a%20b.raw")
    assert image.info.path == str(path)
    assert pages_of(f"file://localhost{tmp_path}/a%20b.raw") == pages_of(str(path))
    assert local_path("s3://bucket/x") is None
    assert local_path("a/b") == "a/b"
    assert isinstance(images.files.open_file(f"file://{tmp_path}/a%20b.raw"), LocalFile)


def test_a_range_that_came_short_is_asked_for_again(s3: Proxy, hasty: stores.Rules) -> None:
    s3.server.put("x.raw", page(1) * 2)
    file = StoredFile(s3.uri("x.raw"))

    class Short:
        def __init__(self, handle: Any) -> None:
            self.handle, self.tries = handle, 0

        def read_at(self, nbytes: int, offset: int) -> bytes:
            self.tries += 1
            data: bytes = self.handle.read_at(nbytes, offset)
            return data[:-1] if self.tries < 3 else data

    file._handle = short = Short(file._handle)
    assert file.read(0, PAGE) == page(1)
    assert short.tries == 3
    short.tries = -1000
    with pytest.raises(ImageReadError, match="gave 4095 bytes"):
        file.read(0, PAGE)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Threads that read from a store end with who asked for them."""
    yield
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("ksmdist-store") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_compressed_object(s3: Proxy, hasty: stores.Rules, tmp_path: Path) -> None:
    path = raw_image(tmp_path / "x.raw", 300)
    s3.server.put("x.raw.gz", gzip.compress(path.read_bytes()))
    image = images.open_image(s3.uri("x.raw.gz"))
    assert contents(image.batches(0, 300)) == path.read_bytes()
    s3.server.put("x.raw.gz", gzip.compress(raw_image(tmp_path / "x.raw", 300, 2).read_bytes()))
    with pytest.raises(ImageError, match=r"changed while it was scanned|cannot be read"):
        list(image.batches(0, 300))
    image.close()
