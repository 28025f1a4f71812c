"""Images made on the spot, and runs on them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from typer.testing import CliRunner

from ksmdist import keys
from ksmdist.cli import app
from ksmdist.images.proc import Machine
from ksmdist.sysfs import Ksm
from ksmdist.tables import CHECKSUMS, DIFF_CONTENTS, DIFF_IMAGES, MEMORY_IMAGE, PAGE_FLAGS, STABLE_TREE, TABLES

from .stores import s3, s3_server  # noqa: F401 (fixtures)
from .targets import Start, Target

# Clusters made in a test's own process have no tokens, and a driver must know before Ray is imported.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

# The key of all tests, so that none reads or makes the user's.
os.environ["KSMDIST_KEY"] = "5a" * keys.KEY_BYTES
DIGESTER = keys.load().digester

PAGE = 4096
ZERO = bytes(PAGE)


def page(word: int) -> bytes:
    """A page that no fill word makes, told apart by `word`."""
    return struct.pack("<QQ", word, word + 1) * (PAGE // 16)


def digest(content: bytes) -> bytes:
    """A page's digest under the key of the tests."""
    return xxhash.xxh3_128_digest(content, seed=DIGESTER.seed)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark `live` what makes mergeable memory: no test of the kernel may run beside it."""
    for item in items:
        if "start" in getattr(item, "fixturenames", ()):
            item.add_marker("live")


def key_forms() -> list[bytes]:
    """The key of the tests and the seeds that come from it, as programs write them down."""
    key = os.environ[keys.VARIABLE]
    forms = [key.encode(), bytes.fromhex(key)]
    for number, nbytes in ((DIGESTER.seed, 8), (DIGESTER.witness_seed, 4)):
        forms += [f"{number:x}".encode(), str(number).encode()]
        forms += [number.to_bytes(nbytes, "big"), number.to_bytes(nbytes, "little")]
    return forms


def in_a_process(code: str, *arguments: object) -> Any:
    """What Python code, with the tests at hand and `arguments` as argv[1:], prints as JSON: a crash is its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def elf_core(
    segments: Sequence[tuple[int, bytes, int]],
    note: bytes = b"QEMU",
    physical: bool = True,
    offsets: Sequence[int] | None = None,
    xnum: bool = False,
    order: str = "<",
) -> bytes:
    """An ELF64 core: segments are (address, bytes in the file, memsz); offsets as QEMU's, not page-aligned."""
    count = len(segments) + 1
    table_at, data_at = 64, 64 + 56 * count + (64 if xnum else 0)
    notes = struct.pack(order + "III", len(note) + 1, 0, 0) + (note + b"\0").ljust(-(-(len(note) + 1) // 4) * 4, b"\0")
    headers = [struct.pack(order + "IIQQQQQQ", 4, 0, data_at, 0, 0, len(notes), len(notes), 0)]
    body = bytearray(notes)
    for number, (address, data, memsz) in enumerate(segments):
        offset = data_at + len(body)
        if offsets is not None:
            offset = offsets[number]
        else:
            body += data
        where = (0, address) if physical else (address, 0)
        headers.append(struct.pack(order + "IIQQQQQQ", 1, 4, offset, *where, len(data), memsz, 0))
    ident = b"\x7fELF" + bytes([2, 1 if order == "<" else 2, 1]) + bytes(9)
    shoff = table_at + 56 * count if xnum else 0
    phnum = 0xFFFF if xnum else count
    head = ident + struct.pack(
        order + "HHIQQQIHHHHHH", 4, 62, 1, 0, table_at, shoff, 0, 64, 56, phnum, 64, int(xnum), 0
    )
    section = struct.pack(order + "IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, count, 0, 0) if xnum else b""
    return head + b"".join(headers) + section + bytes(body)


Row = tuple[int, bytes | None, int] | tuple[int, bytes | None, int, int | None, str | None, int]


def arrow_image(path: Path, rows: Sequence[Row], metadata: Mapping[str, str] | None = None, batch: int = 3) -> Path:
    """A memory_image with rows (address, content, flags[, frame, region, node]), by the schema alone."""
    names = sorted({region for _, _, _, _, region, _ in map(_whole, rows) if region is not None})
    keys = {"ksmdist.table": "memory_image", "ksmdist.version": "1", "ksmdist.page_size": str(PAGE)}
    schema = pa.schema([(c.name, c.type) for c in MEMORY_IMAGE.columns], metadata=keys | dict(metadata or {}))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for at in range(0, len(rows), batch):
            part = [_whole(row) for row in rows[at : at + batch]]
            codes = pa.array([None if row[4] is None else names.index(row[4]) for row in part], pa.int32())
            columns = {
                "address": [row[0] for row in part],
                "content": [row[1] for row in part],
                "flags": [row[2] for row in part],
                "numa_node": [row[5] for row in part],
                "frame": [row[3] for row in part],
                "region": pa.DictionaryArray.from_arrays(codes, pa.array(names, pa.string())),
            }
            arrays = [pa.array(columns[f.name], f.type) if f.name != "region" else columns["region"] for f in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return path


def _whole(row: Row) -> tuple[int, bytes | None, int, int | None, str | None, int]:
    return row if len(row) == 6 else (*row, None, None, 0)


def eligible(*names: str) -> int:
    """Flags: eligible, and those named."""
    return PAGE_FLAGS["eligible"] | sum(PAGE_FLAGS[name] for name in names)


_APART = (STABLE_TREE, CHECKSUMS, DIFF_CONTENTS, DIFF_IMAGES)
KEPT = [table for table in TABLES.values() if table.file.endswith(".parquet") and table not in _APART]
"""Tables that every run keeps, besides the stable tree."""

MakeImage = Callable[..., Path]


@pytest.fixture
def make_raw(tmp_path: Path) -> MakeImage:
    """make_raw(name, pages): a raw image; None among the pages is a hole."""

    def make(name: str, pages: Sequence[bytes | None]) -> Path:
        path = tmp_path / name
        with open(path, "wb") as sink:
            for number, content in enumerate(pages):
                if content is not None:
                    sink.seek(number * PAGE)
                    sink.write(content)
            sink.truncate(len(pages) * PAGE)
        return path

    return make


def table_files(run: Path) -> dict[str, bytes]:
    """Every Parquet file of a run, by name."""
    return {str(f.relative_to(run)): f.read_bytes() for f in sorted(run.rglob("*.parquet"))}


def manifest(run: Path) -> Any:
    return json.loads((run / "run.json").read_text())


def oracle(images: Mapping[str, Sequence[bytes | None]]) -> dict[str, Any]:
    """The truth, the slow way: a dict from page bytes to the places that hold them."""
    places: dict[bytes, list[tuple[str, int]]] = {}
    for name, pages in images.items():
        for number, content in enumerate(pages):
            if content is not None:
                places.setdefault(content, []).append((name, number * len(content)))
    other = {content: where for content, where in places.items() if content.strip(b"\0")}
    copies = [len(where) for where in other.values()]
    filled = sum(len(w) for c, w in other.items() if c == c[:8] * (len(c) // 8))
    zero = sum(map(len, places.values())) - sum(copies)
    return {
        "stable": {c: (len(w), len({n for n, _ in w}), min(w)) for c, w in places.items() if len(w) > 1},
        "zero": zero,
        "duplicate": sum(n for n in copies if n > 1),
        "unique": copies.count(1),
        "same_filled": filled,
        "contents": {
            "distinct": len(copies),
            "shared": sum(n > 1 for n in copies),
            "max_copies": max(copies, default=0),
        },
        "absent": sum(content is None for pages in images.values() for content in pages),
    }


def invoke(*arguments: str | Path) -> Any:
    """A command's result, as typer's CliRunner gives it; an error of ours is raised."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def printed(*arguments: str | Path) -> str:
    """What a command prints that does well."""
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    return str(done.stdout)


def random_pages(rng: np.random.Generator, count: int) -> list[bytes]:
    return [rng.bytes(PAGE) for _ in range(count)]


def unavailable(reason: str, force: str = "KSMDIST_FORCE_KERNEL") -> None:
    """Skip a test that needs KSM, root or what `force` names; fail it where the environment has that as 1."""
    if os.environ.get(force) == "1":
        pytest.fail(reason)
    pytest.skip(f"{reason}; {force}=1 makes this a failure")


@pytest.fixture
def ksm() -> Ksm:
    """This host's KSM, writable."""
    found = Ksm()
    if not os.access(found.root / "run", os.W_OK):
        unavailable(f"{found.root / 'run'} is not there, or not writable: this needs root and a kernel with KSM")
    return found


@pytest.fixture
def start() -> Iterator[Start]:
    """start(code): a process that does what `code` says and waits; see targets.PRELUDE."""
    targets: list[Target] = []

    def begin(code: str, **options: Any) -> Target:
        targets.append(Target(code, **options))
        return targets[-1]

    yield begin
    for target in targets:
        target.close()


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    machine = Machine.here()
    yield machine
    machine.close()
