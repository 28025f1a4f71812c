"""info, import, export: what images are, and there and back again, byte by byte."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ksmdist
from ksmdist import images
from ksmdist.errors import ImageError, RunDirectoryError, SettingsError
from ksmdist.settings import Settings

from .conftest import PAGE, ZERO, MakeImage, arrow_image, elf_core, eligible, invoke, page, printed, table_files
from .readers import pages_of

PAGES = [None, page(1), ZERO, page(2), None, ZERO, page(1), None, None]


def info_of(*arguments: str | Path) -> Any:
    return json.loads(printed("info", "--json", *arguments))


def test_info_of_a_raw_image(make_raw: MakeImage, tmp_path: Path) -> None:
    path = make_raw("vm.raw", PAGES)
    (found,) = info_of(path)
    assert found["ranges"] == [[PAGE, 4 * PAGE], [5 * PAGE, 7 * PAGE]]
    assert {
        key: found[key] for key in ("format", "kind", "pages", "pages_absent", "pages_excluded", "filter_level")
    } == {
        "format": "raw",
        "kind": "guest",
        "pages": 5,
        "pages_absent": 4,
        "pages_excluded": 0,
        "filter_level": "",
    }
    text = printed("info", path)
    assert "present    5 pages, 20.0 KiB" in text
    assert "0x000000001000 to 0x000000004000             3 pages" in text
    assert "never touched" in text
    packed = tmp_path / "vm.raw.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    (found,) = info_of(packed)
    assert (found["pages"], found["unpacked"]) == (9, 9 * PAGE)
    assert "holes of the file are not kept" in found["meaning"][0]


def test_info_goes_on_after_a_broken_image(make_raw: MakeImage, tmp_path: Path) -> None:
    good = make_raw("vm.raw", PAGES)
    (tmp_path / "broken").write_bytes(b"\x7fELF\2\1")
    done = invoke("info", tmp_path / "broken", good, tmp_path / "gone", "--json")
    assert done.exit_code == 10
    assert [found["path"] for found in json.loads(done.stdout)] == [str(good)]
    assert "truncated: the ELF header" in done.stderr
    assert "No such file" in done.stderr


def test_info_of_holes_exits_as_a_run_does(tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_bytes(elf_core([(0, page(1) + page(2), 2 * PAGE)])[:-PAGE])
    done = invoke("info", path)
    assert done.exit_code == 3
    assert "1 pages truncated" in done.stdout


def test_import_names_the_image(make_raw: MakeImage, tmp_path: Path) -> None:
    path = make_raw("vm.raw", PAGES)
    printed("import", path, "-o", tmp_path / "x.arrow", "--id", "vm-1", "--tenant", "red", "--host", "h1")
    (found,) = info_of(tmp_path / "x.arrow")
    assert (found["image_id"], found["tenant"], found["host"]) == ("vm-1", "red", "h1")
    run: Any = ksmdist.run([tmp_path / "x.arrow"], tmp_path / "run")
    assert run.images.select(["image_id", "host", "tenant", "absent"]).to_pylist() == [
        {"image_id": "vm-1", "host": "h1", "tenant": "red", "absent": 4}
    ]
    with pytest.raises(SettingsError, match="cannot be"):
        invoke("import", path, "-o", tmp_path / "y.arrow", "--tenant", "a\nb")
    with pytest.raises(RunDirectoryError, match="exists"):
        invoke("import", path, "-o", tmp_path / "x.arrow")


def test_raw_to_arrow_and_back_is_the_file(make_raw: MakeImage, tmp_path: Path) -> None:
    path = make_raw("vm.raw", PAGES)
    printed("import", path, "-o", tmp_path / "x.arrow")
    printed("export", tmp_path / "x.arrow", "-o", tmp_path / "y.raw")
    assert (tmp_path / "y.raw").read_bytes() == path.read_bytes()
    assert pages_of(tmp_path / "y.raw") == pages_of(path)  # zero pages are no holes


@pytest.mark.parametrize("kind", ["guest", "process"])
def test_a_core_to_arrow_and_back(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "core"
    segments = [(0x10000, page(1) + ZERO, 3 * PAGE), (0x40000, page(3), PAGE), (0, page(4), PAGE)]
    guest = kind == "guest"
    path.write_bytes(elf_core(segments, b"QEMU" if guest else b"CORE", physical=guest))
    printed("import", path, "-o", tmp_path / "x.arrow", "--tenant", "red", "--id", "vm-1")
    printed("export", tmp_path / "x.arrow", "-o", tmp_path / "y.elf")
    assert pages_of(tmp_path / "y.elf") == pages_of(tmp_path / "x.arrow") == pages_of(path)
    before, after = (images.open_image(str(tmp_path / name)).info for name in ("x.arrow", "y.elf"))
    for name in ("kind", "image_id", "tenant", "pages", "pages_absent", "filter_level", "caveats", "producer"):
        assert getattr(before, name) == getattr(after, name), name
    printed("import", tmp_path / "y.elf", "-o", tmp_path / "z.arrow")
    printed("export", tmp_path / "z.arrow", "-o", tmp_path / "z.elf")
    assert (tmp_path / "z.elf").read_bytes() == (tmp_path / "y.elf").read_bytes()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([None, *range(5)]), min_size=1, max_size=30), st.sampled_from(["raw", "elf"]))
def test_round_trips(tmp_path_factory: pytest.TempPathFactory, made: list[int | None], ending: str) -> None:
    folder = tmp_path_factory.mktemp("trip")
    contents = [None if n is None else page(n) if n else ZERO for n in made]
    path = folder / "vm.raw"
    with open(path, "wb") as sink:
        sink.truncate(len(contents) * PAGE)
        for number, content in enumerate(contents):
            if content is not None:
                os.pwrite(sink.fileno(), content, number * PAGE)
    printed("import", path, "-o", folder / "x.arrow")
    printed("export", folder / "x.arrow", "-o", folder / f"y.{ending}")
    assert pages_of(folder / f"y.{ending}") == pages_of(path)
    info = images.open_image(str(folder / f"y.{ending}")).info
    assert info.pages_absent == made.count(None)


def test_more_runs_than_a_core_has_numbers_for(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    image = arrow_image(path, [(2 * n * PAGE, page(n % 3), eligible()) for n in range(66_000)], batch=10_000)
    printed("export", image, "-o", tmp_path / "y.elf")
    assert images.open_image(str(tmp_path / "y.elf")).info.pages == 66_000


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    rows = [(0, page(1), eligible()), (PAGE, None, eligible("swapped")), (2 * PAGE, page(2), eligible("unreadable"))]
    path = arrow_image(tmp_path / "x.arrow", [(at, c, f) for at, c, f in rows])
    done = invoke("export", path, "-o", tmp_path / "y.raw")
    assert done.exit_code == 3
    assert "1 pages more have no bytes" in done.stdout
    assert "unreadable: left out" in done.stderr
    assert pages_of(tmp_path / "y.raw") == {0: page(1)}
    with pytest.raises(SettingsError, match=r"use \.raw or \.elf"):
        invoke("export", path, "-o", tmp_path / "y.qcow2")
    process = arrow_image(tmp_path / "p.arrow", rows[:1], {"ksmdist.kind": "process"})
    with pytest.raises(ImageError, match="is of kind process"):
        invoke("export", process, "-o", tmp_path / "p.raw")
    assert not list(tmp_path.glob(".*partial*"))


def test_a_diff_snapshot_lies_over_its_base(make_raw: MakeImage, tmp_path: Path) -> None:
    base = make_raw("full.mem", [page(1), page(2), ZERO, None, page(5), None])
    diff = make_raw("diff.mem", [None, page(9), None, ZERO, None, None])
    last = make_raw("last.mem", [None, None, None, None, page(8), None])
    merged = {0: page(1), PAGE: page(9), 2 * PAGE: ZERO, 3 * PAGE: ZERO, 4 * PAGE: page(5)}
    assert pages_of(diff, [str(base)]) == merged
    assert pages_of(last, [str(base), str(diff)]) == merged | {4 * PAGE: page(8)}
    assert pages_of(diff) == {PAGE: page(9), 3 * PAGE: ZERO}
    info = images.open_image(str(diff), base=[str(base)]).info
    assert (info.pages, info.pages_absent) == (5, 1)

    whole = tmp_path / "whole"
    whole.mkdir()
    with open(whole / "diff.mem", "wb") as sink:
        sink.truncate(6 * PAGE)
        for at, content in merged.items():
            os.pwrite(sink.fileno(), content, at)
    alike = table_files(ksmdist.run([whole / "diff.mem"], tmp_path / "a").path)
    assert printed("run", diff, "--base", base, "-o", tmp_path / "b", "-q")
    assert table_files(tmp_path / "b") == alike
    manifest = tmp_path / "fleet.yaml"
    manifest.write_text("- uri: diff.mem\n  base: full.mem\n")
    ksmdist.run([], tmp_path / "c", Settings(shard_pages=2), manifest=str(manifest))
    assert table_files(tmp_path / "c")["stable_tree/00000.parquet"] == alike["stable_tree/00000.parquet"]


def test_a_base_that_cannot_be(make_raw: MakeImage, tmp_path: Path) -> None:
    diff, other = make_raw("diff.mem", [page(1), None]), make_raw("other.mem", [page(1)])
    with pytest.raises(ImageError, match=r"has 4096 bytes, and .*diff\.mem.* 8192"):
        images.open_image(str(diff), base=[str(other)])
    core = tmp_path / "core"
    core.write_bytes(elf_core([(0, page(1), PAGE)]))
    with pytest.raises(SettingsError, match="--base goes with raw images alone"):
        images.open_image(str(core), base=[str(other)])


def test_a_diff_that_lost_its_holes(make_raw: MakeImage, tmp_path: Path) -> None:
    base, diff = make_raw("full.mem", [page(1), page(2)]), make_raw("diff.mem", [ZERO, page(3)])
    (caveat,) = images.open_image(str(diff), base=[str(base)]).info.caveats
    assert "has no hole" in caveat
    packed = tmp_path / "diff.mem.gz"
    packed.write_bytes(gzip.compress(diff.read_bytes()))
    with pytest.raises(ImageError, match="no holes to say what is unchanged"):
        images.open_image(str(packed), base=[str(base)])
    assert pages_of(base, []) == {0: page(1), PAGE: page(2)}


def test_a_base_that_changed_is_noticed(make_raw: MakeImage) -> None:
    base, diff = make_raw("full.mem", [page(1)]), make_raw("diff.mem", [None])
    info = images.open_image(str(diff), base=[str(base)]).info
    images.reopen(info).close()
    images.check_unchanged(info)
    base.write_bytes(page(2))
    os.utime(base, ns=(1, 1))
    for check in (images.reopen, images.check_unchanged):
        with pytest.raises(ImageError, match="changed while it was scanned"):
            check(info)


def test_a_filtered_image_is_flagged_wherever_it_is_counted(tmp_path: Path) -> None:
    source = {"producer": "makedumpfile", "filter_level": "makedumpfile -d 31: much", "pages_excluded": 5}
    keys = {"ksmdist.pages_absent": "6", "ksmdist.source": json.dumps(source)}
    rows = [(n * PAGE, page(n // 2), eligible()) for n in range(6)]
    image = arrow_image(tmp_path / "vm.arrow", rows, keys)
    whole = arrow_image(tmp_path / "whole.arrow", rows)
    run = tmp_path / "run"
    flag = "FILTERED: vm: makedumpfile -d 31: much (5 pages); what is counted is not the whole memory."
    for shown in (
        printed("run", image, whole, "-o", run, "-q"),
        printed("whatif", run),
        printed("whatif", run, "--use-zero-pages"),
        printed("explain", run),
        printed("unmerge", run),
        printed("diff", run, run),
        printed("import", image, "-o", tmp_path / "x.arrow"),
        printed("export", image, "-o", tmp_path / "x.elf"),
        " ".join(printed("report", run).split()),
    ):
        assert flag in shown
    assert "makedumpfile -d 31: much" in printed("info", image)
    expected = [{"image_id": "vm", "filter_level": source["filter_level"], "excluded": 5}]
    for command in ("report", "whatif", "explain", "unmerge"):
        assert json.loads(printed(command, run, "--json"))["filtered"] == expected
    assert json.loads(printed("diff", run, run, "--json"))["a"]["filtered"] == expected
    metrics = printed("report", run, "--prometheus")
    assert "\nksmdist_run_images_filtered 1\n" in metrics
    assert "\nksmdist_excluded_pages 5\n" in metrics
    printed("report", run, "--html", tmp_path / "page.html")
    assert flag.split(": ", 1)[1] in (tmp_path / "page.html").read_text()
    done = invoke("query", run, "select sum(total) as n from images")
    assert flag in done.stderr
    assert ksmdist.run([whole], tmp_path / "other").summary["filtered"] == []
    columns = ksmdist.run([image], tmp_path / "again").images.select(["producer", "filter_level", "excluded"])
    assert columns.to_pylist() == [{"producer": "makedumpfile", "filter_level": source["filter_level"], "excluded": 5}]


def test_a_checkpoints_other_files_are_no_images(tmp_path: Path) -> None:
    from ksmdist import fleet

    folder = tmp_path / "ckpt"
    folder.mkdir()
    magic = bytes.fromhex("1943565425400856")
    for name, data in {
        "pagemap-7.img": magic,
        "pages-1.img": bytes(PAGE),
        "mm-7.img": bytes(8),
        "stats-dump": bytes(8),
        "inventory.img": bytes.fromhex("16313158"),
    }.items():
        (folder / name).write_bytes(data)
    (tmp_path / "disk.img").write_bytes(bytes(PAGE))
    found = fleet.expand(fleet.Source(str(folder)))
    assert [source.uri for source in found.sources] == [f"{folder}/pagemap-7.img"]
    assert found.left_out == ()
    deep = fleet.expand(fleet.Source(f"{tmp_path}/**"))
    assert [Path(source.uri).name for source in deep.sources] == ["pagemap-7.img", "disk.img"]


def test_archives_in_a_folder_are_left_out(tmp_path: Path) -> None:
    from ksmdist import fleet

    data = np.random.default_rng(1).bytes(2 * PAGE)
    for name in ("vm.raw.gz", "core.app.1000.abc.42.17.zst", "logs.tar.gz", "vmcore.gz", "vm.elf.xz"):
        (tmp_path / name).write_bytes(gzip.compress(data))
    found = fleet.expand(fleet.Source(str(tmp_path)))
    assert [Path(source.uri).name for source in found.sources] == [
        "core.app.1000.abc.42.17.zst",
        "vm.elf.xz",
        "vm.raw.gz",
        "vmcore.gz",
    ]
    assert found.left_out == (
        (f"{tmp_path}/logs.tar.gz", "is gzip-compressed, and its name does not say that an image is in it"),
    )
