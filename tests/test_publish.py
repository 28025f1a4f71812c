"""What `ksmdist publish` hands on: every count, and nothing that names, places or confirms anything."""

from __future__ import annotations

import base64
import json
import os
import stat
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ksmdist
from ksmdist import publish as publishing
from ksmdist import store
from ksmdist.errors import RunDirectoryError, SettingsError
from ksmdist.images import FORMATS
from ksmdist.images.headers import KINDS_OF_IMAGES
from ksmdist.publish import KEEPABLE, publish
from ksmdist.settings import Settings
from ksmdist.tables import CONTENTS, EXPOSURE, HUGE, IMAGES, REGIONS, SHARING, STABLE_TREE, TABLES
from ksmdist.tables.published import (
    PUBLISHED,
    REGION_CLASSES,
    SETTINGS,
    UNPUBLISHED,
    UNPUBLISHED_SETTINGS,
    WORDS,
    Publication,
    Rule,
    render_decisions,
)

from .conftest import PAGE, ZERO, arrow_image, eligible, invoke, page, printed

ROOT = Path(__file__).parents[1]
SEED = bytes(32)
BASE = 0x7F3A_5C1D_0000  # of addresses that no count is alike
SECRET_WORD = 0x5345_4352_4554_2121


def pages_of(image: int) -> list[tuple[bytes, str | None]]:
    """Pages and regions: of all images, of two, of one, one word each, zero."""
    shared = [(page(0xA000 + n), "/home/alice/marker-file.db (deleted)") for n in range(6)]
    own = [(page((image + 1) << 20 | n), f"[anon:marker-arena-{image}]") for n in range(3 + image)]
    twice = [(page((image + 1) << 24), "[heap]")] * 2
    rare = [(page(0xB000 + image // 2 * 16 + n), "/memfd:marker-memfd (deleted)") for n in range(2 + image // 2)]
    filled = [(SECRET_WORD.to_bytes(8, "little") * (PAGE // 8), None), (b"\xcc" * PAGE, "[stack]")]
    return [*shared, *own, *twice, *rare, *filled, *[(ZERO, "marker-ram-block")] * (2 + image)]


NAMES = ("zz-marker-image", "aa-marker-image", "mm-marker-image", "bb-marker-image")
HOSTS = ("marker-host-q", "marker-host-b", "marker-host-q", "")
TENANTS = ("marker-tenant-z", "marker-tenant-c", "marker-tenant-z", "marker-tenant-k")
SALTS = ("marker-salt-1", "", "marker-salt-2", "")


def make_run(folder: Path, names: Sequence[str] = NAMES, **knobs: Any) -> Path:
    """A run of processes whose names, addresses, regions and contents are markers."""
    paths = []
    for image, name in enumerate(names):
        rows = [
            (BASE + (image * 4096 + n * 3) * PAGE, content, eligible(), None, region, 0)
            for n, (content, region) in enumerate(pages_of(image))
        ]
        source = {
            "producer": "marker-producer",
            "filter_level": "marker-filter" if image == 1 else "",
            "caveats": ["marker-caveat"],
        }
        metadata = {
            "ksmdist.image_id": name,
            "ksmdist.kind": "guest" if image == 3 else "process",
            "ksmdist.host": HOSTS[image],
            "ksmdist.tenant": TENANTS[image],
            "ksmdist.salt": SALTS[image],
            "ksmdist.source": json.dumps(source),
        }
        paths.append(arrow_image(folder / f"marker-file-{image}.arrow", rows, metadata))
    return ksmdist.run(paths, folder / "marker-run", Settings(**knobs), "inline").path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("marker-folder"))


def table(folder: Path, name: str) -> pa.Table:
    return pq.read_table(folder / PUBLISHED[name].table.file)


@pytest.fixture(scope="module")
def own_words(run: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a publication of the run says whose own names are found by test_nothing_of_a_run_...: ksmdist's words."""
    out = tmp_path_factory.mktemp("own") / "out"
    publish(run, out, seed=SEED)
    return b"\n".join(data for _, data in everything(out))


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table(folder, name).to_pylist()
    return found


@pytest.mark.parametrize("name", TABLES)
def test_each_column_of_each_table_is_decided(name: str) -> None:
    assert (name in PUBLISHED) != (name in UNPUBLISHED), f"decide table {name} in ksmdist/tables/published.py"
    if name in PUBLISHED:
        publication = PUBLISHED[name]
        taken = {one.source for one in publication.taken}
        columns = {column.name for column in TABLES[name].columns}
        assert taken | set(publication.left_out) == columns, f"decide each column of {name} in tables/published.py"
        assert not taken & set(publication.left_out)


@pytest.mark.parametrize("publication", PUBLISHED.values(), ids=lambda one: one.source.name)
def test_only_numbers_are_kept_as_they_are(publication: Publication) -> None:
    of = {column.name: column for column in publication.source.columns}
    for taken in publication.taken:
        column = of[taken.source]
        if taken.rule is Rule.KEEP and (publication.source.name, taken.name) != ("contents", "meaning"):
            assert not pa.types.is_string(column.type), taken
            assert not pa.types.is_fixed_size_binary(column.type), taken
            assert "address" not in taken.name, taken
            assert "digest" not in taken.name, taken
        if taken.rule is Rule.WORD:
            assert f"{publication.source.name}.{taken.name}" in WORDS or taken.name in WORDS, taken
    assert publication.table.name not in TABLES
    assert set(publication.table.sort) <= {taken.name for taken in publication.taken}


def test_the_words_are_those_of_the_code() -> None:
    assert set(UNPUBLISHED) <= set(TABLES)
    assert sorted(WORDS["format"]) == sorted(known.name for known in FORMATS)
    assert WORDS["images.kind"] == KINDS_OF_IMAGES
    assert set(SETTINGS) | set(UNPUBLISHED_SETTINGS) == {one.name for one in fields(Settings)}
    assert not set(SETTINGS) & set(UNPUBLISHED_SETTINGS)
    reasons = next(column.doc for column in TABLES["holes"].columns if column.name == "reason")
    assert tuple(part.split(":")[0] for part in reasons.split(" | ")) == WORDS["reason"]


def test_the_document_has_every_decision() -> None:
    assert render_decisions() in (ROOT / "docs" / "publish.md").read_text()


def forms(data: bytes) -> Iterator[bytes]:
    """Bytes as they are, as hexadecimal, as base64 at each of three offsets."""
    yield data
    yield data.hex().encode()
    yield data.hex().upper().encode()
    for lead in range(3):
        text = base64.b64encode(bytes(lead) + data)
        yield text[4 if lead else 0 : len(text) - 4]  # what bytes beside it change is not looked for


def everything(folder: Path) -> Iterator[tuple[str, bytes]]:
    """All that the files of a publication say: their bytes, Parquet's values, metadata and statistics, their names."""
    for path in sorted(folder.rglob("*")):
        yield "name", str(path.relative_to(folder)).encode()
        if path.is_dir():
            continue
        data = path.read_bytes()
        yield path.name, data
        if path.suffix != ".parquet":
            continue
        with pq.ParquetFile(path) as file:
            whole, metadata = file.read(), file.metadata
            yield path.name, repr((metadata.metadata, file.schema_arrow.metadata, metadata.to_dict())).encode()
            for field in file.schema_arrow:
                yield path.name, repr((field.name, field.metadata)).encode()
            for group in range(metadata.num_row_groups):
                for number in range(metadata.num_columns):
                    seen = metadata.row_group(group).column(number).statistics
                    if seen is not None and seen.has_min_max:
                        yield path.name, repr((seen.min, seen.max)).encode()
                        for value in (seen.min, seen.max):
                            if isinstance(value, bytes):
                                yield path.name, value
        for column in whole.columns:
            for value in column.to_pylist():
                if isinstance(value, bytes):
                    yield path.name, value
                elif isinstance(value, int) and not isinstance(value, bool):
                    yield path.name, (value % (1 << 64)).to_bytes(8, "little")
                    yield path.name, str(value).encode()
                elif value is not None:
                    yield path.name, str(value).encode()


def secrets_of(run: Path) -> dict[str, list[bytes]]:
    """What must not be in a publication: names, digests, addresses, fingerprints, secret words, of the run itself."""
    manifest = json.loads((run / "run.json").read_text())
    tree = store.read_table(run, STABLE_TREE)
    digests = set(tree.column("digest").to_pylist()) | set(store.read_table(run, CONTENTS).column("digest").to_pylist())
    addresses = {BASE + n * PAGE for n in range(4 * 4096)}
    placed = set(tree.column("first_address").to_pylist())
    assert placed <= addresses
    texts = [str(image["fingerprint"]).encode() for image in manifest["images"]]
    if manifest.get("key"):
        texts.append(str(manifest["key"]).encode())
    return {
        "names": [b"marker", str(run.parent).encode(), os.fsencode(run)],
        "digests": [*digests] + [digest[::-1] for digest in digests],
        "halves": [digest[:8] for digest in digests] + [digest[8:] for digest in digests],
        "addresses": [form for at in placed for form in (at.to_bytes(8, "little"), str(at).encode(), b"%x" % at)],
        "frames": [b"%d" % (at // PAGE) for at in placed],
        "fingerprints": [text for text in texts if len(text) > 3],
        "words": [SECRET_WORD.to_bytes(8, "little"), SECRET_WORD.to_bytes(8, "big"), str(SECRET_WORD).encode()],
    }


def test_nothing_of_a_run_that_names_or_places_is_in_its_publication(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "publication"
    publish(run, out)
    wanted = [(what, form) for what, found in secrets_of(run).items() for data in found for form in forms(data)]
    wanted = [(what, form) for what, form in wanted if len(form) > 4]
    assert len(wanted) > 200
    for name, data in everything(out):
        for what, form in wanted:
            assert form not in data, (name, what, form)


def test_the_search_finds_what_is_there(run: Path, tmp_path: Path) -> None:
    """The test above would see a leak: in the run itself each kind of secret is found, in several encodings."""
    secrets = secrets_of(run)
    whole = [data for _, data in everything(run)]
    for what in ("names", "digests", "addresses", "words", "fingerprints"):
        assert any(data in seen for data in secrets[what] for seen in whole), what
    inside = b"xx" + base64.b64encode(b"?" + NAMES[0].encode() + b"?")
    assert any(form in inside for form in forms(NAMES[0].encode()))


COPIED = ("counters", "whatif", "policy", "policy_spectrum", "spectrum", "spectrum_buckets", "zero_colors")


def test_every_count_is_the_runs(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "publication"
    said = publish(run, out, keep=("order",))
    written = {one["name"].removeprefix("published_"): one["rows"] for one in said["tables"]}
    assert written.keys() == PUBLISHED.keys()
    for name in PUBLISHED:
        theirs, ours = store_rows(run, name), table(out, name)
        assert written[name] == len(ours), name
        if name != REGIONS.name:  # of which several have one class
            assert len(ours) == theirs.num_rows, name
        for taken in PUBLISHED[name].taken:
            if taken.rule is Rule.KEEP and not PUBLISHED[name].pairs and taken.name != "meaning":
                left, right = (sorted(map(repr, t.column(taken.name).to_pylist())) for t in (theirs, ours))
                if name == REGIONS.name:
                    assert sum(theirs.column(taken.name).to_pylist()) == sum(ours.column(taken.name).to_pylist())
                else:
                    assert left == right, (name, taken)
    for name in COPIED:
        assert table(out, name).to_pylist() == store_rows(run, name).to_pylist(), name


def store_rows(run: Path, name: str) -> pa.Table:
    return store.read_table(run, TABLES[name])


def by_name(run: Path, out: Path) -> dict[str, str]:
    """Which published image is which, by sizes, which differ."""
    published = {row["total"]: row["image_id"] for row in rows_of(out, "images")}
    return {row["image_id"]: published[row["total"]] for row in store_rows(run, "images").to_pylist()}


def test_pairs_of_images_and_tenants_are_the_runs(run: Path, tmp_path: Path) -> None:
    for number in range(6):  # whichever way the numbers fall
        out = tmp_path / f"publication-{number}"
        publish(run, out, seed=bytes([number]) * 32)
        image = by_name(run, out)

        def pair(row: Mapping[str, Any], one: str, other: str, names: Mapping[str, str], columns: str) -> Any:
            a = (names[row[one]], *(row[name] for name in columns.split()))
            b = (names[row[other]], *(row[name.replace("pages", "other_pages")] for name in columns.split()))
            return (*sorted([a, b]), row["contents"])

        theirs = [pair(row, "image_id", "other_id", image, "pages") for row in store_rows(run, "sharing").to_pylist()]
        same = {name: name for name in image.values()}
        ours = [pair(row, "image_id", "other_id", same, "pages") for row in rows_of(out, "sharing")]
        assert len(theirs) == 10
        assert sorted(theirs) == sorted(ours)
        numbers = {row["image"]: row["image_id"] for row in rows_of(out, "images")}
        keys = [(row["image"], row["other"]) for row in rows_of(out, "sharing")]
        assert keys == sorted(keys)
        assert all(one <= other for one, other in keys)
        for row in rows_of(out, "sharing"):
            assert (numbers[row["image"]], numbers[row["other"]]) == (row["image_id"], row["other_id"])

        of = {row["image_id"]: row["tenant"] for row in rows_of(out, "images")}
        tenants = {row["tenant"]: of[image[row["image_id"]]] for row in store_rows(run, "images").to_pylist()}
        columns = "pages rare_pages salt_pages"
        theirs = [pair(row, "tenant", "other", tenants, columns) for row in store_rows(run, "exposure").to_pylist()]
        kept = {name: name for name in tenants.values()}
        ours = [pair(row, "tenant", "other", kept, columns) for row in rows_of(out, "exposure")]
        assert theirs
        assert sorted(theirs) == sorted(ours)
        assert all(row["tenant"] < row["other"] for row in rows_of(out, EXPOSURE.name))


def test_a_content_has_one_number_in_all_tables(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "publication"
    publish(run, out)
    tree, top = rows_of(out, "stable_tree"), rows_of(out, "contents")
    assert [row["content"] for row in tree] == list(range(1, len(tree) + 1))
    assert [row["rank"] for row in top] == list(range(1, len(top) + 1))
    assert [row["copies"] for row in top] == sorted((row["copies"] for row in top), reverse=True)
    linked = [row for row in top if row["content"] is not None]
    assert len(linked) >= 10
    for row in linked:
        theirs = tree[row["content"] - 1]
        names = ("kind", "fill_word", "copies", "images", "nodes", "first_image")
        assert [row[name] for name in names] == [theirs[name] for name in names]


def test_contents_of_a_table_that_was_cut_off_are_not_told_from_their_like(tmp_path: Path) -> None:
    run = make_run(tmp_path, contents=4)
    publish(run, tmp_path / "publication")
    top = rows_of(tmp_path / "publication", "contents")
    fewest = min(row["copies"] for row in top)
    assert len(top) == 4
    assert all((row["content"] is None) == (row["copies"] == fewest) for row in top)


def test_the_order_of_digests_names_and_scanning_is_not_in_it(run: Path, tmp_path: Path) -> None:
    digests = store.read_table(run, STABLE_TREE).column("copies").to_pylist()
    seen, orders, salts, first = set(), set(), set(), []
    for number in range(24):
        out = tmp_path / f"publication-{number}"
        publish(run, out, seed=bytes([number]) * 32)
        image = by_name(run, out)
        images = {row["image_id"]: row for row in rows_of(out, "images")}
        assert all(name == f"image-{row['image']}" for name, row in images.items())
        orders.add(tuple(image[name] for name in NAMES))
        salts.add(tuple(images[image[name]]["salt"] for name in NAMES))
        first.append([row["first_image"] for row in rows_of(out, "stable_tree") if row["images"] > 1])
        seen.add(tuple(table(out, "stable_tree").column("copies").to_pylist()))
        assert not (out / "cumulative.parquet").exists()
        assert {row["scan_order"] for row in rows_of(out, "images")} == {None}
    assert len(orders) > 8
    assert salts == {(1, 0, 2, 0), (2, 0, 1, 0)}
    assert len(seen) > 12
    assert all(sorted(one) == sorted(digests) for one in seen)
    assert all(name is None for names in first for name in names)


def test_two_publications_have_no_numbers_in_common_unless_asked(run: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    publish(run, tmp_path / "a", names=names)
    publish(run, tmp_path / "b", names=names)
    assert named(tmp_path / "a") == named(tmp_path / "b")
    assert stat.S_IMODE(names.stat().st_mode) == 0o600
    known = json.loads(names.read_text())
    assert known["images"].keys() == set(NAMES)
    image = by_name(run, tmp_path / "a")
    assert image == {name: f"image-{number}" for name, number in known["images"].items()}
    contents = [[row["content"] for row in rows_of(tmp_path / name, "contents")] for name in ("a", "b")]
    assert contents[0] != contents[1]

    known["images"]["another"] = 77
    names.write_text(json.dumps(known))
    publish(run, tmp_path / "e", names=names)
    assert named(tmp_path / "e") == named(tmp_path / "a")
    assert json.loads(names.read_text())["images"]["another"] == 77


def named(out: Path) -> list[tuple[Any, ...]]:
    """Names of images, hosts and tenants, and sizes."""
    return [
        tuple(row[name] for name in ("image", "image_id", "host", "tenant", "total")) for row in rows_of(out, "images")
    ]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"ksmdist_names": 1}', '{"ksmdist_names": 1, "images": {"a": 0}, "hosts": {}, "tenants": {}}'],
)
def test_a_file_of_names_that_is_none(run: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "names").write_text(text)
    with pytest.raises(RunDirectoryError, match="no file of names"):
        publish(run, tmp_path / "out", names=tmp_path / "names")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "names").read_text() == text


@pytest.mark.parametrize("keep", KEEPABLE)
def test_what_is_kept_on_request(run: Path, tmp_path: Path, keep: str) -> None:
    out = tmp_path / "publication"
    said = publish(run, out, keep=(keep,))
    assert said["kept"] == [keep]
    images = rows_of(out, "images")
    there = {
        "images": {row["image_id"] for row in images} == set(NAMES),
        "hosts": {row["host"] for row in images} == set(HOSTS),
        "tenants": {row["tenant"] for row in images} == set(TENANTS)
        and {row["tenant"] for row in rows_of(out, "exposure")} <= set(TENANTS),
        "order": sorted(row["scan_order"] for row in images if row["scan_order"] is not None) == [0, 1, 2, 3],
    }
    assert there == {name: name == keep for name in KEEPABLE}
    assert (out / "cumulative.parquet").exists() == (keep == "order")
    if keep == "order":
        shown = {row["scan_order"]: row["image_id"] for row in images}
        cumulative = rows_of(out, "cumulative")
        assert [row["image_id"] for row in cumulative] == [shown[n] for n in range(4)]
        assert all(row["first_image"] for row in rows_of(out, "stable_tree"))


def test_regions_are_classes(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "publication"
    publish(run, out)
    regions = rows_of(out, "regions")
    guest = {row["image"] for row in rows_of(out, "images") if row["kind"] == "guest"}
    assert {row["region"] for row in regions if row["image"] not in guest} == {
        "anonymous",
        "file",
        "heap",
        "other",
        "shared",
        "stack",
        None,
    }
    assert {row["region"] for row in regions if row["image"] in guest} == {"ram", None}
    keys = [(row["image"], row["region"]) for row in regions]
    assert len(set(keys)) == len(keys)
    assert {row["region"] for row in rows_of(out, "contents")} <= {*REGION_CLASSES, None}


_words = st.text(string.ascii_letters + string.digits + "-_./[]:é日 ", min_size=8, max_size=16).filter(
    lambda text: text.strip() == text and not text.startswith(("image-", "host-", "tenant-"))
)


@settings(max_examples=15, deadline=None)
@given(st.lists(_words, min_size=4, max_size=4, unique=True), st.binary(min_size=32, max_size=32))
def test_no_name_whatever_it_is_comes_through(
    run: Path, own_words: bytes, tmp_path_factory: pytest.TempPathFactory, names: list[str], seed: bytes
) -> None:
    """The run's tables with other names in them: none of these is in the publication, but as a word of ksmdist."""
    folder = tmp_path_factory.mktemp("named")
    renamed = rename(run, folder / "run", dict(zip(NAMES, names, strict=True)))
    publish(renamed, folder / "out", seed=seed)
    for name, data in everything(folder / "out"):
        for text in names:
            assert text.encode() not in data or text.encode() in own_words, (name, text)


def rename(run: Path, to: Path, names: Mapping[str, str]) -> Path:
    """A run directory with other image names in all tables."""
    to.mkdir()
    (to / "stable_tree").mkdir()
    for path in run.rglob("*.parquet"):
        found = pq.read_table(path, partitioning=None)
        columns = [
            pa.array([names.get(value, value) for value in column.to_pylist()], column.type)
            if pa.types.is_string(column.type)
            else column
            for column in found.columns
        ]
        pq.write_table(pa.Table.from_arrays(columns, schema=found.schema), to / path.relative_to(run))
    text = (run / "run.json").read_text()
    (to / "run.json").write_text(text)
    return to


def test_a_word_that_ksmdist_does_not_have_is_other(run: Path, tmp_path: Path) -> None:
    words = {
        "arrow": "marker-format",
        "process": "marker-kind",
        "same_filled": "marker-filled",
        "stable_tree": "marker",
    }
    publish(rename(run, tmp_path / "run", words | {"text": "marker-what"}), tmp_path / "out")
    assert not [name for name, data in everything(tmp_path / "out") if b"marker" in data]
    images = rows_of(tmp_path / "out", "images")
    assert {(row["format"], row["kind"]) for row in images} == {("other", "other"), ("other", "guest")}
    assert {row["kind"] for row in rows_of(tmp_path / "out", "stable_tree")} == {"zero", "other"}


def test_files_are_private_and_whole(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "publication"
    publish(run, out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o600}
    expected = {one.table.file for one in PUBLISHED.values() if not one.with_order} | {"publication.json"}
    assert {path.name for path in out.iterdir()} == expected
    for publication in PUBLISHED.values():
        if not publication.with_order:
            schema = pq.read_schema(out / publication.table.file)
            assert schema.equals(publication.table.schema, check_metadata=True)

    def full(*_: object) -> None:
        raise RunDirectoryError("cannot be written: No space left on device", "x", "free some space")

    monkeypatch.setattr("ksmdist.publish.store.write_text", full)
    with pytest.raises(RunDirectoryError, match="No space"):
        publish(run, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["publication"]


def test_a_directory_that_is_there_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    with pytest.raises(RunDirectoryError, match="exists"):
        publish(run, tmp_path / "kept")
    assert (tmp_path / "kept" / "file").read_text() == "mine"
    with pytest.raises(SettingsError, match="in the run"):
        publish(run, run / "publication")
    assert not (run / "publication").exists()
    with pytest.raises(SettingsError, match="cannot be kept; use images, hosts, tenants, order"):
        publish(run, tmp_path / "out", keep=("digests",))


def test_no_command_takes_a_publication_for_a_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "publication"
    publish(run, out)
    for command in (("report",), ("whatif",), ("query",), ("publish", "-o", tmp_path / "again")):
        with pytest.raises(RunDirectoryError, match="no run directory"):
            invoke(command[0], out, *command[1:])
    (out / "run.json").write_bytes((run / "run.json").read_bytes())
    with pytest.raises(RunDirectoryError, match=r"is table published_\w+, version 1, not"):
        invoke("report", out)


def test_a_damaged_run_is_an_error(run: Path, tmp_path: Path) -> None:
    damaged = rename(run, tmp_path / "run", {})
    found = pq.read_table(damaged / SHARING.file)
    at = found.schema.get_field_index("image")
    wrong = found.set_column(at, found.schema.field(at), pa.array([9] * len(found), pa.int32()))
    pq.write_table(wrong.replace_schema_metadata(found.schema.metadata), damaged / SHARING.file)
    with pytest.raises(RunDirectoryError, match="table sharing that is not what it should be"):
        publish(damaged, tmp_path / "out")
    damaged = rename(run, tmp_path / "run2", {})
    found = pq.read_table(damaged / HUGE.file)
    at = found.schema.get_field_index("image_id")
    wrong = found.set_column(at, found.schema.field(at), pa.array(["x"] * len(found)))
    pq.write_table(wrong.replace_schema_metadata(found.schema.metadata), damaged / HUGE.file)
    with pytest.raises(RunDirectoryError, match="table huge that is not what it should be"):
        publish(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tables_larger_than_a_pass_are_the_same(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(run, tmp_path / "whole", seed=SEED)
    monkeypatch.setattr(publishing, "_PASS_ROWS", 3)
    publish(run, tmp_path / "parts", seed=SEED)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name


def test_what_publication_json_says(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "publication"
    said = publish(run, out)
    assert json.loads((out / "publication.json").read_text()) == said
    assert (said["images"], said["hosts"], said["tenants"]) == (4, 2, 3)
    assert (said["images_filtered"], said["pages_unreadable"], said["images_out_of_reach"]) == (1, 0, 0)
    assert said["caveats"] >= 1
    assert said["settings"]["page_size"] == PAGE
    assert said["settings"].keys() == set(SETTINGS)
    described = {one["name"]: [column["name"] for column in one["columns"]] for one in said["tables"]}
    for one in said["tables"]:
        assert described[one["name"]] == pq.read_schema(out / one["file"]).names
    assert [row["filtered"] for row in rows_of(out, "images")].count(True) == 1
    assert {row["salt"] for row in rows_of(out, IMAGES.name)} == {0, 1, 2}
    words = {row["fill_word"] for row in rows_of(out, "stable_tree")}
    assert words == {None, 0, 0xCCCC_CCCC_CCCC_CCCC}


def test_the_command(run: Path, tmp_path: Path) -> None:
    text = printed("publish", run, "-o", tmp_path / "a", "--keep", "tenants, hosts", "--names", tmp_path / "names")
    assert "names kept: hosts, tenants" in text
    assert "their texts name images" in text
    assert "not to be handed on" in text
    said = json.loads(printed("publish", run, "-o", tmp_path / "b", "--json"))
    assert said == json.loads((tmp_path / "b" / "publication.json").read_text())
    with pytest.raises(SettingsError, match="--keep"):
        invoke("publish", run, "-o", tmp_path / "c", "--keep", "everything")
