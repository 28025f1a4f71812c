"""Run directories that strangers have made: links, pipes, bombs, forged figures and texts. Each ends in an error that
says so, or in figures that mean nothing; never in a crash, a hang, a file elsewhere, or a script in the page."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ksmdist
from ksmdist import intake, store
from ksmdist.errors import KsmdistError, RunDirectoryError, SettingsError
from ksmdist.tables import CONTENTS, IMAGES, SPECTRUM, STABLE_TREE

from .conftest import invoke, printed
from .run_mutations import CHANGES, commands, copied, tables, whole


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(tmp_path_factory.mktemp("whole"))


def ends(run: Path, other: Path, page_at: Path | None = None) -> dict[str, str]:
    """What each command that reads a run says of it: "" where it does well. page_at: None: without a page."""
    said = {}
    for command in commands(run, other, page_at):
        try:
            done = invoke(*command)
            assert done.exit_code == 0, done.output
            said[" ".join(command)] = ""
        except KsmdistError as error:
            said[" ".join(command)] = str(error)
    return said


LINKED = ["run.json", "stable_tree", "stable_tree/00000.parquet", "images.parquet", "sharing.parquet", "whatif.parquet"]


@pytest.mark.parametrize("name", LINKED)
def test_links_are_not_followed(run: Path, tmp_path: Path, name: str) -> None:
    bad = copied(run, tmp_path / "bad")
    (bad / name).rename(tmp_path / "elsewhere")
    (bad / name).symlink_to(tmp_path / "elsewhere")
    said = ends(bad, run)
    refused = [text for text in said.values() if text]
    assert refused
    if name == "run.json":
        assert len(refused) == len(said)
    assert all(f"has {name}, which is a symbolic link: it is not read" in text for text in refused), refused
    # The directory itself is what the user names, and may be one.
    (tmp_path / "link").symlink_to(run)
    assert not any(ends(tmp_path / "link", run).values())


def test_what_is_kept_for_a_later_run_is_no_link(run: Path, tmp_path: Path) -> None:
    images = sorted(run.parent.glob("*.arrow"))
    for name in ("checksums", "checksums/00000.parquet", "run.json", "passes.parquet", "images.parquet"):
        bad = copied(run, tmp_path / "bad")
        shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
        (bad / name).rename(tmp_path / "elsewhere")
        (bad / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(RunDirectoryError, match="which is a symbolic link"):
            ksmdist.run(images, tmp_path / "run", engine="inline", previous=bad)
        if (tmp_path / "elsewhere").is_file():
            (tmp_path / "elsewhere").unlink()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    where = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(where)


SPECIAL: dict[str, Callable[[Path], object]] = {"pipe": _pipe, "socket": _socket, "folder": Path.mkdir}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["run.json", "images.parquet", "stable_tree/00000.parquet"])
def test_what_is_no_file_is_not_waited_for(run: Path, tmp_path: Path, kind: str, name: str) -> None:
    bad = copied(run, tmp_path / "bad")
    (bad / name).unlink()
    SPECIAL[kind](bad / name)
    said = [text for text in ends(bad, run).values() if text]
    assert said
    assert all(f"has {name}, which is a {kind}" in text for text in said), said


def test_a_name_that_goes_up_is_no_name_of_a_table(run: Path, tmp_path: Path) -> None:
    bad = copied(run, tmp_path / "bad")
    assert intake.names(bad, "stable_tree/*.parquet") == ["stable_tree/00000.parquet", "stable_tree/00001.parquet"]
    assert intake.names(bad, "none/*.parquet") == []
    with pytest.raises(FileNotFoundError):
        intake.open_file(bad, "none/x")


NO_JSON: dict[str, bytes] = {
    "lists in lists": b"[" * 200_000,
    "objects in objects": b'{"a":' * 200_000,
    "no number": b'{"run_version": NaN}',
    "more than there is": b'{"run_version": 1e999}',
    "a number of a million digits": b'{"run_version": ' + b"9" * 1_000_000 + b"}",
    "half a letter": b'{"run_version": "\\ud800"}',
    "no UTF-8": b'{"run_version": "\xff"}',
    "nothing": b"",
    "a number": b"6",
    "a list": b"[6]",
    "another version": b'{"run_version": [6]}',
}


@pytest.mark.parametrize("data", NO_JSON.values(), ids=NO_JSON)
def test_json_that_is_none(run: Path, tmp_path: Path, data: bytes) -> None:
    bad = copied(run, tmp_path / "bad")
    (bad / "run.json").write_bytes(data)
    for text in ends(bad, run).values():
        assert "is no run directory" in text or "is of version" in text


def test_a_run_json_that_is_all_of_a_disk_is_not_read(run: Path, tmp_path: Path) -> None:
    bad = copied(run, tmp_path / "bad")
    os.truncate(bad / "run.json", 1 << 40)
    with pytest.raises(RunDirectoryError, match="is no run directory"):
        printed("report", bad)


@pytest.mark.parametrize(
    ("text", "why"), [("[" * 100_000, "lists in lists"), ("-Infinity", "no number"), ("1e400", "no number")]
)
def test_json_from_strangers(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        intake.parsed(text)
    assert intake.parsed('{"a": [1, 2.5, "\\u00e9\\ud83d\\ude00"]}') == {"a": [1, 2.5, "é😀"]}


def _written(run: Path, definition: Any, table: pa.Table, **options: Any) -> None:
    name = definition.file.replace("*", "00000")
    pq.write_table(table.replace_schema_metadata(definition.schema.metadata), run / name, **options)


MEMORY = 3 << 30

LIMITED = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
from ksmdist.cli import main
sys.argv[0] = "ksmdist"
main()
"""


