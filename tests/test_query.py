"""SQL over a run: the tables by their names and nothing else; the ten questions of examples/."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import ksmdist
from ksmdist import store
from ksmdist.errors import KsmdistError, RunDirectoryError, SettingsError
from ksmdist.query import json_value, tables_of
from ksmdist.tables import (
    CONTENTS,
    COUNTERS,
    HUGE,
    IMAGES,
    KSM_STAT,
    POLICY,
    REGIONS,
    SHARING,
    SPECTRUM_BUCKETS,
    STABLE_TREE,
    WHATIF,
)

from .conftest import PAGE, ZERO, Row, arrow_image, eligible, page, printed

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of two tenants, in a directory whose name is hard to quote."""
    folder = tmp_path_factory.mktemp("it's [a] *")
    images = []
    for name, tenant, own in (("a", "red", 10), ("b", "red", 20), ("c", "blue", 30)):
        contents = [ZERO] * 40 + [b"\xcc" * PAGE] * 4 + [page(1)] * 2 + [page(own), page(own), page(own + 1)]
        contents += [page(2)] * (tenant == "red")
        rows: list[Row] = [(at * PAGE, content, eligible(), None, "[heap]", 0) for at, content in enumerate(contents)]
        rows += [(1 << 21 | at * PAGE, page(3 + at), eligible("huge"), None, "/lib", 0) for at in range(3)]
        rows += [(1 << 22 | at * PAGE, page(1), 0, None, "/lib", 0) for at in range(5)]
        metadata = {"ksmdist.image_id": name, "ksmdist.tenant": tenant, "ksmdist.kind": "process"}
        images.append(arrow_image(folder / f"{name}.arrow", rows, metadata))
    ksmdist.run(images, folder / "run", ksmdist.Settings(ranges=4, task_memory=256 << 20))
    return folder / "run"


def rows(run: Path, definition: Any) -> list[dict[str, Any]]:
    return list(store.read_table(run, definition).to_pylist())


def asked(run: Path, *arguments: str | Path) -> Any:
    return json.loads(printed("query", run, *arguments, "--json"))


def test_every_table_is_there_by_its_name(run: Path) -> None:
    names = [table.name for table in tables_of(run)]
    assert {path.relative_to(run).parts[0].removesuffix(".parquet") for path in run.rglob("*.parquet")} == set(names)
    for table in tables_of(run):
        kept = rows(run, table)
        found = asked(run, f"select * from {table.name}")
        assert found == [{name: json_value(value) for name, value in row.items()} for row in kept], table.name
    listed = printed("query", run)
    assert [line.split(":")[0] for line in listed.splitlines()[:-1]] == names
    assert listed == printed("query", run, "--list")
    assert asked(run, "--list")[0].keys() == {"table", "column", "type", "unit", "meaning"}


