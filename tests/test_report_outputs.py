"""Where reports go: files, links, pipes, devices, terminals; names from outside; and runs that are damaged."""

from __future__ import annotations

import json
import os
import pty
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ksmdist
from ksmdist import report
from ksmdist.errors import RunDirectoryError, SettingsError
from ksmdist.tables import POLICY, SHARING

from .conftest import PAGE, ZERO, MakeImage, Row, arrow_image, eligible, page, printed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images that share."""
    folder = tmp_path_factory.mktemp("outputs")
    rows: list[Row] = [(at * PAGE, content, eligible()) for at, content in enumerate([ZERO, ZERO, page(1), page(2)])]
    images = [arrow_image(folder / f"{name}.arrow", rows, {"ksmdist.image_id": name}) for name in "ab"]
    ksmdist.run(images, folder / "run")
    return folder / "run"


@pytest.mark.parametrize("option", ["--prometheus", "--json"])
def test_output_goes_to_a_file_whole(run: Path, tmp_path: Path, option: str) -> None:
    assert printed("report", run, option, "-o", tmp_path / "x") == ""
    assert (tmp_path / "x").read_text() == printed("report", run, option)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


def test_the_page_is_written_whole(run: Path, tmp_path: Path) -> None:
    assert printed("report", run, "--html", tmp_path / "x.html") == f"page: {tmp_path / 'x.html'}\n"
    assert (tmp_path / "x.html").read_text().rstrip().endswith("</html>")
    assert stat.S_IMODE((tmp_path / "x.html").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.html"]
    with pytest.raises(RunDirectoryError, match="cannot be written: No such file"):
        printed("report", run, "--html", tmp_path / "no" / "x.html")


OUTPUTS = (("--prometheus", "-o"), ("--json", "-o"), ("--html",))


@pytest.mark.parametrize("options", OUTPUTS)
def test_a_file_that_is_there_keeps_its_mode(run: Path, tmp_path: Path, options: Sequence[str]) -> None:
    path = tmp_path / "x"
    path.write_text("old" * 10**6)
    path.chmod(0o644)
    if os.geteuid() == 0:
        os.chown(path, -1, 12345)  # who is let read it by its group is still
    before = path.stat()
    printed("report", run, *options, path)
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert path.read_bytes() == written(run, tmp_path / "other", options)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["other", "x"]


def written(run: Path, path: Path, options: Sequence[str]) -> bytes:
    printed("report", run, *options, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return path.read_bytes()


@pytest.mark.parametrize("options", OUTPUTS)
@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_stays_and_leads_to_what_was_written(
    run: Path, tmp_path: Path, options: Sequence[str], there: bool
) -> None:
    (tmp_path / "deep").mkdir()
    target, link = tmp_path / "deep" / "target", tmp_path / "link"
    if there:
        target.write_text("old")
        target.chmod(0o640)
    (tmp_path / "between").symlink_to(Path("deep") / "target")
    link.symlink_to("between")
    printed("report", run, *options, link)
    assert link.is_symlink()
    assert target.read_bytes() == written(run, tmp_path / "other", options)
    assert not target.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == (0o640 if there else 0o600)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["target"]


@pytest.mark.parametrize("options", OUTPUTS)
@pytest.mark.parametrize("linked", [True, False])
def test_a_pipe_is_written_to_and_stays(run: Path, tmp_path: Path, options: Sequence[str], linked: bool) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    named = pipe
    if linked:
        named = tmp_path / "link"
        named.symlink_to(pipe)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    printed("report", run, *options, named)
    reader.join(60)
    assert found == [written(run, tmp_path / "other", options)]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert named.is_symlink() == linked


@pytest.mark.parametrize("options", OUTPUTS)
def test_a_device_is_written_to_and_stays(run: Path, tmp_path: Path, options: Sequence[str]) -> None:
    device = tmp_path / "null"  # like /dev/null, which no test may touch
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_bytes(b"")
    except OSError as error:
        pytest.skip(f"a device cannot be made or opened here: {error}; run this as root on a file system with devices")
    before = device.lstat()
    printed("report", run, *options, device)
    after = device.lstat()
    assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)


def test_a_terminal_is_written_to(run: Path) -> None:
    controller, terminal = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # EIO: the other end is closed
            while piece := os.read(controller, 1 << 16):
                shown.append(piece)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    printed("report", run, "--json", "-o", os.ttyname(terminal))
    os.close(terminal)
    reader.join(60)
    os.close(controller)
    assert b"".join(shown).replace(b"\r\n", b"\n").decode() == printed("report", run, "--json")


@pytest.mark.parametrize("options", OUTPUTS)
def test_what_stdout_is_gets_nothing_but_the_file(run: Path, tmp_path: Path, options: Sequence[str]) -> None:
    # What was in the file that stdout goes on with stays, and the page is not followed by where it is.
    path = tmp_path / "x"
    path.write_bytes(b"before\n")
    command = [sys.executable, "-m", "ksmdist", "report", str(run), *options, "/proc/self/fd/1"]
    with open(path, "ab") as sink:
        done = subprocess.run(command, stdout=sink, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert path.read_bytes() == b"before\n" + written(run, tmp_path / "other", options)
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, (tmp_path / "other").read_bytes())


def test_what_cannot_be_written_is_said(run: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name, why in (("", "Is a directory"), ("no/x", "No such file"), ("loop", "Too many levels")):
        for options in OUTPUTS:
            with pytest.raises(RunDirectoryError, match=f"cannot be written: {why}.*with {options[-1]}$"):
                printed("report", run, *options, tmp_path / name)


def test_wrong_arguments_and_runs_are_said(run: Path, tmp_path: Path) -> None:
    for arguments in (["--json", "--prometheus"], ["-o", "x"]):
        with pytest.raises(SettingsError):
            printed("report", run, *arguments)
    with pytest.raises(RunDirectoryError, match="is no run directory"):
        printed("report", tmp_path)


def test_a_run_with_a_table_missing_says_which(make_raw: MakeImage, tmp_path: Path) -> None:
    ksmdist.run([make_raw("a.raw", [ZERO] * 3)], tmp_path / "run")
    path = tmp_path / "run" / SHARING.file
    path.unlink()
    with pytest.raises(RunDirectoryError, match=r"has no readable table sharing: sharing\.parquet is not there"):
        printed("report", tmp_path / "run")
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(RunDirectoryError, match="has no readable table sharing: "):
        printed("report", tmp_path / "run")
    columns: Mapping[str, list[int]] = {name: [1] for name in SHARING.schema.names}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(RunDirectoryError, match=r"sharing\.parquet is no table of ksmdist, not sharing, version 1"):
        printed("report", tmp_path / "run")


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        *(
            (lambda manifest, name=name: manifest.pop(name), f"{name} is missing")
            for name in ("summary", "settings", "images", "identities", "caveats", "engine", "ksmdist")
        ),
        *(
            (lambda manifest, name=name: manifest.update({name: "x"}), f"{name} is no {what}")
            for name, what in (
                ("summary", "object"),
                ("settings", "object"),
                ("images", "list"),
                ("identities", "list"),
                ("caveats", "list"),
            )
        ),
        (lambda manifest: manifest.update(caveats=[1]), r"caveats\[0\] is no str"),
        (lambda manifest: manifest["images"][1].pop("image_id"), r"images\[1\]\.image_id is missing"),
        (lambda manifest: manifest["identities"][0].update(holds=1), r"identities\[0\]\.holds is no bool"),
        (lambda manifest: manifest["summary"].pop("holes"), r"summary\.holes is missing"),
        (lambda manifest: manifest["summary"]["pages"].update(zero="1"), r"summary\.pages\.zero is no int"),
        (lambda manifest: manifest["summary"]["pages"].update(zero=True), r"summary\.pages\.zero is no int"),
        (lambda manifest: manifest["summary"]["settings"].pop("kernel"), r"summary\.settings\.kernel is missing"),
        (lambda manifest: manifest["settings"].update(page_size=5000), "5000 is no page size"),
        (lambda manifest: manifest["settings"].update(max_page_sharing="x"), "'<' not supported"),
        (lambda manifest: manifest["settings"].update(x=1), "unexpected keyword argument 'x'"),
    ],
)
def test_a_damaged_run_json_is_said(run: Path, tmp_path: Path, change: Change, why: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    manifest = json.loads((run / "run.json").read_text())
    change(manifest)
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    said = f"has a run.json that is not what it should be: .*{why}"
    for command in (
        ("report", tmp_path / "run"),
        ("report", tmp_path / "run", "--html", tmp_path / "x"),
        ("diff", run, tmp_path / "run"),
        ("whatif", tmp_path / "run"),
    ):
        with pytest.raises(RunDirectoryError, match=said):
            printed(*command)
    with pytest.raises(RunDirectoryError, match=said):
        ksmdist.run([run.parent / "a.arrow"], tmp_path / "second", previous=tmp_path / "run")
    assert not (tmp_path / "x").exists()


def _rewritten(table: pa.Table, of: str) -> pa.Table:
    metadata = table.schema.metadata
    if of == "no metadata":
        return table.replace_schema_metadata(None)
    if of == "another version":
        return table.replace_schema_metadata(metadata | {b"ksmdist.version": b"9"})
    if of == "a column less":
        return table.drop_columns(table.column_names[-1])
    if of == "a column more":
        return table.append_column("more", pa.nulls(len(table)))
    if of == "another order":
        return table.select(table.column_names[::-1])
    return table.cast(
        pa.schema(
            [(each.name, pa.int32() if each.type == pa.int64() else each.type) for each in table.schema], metadata
        )
    )


WAYS = {
    "no metadata": "is no table of ksmdist, not {name}, version {version}",
    "another version": "is table {name}, version 9, not {name}, version {version}",
    "a column less": "has columns ",
    "a column more": "has columns .*, more",
    "another order": "has columns ",
    "other types": "has columns of other types",
}


@pytest.mark.parametrize("of", WAYS)
@pytest.mark.parametrize("definition", [POLICY, SHARING], ids=lambda definition: str(definition.name))
def test_a_table_of_another_schema_is_refused(run: Path, tmp_path: Path, definition: Any, of: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / definition.file
    pq.write_table(_rewritten(pq.read_table(path), of), path)
    said = rf"{definition.name}\.parquet {WAYS[of].format(name=definition.name, version=definition.version)}"
    for options in ((), ("--html", tmp_path / "x")):
        with pytest.raises(RunDirectoryError, match=f"tables that are not what they should be: {said}"):
            printed("report", tmp_path / "run", *options)
    if definition is SHARING:
        pq.write_table(pq.read_table(run / POLICY.file), path)
        with pytest.raises(RunDirectoryError, match=r"sharing\.parquet is table policy, version 2, not sharing"):
            printed("report", tmp_path / "run")


def test_names_from_images_are_fit_for_a_terminal(tmp_path: Path) -> None:
    names = ("red\x1b[31m", "gpj\u202eexe", "nul\x00", "two\nlines", "\x9b31m")
    images = []
    for number, name in enumerate(names):
        rows: list[Row] = [
            (at * PAGE, content, eligible(), None, f"[{name}]", 0) for at, content in enumerate([ZERO] * 3)
        ]
        rows.append((4 * PAGE, page(number), eligible(), None, "[other]", 0))
        metadata = {"ksmdist.image_id": name, "ksmdist.kind": "process", "ksmdist.tenant": name}
        images.append(arrow_image(tmp_path / f"{number}.arrow", rows, metadata))
    shown = [printed("run", *images, "-o", tmp_path / "run")]
    run = tmp_path / "run"
    for command in ("explain", "unmerge", "report"):
        shown.append(printed(command, run))
    shown += [printed("whatif", run, "--use-zero-pages"), printed("unmerge", run, "--image", names[0])]
    shown.append(printed("explain", run, "--image", names[1]))
    for text in shown:
        assert all(char.isprintable() or char == "\n" for char in text), text
    for text in (*shown[:3], shown[4]):
        assert "red?[31m" in text
        assert "gpj?exe" in text
    assert "Unmerging red?[31m (MADV_UNMERGEABLE)" in shown[5]
    assert "[gpj?exe]" in shown[6]


def test_what_a_run_says_of_images_is_fit_for_a_terminal(run: Path) -> None:
    done = ksmdist.load(run)
    bad = "x\x1b[31m\u202e\nend"
    summary = dict(done.summary) | {"run": bad, "engine_why": bad}
    summary["holes"] = {"ranges": 1, "pages": 1, "images": [bad]}
    out = StringIO()
    report.render(summary, done.images, done.ksm_stat.to_pylist(), (bad,), out)
    assert all(char.isprintable() or char == "\n" for char in out.getvalue())
    for said in ("note: x?[31m??end", "counted: x?[31m??end", "run directory: x?[31m??end"):
        assert said in out.getvalue()
