"""Manifests, patterns and folders: which images they name, on which nodes, and what is refused."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksmdist.errors import ImageReadError, KsmdistError, SettingsError
from ksmdist.fleet import Expanded, Source, expand, parse, read_manifest

from .conftest import PAGE, ZERO, arrow_image, elf_core, page
from .stores import BUCKET, Proxy


def written(folder: Path, text: str, name: str = "fleet.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def names(expanded: Expanded) -> list[str]:
    return [source.uri for source in expanded.sources]


def test_what_is_named_on_the_command_line() -> None:
    assert parse("vm.raw") == Source("vm.raw")
    assert parse("node://n1/dumps/a%20b.raw") == Source("/dumps/a b.raw", node="n1", host="n1")
    assert parse("s3://b/vm*.raw?region=x") == Source("s3://b/vm*.raw?region=x")
    assert parse("file:///a/b.raw") == Source("/a/b.raw")
    assert str(parse("node://n1/dumps/*.raw")) == "node://n1/dumps/*.raw"
    for text in ("", "node:///x", "node://n1", "ftp://h/x", "s3://k:s@b/x"):
        with pytest.raises(SettingsError):
            parse(text)


ENTRIES = """
- image: vm1            # a comment
  uri: sub/vm1.raw
  tenant: "1"
- {uri: /dumps/vm2.raw, host: n2, kind: guest, tenant: blue}
- uri: node://n3/dumps/vm3.raw
  image: vm3
  pass: 1
- uri: node://n3/dumps/vm3b.raw
  image: vm3
  pass: 2
  host: n3
- uri: s3://bucket/vm4.raw?region=eu-west-1
  host: n4
  tenant: ~
- uri: file:///dumps/vm5.raw
  host: n5
