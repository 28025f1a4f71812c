"""What changed between two runs, against a dict of page bytes."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ksmdist
from ksmdist import diff, store, streams
from ksmdist.errors import IdentityError, RunDirectoryError, SettingsError
from ksmdist.report import printable
from ksmdist.tables import DIFF_CONTENTS, DIFF_IMAGES, SPECTRUM, STABLE_TREE

from .conftest import PAGE, ZERO, MakeImage, digest, invoke, page

FILLED = b"\xcc" * PAGE
CONTENTS = [ZERO, FILLED, page(1), page(2), page(3), page(4)]

Images = Mapping[str, Sequence[int]]


def write(folder: Path, images: Images) -> list[Path]:
    folder.mkdir()
    for name, pages in images.items():
        (folder / f"{name}.raw").write_bytes(b"".join(CONTENTS[number] for number in pages))
    return [folder / f"{name}.raw" for name in images]


def tree(images: Images) -> dict[bytes, tuple[int, int, str, int]]:
    """Contents with two copies or more, by digest: copies, images, first image and address."""
    places: dict[int, list[tuple[str, int]]] = {}
    for name, pages in images.items():
        for at, number in enumerate(pages):
            places.setdefault(number, []).append((name, at * PAGE))
    return {
        digest(CONTENTS[number]): (len(where), len({name for name, _ in where}), *min(where))
        for number, where in places.items()
        if len(where) > 1
    }


def change(one: tuple[int, int, str, int] | None, two: tuple[int, int, str, int] | None) -> str:
    if one is None or two is None:
        return "came" if one is None else "went"
    if one[0] != two[0]:
        return "gained" if two[0] > one[0] else "lost"
    return "alike" if one == two else "moved"


IMAGES = st.dictionaries(
    st.sampled_from("abc"), st.lists(st.integers(0, len(CONTENTS) - 1), min_size=1, max_size=8), min_size=1
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(IMAGES, IMAGES, st.sampled_from([1, 4]), st.sampled_from([1, 2, 8]))
def test_a_diff_is_what_a_dict_says(a: Images, b: Images, ranges_a: int, ranges_b: int) -> None:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        for name, images, ranges in (("a", a, ranges_a), ("b", b, ranges_b)):
            ksmdist.run(write(root / f"of_{name}", images), root / name, ksmdist.Settings(ranges=ranges), "inline")
        found = json.loads(invoke("diff", root / "a", root / "b", "-o", root / "d", "--json").stdout)
        contents = pq.read_table(root / "d" / DIFF_CONTENTS.file)
        of_images = pq.read_table(root / "d" / DIFF_IMAGES.file)
    assert contents.schema.equals(DIFF_CONTENTS.schema, check_metadata=True)
    assert of_images.schema.equals(DIFF_IMAGES.schema, check_metadata=True)

    one, two = tree(a), tree(b)
    both = {digest: (one.get(digest), two.get(digest)) for digest in sorted(one | two)}
    changes = {digest: change(*sides) for digest, sides in both.items()}
    rows = contents.to_pylist()
    assert [(row["digest"], row["change"]) for row in rows] == [
        (digest, said) for digest, said in changes.items() if said != "alike"
    ]
    for row in rows:
        old, new = both[row["digest"]]
        last = new or old
        assert last is not None
        assert (row["copies_a"], row["images_a"]) == ((None, None) if old is None else old[:2])
        assert (row["copies_b"], row["images_b"]) == ((None, None) if new is None else new[:2])
        assert (row["first_image"], row["first_address"]) == last[2:]
        assert (row["kind"] == "zero") == (row["fill_word"] == 0)

    # All changes add up to both trees, those alike included.
    for name, of in found["contents"].items():
        digests = [digest for digest, said in changes.items() if said == name]
        assert of["contents"] == len(digests)
        assert of["copies_a"] == sum(one[digest][0] for digest in digests if digest in one)
        assert of["copies_b"] == sum(two[digest][0] for digest in digests if digest in two)
        assert of["bytes_gained"] == (of["copies_b"] - of["copies_a"]) * PAGE
    assert sum(of["copies_a"] for of in found["contents"].values()) == sum(side[0] for side in one.values())
    assert sum(of["copies_b"] for of in found["contents"].values()) == sum(side[0] for side in two.values())
    gained = {
        digest: (sides[1] or (0,))[0] - (sides[0] or (0,))[0] for digest, sides in both.items() if sides[0] != sides[1]
    }
    largest = sorted((digest for digest in gained if gained[digest]), key=lambda digest: (-abs(gained[digest]), digest))
    assert [row["digest"] for row in found["top_contents"]] == [digest.hex() for digest in largest[:10]]

    said = {row["image_id"]: row for row in of_images.to_pylist()}
    assert sorted(said) == sorted({*a, *b})
    for name, row in said.items():
        assert row["total_a"] == (len(a[name]) if name in a else None)
        assert row["zero_b"] == (list(b[name]).count(0) if name in b else None)
        assert (row["change"] in ("came", "went")) == ((name in a) != (name in b))
    assert found["images"] == {
        name: [row["change"] for row in said.values()].count(name) for name in ("came", "went", "changed", "same")
    }


def rows_of(contents: Mapping[bytes, tuple[int, int]], cut: int) -> Iterator[pa.RecordBatch]:
    """Rows of a stable tree, digest -> copies and first address, in batches of `cut`."""
    schema = pa.schema([STABLE_TREE.schema.field(name) for name in diff.TREE_COLUMNS])
    rows = [
        {
            "digest": digest,
            "kind": "other",
            "fill_word": None,
            "copies": copies,
            "images": 1,
            "first_image": "x",
            "first_address": address,
        }
        for digest, (copies, address) in sorted(contents.items())
    ]
    yield from pa.Table.from_pylist(rows, schema=schema).to_batches(max_chunksize=cut)


DIGESTS = st.builds(  # few, so that both sides have them; high bytes and NULs where order could go wrong
    lambda head, tail: bytes([head]) + bytes(14) + bytes([tail]),
    st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]),
    st.sampled_from([0, 1, 0x80, 0xFF]),
)
SIDE = st.dictionaries(DIGESTS, st.tuples(st.integers(2, 4), st.sampled_from([0, PAGE])))


@given(SIDE, SIDE, st.integers(1, 7), st.integers(1, 7))
def test_batches_of_any_length_give_the_same_rows(
    a: dict[bytes, tuple[int, int]], b: dict[bytes, tuple[int, int]], cut_a: int, cut_b: int
) -> None:
    found = diff.Difference(keep=3)
    pieces = list(diff.diff_contents(rows_of(a, cut_a), rows_of(b, cut_b), found))
    rows = pa.concat_tables(pieces).to_pylist() if pieces else []
    assert [row["digest"] for row in rows] == sorted(digest for digest in a | b if a.get(digest) != b.get(digest))
    assert found.sums["alike"].contents == sum(a.get(digest) == b[digest] for digest in b)
    assert sum(sums.copies_a for sums in found.sums.values()) == sum(copies for copies, _ in a.values())
    whole = diff.Difference(keep=3)
    list(diff.diff_contents(rows_of(a, 100), rows_of(b, 100), whole))
    assert whole.sums == found.sums
    assert whole.largest.to_pylist() == found.largest.to_pylist()


def test_a_tree_out_of_order_is_refused() -> None:
    digests = [bytes([number]) * 16 for number in (1, 2, 3)]
    batches = [next(rows_of({digest: (2, 0)}, 1)) for digest in (digests[1], digests[0])]
    with pytest.raises(RunDirectoryError, match=r"digests that do not ascend, from 0101"):
        list(diff.diff_contents(iter(batches), iter(()), diff.Difference()))


def test_the_bytes_do_not_depend_on_how_the_trees_were_cut(make_raw: MakeImage, tmp_path: Path) -> None:
    pages = [page(number) for number in range(200)]
    a, b = make_raw("a.raw", pages * 2), make_raw("b.raw", pages * 3)
    written = set()
    for ranges in (1, 8):
        for name, image in (("one", a), ("two", b)):
            ksmdist.run([image], tmp_path / f"{name}{ranges}", ksmdist.Settings(ranges=ranges))
        invoke("diff", tmp_path / f"one{ranges}", tmp_path / f"two{ranges}", "-o", tmp_path / f"d{ranges}")
        written.add((tmp_path / f"d{ranges}" / DIFF_CONTENTS.file).read_bytes())
    assert len(written) == 1


def test_the_bytes_do_not_depend_on_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_GROUP_ROWS", 5)
    found = diff.Difference()
    contents = {bytes([number]) * 16: (2, 0) for number in range(13)}
    (rows,) = diff.diff_contents(rows_of(contents, 100), iter(()), found)
    written = []
    for cut in (1, 4, 5, 6, 13):
        pieces = [rows.slice(at, cut) for at in range(0, len(rows), cut)]
        with streams.table_writer(DIFF_CONTENTS, tmp_path) as write:
            for piece in [rows.slice(0, 0), *pieces, rows.slice(0, 0)]:
                write(piece)
        written.append((tmp_path / DIFF_CONTENTS.file).read_bytes())
        file = pq.ParquetFile(tmp_path / DIFF_CONTENTS.file)
        assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [5, 5, 3]
        assert file.read().equals(rows)
    assert len(set(written)) == 1
    with streams.table_writer(DIFF_CONTENTS, tmp_path):
        pass
    assert pq.read_table(tmp_path / DIFF_CONTENTS.file).schema.equals(DIFF_CONTENTS.schema, check_metadata=True)


def test_what_people_read(make_raw: MakeImage, tmp_path: Path) -> None:
    first, second = make_raw("a.raw", [ZERO] * 3 + [page(1)] * 2), make_raw("b.raw", [ZERO, page(1), FILLED, FILLED])
    ksmdist.run([first], tmp_path / "before")
    ksmdist.run([first, second], tmp_path / "after")
    shown = invoke("diff", tmp_path / "before", tmp_path / "after").stdout
    assert shown.splitlines()[0] == (
        "3 contents changed, 0 are alike; B has 16.0 KiB more in contents held twice or more."
    )
    for said in (
        "A content with one copy is in no stable tree: - and 0 stand for one copy or none.",
        "images: 1 came, 0 went, 1 changed, 0 same",
        "0xcc..: MSVC uninitialised",
        "twice or more in B only",
    ):
        assert said in " ".join(shown.split()), said
    moved = (tmp_path / "before").rename(tmp_path / "renamed")
    assert f"in A ({printable(str(moved), 30)})" in invoke("diff", moved, tmp_path / "after").stdout
    alike = invoke("diff", tmp_path / "after", tmp_path / "after").stdout
    assert alike.startswith("0 contents changed, 3 are alike; B has as many in contents held twice or more.\n")


def test_pages_that_changed_and_settings_that_differ_are_said(make_raw: MakeImage, tmp_path: Path) -> None:
    pages = [ZERO] * 4 + [page(1)] * 2
    ksmdist.run([make_raw("a.raw", pages)], tmp_path / "one", ksmdist.Settings(checksums=True))
    image = make_raw("a.raw", [*pages[:5], ZERO])
    ksmdist.run([image], tmp_path / "two", ksmdist.Settings(use_zero_pages=True), previous=tmp_path / "one")
    shown = invoke("diff", tmp_path / "one", tmp_path / "two").stdout
    assert "1 pages of B changed between passes: they are in no stable tree." in shown
    assert "settings of B: use_zero_pages=1" in shown
    found = json.loads(invoke("diff", tmp_path / "one", tmp_path / "two", "--json").stdout)
    assert {name: of["contents"] for name, of in found["contents"].items() if of["contents"]} == {"went": 1, "alike": 1}


def test_only_runs_of_one_kind_are_compared(make_raw: MakeImage, tmp_path: Path) -> None:
    image = make_raw("a.raw", [ZERO] * 8)
    ksmdist.run([image], tmp_path / "one")
    ksmdist.run([image], tmp_path / "large", ksmdist.Settings(page_size=8192))
    ksmdist.run([image], tmp_path / "all", ksmdist.Settings(eligible="all"))
    for other, setting in (("large", "page_size"), ("all", "eligible")):
        with pytest.raises(SettingsError, match=f"^{setting}: is .* compare runs that have the same"):
            invoke("diff", tmp_path / "one", tmp_path / other, "-o", tmp_path / "d")
    with pytest.raises(RunDirectoryError, match="is no run directory"):
        invoke("diff", tmp_path / "one", tmp_path)
    assert not (tmp_path / "d").exists()


def test_the_directory_is_whole_or_not_there(make_raw: MakeImage, tmp_path: Path) -> None:
    ksmdist.run([make_raw("a.raw", [ZERO] * 4 + [page(1)] * 2)], tmp_path / "one")
    ksmdist.run([make_raw("b.raw", [ZERO] * 3)], tmp_path / "two")
    assert "tables: " in invoke("diff", tmp_path / "one", tmp_path / "two", "-o", tmp_path / "d").stdout
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "d").iterdir()} == {0o600}
    with pytest.raises(RunDirectoryError, match="exists; choose another directory"):
        invoke("diff", tmp_path / "one", tmp_path / "two", "-o", tmp_path / "d")
    # A tree that does not add up to its spectrum: an identity, and nothing written.
    (part,) = (tmp_path / "two" / "stable_tree").iterdir()
    pq.write_table(STABLE_TREE.schema.empty_table(), part)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(IdentityError, match="of run B"):
        invoke("diff", tmp_path / "one", tmp_path / "two", "-o", tmp_path / "e")
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(RunDirectoryError, match="cannot be written: No such file"):
        invoke("diff", tmp_path / "one", tmp_path / "one", "-o", tmp_path / "no" / "d")


def test_a_tree_of_another_schema_is_refused(make_raw: MakeImage, tmp_path: Path) -> None:
    ksmdist.run([make_raw("a.raw", [ZERO] * 4 + [page(1)] * 2)], tmp_path / "one", ksmdist.Settings(ranges=2))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    part = sorted((tmp_path / "two" / "stable_tree").iterdir())[1]
    for rows, why in (
        (pq.read_table(part).replace_schema_metadata(None), "is no table of ksmdist"),
        (pq.read_table(tmp_path / "one" / SPECTRUM.file), "is table spectrum, version"),
        (pq.read_table(part).drop_columns("kind"), "has columns digest, "),
    ):
        pq.write_table(rows, part)
        with pytest.raises(RunDirectoryError, match=f"{part.name} {why}"):
            invoke("diff", tmp_path / "one", tmp_path / "two", "-o", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_the_check_names_the_run_that_does_not_add_up(make_raw: MakeImage, tmp_path: Path) -> None:
    ksmdist.run([make_raw("a.raw", [ZERO] * 4)], tmp_path / "one")
    spectrum = store.read_table(tmp_path / "one", SPECTRUM)
    with pytest.raises(IdentityError, match=r"run A: 0 is not 4"):
        diff.check(diff.Difference(), spectrum, spectrum)
