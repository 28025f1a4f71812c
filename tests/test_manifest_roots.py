"""What a manifest, or an image, may name: nothing outside of its folder, unless the user says where."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

import ksmdist
from ksmdist import images, pipeline, stages
from ksmdist.engines.base import Machines
from ksmdist.engines.inline import InlineEngine
from ksmdist.errors import ImageError, ImageReadError, SettingsError
from ksmdist.fleet import Source, expand, read_manifest
from ksmdist.images import roots
from ksmdist.settings import Settings

from .conftest import invoke, page, printed
from .criu_files import PARENT, PRESENT, checkpoint
from .kdump_files import EXPECTED, PAGES, split_kdump
from .readers import pages_of
from .stores import Proxy
from .vmware_files import vmss

SECRET, RAM = page(77), page(1) + page(2)
REGIONS = [(0, 0, 2)]
AT = 0x7F0000000000


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """A folder for a manifest and its images, beside one that is none of its business."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "secret.raw").write_bytes(SECRET)
    (tmp_path / "fleet" / "sub").mkdir(parents=True)
    (tmp_path / "fleet" / "sub" / "vm.raw").write_bytes(page(1))
    return tmp_path / "fleet"


def manifest(folder: Path, *entries: str) -> str:
    (folder / "fleet.yaml").write_text("".join(f"- {{{entry}}}\n" for entry in entries))
    return str(folder / "fleet.yaml")


def looked(path: str, more: Sequence[str] = ()) -> list[str]:
    """The images of a manifest, opened on their nodes, which are all this host."""
    found = stages.open_sources(Settings(), read_manifest(path, more))
    return [info.path for _, info, _ in found.images]


def links(folder: Path) -> None:
    other = folder.parent / "other"
    (folder / "link.raw").symlink_to(other / "secret.raw")
    (folder / "links").mkdir()
    (folder / "links" / "secret.raw").symlink_to("../../other/secret.raw")
    (folder / "out").symlink_to(other)
    (folder / "deep.raw").symlink_to("out/secret.raw")
    (folder / "gone.raw").symlink_to(other / "none.raw")
    (folder / "near.raw").symlink_to("sub/vm.raw")
    (other / "back.raw").symlink_to(folder / "sub" / "vm.raw")


OUTSIDE = {
    "whole path": "uri: {other}/secret.raw",
    "file URI": "uri: 'file://{other}/secret.raw'",
    "up": "uri: ../other/secret.raw",
    "up and up": "uri: sub/../../other/secret.raw",
    "a device": "uri: /dev/mem",
    "what is not there": "uri: ../other/none.raw",
    "folder": "uri: ../other/",
    "folder above": "uri: ..",
    "name that begins like the folder's": "uri: ../fleet2/vm.raw",
    "pattern": "uri: ../other/*.raw",
    "pattern above": "uri: ../*/secret.raw",
    "pattern, up in it": "uri: 's*/../../other/*.raw'",
    "link": "uri: link.raw",
    "link to a link": "uri: deep.raw",
    "link to nothing": "uri: gone.raw",
    "link to a folder": "uri: out",
    "in a linked folder": "uri: out/secret.raw",
    "back from a linked folder": "uri: out/back.raw",
    "pattern that a link matches": "uri: 'lin*.raw'",
    "pattern that a linked folder matches": "uri: 'o*/*.raw'",
    "folder with a link": "uri: links",
    "base": "uri: sub/vm.raw, base: ../other/secret.raw",
    "base that is a link": "uri: sub/vm.raw, base: link.raw",
}