"""


@pytest.mark.parametrize("head", ["", "images:"])
def test_a_manifest_in_yaml(tmp_path: Path, head: str) -> None:
    assert read_manifest(written(tmp_path, head + ENTRIES), ["s3://bucket?region=eu-west-1"]) == [
        Source(f"{tmp_path}/sub/vm1.raw", image_id="vm1", tenant="1"),
        Source("/dumps/vm2.raw", node="n2", host="n2", kind="guest", tenant="blue"),
        Source("/dumps/vm3.raw", node="n3", host="n3", image_id="vm3", pass_number=1),
        Source("/dumps/vm3b.raw", node="n3", host="n3", image_id="vm3", pass_number=2),
        Source("s3://bucket/vm4.raw?region=eu-west-1", host="n4"),
        Source("/dumps/vm5.raw", node="n5", host="n5"),
    ]


def test_a_manifest_in_parquet_is_the_same(tmp_path: Path) -> None:
    columns = {
        "uri": ["a.raw", "/dumps/b.raw", "s3://bucket/c.raw"],
        "host": pa.array([None, "n1", None]).dictionary_encode(),
        "image": pa.array(["a", "b", None], pa.large_string()),
        "pass": pa.array([None, 2, 1], pa.int32()),
    }
    path = tmp_path / "fleet.parquet"
    pq.write_table(pa.table(columns), path)
    expected = [
        Source(f"{tmp_path}/a.raw", image_id="a"),
        Source("/dumps/b.raw", node="n1", host="n1", image_id="b", pass_number=2),
        Source("s3://bucket/c.raw", pass_number=1),
    ]
    assert read_manifest(str(path), ["s3://bucket"]) == expected
    path.rename(tmp_path / "fleet")  # known by its first bytes
    assert read_manifest(str(tmp_path / "fleet"), ["s3://bucket"]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"fleet\.yaml: has no entries"),
        ("[]", "has no entries"),
        ("hello", "is no list of images"),
        ("fleet: []", "is no list of images"),
        ("images: 3", "is no list of images"),
        ("images: []\nother: 1", "line 2: has the unknown key 'other' beside images"),
        ("- a.raw", "line 1: is an entry that is no mapping"),
        ("- uri: a\n- uri: ''", r"entry 2 \(line 2\): uri '' cannot be"),
        ("- image: a", r"entry 1 \(line 1\): has no uri"),
        ("- uri: a\n  colour: red", "has the unknown key 'colour'; use image, uri"),
        ("- uri: a\n  uri: b", "line 2: has the key uri twice"),
        ("- uri: [a]", "uri is a list or mapping"),
        ("- uri: 7", "uri is 7, not a text; put it in quotes"),
        ("- uri: a\n  host: yes", "host is the bool yes, not a text"),
        ("- uri: a\n  tenant: 2026-01-01", "tenant is the timestamp 2026-01-01"),
        ("- uri: a\n  image: a\n  pass: two", "pass is 'two'; give 1, 2"),
        ("- uri: a\n  image: a\n  pass: 0", "pass is 0"),
        ("- uri: a\n  image: a\n  pass: -1", "pass is the int -1"),
        ("- uri: a\n  image: a\n  pass: '1'", "pass is '1'"),
        ("- uri: a\n  pass: 2", "pass 2 is of no image"),
        ("- uri: a\n  kind: vm", "kind is 'vm'; use one of guest, process"),
        ("- uri: http://h/a", "uri http://h/a: has the unknown scheme 'http'"),
        ("- uri: s3://key:hidden@b/a", "has a password or key"),
        ("- uri: a\n  host: n1", "uri a is relative, on host 'n1'"),
        ("- uri: node://n1/a\n  host: n2", "host 'n2' is not the node of uri node://n1/a"),
        ("- uri: a\n  image: x\n- uri: b\n  image: x", r"entry 2 \(line 3\): image 'x', pass 1, is entry 1 already"),
        ("- uri: a\n  image: x\n- uri: b\n  image: x\n  pass: 1", "pass 1, is entry 1 already"),
        ("- &a {uri: a}\n- *a", r"line 1: has an anchor or alias"),
        ("- uri: *a", r"has an anchor or alias"),
        ("- uri: !!python/object:os.system a", "has the tag"),
        ("- uri: a\n---\n- uri: b", "has a second document"),
        ("- uri: 'a", "is no YAML"),
        ("- uri: a\n  \tb: c", "line 2: is no YAML"),
        ('- uri: "a\\nb"', "cannot be"),
        (f"- uri: {'a' * 5000}", "cannot be"),
    ],
)
def test_manifests_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        read_manifest(written(tmp_path, text))
    assert "fleet.yaml" in caught.value.where
    assert "hidden" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_manifests_that_are_no_manifests(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(SettingsError, match="is no Parquet file"):
        read_manifest(str(tmp_path / "x"))
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="is no YAML"):
        read_manifest(str(tmp_path / "x"))
    with pytest.raises(ImageReadError, match="No such file"):
        read_manifest(str(tmp_path / "none"))
    for columns, message in (
        ({"image": ["a"]}, "has no column uri"),
        ({"uri": [1]}, "column uri is int64; write it as strings"),
        ({"uri": ["a"], "pass": ["1"]}, "column pass is string; write it as integers"),
        ({"uri": ["a"], "size": [1]}, "unknown column 'size'"),
        ({"uri": ["a", None]}, "entry 2: has no uri"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        with pytest.raises(SettingsError, match=message):
            read_manifest(str(tmp_path / "x.parquet"))


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [" + ", ".join([f"*{before}"] * 9) + "]")
    begun = time.monotonic()
    with pytest.raises(SettingsError):
        read_manifest(written(tmp_path, "\n".join(lines)))
    with pytest.raises(SettingsError, match="anchor"):
        read_manifest(written(tmp_path, "images:\n- uri: " + lines[0][3:]))
    with pytest.raises(SettingsError):
        read_manifest(written(tmp_path, "[" * 100_000))
    assert time.monotonic() - begun < 10


def test_a_manifest_in_a_store(s3: Proxy) -> None:
    s3.server.put("fleet/m.yaml", b"- uri: vm.raw\n- uri: ../other/*.raw\n- {uri: /local/x.raw, host: n1}\n")
    uri = s3.uri("fleet/m.yaml")
    query = uri[uri.index("?") :]
    assert [source.uri for source in read_manifest(uri, [s3.uri("other")])] == [
        f"s3://{BUCKET}/fleet/vm.raw{query}",
        f"s3://{BUCKET}/other/*.raw{query}",
        "/local/x.raw",
    ]


FILES = {
    "b.raw": page(1),
    "a.raw": page(2),
    "guest": elf_core([(0, page(1), PAGE)]),
    "program": b"\x7fELF\x02\x01" + bytes(10) + b"\x02\x00" + bytes(60),
    "old.dump": b"QFI\xfb" + bytes(100),
    "notes.txt": b"some notes",
    "empty.raw": b"",
    ".hidden.raw": page(3),
    "deep/er/c.raw": page(4),
    "deep/d.raw": page(5),
    "deep/.e/f.raw": page(6),
    "odd[1].raw": page(7),
    "odd1.raw": page(8),
}

LEFT_OUT = {
    "program": "is an ELF file, and no core",
    "old.dump": "is a qcow2 disk image",
    "notes.txt": "has no magic of an image, nor an ending of raw memory",
    "empty.raw": "is empty",
}

PATTERNS = {
    "*.raw": ["a.raw", "b.raw", "empty.raw", "odd1.raw", "odd[1].raw"],
    "?.raw": ["a.raw", "b.raw"],
    "[!a].raw": ["b.raw"],
    "odd[1].raw": ["odd[1].raw"],  # it is there: no pattern
    "odd[12].raw": ["odd1.raw"],
    "*/*.raw": ["deep/d.raw"],
    "**/*.raw": ["a.raw", "b.raw", "deep/d.raw", "deep/er/c.raw", "empty.raw", "odd1.raw", "odd[1].raw"],
    "deep/**": ["deep/d.raw", "deep/er/c.raw"],
    "d*p/**/c.raw": ["deep/er/c.raw"],
    "deep/*/c.raw": ["deep/er/c.raw"],
    "deep/.*/f.raw": ["deep/.e/f.raw"],
    "*": ["a.raw", "b.raw", "guest", "image", "odd1.raw", "odd[1].raw"],
    "": ["a.raw", "b.raw", "guest", "image", "odd1.raw", "odd[1].raw"],
}


def files(folder: Path) -> dict[str, bytes]:
    image = arrow_image(folder / "image.tmp", [(0, ZERO, 1)])
    data = image.read_bytes()
    image.unlink()
    return FILES | {"image": data}


def laid(folder: Path) -> Path:
    for name, data in files(folder).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_files(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    laid(tmp_path)
    found = expand(Source(f"{tmp_path}/{pattern}", node="n1", tenant="t"))
    assert names(found) == [f"{tmp_path}/{name}" for name in PATTERNS[pattern]]
    assert all((source.node, source.tenant) == ("n1", "t") for source in found.sources)
    assert pickle.loads(pickle.dumps(found)) == found
    monkeypatch.chdir(tmp_path)
    if pattern:
        assert names(expand(Source(pattern))) == PATTERNS[pattern]


def test_what_is_left_out_of_a_folder_is_named(tmp_path: Path) -> None:
    laid(tmp_path)
    expected = LEFT_OUT | {"deep": "is a folder: name it too, or use **", ".hidden.raw": "is hidden"}
    for text in (f"{tmp_path}", f"{tmp_path}/"):
        found = expand(Source(text))
        assert {uri.removeprefix(f"{tmp_path}/"): why for uri, why in found.left_out} == expected
        assert names(found) == [f"{tmp_path}/{name}" for name in PATTERNS[""]]
    found = expand(Source(f"{tmp_path}/*"))
    expected = LEFT_OUT | {"deep": "is a folder: end it with / to scan what is in it"}
    assert {uri.removeprefix(f"{tmp_path}/"): why for uri, why in found.left_out} == expected


def test_patterns_and_folders_of_objects(s3: Proxy, tmp_path: Path) -> None:
    for name, data in files(tmp_path).items():
        s3.server.put(f"f/{name}", data)
    try:
        for pattern, expected in PATTERNS.items():
            found = expand(Source(s3.uri(f"f/{pattern}"), host="n1"))
            assert names(found) == [s3.uri(f"f/{name}") for name in expected], pattern
            assert all(source.host == "n1" for source in found.sources)
        found = expand(Source(s3.uri("f")))  # a folder, though it does not end like one
        assert names(found) == [s3.uri(f"f/{name}") for name in PATTERNS[""]]
        expected_out = LEFT_OUT | {"deep": "is a folder: name it too, or use **", ".hidden.raw": "is hidden"}
        assert dict(found.left_out) == {s3.uri(f"f/{name}"): why for name, why in expected_out.items()}
        with pytest.raises(ImageReadError, match="matches no file"):
            expand(Source(s3.uri("f/x*")))
        with pytest.raises(ImageReadError, match="No such file"):
            expand(Source(s3.uri("f/none.raw")))
        with pytest.raises(ImageReadError, match="no such folder"):
            expand(Source(s3.uri("none/")))
        with pytest.raises(SettingsError, match="wildcard in the bucket's name"):
            expand(Source(s3.uri("x").replace(BUCKET, "im*")))
    finally:
        for name in files(tmp_path):
            s3.server.delete(f"f/{name}")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("none.raw", ImageReadError, "No such file or directory"),
        ("x*.raw", ImageReadError, "matches no file"),
        ("none/", ImageReadError, "no such folder"),
        ("void", ImageReadError, "holds no image: it is empty"),
        ("void*", ImageReadError, "holds no image: .*is a folder"),
        ("words", ImageReadError, "holds no image: .*notes.txt has no magic"),
        ("run", SettingsError, "is a run directory of ksmdist"),
    ],
)
def test_sources_that_are_no_images(tmp_path: Path, name: str, error: type[KsmdistError], message: str) -> None:
    for folder in ("void", "words", "run"):
        (tmp_path / folder).mkdir()
    (tmp_path / "words" / "notes.txt").write_text("some")
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(error, match=message) as caught:
        expand(Source(f"{tmp_path}/{name}", node="n1"))
    assert caught.value.where == f"{'node://n1' if error is SettingsError else ''}{tmp_path}/{name}"


def test_one_image_is_one_file(tmp_path: Path) -> None:
    laid(tmp_path)
    with pytest.raises(SettingsError, match="is 5 files, and one image: 'x'"):
        expand(Source(f"{tmp_path}/*.raw", image_id="x"))
    assert names(expand(Source(f"{tmp_path}/a*.raw", image_id="x"))) == [f"{tmp_path}/a.raw"]


def test_links_and_special_files_of_a_folder(tmp_path: Path) -> None:
    import os

    (tmp_path / "a.raw").write_bytes(page(1))
    (tmp_path / "link.raw").symlink_to("a.raw")
    (tmp_path / "broken.raw").symlink_to("none")
    (tmp_path / "up").symlink_to(".")
    os.mkfifo(tmp_path / "pipe.raw")
    found = expand(Source(str(tmp_path)))
    assert names(found) == [f"{tmp_path}/a.raw", f"{tmp_path}/link.raw"]
    assert [why for uri, why in found.left_out if "up" not in uri] == ["is not a regular file"] * 2
    assert names(expand(Source(f"{tmp_path}/**/*.raw")))[0] == f"{tmp_path}/a.raw"  # and it ends


def test_a_large_manifest_is_read_by_its_events(tmp_path: Path) -> None:
    entries = "".join(f"- image: vm{n}\n  uri: s3://fleet/vm{n}.raw\n  host: n{n % 100}\n" for n in range(20_000))
    sources = read_manifest(written(tmp_path, entries), ["s3://fleet"])
    assert len(sources) == 20_000
    assert sources[-1] == Source("s3://fleet/vm19999.raw", image_id="vm19999", host="n99")
