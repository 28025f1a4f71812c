"""info, import, export: what images are, and there and back again, byte by byte."""

from __future__ import annotations

import gzip
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ksmdist
from ksmdist import images
from ksmdist.errors import ImageError, RunDirectoryError, SettingsError
from ksmdist.report.terminal import filtered_lines
from ksmdist.settings import Settings

from .conftest import PAGE, ZERO, MakeImage, arrow_image, elf_core, eligible, invoke, page, printed, table_files
from .criu_files import MERGEABLE, PRESENT, Vma, checkpoint
from .kdump_files import kdump, split_kdump
from .lime_files import avml_file
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


def test_info_does_not_claim_to_know_what_was_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.avml"
    path.write_bytes(avml_file([(PAGE, page(1))]))
    text = printed("info", path)
    assert "filter     AVML: blocks of 16 MiB" in text
    assert "excluded   not known" in text


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


def test_a_folder_with_one_image_is_exported(make_raw: MakeImage, tmp_path: Path) -> None:
    at, pages = 0x7F0000000000, [page(1), ZERO, page(2)]
    mappings = [Vma(at, at + 2 * PAGE, madv=MERGEABLE), Vma(at + 2 * PAGE, at + 3 * PAGE)]
    checkpoint(tmp_path / "ckpt", [(at, 3, PRESENT)], b"".join(pages), mappings)
    shown = printed("export", tmp_path / "ckpt", "-o", tmp_path / "x.elf")
    assert "which of its pages KSM may merge, are not in it" in shown
    assert pages_of(tmp_path / "x.elf") == {at + n * PAGE: content for n, content in enumerate(pages)}
    (tmp_path / "split").mkdir()
    split_kdump(tmp_path / "split", dict(enumerate(pages)), [0, 1, 3])
    shown = printed("export", tmp_path / "split", "-o", tmp_path / "y.raw")
    assert shown == f"{tmp_path / 'y.raw'}: 3 pages\n"
    assert (tmp_path / "y.raw").read_bytes() == b"".join(pages)
    for name in ("a.raw", "b.raw"):
        make_raw(name, [page(1)])
    with pytest.raises(SettingsError, match=r"is 2 images, and z\.elf can hold one"):
        invoke("export", tmp_path / "[ab].raw", "-o", tmp_path / "z.elf")


def test_many_holes_are_a_few_lines(tmp_path: Path) -> None:
    segments = [(2 * n * PAGE, b"", PAGE) for n in range(100)]
    core = bytearray(elf_core(segments))
    for number in range(1, 101):  # each claims a page past the end of the file
        struct.pack_into("<QQQQ", core, 64 + 56 * number + 8, 1 << 30, 0, 2 * (number - 1) * PAGE, PAGE)
    (tmp_path / "core").write_bytes(core)
    for command, out in (("export", "x.elf"), ("import", "x.arrow")):
        done = invoke(command, tmp_path / "core", "-o", tmp_path / out)
        assert done.exit_code == 3
        *first, last = done.stderr.splitlines()
        assert len(first) == 20
        assert first[1] == f"{tmp_path / 'core'}: 1 pages at 0x2000 truncated: left out"
        assert last.startswith("... and 80 holes more, 100 pages in all")


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
        printed("plan", image, whole),
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
    assert json.loads(printed("plan", image, whole, "--json"))["filtered"] == expected
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


def test_ways_to_be_filtered_are_said_up_to_a_point() -> None:
    one = [{"image_id": f"vm-{n}", "filter_level": f"way {n}", "excluded": n} for n in range(25)]
    lines = filtered_lines([*one, one[24] | {"image_id": "last"}])
    assert lines[1] == "FILTERED: vm-1: way 1 (1 pages); what is counted is not the whole memory."
    assert lines[20:] == ["FILTERED: 6 images more, each in its own way; table images has them all."]
    assert len(filtered_lines([one[0] | {"filter_level": "x" * 10_000}])[0]) < 400


def test_notes_that_are_not_shown_are_counted(tmp_path: Path) -> None:
    keys = {"ksmdist.source": json.dumps({"caveats": [f"this is number {n}" for n in range(25)]})}
    image = arrow_image(tmp_path / "vm.arrow", [(0, page(1), eligible())], keys)
    shown = printed("run", image, "-o", tmp_path / "run", "-q")
    assert shown.count("note: ") == 20
    assert "\n... and 5 notes more; run.json has them all\n" in shown


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


def test_a_core_that_lost_its_holes_is_flagged(tmp_path: Path) -> None:
    """Compressed by systemd-coredump, or copied, what was never touched is in it as zeros."""
    size = 24 * PAGE
    with open(tmp_path / "core", "wb") as sink:
        sink.write(elf_core([(0x7F0000000000, bytes(size), size)], b"CORE", physical=False, offsets=[PAGE])[:PAGE])
        os.pwrite(sink.fileno(), page(1), 9 * PAGE)
        sink.truncate(PAGE + size)
    data = (tmp_path / "core").read_bytes()
    (tmp_path / "core.gz").write_bytes(gzip.compress(data))
    (tmp_path / "copied").write_bytes(data)
    assert images.open_image(str(tmp_path / "core")).info.filter_level == ""
    for name in ("core.gz", "copied"):
        info = images.open_image(str(tmp_path / name)).info
        assert "never touched is in it as zeros" in info.filter_level
        assert info.caveats == ()
        assert "FILTERED: " in printed("run", tmp_path / name, "-o", tmp_path / f"run-{name}", "-q")


