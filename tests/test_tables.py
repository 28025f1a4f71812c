"""Schemas: published as they are in the code, complete, and enough for a reader that has no ksmdist."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

import ksmdist
from ksmdist.schema import Table, render
from ksmdist.tables import MEMORY_IMAGE, PAGE_FLAGS, TABLES

from .conftest import ZERO, MakeImage, page

SCHEMAS = Path(__file__).parents[1] / "schemas"


def test_the_published_schemas_are_the_codes() -> None:
    published = {path.name: json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}
    assert published == {f"{t.name}.v{t.version}.json": render(t) for t in TABLES.values()}


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_every_column_says_what_it_is(table: Table) -> None:
    for column in table.columns:
        assert column.doc, column.name
        number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        assert (column.unit is not None) == number, column.name
    assert set(table.sort) <= {column.name for column in table.columns}


def test_flags_are_single_bits_and_published() -> None:
    assert sorted(PAGE_FLAGS.values()) == [1 << n for n in range(len(PAGE_FLAGS))]
    flags = next(c for c in json.loads(json.dumps(render(MEMORY_IMAGE)))["columns"] if c["name"] == "flags")
    assert flags["bits"]["eligible"] == 1


def test_duckdb_reads_a_run_from_the_schema_files_alone(make_raw: MakeImage, tmp_path: Path) -> None:
    run = ksmdist.run([make_raw("a.raw", [ZERO, ZERO, page(1), page(1), page(2)])], tmp_path / "out")
    duck = {"int64": "BIGINT", "int32": "INTEGER", "int16": "SMALLINT", "uint64": "UBIGINT", "string": "VARCHAR"}
    duck |= {"fixed_size_binary[16]": "BLOB", "bool": "BOOLEAN"}
    for path in SCHEMAS.glob("*.json"):
        schema = json.loads(path.read_text())
        if not schema["file"].endswith(".parquet"):
            continue
        described = duckdb.sql(f"describe select * from '{run.path / schema['file']}'").fetchall()
        assert [row[:2] for row in described] == [(c["name"], duck[c["type"]]) for c in schema["columns"]]
    copies = duckdb.sql(f"select kind, copies from '{run.path}/stable_tree/*.parquet' order by kind").fetchall()
    assert copies == [("other", 2), ("zero", 2)]