def limited(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A command in 3 GiB of addresses, of which the interpreter and its libraries take one."""
    command = [sys.executable, "-c", LIMITED, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_a_text_that_stands_for_a_million_is_in_memory_once(run: Path, tmp_path: Path) -> None:
    bad = copied(run, tmp_path / "bad")
    rows, text = 100_000, "x" * (1 << 20)  # 100 GiB, written out
    for definition, column in ((CONTENTS, "what"), (STABLE_TREE, "first_image")):
        table = store.read_table(run, definition).slice(0, 1)
        repeated = table.take(pa.array([0] * rows, pa.int64()))
        coded = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
        repeated = repeated.set_column(table.schema.get_field_index(column), column, coded)
        with pa.OSFile(str(bad / definition.file.replace("*", "00000")), "wb") as sink:
            schema = definition.schema
            with pq.ParquetWriter(sink, repeated.schema.with_metadata(schema.metadata), store_schema=False) as writer:
                writer.write_table(repeated.replace_schema_metadata(schema.metadata))
        assert (bad / definition.file.replace("*", "00000")).stat().st_size < 4 << 20
    asked: list[list[str | Path]] = [["report", bad], ["report", bad, "--html", tmp_path / "x"]]
    asked += [["diff", run, bad], ["diff", bad, run]]
    for command in asked:
        done = limited(*command)
        assert done.returncode == 11, done
        assert "Traceback" not in done.stderr
        assert "texts of its column" in done.stderr or "are not what they should be" in done.stderr, done.stderr
    done = limited("query", bad, "select count(*), max(length(what)) from contents")
    assert "Traceback" not in done.stderr


def test_zeros_that_unpack_for_ever_are_refused(run: Path, tmp_path: Path) -> None:
    bad = copied(run, tmp_path / "bad")
    table = store.read_table(run, SPECTRUM).slice(0, 1)
    rows = (1 << 20) + 1
    _written(bad, SPECTRUM, table.take(pa.array([0] * rows, pa.int64())), row_group_size=rows)
    asked: list[list[str | Path]] = [["whatif", bad], ["query", bad, "from spectrum"], ["diff", run, bad]]
    for command in asked:
        with pytest.raises(RunDirectoryError):
            invoke(*command)


@pytest.mark.parametrize(
    ("column", "values", "why"),
    [
        ("total", [-1, 5], "total has -1, which cannot be"),
        ("scan_order", [0, 1 << 30], "scan_order has 1073741824, which cannot be"),
        ("unreadable", [None, -5], "unreadable has -5"),
        ("total", [None, 5], "total has nulls"),
        ("tenant", [None, "x"], "tenant has nulls"),
    ],
)
def test_numbers_that_cannot_be(run: Path, tmp_path: Path, column: str, values: list[Any], why: str) -> None:
    bad = copied(run, tmp_path / "bad")
    table = store.read_table(run, IMAGES)
    at = table.schema.get_field_index(column)
    _written(bad, IMAGES, table.set_column(at, column, pa.array(values, table.schema.field(column).type)))
    with pytest.raises(RunDirectoryError, match=why):
        store.read_table(bad, IMAGES)


def test_a_text_that_is_no_utf8(run: Path, tmp_path: Path) -> None:
    bad = copied(run, tmp_path / "bad")
    table = store.read_table(run, IMAGES)
    raw = pa.array([b"\xff\xfe", b"b"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    _written(bad, IMAGES, table.set_column(table.schema.get_field_index("tenant"), "tenant", text))
    with pytest.raises(RunDirectoryError, match="UTF8"):
        printed("report", bad, "--prometheus")
    with pytest.raises(KsmdistError):
        printed("query", bad, "select tenant from images", "--json")


CLOSED = [
    "copy images to '{there}'",
    "explain analyze copy images to '{there}'",
    "from read_csv('/etc/hostname')",
    "from read_text('{run}/run.json')",
    "from '{run}/images.parquet'",
    "from glob('/*')",
    "attach '{there}' as x",
    "install httpfs",
    "load httpfs",
    "load '{there}'",
    "from 'https://localhost/x.parquet'",
    "export database '{there}'",
    "set enable_external_access = true",
    "set temp_directory = '{there}'",
    "set lock_configuration = false",
    "reset lock_configuration",
    "set autoinstall_known_extensions = true",
    "create persistent secret s (type s3)",
    "from secret_table",
    "import database '{there}'",
]


@pytest.mark.parametrize("sql", CLOSED)
def test_sql_reaches_nothing_but_the_tables(run: Path, tmp_path: Path, sql: str) -> None:
    secret_table = pa.table({"a": [1]})  # which DuckDB would find among Python's variables
    assert len(secret_table) == 1
    with pytest.raises(SettingsError):
        printed("query", run, sql.format(there=tmp_path / "there", run=run))
    assert not (tmp_path / "there").exists()


class _Elements(HTMLParser):
    """What a page is made of: elements that run or fetch something, and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style", "iframe", "img", "object", "embed", "form", "base", "link", "svg", "input"):
            self.found[tag] = self.found.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}
        for name, value in attrs:
            assert name not in ("src", "srcdoc", "action")
            assert name != "href" or (value or "").startswith("#")