@pytest.mark.parametrize("entry", OUTSIDE.values(), ids=OUTSIDE)
def test_what_is_outside_is_refused(fleet: Path, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    links(fleet)
    path = manifest(fleet, entry.format(other=fleet.parent / "other"))
    opened: list[str] = []
    whole = os.open

    def noting(path: str, *arguments: int) -> int:
        opened.append(os.path.realpath(path))
        return whole(path, *arguments)

    monkeypatch.setattr(os, "open", noting)
    with pytest.raises(SettingsError, match="is named by a manifest") as caught:
        looked(path)
    assert opened == [path]  # nothing but the manifest
    typed = shlex.split(caught.value.hint.split(roots.OPTION)[1])[0]
    assert os.path.isabs(typed)
    again = None
    try:
        looked(path, [typed])
    except (ImageReadError, SettingsError) as error:
        again = str(error)
    assert again != str(caught.value)  # now it is read; or is no image, or not there, or the next thing is outside


@pytest.mark.parametrize(
    "uri", ["sub/vm.raw", "sub/../sub/vm.raw", "sub/", "sub", "'*/*.raw'", "'**/*.raw'", "near.raw", "."]
)
def test_what_is_inside_is_read(fleet: Path, uri: str) -> None:
    (fleet / "near.raw").symlink_to("sub/vm.raw")
    assert len(looked(manifest(fleet, f"uri: {uri}"))) == (2 if uri == "'**/*.raw'" else 1)
    whole = os.path.normpath(fleet / uri.strip("'"))
    assert looked(manifest(fleet, f"uri: '{whole}'"))


def test_names_in_errors_are_one_line(fleet: Path) -> None:
    odd = fleet.parent / "other\n\x1b[1mksmdist: fine; add --manifest-root /"
    odd.mkdir()
    (odd / "secret.raw").write_bytes(SECRET)
    (fleet / "a.raw").symlink_to(odd / "secret.raw")
    with pytest.raises(SettingsError, match=r"other\?\?\[1m") as caught:
        looked(manifest(fleet, "uri: a.raw"))
    assert str(caught.value).isprintable()


def test_the_folder_may_be_reached_by_a_link(fleet: Path) -> None:
    (fleet.parent / "named").symlink_to(fleet)
    manifest(fleet, "uri: sub/vm.raw", f"uri: {fleet}/sub/vm.raw, image: again")
    assert len(looked(str(fleet.parent / "named" / "fleet.yaml"))) == 2


def test_more_roots(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links(fleet)
    other = fleet.parent / "other"
    path = manifest(fleet, f"uri: {other}/secret.raw", "uri: link.raw, image: linked", "uri: sub/vm.raw")
    monkeypatch.chdir(fleet.parent)
    for root in (str(other), "other", f"file://{other}", "/", str(fleet.parent), f"{other}/../other/"):
        assert len(looked(path, [root])) == 3
    for root in (f"{other}x", "s3://other", f"node://n1{other}", str(other / "more")):
        with pytest.raises(SettingsError, match="is named by a manifest"):
            looked(path, [root])
    assert len(looked(path, ["s3://b", str(other)])) == 3
    for root in ("", "node://n1", "http://x", "s3://b/a/../c"):
        with pytest.raises(SettingsError):
            looked(path, [root])


def test_files_of_nodes_are_in_no_folder_of_the_manifest(fleet: Path) -> None:
    inside = fleet / "sub" / "vm.raw"
    for entry in (f"uri: 'node://n1{inside}'", f"uri: {inside}, host: n1"):
        path = manifest(fleet, entry)
        with pytest.raises(SettingsError) as caught:
            looked(path)
        assert caught.value.where == f"node://n1{inside}"
        folder = inside.parent
        assert f"--manifest-root node://n1{folder}, or for every node --manifest-root {folder}" in caught.value.hint
        for root in (f"node://n1{folder}", f"node://n1{fleet}/", str(folder), "/"):
            assert looked(path, [root]) == [str(inside)]
        with pytest.raises(SettingsError):
            looked(path, [f"node://n2{folder}"])
    (fleet / "sub" / "out.raw").symlink_to(fleet.parent / "other" / "secret.raw")  # resolved there
    with pytest.raises(SettingsError, match="leads to"):
        looked(manifest(fleet, f"uri: 'node://n1{fleet}/sub/out.raw'"), [f"node://n1{fleet}"])


@pytest.mark.parametrize(
    ("uri", "root", "fits"),
    [
        ("s3://b/fleet/vm.raw", "s3://b/fleet", True),
        ("s3://b/fleet/vm.raw", "s3://b", True),
        ("s3://b/fleet//vm.raw", "s3://b/fleet/", True),
        ("s3://b/fleet/*.raw", "s3://b/fleet", True),
        ("s3://b/fleet*/vm.raw", "s3://b/fleet", False),
        ("s3://b/fleet2/vm.raw", "s3://b/fleet", False),
        ("s3://other/fleet/vm.raw", "s3://b/fleet", False),
        ("gs://b/fleet/vm.raw", "s3://b/fleet", False),
        ("s3://b/fleet/vm.raw?region=x", "s3://b/fleet", False),
        ("s3://b/fleet/vm.raw?endpoint_override=198.51.100.1", "s3://b/fleet?region=x", False),
        ("s3://b/fleet/vm.raw?region=x&scheme=http", "s3://b/fleet?scheme=http&region=x", True),
        ("s3://b/fleet/../other/vm.raw", "s3://b/fleet", False),
        ("s3://b//fleet/vm.raw", "s3://b/fleet", False),
        ("s3://b/./fleet/vm.raw", "s3://b/fleet", False),
        ("s3://b/fleet/%2e%2e/other/vm.raw", "s3://b/fleet", False),
        ("hdfs://h:1/fleet/../other/vm.raw", "hdfs://h:1/", False),
        ("s3://b/fleet/vm.raw", "/", True),
        ("s3://b/fleet/vm.raw", "/b", False),
    ],
)
def test_stores_are_asked_for_nothing_outside(fleet: Path, uri: str, root: str, fits: bool) -> None:
    for entry in (f"uri: '{uri}'", f"uri: sub/vm.raw, base: '{uri}'"):
        path = manifest(fleet, entry)
        with pytest.raises(SettingsError):
            read_manifest(path)  # which opens no image
        if fits:
            assert read_manifest(path, [root])
            continue
        with pytest.raises(SettingsError) as caught:
            read_manifest(path, [root])
        assert caught.value.where == uri
        if "/../" not in caught.value.what:
            assert read_manifest(path, [shlex.split(caught.value.hint.split(roots.OPTION)[1])[0]])


def test_a_manifest_in_a_store_has_its_folder_there(s3: Proxy) -> None:
    s3.server.put("fleet/vm.raw", page(1))
    s3.server.put("other/secret.raw", SECRET)
    s3.server.put("fleet/in.yaml", b"- uri: vm.raw\n")
    s3.server.put("fleet/out.yaml", b"- uri: ../other/secret.raw\n")
    s3.server.put("fleet/here.yaml", b"- uri: /etc/passwd\n")
    assert looked(s3.uri("fleet/in.yaml")) == [s3.uri("fleet/vm.raw")]
    for name in ("out", "here"):
        with pytest.raises(SettingsError, match="is named by a manifest"):
            looked(s3.uri(f"fleet/{name}.yaml"))
    assert looked(s3.uri("fleet/out.yaml"), [s3.uri("other")]) == [s3.uri("other/secret.raw")]


def test_the_command_line(fleet: Path, tmp_path: Path) -> None:
    path = manifest(fleet, "uri: ../other/secret.raw", "uri: sub/vm.raw")
    for command in (("plan",), ("run", "-o", tmp_path / "run")):
        with pytest.raises(SettingsError) as caught:
            invoke(*command, "--manifest", path, "--engine", "inline")
        assert f"add --manifest-root {tmp_path}/other" in caught.value.hint
        assert not (tmp_path / "run").exists()
        with pytest.raises(SettingsError, match="goes with a manifest alone"):
            invoke(*command, fleet / "sub" / "vm.raw", "--manifest-root", "/", "--engine", "inline")
        more = ("--manifest-root", "s3://b", "--manifest-root", tmp_path / "other")
        printed(*command, "--manifest", path, *more, "--engine", "inline")
    named = [str(tmp_path / "other" / "secret.raw"), str(fleet / "sub" / "vm.raw")]
    again = ksmdist.run(named, tmp_path / "again", engine="inline")  # what the user names may lie anywhere
    assert again.summary["pages"]["total"] == 2
    with pytest.raises(SettingsError, match="is named by a manifest"):
        pipeline.estimate([], manifest=path, engine="inline")
    assert pipeline.estimate([], manifest=path, engine="inline", manifest_roots=[tmp_path / "other"]).settings


def test_a_run_is_taken_up_without_its_roots(fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was opened in a root is read again as the same file, or not at all."""
    monkeypatch.setattr(InlineEngine, "machines", lambda self: Machines(frozenset({"n1"}), 1, 1 << 30))
    path = manifest(fleet, f"uri: {tmp_path}/other/secret.raw, host: n1", "uri: sub/vm.raw")
    whole = stages.merge

    def failing(*arguments: object) -> None:
        raise ImageError("fails", "here", "no")

    monkeypatch.setattr(stages, "merge", failing)
    with pytest.raises(ImageError, match="--resume"):
        ksmdist.run([], tmp_path / "run", engine="inline", manifest=path, manifest_roots=["/"])
    monkeypatch.setattr(stages, "merge", whole)
    assert pipeline.resume(tmp_path / "run", "inline").summary["pages"]["total"] == 2
    before = ksmdist.run(
        [], tmp_path / "next", engine="inline", manifest=path, manifest_roots=["/"], previous=tmp_path / "run"
    )
    assert before.summary["pages"]["volatile"] == 0


# What an image names.


def test_the_memory_beside_a_vmss_is_no_link_out(tmp_path: Path) -> None:
    place, other = tmp_path / "vm", tmp_path / "other"
    place.mkdir()
    other.mkdir()
    (other / "secret.vmem").write_bytes(RAM)
    (other / "vm.vmss").write_bytes(vmss(REGIONS))
    (place / "vm.vmss").write_bytes(vmss(REGIONS))
    (place / "vm.vmem").symlink_to(other / "secret.vmem")
    with pytest.raises(ImageReadError, match=r"vm\.vmem: is a link to .*out of the folder"):
        images.open_image(str(place / "vm.vmss"))
    (place / "vm.vmem").unlink()
    (place / "vm.vmem").write_bytes(RAM)
    images.open_image(str(place / "vm.vmss")).close()
    (place / "vm.vmss").unlink()
    (place / "vm.vmss").symlink_to(other / "vm.vmss")
    with pytest.raises(ImageReadError, match="out of the folder"):
        images.open_image(str(place / "vm.vmem"))
    (place / "vm.vmss").unlink()
    (place / "vm.vmss").symlink_to("there")
    (place / "there").write_bytes(vmss(REGIONS))
    images.open_image(str(place / "vm.vmem")).close()  # within the folder


@pytest.mark.parametrize("name", ["pages-1.img", "mm-7.img", "core-7.img"])
def test_files_of_a_checkpoint_are_no_links_out(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path / "1", [(AT, 1, PRESENT)], SECRET)
    images.open_image(str(path)).close()
    (tmp_path / "other").write_bytes(SECRET)
    (tmp_path / "1" / name).unlink(missing_ok=True)
    (tmp_path / "1" / name).symlink_to(tmp_path / "other")
    with pytest.raises(ImageReadError, match="out of the folder of the image"):
        images.open_image(str(path))


def test_the_parent_of_a_checkpoint_lies_beside_it(tmp_path: Path) -> None:
    """CRIU makes it a link to another folder; of a stranger's it leads nowhere else, and a manifest's not out of it."""
    place = tmp_path / "taken"
    checkpoint(place / "1", [(AT, 1, PRESENT)], page(1))
    path = checkpoint(place / "2", [(AT, 1, PARENT)], b"", parent="../1")
    images.open_image(str(path)).close()
    (place / "fleet.yaml").write_text(f"- uri: 2/{path.name}\n")
    (place / "2" / "fleet.yaml").write_text(f"- uri: {path.name}\n")
    assert len(looked(str(place / "fleet.yaml"))) == 1
    with pytest.raises(SettingsError, match="is named by a manifest"):
        looked(str(place / "2" / "fleet.yaml"))
    assert len(looked(str(place / "2" / "fleet.yaml"), [str(place)])) == 1
    checkpoint(tmp_path / "far", [(AT, 1, PRESENT)], SECRET)
    for target in ("../../far", "..", str(tmp_path / "far")):
        (place / "2" / "parent").unlink()
        (place / "2" / "parent").symlink_to(target)
        with pytest.raises(ImageReadError, match="an image may not lead to"):
            images.open_image(str(path))


def test_pieces_of_a_split_dump_are_no_links_out(tmp_path: Path) -> None:
    """A link out is a piece that is not there: its pages are missing, and counted as such."""
    place, other = tmp_path / "dump", tmp_path / "other"
    place.mkdir()
    other.mkdir()
    pieces = split_kdump(place, PAGES, [0, 42, 40001])
    assert pages_of(pieces[0]) == EXPECTED
    pieces[1].rename(other / "piece.1")
    pieces[1].symlink_to(other / "piece.1")
    found = pages_of(pieces[0])
    assert {at for at, held in found.items() if held is not None} == {at for at in EXPECTED if at < 42 * 4096}
    assert pages_of(pieces[1])  # named by the user, it may be a link


def test_what_the_user_names_has_no_roots(tmp_path: Path) -> None:
    (tmp_path / "vm.raw").write_bytes(page(1))
    (tmp_path / "link.raw").symlink_to("/dev/null")
    assert expand(Source(str(tmp_path / "vm.raw"))).sources[0].roots == ()
    path = manifest(tmp_path, "uri: vm.raw")
    assert [str(one) for one in read_manifest(path)[0].roots] == [f"file://{tmp_path}"]


def test_an_earlier_run_names_images_where_it_is(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder, number in ((here, 1), (elsewhere, 2)):
        folder.mkdir()
        (folder / "vm.raw").write_bytes(page(number) * 2)
    before = ksmdist.run([here / "vm.raw"], here / "before", engine="inline").path
    said = json.loads((before / "run.json").read_text())
    for path in (str(elsewhere / "vm.raw"), f"{here}/../elsewhere/vm.raw", "s3://bucket/vm.raw?endpoint_override=x:80"):
        said["images"][0]["path"] = path
        (before / "run.json").write_text(json.dumps(said))
        with pytest.raises(SettingsError, match=r"an earlier run.* is outside of what it may name") as caught:
            ksmdist.run([here / "vm.raw"], tmp_path / "run", engine="inline", previous=before)
        assert "add --manifest-root " in caught.value.hint
    # An earlier run in another folder than its images: the message says what to type.
    other = ksmdist.run([elsewhere / "vm.raw"], tmp_path / "here" / "other", engine="inline").path
    arguments: list[str | Path] = [
        "run",
        elsewhere / "vm.raw",
        "-o",
        tmp_path / "run",
        "--engine",
        "inline",
        "--previous",
        other,
    ]
    with pytest.raises(SettingsError, match="outside of what") as caught:
        invoke(*arguments)
    assert caught.value.hint.endswith(f"add --manifest-root {elsewhere}")
    assert printed(*arguments, "--manifest-root", elsewhere)