def test_a_digest_is_found_and_printed_as_hexadecimal(run: Path) -> None:
    tree = rows(run, STABLE_TREE)
    for row in tree:
        found = asked(run, f"select digest, copies from stable_tree where digest = from_hex('{row['digest'].hex()}')")
        assert found == [{"digest": row["digest"].hex(), "copies": row["copies"]}]
    after = tree[len(tree) // 2]["digest"].hex()
    (found,) = asked(run, f"select count(*) n from stable_tree where digest > from_hex('{after}')")
    assert found["n"] == len(tree) - len(tree) // 2 - 1


def test_formats(run: Path, tmp_path: Path) -> None:
    sql = "select image_id, zero, null as nothing, zero > 0 as some, digest from images, contents where rank = 1"
    found = list(csv.DictReader(io.StringIO(printed("query", run, sql, "--csv"))))
    digest = rows(run, CONTENTS)[0]["digest"].hex()
    assert found[0] == {"image_id": "a", "zero": "40", "nothing": "", "some": "True", "digest": digest}
    assert asked(run, sql)[0] == {"image_id": "a", "zero": 40, "nothing": None, "some": True, "digest": digest}
    shown = printed("query", run, sql)
    assert re.search(rf"^ *a +40 +- +true +{digest} *$", shown, re.M)
    (tmp_path / "x.sql").write_text(f"-- a question\n{sql};\n")
    assert printed("query", run, "-f", tmp_path / "x.sql") == shown
    assert asked(run, "select 1 where false") == []
    assert printed("query", run, "select 1 as x where false", "--csv") == "x\n"
    assert "more rows than 200" in printed("query", run, "select * from range(300)")
    assert len(asked(run, "select * from range(3000)")) == 3000
    odd = "select 'nan'::double a, 1.5::decimal(9, 2) b, 2::decimal c, [1, null] d, {'x': 1} e, date '2026-01-02' f"
    assert asked(run, odd) == [
        {"a": None, "b": 1.5, "c": 2, "d": [1, None], "e": {"x": 1}, "f": "2026-01-02"},
    ]
    assert "\x1b" not in printed("query", run, "select chr(27) || '[31m' as x")
    with pytest.raises(SettingsError, match="has two columns x"):
        asked(run, "select 1 as x, 2 as x")


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("selec 1", "Parser Error"),
        ("select * from no_such_table", "Table with name no_such_table does not exist"),
        ("select no_such_column from images", "no_such_column"),
        ("select error('stop here')", "stop here"),
    ],
)
def test_duckdbs_message_is_passed_on(run: Path, sql: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as raised:
        printed("query", run, sql)
    assert raised.value.exit_code == 2
    assert len(str(raised.value).splitlines()) <= 6
    with pytest.raises(SettingsError, match="exclude each other"):
        printed("query", run, sql, "--list")
    with pytest.raises(SettingsError, match="exclude each other"):
        printed("query", run, sql, "--json", "--csv")


@pytest.mark.parametrize(
    "sql",
    [
        "from read_text('{other}')",
        "from read_blob('{own}')",
        "from read_csv('{other}')",
        "from read_parquet('{own}')",
        "from '{other}'",
        "from '{own}'",
        "from glob('/*')",
        "from sniff_csv('{other}')",
        "from parquet_metadata('{own}')",
        "copy images to '{new}'",
        "copy (select 1) to '{own}' (format parquet, use_tmp_file false)",
        "explain analyze copy (select 1) to '{own}' (format parquet, use_tmp_file false)",
        "with x as (copy (select 1) to '{own}' (format parquet, use_tmp_file false)) from x",
        "create table x as select 1; copy x from '{other}'",
        "attach '{new}'",
        "export database '{new}'",
        "import database '{new}'",
        "install httpfs",
        "load httpfs",
        "create secret (type s3)",
        "set enable_external_access = true",
        "set allowed_paths = ['{other}']",
        "set temp_directory = '{new}'",
        "set memory_limit = '1GB'",
        "reset lock_configuration",
        "pragma enable_profiling; pragma profiling_output = '{new}'; select 1",
    ],
)
def test_sql_from_a_stranger_sees_no_file_and_writes_none(run: Path, tmp_path: Path, sql: str) -> None:
    other, new, own = tmp_path / "other", tmp_path / "new", run / IMAGES.file
    other.write_text("a secret")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    names = {"other": other, "new": new, "own": own}
    quoted = {name: str(path).replace("'", "''") for name, path in names.items()}
    with pytest.raises(KsmdistError) as raised:
        printed("query", run, re.sub(r"\{(other|new|own)\}", lambda match: quoted[match[1]], sql))
    assert "a secret" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_python_is_out_of_reach(run: Path) -> None:
    secret = store.read_table(run, IMAGES)  # DuckDB looks for tables among Python's variables, if it may
    assert len(secret)
    with pytest.raises(SettingsError, match="Table with name secret does not exist"):
        printed("query", run, "select * from secret")


def test_without_duckdb_it_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(SettingsError, match=r"DuckDB, which is not installed; .*pip install 'ksmdist\[query\]'"):
        printed("query", run, "select 1")
    assert "images: " in printed("query", run, "--list")


def test_a_damaged_or_missing_run_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="is no run directory"):
        printed("query", tmp_path, "select 1")
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / IMAGES.file).write_bytes(b"PAR1 and then nothing")
    assert asked(copy, "select count(*) as n from contents") == [{"n": len(rows(run, CONTENTS))}]
    with pytest.raises(RunDirectoryError, match=r"has no readable table images: .*Parquet"):
        printed("query", copy, "select * from images")
    with pytest.raises(SettingsError, match="cannot be read: "):
        printed("query", run, "-f", tmp_path / "none.sql")