FORGED = "\"'></script><script>alert(1)</script><img src=x onerror=alert(2)>${policy}<!--"


def _forged(value: Any) -> Any:
    if isinstance(value, str):
        return FORGED + value
    if isinstance(value, dict):
        return {key: _forged(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_forged(item) for item in value]
    return value


def test_texts_of_a_run_are_no_markup(run: Path, tmp_path: Path) -> None:
    bad = copied(run, tmp_path / "bad")
    manifest = json.loads((bad / "run.json").read_text())
    kept = {name: manifest[name] for name in ("settings", "identities", "run_version")} | {
        "settings": manifest["settings"]
    }
    forged = _forged(manifest) | kept
    forged["summary"]["settings"] = manifest["summary"]["settings"]
    forged["identities"] = [_forged(one) for one in manifest["identities"]]
    (bad / "run.json").write_text(json.dumps(forged))
    free = {"tenant", "host", "producer", "filter_level", "format", "what", "region", "kind"}
    for path in tables(bad):
        table = pq.read_table(path, partitioning=None)
        for number, field in enumerate(table.schema):
            if pa.types.is_string(field.type) and field.name in free and path.stem in ("images", "contents"):
                if (path.stem, field.name) == ("contents", "kind"):
                    continue
                texts = [None if text is None else FORGED + text for text in table.column(number).to_pylist()]
                table = table.set_column(number, field, pa.array(texts, field.type))
        pq.write_table(table, path)
    pages = []
    for name, directory in (("good", run), ("bad", bad)):
        printed("report", directory, "--html", tmp_path / f"{name}.html")
        text = (tmp_path / f"{name}.html").read_text()
        elements = _Elements()
        elements.feed(text)
        pages.append(elements)
        if name == "bad":
            assert "alert(1)" in text  # it is shown, as text
            assert "<script>alert(1)" not in text
            assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text
    assert pages[0].found == pages[1].found
    assert pages[0].attributes == pages[1].attributes
    for text in (printed("report", bad, "--prometheus"), printed("report", bad)):
        assert all(sign.isprintable() or sign == "\n" for sign in text)


def many(seeds: range, run: Path, place: Path) -> None:
    """What a child does: every command on runs that were changed, as `seeds` has it."""
    for seed in seeds:
        rng = random.Random(seed)
        bad = copied(run, place / "bad")
        what = rng.choice(CHANGES)(bad, rng)
        print(seed, what, flush=True)
        ends(bad, run, place / "page.html" if seed % 4 == 0 else None)
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)


def test_no_change_of_a_run_ends_in_a_crash(run: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tests.test_hostile_runs import many; "
    code += "many(range(16), *map(Path, sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, run, tmp_path],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, (done.stdout[-500:], done.stderr[-3000:])
    assert int(done.stdout.split()[-1]) < 1024  # MiB