def test_info_says_what_a_hole_means(make_raw: MakeImage) -> None:
    base, diff = make_raw("full.mem", [page(1), page(2)]), make_raw("diff.mem", [None, page(3)])
    over, alone = printed("info", diff, "--base", base), printed("info", diff)
    assert "has not changed" in over
    assert "never touched" not in over
    assert "never touched" in alone
    assert "give the file below as --base" in alone
    assert "--base" not in printed("info", base)


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="save first what comes through a pipe"):
        images.open_image(str(tmp_path / "pipe"))


def test_what_is_raw_by_force_and_does_not_look_it(make_raw: MakeImage, tmp_path: Path) -> None:
    core = elf_core([(0, page(1), PAGE)])
    for name, data in (("elf", core), ("gzip", gzip.compress(core)), ("a qcow2 disk image", b"QFI\xfb")):
        (tmp_path / "x").write_bytes(data.ljust(2 * PAGE, b"\0"))
        (caveat,) = images.open_image(str(tmp_path / "x"), format="raw").info.caveats
        assert caveat.startswith(f"starts like {name}, and is counted as raw memory")
    assert images.open_image(str(make_raw("vm.raw", [page(1)])), format="raw").info.caveats == ()


def test_an_inventory_leads_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "inventory.img").write_bytes(bytes.fromhex("16313158") + bytes(8))
    with pytest.raises(ImageError, match="and has no pages; name the folder that it is in"):
        images.open_image(str(tmp_path / "inventory.img"))


def test_what_was_lost_outlives_import_and_export(tmp_path: Path) -> None:
    core = tmp_path / "core"
    core.write_bytes(elf_core([(0, page(1) + page(2), 2 * PAGE)])[:-PAGE])
    for command, name in (("import", "x.arrow"), ("export", "x.elf")):
        assert invoke(command, core, "-o", tmp_path / name).exit_code == 3
        info = images.open_image(str(tmp_path / name)).info
        assert (info.pages, info.pages_absent) == (1, 1)
        assert info.filter_level == f"1 pages could not be read when it was {command}ed, and are not in it"
        assert pages_of(tmp_path / name) == {0: page(1)}


def test_what_is_found_lost_while_it_is_read_stays_a_hole(tmp_path: Path) -> None:
    data = bytearray(kdump({n: page(n) for n in range(1, 9)}))
    at = data.rfind(b"\x78\x01")  # the last page, as zlib packs it
    data[at + 4 : at + 12] = bytes(8)
    path = tmp_path / "x.kdump"
    path.write_bytes(data)
    found = pages_of(path)
    assert found[8 * PAGE] is None
    assert invoke("import", path, "-o", tmp_path / "x.arrow").exit_code == 3
    assert pages_of(tmp_path / "x.arrow") == found
    assert invoke("run", tmp_path / "x.arrow", "-o", tmp_path / "run", "-q").exit_code == 3
    assert invoke("export", path, "-o", tmp_path / "x.elf").exit_code == 3
    assert images.open_image(str(tmp_path / "x.elf")).info.pages_absent == 1


def test_info_of_a_split_dump_without_a_piece(tmp_path: Path) -> None:
    first, second, _ = split_kdump(tmp_path, {n: page(n) for n in range(30)}, [0, 10, 20, 30])
    assert "no page was left out" in printed("info", first)
    second.unlink()
    text = printed("info", first)
    assert "10 of its pages are in pieces of the split dump that are not beside it" in text
    assert "no page was left out" not in text


def test_a_packed_file_of_which_nothing_can_be_unpacked(tmp_path: Path) -> None:
    data = np.random.default_rng(1).bytes(64 * PAGE)
    packed = bytes(pa.Codec("zstd").compress(data))  # says its size
    (tmp_path / "x.raw.zst").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ImageError, match="cannot be unpacked from its first byte on"):
        images.open_image(str(tmp_path / "x.raw.zst"))


def test_a_base_that_cannot_be_one(make_raw: MakeImage, tmp_path: Path) -> None:
    diff = make_raw("diff.mem", [None, page(3)])
    with pytest.raises(SettingsError, match="is laid over itself"):
        images.open_image(str(diff), base=[str(diff)])
    packed = tmp_path / "full.mem.gz"
    packed.write_bytes(gzip.compress(page(1) + page(2)))
    with pytest.raises(ImageError, match=r"is compressed \(gzip\); unpack it first"):
        images.open_image(str(diff), base=[str(packed)])


def test_pages_of_a_checkpoint_by_themselves_are_no_guest(make_raw: MakeImage) -> None:
    path = str(make_raw("pages-1.img", [page(1)]))
    with pytest.raises(ImageError, match="name its folder, or the pagemap file"):
        images.open_image(path)
    assert images.open_image(path, format="raw").info.pages == 1


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("source", "[" * 200_000, "source is not what"),
        ("source", '{"pages_excluded": Infinity}', "source is not what"),
        ("source", '{"pages_excluded": 1e999}', "source is not what"),
        ("source", '{"producer": "\\ud800"}', "source is not what"),
        ("source", '{"caveats": ["\\udfff"]}', "source is not what"),
        ("passed_over", '[{"region": "r", "reason": "not_anonymous", "pages": 1e999}]', "passed_over is not what"),
        ("passed_over", "[" * 200_000, "passed_over is not what"),
        ("ksm_stat", '{"a": "\\ud800"}', "ksm_stat is no JSON object"),
        ("ksm_stat", '{"a":' * 200_000, "ksm_stat is no JSON object"),
    ],
)
def test_metadata_that_cannot_be_written_again(key: str, value: str, what: str, tmp_path: Path) -> None:
    path = arrow_image(tmp_path / "x.arrow", [(0, page(1), eligible())], {f"ksmdist.{key}": value})
    with pytest.raises(ImageError, match=what):
        images.open_image(str(path))