@pytest.mark.parametrize("definition", [IMAGES, STABLE_TREE], ids=lambda definition: str(definition.name))
@pytest.mark.parametrize("sql", ["select * from {}", "create view v as select * from {}; select count(*) from v"])
def test_a_table_of_another_schema_is_refused(run: Path, tmp_path: Path, definition: Any, sql: str) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    path = sorted(copy.glob(definition.file))[-1]
    pq.write_table(pq.read_table(run / CONTENTS.file), path)
    with pytest.raises(RunDirectoryError, match=f"{path.name} is table contents, version ., not {definition.name}"):
        printed("query", copy, sql.format(definition.name.upper()))
    assert asked(copy, "select count(*) as n from contents") == [{"n": len(rows(run, CONTENTS))}]


@pytest.mark.parametrize("sql", ["", ";", " \n;; ", "-- select 1", "/* select 1 */;"])
def test_sql_that_asks_for_nothing_is_said(run: Path, tmp_path: Path, sql: str) -> None:
    (tmp_path / "x.sql").write_text(sql)
    for arguments in (("--", sql), ("-f", tmp_path / "x.sql")):
        with pytest.raises(SettingsError, match=r"^SQL: asks for nothing; ksmdist query RUN --list names tables"):
            printed("query", run, *arguments)


# The ten questions.


def example(run: Path, name: str) -> list[dict[str, Any]]:
    found = asked(run, "-f", EXAMPLES / f"{name}.sql")
    assert isinstance(found, list)
    return found


def test_examples_are_ten_each_listed_tested_and_explained() -> None:
    files = sorted(path.name for path in EXAMPLES.glob("*.sql"))
    assert len(files) == 10
    readme, tests = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    for name in files:
        first = (EXAMPLES / name).read_text().splitlines()[0]
        assert re.fullmatch(r"-- [A-Z].*\?", first), name
        question = first.removeprefix("-- ").replace("`", "")
        assert f"| {question} | [{name}]({name}) |" in readme, name
        assert f'example(run, "{name.removesuffix(".sql")}")' in tests, name


def test_example_zero_page(run: Path) -> None:
    found = {row["kind"]: row for row in example(run, "01-zero-page")}
    policy = rows(run, POLICY)[-1]
    assert {kind: row["saved_pages"] for kind, row in found.items()} == {
        kind: policy[f"saved_{kind}"] for kind in ("zero", "same_filled", "other")
    }
    assert found["zero"]["saved_pages"] == 119
    assert found["zero"]["percent"] == round(100 * 119 / policy["saved_pages"], 1)
    assert sum(row["saved_mib"] for row in found.values()) == pytest.approx(policy["saved_bytes"] / (1 << 20))


def test_example_most_merged(run: Path) -> None:
    found = example(run, "02-most-merged")
    kept = rows(run, CONTENTS)
    assert [(row["rank"], row["copies"], row["what"]) for row in found] == [
        (row["rank"], row["copies"], row["what"]) for row in kept
    ]
    assert found[0]["what"] == "zero"
    assert found[0]["first_place"] == "a [heap]"
    assert found[1]["copies"] == 12
    assert (found[1]["images"], found[1]["tenants"]) == (3, 2)


def test_example_variety(run: Path) -> None:
    found = example(run, "03-variety")
    kept = [row for row in rows(run, SPECTRUM_BUCKETS) if row["kind"] != "zero"]
    assert sum(row["contents"] for row in found) == sum(row["contents"] for row in kept)
    pages = {row["from_copies"]: row["pages"] for row in found}
    # Fill: 12 copies; page(1): 6; page(3..5): 3 each; own pairs and page(2): 2 each; three lone ones.
    assert pages == {1: 3, 2: 3 * 2 + 2 + 3 * 3, 4: 6, 8: 12}
    assert sum(row["percent_of_pages"] for row in found) == pytest.approx(100, abs=0.3)


