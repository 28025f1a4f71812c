"""Schemas: published as they are in the code, complete, and enough for a reader that has no ksmdist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

import ksmdist
from ksmdist.schema import Table, render, render_index, render_markdown
from ksmdist.settings import Settings
from ksmdist.tables import MEMORY_IMAGE, PAGE_FLAGS, TABLES

from .conftest import ZERO, MakeImage, page

SCHEMAS = Path(__file__).parents[1] / "schemas"
PAGES = Path(__file__).parents[1] / "docs" / "tables"


def test_the_published_schemas_are_the_codes() -> None:
    published = {path.name: json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}
    assert published == {f"{t.name}.v{t.version}.json": render(t) for t in TABLES.values()}


def test_the_pages_of_tables_are_the_codes() -> None:
    rendered = {f"{table.name}.md": render_markdown(table) for table in TABLES.values()}
    rendered["README.md"] = render_index(TABLES.values())
    assert {path.name: path.read_text() for path in PAGES.iterdir()} == rendered


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_a_page_has_every_column_in_cells_of_its_own(table: Table) -> None:
    lines = render_markdown(table).splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("| `")]
    named = [row[0].strip(" `") for row in cells if len(row) == 5]
    assert named == [column.name for column in table.columns]
    docs = [row[4].strip().replace("\\|", "|") for row in cells if len(row) == 5]
    assert docs == [column.doc for column in table.columns]
    assert all(len(line) <= 120 for line in lines if not line.startswith(("|", "[schemas/")))


def test_the_schemas_readme_names_every_table_and_its_maker() -> None:
    rows = re.findall(r"^\| (\w+) \| (.+) \| (.+) \|$", (SCHEMAS / "README.md").read_text(), re.M)[1:]
    assert sorted(name for name, _, _ in rows) == sorted(TABLES)
    for name, file, maker in rows:
        shown = re.sub("N+", "*", file.split("`")[1]) if "`" in file and ".parquet" in file else ""
        assert shown == (TABLES[name].file if TABLES[name].file.endswith(".parquet") else ""), name
        for module in re.findall(r"^(\w+\.py)$", maker):
            assert (SCHEMAS.parent / "ksmdist" / module).exists(), (name, module)


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


DUCK = {
    "int64": "BIGINT",
    "int32": "INTEGER",
    "int16": "SMALLINT",
    "uint64": "UBIGINT",
    "uint32": "UINTEGER",
    "double": "DOUBLE",
    "string": "VARCHAR",
    "fixed_size_binary[16]": "BLOB",
    "bool": "BOOLEAN",
}
"""DuckDB's names of Arrow's types."""


def test_duckdb_reads_a_run_from_the_schema_files_alone(make_raw: MakeImage, tmp_path: Path) -> None:
    images = [make_raw("a.raw", [ZERO, ZERO, page(1), page(1), page(2)]), make_raw("b.raw", [page(1), page(3)])]
    run = ksmdist.run(images, tmp_path / "out", Settings(checksums=True))
    other = ksmdist.run(images[:1], tmp_path / "other")
    command = [sys.executable, "-m", "ksmdist", "diff", str(other.path), str(run.path), "-o", str(tmp_path / "diff")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    read = set()
    for path in SCHEMAS.glob("*.json"):
        schema = json.loads(path.read_text())
        if not schema["file"].endswith(".parquet"):
            continue
        folder = tmp_path / "diff" if schema["file"].startswith("diff_") else run.path
        described = duckdb.sql(f"describe select * from '{folder / schema['file']}'").fetchall()
        assert [row[:2] for row in described] == [(c["name"], DUCK[c["type"]]) for c in schema["columns"]]
        read.add(folder / schema["file"])
    written = [path for folder in (run.path, tmp_path / "diff") for path in folder.rglob("*.parquet")]
    of_many = {run.path / name for name in ("stable_tree", "checksums")}
    assert read == {path.parent / "*.parquet" if path.parent in of_many else path for path in written}
    copies = duckdb.sql(f"select kind, copies from '{run.path}/stable_tree/*.parquet' order by kind").fetchall()
    assert copies == [("other", 3), ("zero", 2)]
