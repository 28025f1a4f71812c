"""Run directories as a stranger might make them: one that is whole, and ways to change it; commands that read it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import ksmdist

from .conftest import PAGE, ZERO, Row, arrow_image, eligible, page

NUMBERS = (-1, -2, 1, 7, 1 << 20, 1 << 31, (1 << 40) + 1, (1 << 62) + 1, -(1 << 63), (1 << 63) - 1)
TEXTS = ("", "x", "\x1b[31m", "zero", "<script>alert(1)</script>", "a" * 100_000)


def whole(folder: Path) -> Path:
    """A run with something in each table: two nodes, forked frames, regions, tenants, checksums, two passes."""
    for name, tenant, first in (("a", "red", 1), ("b", "blue", 2)):
        rows: list[Row] = []
        for number in range(24):
            content = ZERO if number % 5 == 0 else page(number % 7) if number % 2 else page(100 * first + number)
            rows.append(
                (number * PAGE, content, eligible("huge") if number > 20 else eligible(), 5 + number % 9, None, 0)
            )
            rows[-1] = (*rows[-1][:4], f"[{name}{number % 3}]", number % 2)
        rows.append((99 * PAGE, None, eligible("unreadable")))
        metadata = {"ksmdist.image_id": name, "ksmdist.kind": "process", "ksmdist.tenant": tenant}
        arrow_image(folder / f"{name}.arrow", rows, metadata, batch=9)
    settings = ksmdist.Settings(max_page_sharing=4, checksums=True, ranges=2)
    images = [folder / "a.arrow", folder / "b.arrow"]
    first_run = ksmdist.run(images, folder / "first", settings, "inline")
    return ksmdist.run(images, folder / "run", settings, "inline", previous=first_run.path).path


def copied(run: Path, to: Path) -> Path:
    """A copy to change."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to)
    return to


def tables(run: Path) -> list[Path]:
    """Files of tables."""
    return sorted(run.rglob("*.parquet"))


def changed_value(run: Path, rng: random.Random) -> str:
    """Change one value, or a column, of a table; says which."""
    path = rng.choice([path for path in tables(run) if pq.read_metadata(path).num_rows])
    table = pq.read_table(path, partitioning=None)
    number = rng.randrange(table.num_columns)
    field, column = table.schema.field(number), table.column(number).to_pylist()
    some = range(len(column)) if rng.random() < 0.3 else [rng.randrange(len(column))]
    value: Any = _value(field.type, rng)
    for row in some:
        column[row] = value
    found = table.set_column(number, field.with_nullable(True), pa.chunked_array([pa.array(column, field.type)]))
    pq.write_table(found.replace_schema_metadata(table.schema.metadata), path)
    return f"{path.relative_to(run)}: {field.name} = {str(value)[:40]!r} in {len(some)} rows"


def _value(kind: pa.DataType, rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return None
    if pa.types.is_integer(kind):
        info = np.iinfo(kind.to_pandas_dtype())
        return (
            int(np.clip(rng.choice(NUMBERS), info.min, info.max)) if info.min else rng.choice(NUMBERS) % (info.max + 1)
        )
    if pa.types.is_floating(kind):
        return rng.choice((float("nan"), float("inf"), -1.0, 1e308))
    if pa.types.is_boolean(kind):
        return rng.random() < 0.5
    if pa.types.is_fixed_size_binary(kind):
        return rng.randbytes(kind.byte_width)
    if pa.types.is_string(kind):
        return rng.choice(TEXTS)
    return b"\xff\xfe"


def changed_rows(run: Path, rng: random.Random) -> str:
    """Leave rows of a table out, double them, or turn them round; says which."""
    path = rng.choice(tables(run))
    table = pq.read_table(path, partitioning=None)
    how = rng.choice(("none", "half", "twice", "round"))
    rows = {
        "none": lambda: table.slice(0, 0),
        "half": lambda: table.slice(0, len(table) // 2),
        "twice": lambda: pa.concat_tables([table, table]),
        "round": lambda: table.take(pa.array(range(len(table) - 1, -1, -1), pa.int64())),
    }[how]()
    pq.write_table(rows, path)
    return f"{path.relative_to(run)}: {how}"


def changed_bytes(run: Path, rng: random.Random) -> str:
    """Change some bytes of a file, mostly of its footer; says where."""
    path = rng.choice([*tables(run), run / "run.json"])
    data = bytearray(path.read_bytes())
    places = []
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = len(data) - 1 - rng.randrange(min(len(data), 2000)) if rng.random() < 0.6 else rng.randrange(len(data))
        data[at] = rng.choice((0, 1, 127, 128, 255, data[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
        places.append(at)
    if rng.random() < 0.1:
        del data[rng.randrange(len(data)) :]
    path.write_bytes(data)
    return f"{path.relative_to(run)}: bytes {places}"


def changed_json(run: Path, rng: random.Random) -> str:
    """Change a value of run.json; says which."""
    manifest = json.loads((run / "run.json").read_text())
    places = list(_places(manifest))
    holder, key = rng.choice(places)
    others: tuple[Any, ...] = (None, True, 1.5, [], {}, [[]], 10**30)
    value = rng.choice((*NUMBERS, *TEXTS, *others))
    holder[key] = value
    (run / "run.json").write_text(json.dumps(manifest))
    return f"run.json: {key} = {str(value)[:40]!r}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


CHANGES: tuple[Callable[[Path, random.Random], str], ...] = (changed_value, changed_rows, changed_bytes, changed_json)

QUERIES = ("select * from images", "select kind, sum(copies) from stable_tree group by all", "from contents")


def commands(run: Path, other: Path, page_at: Path | None) -> list[list[str]]:
    """Commands that read a run, all that there are; other: a run that is whole; page_at: for the page, if any."""
    name, whole_run, published = str(run), str(other), run.parent / "published"
    shutil.rmtree(published, ignore_errors=True)
    return [
        ["report", name],
        ["report", name, "--json"],
        ["report", name, "--prometheus"],
        *([["report", name, "--html", str(page_at)]] if page_at else []),
        ["whatif", name],
        ["whatif", name, "--max-page-sharing", "2", "--use-zero-pages", "--full-scans", "3", "--smart-scan"],
        ["explain", name],
        ["unmerge", name, "--json"],
        ["diff", name, whole_run],
        ["diff", whole_run, name, "--json"],
        ["publish", name, "-o", str(published)],
        *(["query", name, sql, "--json"] for sql in QUERIES),
    ]