def test_example_images_that_gain(run: Path) -> None:
    found = {row["image_id"]: row for row in example(run, "04-images-that-gain")}
    stats = {row["image_id"]: row for row in rows(run, KSM_STAT)}
    images = {row["image_id"]: row for row in rows(run, IMAGES)}
    for name, row in found.items():
        assert row["merged_pages"] == stats[name]["ksm_merging_pages"]
        assert row["ksm_process_profit"] == stats[name]["ksm_process_profit"]
        assert row["shared_with_others"] == images[name]["shared_with_others"]
    assert {name: row["merged_pages"] for name, row in found.items()} == {"a": 52, "b": 52, "c": 51}
    assert list(found) == ["a", "b", "c"]


def test_example_across_tenants(run: Path) -> None:
    found = example(run, "05-across-tenants")
    assert [(row["tenant"], row["other_tenant"], row["image_id"], row["other_id"]) for row in found] == [
        ("red", "blue", "a", "c"),
        ("red", "blue", "b", "c"),
    ]
    # The fill word, page(1) and the three of /lib: not page(2), which only red has.
    assert {(row["contents"], row["pages"], row["other_pages"]) for row in found} == {(5, 4 + 2 + 3, 4 + 2 + 3)}
    (both,) = (row for row in rows(run, SHARING) if (row["image_id"], row["other_id"]) == ("a", "b"))
    assert both["contents"] == 6


def test_example_within_tenants(run: Path) -> None:
    found = {row["policy"]: row for row in example(run, "06-within-tenants")}
    policy = {row["policy"]: row for row in rows(run, POLICY)}
    assert list(found) == list(policy)
    for name, row in found.items():
        assert row["saved_bytes"] == policy[name]["saved_bytes"]
        assert row["lost_bytes"] == policy["all"]["saved_bytes"] - policy[name]["saved_bytes"]
    assert found["all"]["percent_of_all"] == 100
    # A frame for the zero page, the fill word, page(1) and the three of /lib, that two tenants need twice; the last
    # three are one page in blue.
    assert found["tenant"]["lost_bytes"] == 6 * PAGE


def test_example_max_page_sharing(run: Path) -> None:
    found = example(run, "07-max-page-sharing")
    kept = {
        row["max_page_sharing"]: row
        for row in rows(run, WHATIF)
        if row["accounting"] == "stable_tree" and row["merge_across_nodes"]
    }
    assert {row["max_page_sharing"]: row["profit"] for row in found} == {
        limit: row["profit"] for limit, row in kept.items()
    }
    assert [row["profit"] for row in found] == sorted((row["profit"] for row in found), reverse=True)
    (now,) = (row for row in found if row["present"])
    assert (now["max_page_sharing"], now["more_than_now"]) == (256, 0)


def test_example_unmerge(run: Path) -> None:
    found = example(run, "08-unmerge")
    (counters,) = rows(run, COUNTERS)
    assert found[0]["present"] is True
    assert found[0]["accounting"] == "stable_tree"
    assert found[0]["unmerge_frames"] == counters["pages_sharing"]
    assert found[0]["bytes_needed"] == counters["pages_sharing"] * PAGE
    assert len({row["accounting"] for row in found}) == len(found) == 5
    assert {row["accounting"]: row["zero_pages_given_back"] for row in found}["pte_dirty"] == 120


def test_example_not_merged(run: Path) -> None:
    found = example(run, "09-not-merged")
    images = [row["image_id"] for row in rows(run, IMAGES)]
    wanted = [
        (images[row["image"]], row["region"] or "-", name, row[name])
        for row in rows(run, REGIONS)
        for name in REGIONS.schema.names
        if name not in ("image", "region", "candidates") and row[name]
    ]
    assert [tuple(row.values()) for row in found] == sorted(wanted, key=lambda row: (-row[3], row))
    assert ("a", "/lib", "not_marked", 5) in wanted


def test_example_huge_pages(run: Path) -> None:
    found = example(run, "10-huge-pages")
    kept = rows(run, HUGE)
    for row in found:
        of = [one for one in kept if one["mergeable"] == row["from_mergeable_pages"]]
        for name in ("frames", "huge_frames", "zero_frames", "mergeable_pages"):
            assert row[name] == sum(one[name] for one in of)
    # Three pages of each huge page would merge: it is split for them.
    assert [(row["from_mergeable_pages"], row["huge_frames"]) for row in found] == [(2, 3), (32, 0)]
