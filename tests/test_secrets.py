"""Bytes of pages are in no file, log or message; files are their owner's alone (docs/secrets.md)."""

from __future__ import annotations

import base64
import gzip
import json
import os
import resource
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ksmdist
from ksmdist import images, stages
from ksmdist.engines import Stage, any_node, figures_of_nothing
from ksmdist.errors import EngineError, ImageError
from ksmdist.settings import VERIFY

from .conftest import PAGE, ZERO, arrow_image, elf_core, eligible, invoke, key_forms, page, printed, unavailable
from .kdump_files import kdump
from .qemu_files import Stream, migrated

MARKER = np.random.default_rng(64).bytes(64)
SECRET = MARKER * (PAGE // len(MARKER))
PAGES = [SECRET, page(1), ZERO, page(2)[:-64] + MARKER, SECRET, page(3), page(1), MARKER[:8] * (PAGE // 8)]
"""The last is same-filled: its word, by design, is in the tables."""


def _forms() -> list[bytes]:
    """The marker, a quarter of it at a time, as programs write bytes down."""
    forms = set()
    for at in range(0, 64, 16):
        raw = MARKER[at : at + 16]
        latin = raw.decode("latin-1")
        forms |= {raw, raw.hex().encode(), raw.hex().upper().encode(), repr(raw)[2:-1].encode()}
        forms |= {latin.encode("utf-16-le"), latin.encode("utf-16-be")}
        forms |= {latin.encode(), json.dumps(latin)[1:-1].encode()}
        forms |= {", ".join(map(str, raw)).encode(), ",".join(map(str, raw)).encode()}
        for shift in range(3):  # base64 of what lies somewhere in other bytes: the letters that are its alone
            for encode in (base64.standard_b64encode, base64.urlsafe_b64encode):
                forms.add(encode(bytes(shift) + raw)[4 if shift else 0 : (shift + 16) // 3 * 4])
    assert min(map(len, forms)) >= 16
    return sorted(forms)


FORMS = _forms()


def _shows(data: bytes) -> bool:
    return any(form in data for form in FORMS)


def _columns(data: bytes) -> Iterator[pa.Array]:
    """Every column of a Parquet or Arrow file, as it is unpacked."""
    if data.startswith(b"PAR1"):
        table = pq.read_table(pa.BufferReader(data))
        assert table.schema.metadata is None or not _shows(repr(table.schema.metadata).encode())
        yield from (chunk for column in table.columns for chunk in column.chunks)
    elif data.startswith(b"ARROW1"):
        source = pa.ipc.open_file(pa.BufferReader(data))
        for number in range(source.num_record_batches):
            yield from source.get_batch(number).columns


def _buffers(array: pa.Array) -> Iterator[bytes]:
    yield from (buffer.to_pybytes() for buffer in array.buffers() if buffer is not None)
    if pa.types.is_dictionary(array.type):
        yield from _buffers(array.dictionary)


def leaks(folder: Path, strict: bool = False) -> list[str]:
    """Files below a folder that show the marker, or have it in their names; "" is the folder's own text.

    strict: only files that can be looked into may be there.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if _shows(os.fsencode(name)):
            found.append(name)
        if path.is_symlink() or not path.is_file():
            continue
        data = path.read_bytes()
        if strict and not data.startswith((b"PAR1", b"ARROW1")):
            assert data.isascii(), f"{name} is of a form that is not looked into"
        if _shows(data) or any(_shows(buffer) for column in _columns(data) for buffer in _buffers(column)):
            found.append(name)
    return found


def open_to_others(folder: Path) -> list[str]:
    """What in a folder, itself too, is not 0600, or 0700 if a directory."""
    found = []
    for path in [folder, *sorted(folder.rglob("*"))]:
        mode = path.lstat().st_mode
        if stat.S_IMODE(mode) != (0o700 if stat.S_ISDIR(mode) else 0o600):
            found.append(f"{path.relative_to(folder)} {stat.S_IMODE(mode):04o}")
    return found


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The pages in an image of each kind."""
    folder = tmp_path_factory.mktemp("images")
    raw = b"".join(PAGES)
    numbered = dict(enumerate(PAGES))
    files = {
        "a.raw": raw,
        "b.raw.gz": gzip.compress(raw),
        "c.raw.zst": bytes(pa.Codec("zstd").compress(raw)),
        "d.elf": elf_core([(0, raw, len(raw))]),
        "e.kdump": kdump(numbered),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    rows = [(number * PAGE, content, eligible()) for number, content in numbered.items()]
    arrow_image(folder / "f.arrow", rows, {"ksmdist.kind": "process", "ksmdist.tenant": "red"})
    return [*(folder / name for name in files), folder / "f.arrow"]


SETTINGS = {verify: ksmdist.Settings(verify=verify, checksums=True, shard_pages=3, ranges=2) for verify in VERIFY}


def _run(paths: list[Path], out: Path, verify: Any, engine: str = "inline") -> None:
    run = ksmdist.run(paths, out, SETTINGS[verify], engine)
    assert run.summary["contents"]["shared"] >= 3  # the marker's pages were read, and merged


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_the_search_finds_what_is_planted(tmp_path: Path, form: int) -> None:
    """Each form: in text, in Parquet and Arrow whose columns are compressed, nested or dictionaries."""
    planted = b"x" + FORMS[form] + b"x"
    (tmp_path / "log").write_bytes(planted)
    nested = pa.array([[{"a": planted}]], pa.list_(pa.struct([("a", pa.binary())])))
    for name, column in (
        ("plain", pa.array([planted * 50])),
        ("nested", nested),
        ("dictionary", pa.array([planted]).dictionary_encode()),
    ):
        table = pa.table({"column": column})
        pq.write_table(table, tmp_path / f"{name}.parquet", compression="zstd")
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(str(tmp_path / f"{name}.arrow"), table.schema, options=options) as writer:
            writer.write_table(table)
    assert set(leaks(tmp_path)) == {path.name for path in tmp_path.iterdir()}
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean" / "log").write_bytes(bytes(4096) + MARKER[:8])
    assert leaks(tmp_path / "clean") == []


def test_the_search_finds_the_marker_however_it_lies() -> None:
    for shift in range(5):
        data = bytes(shift) + MARKER + bytes(9)
        for written in (data, data.hex().encode(), base64.b64encode(data), data.decode("latin-1").encode("utf-16")):
            assert _shows(written)


@pytest.mark.parametrize("verify", VERIFY)
def test_no_page_bytes_in_a_run_or_its_output(
    paths: list[Path], tmp_path: Path, verify: Any, no_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert leaks(paths[0].parent), "the images have it"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = tmp_path / "run"
    for settings in ((), ("--json",)):
        done = invoke("run", *paths, "-o", f"{out}{len(settings)}", "--engine", "inline", "--verify", verify, *settings)
        assert done.exit_code == 0, done.output
        assert not _shows(done.stdout_bytes + done.stderr_bytes)
    _run(paths, out, verify)
    query = ("query", out, "select * from contents")
    for command in (("report", out), ("report", out, "--json"), ("explain", out), ("whatif", out), query):
        shown = invoke(*command)
        assert shown.exit_code == 0, shown.output
        assert not _shows(shown.stdout_bytes + shown.stderr_bytes), command
    printed("report", out, "--html", tmp_path / "page.html")
    printed("publish", out, "-o", tmp_path / "published")
    assert leaks(tmp_path) == []
    assert leaks(out, strict=True) == []
    for folder in (out, tmp_path / "run0", tmp_path / "published"):
        assert open_to_others(folder) == []
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == 0o600


@pytest.mark.parametrize("verify", VERIFY)
def test_no_page_bytes_in_an_unfinished_run(
    paths: list[Path], tmp_path: Path, verify: Any, no_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any, **__: Any) -> None:
        raise EngineError("is lost", "the merge", "try again")

    monkeypatch.setattr(stages, "merge", lost)
    with pytest.raises(EngineError, match="is lost"):
        _run(paths, tmp_path / "run", verify)
    partial = tmp_path / "run.partial"
    assert any((partial / "work").glob("*.arrow"))
    assert leaks(partial, strict=True) == []
    assert open_to_others(partial) == []


def test_what_is_made_of_images_is_for_its_owner_alone(paths: list[Path], tmp_path: Path, no_umask: None) -> None:
    """These do hold pages."""
    printed("import", paths[0], "-o", tmp_path / "a.arrow")
    printed("export", tmp_path / "a.arrow", "-o", tmp_path / "a.elf")
    printed("demo", tmp_path / "demo", "--engine", "inline", "--quiet")
    for name in ("a.arrow", "a.elf"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert open_to_others(tmp_path / "demo" / "images") == []
    assert open_to_others(tmp_path / "demo" / "run") == []


def test_a_traceback_shows_no_locals(paths: list[Path], tmp_path: Path) -> None:
    code = """
import sys
from ksmdist import cli, digests
def broken(batch, *_, **__):
    content = batch.column("content")[0].as_py()
    raise RuntimeError(f"a bug, with {len(content)} bytes at hand")
digests.digest_pages = broken
cli.main()
"""
    arguments = ["run", str(paths[0]), "-o", str(tmp_path / "run"), "--engine", "inline"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, timeout=120)
    assert done.returncode == 1
    assert b"Traceback" in done.stderr
    assert b"a bug, with 4096 bytes" in done.stderr
    assert not _shows(done.stdout + done.stderr)
    assert leaks(tmp_path) == []


def test_an_error_does_not_quote_what_may_be_of_a_page(tmp_path: Path) -> None:
    """Where bytes are missing from a QEMU stream, a page is taken for a record and the name of a block."""
    name = MARKER.decode("latin-1")
    stream = Stream()
    stream.begin()
    stream.listed({"pc.ram": PAGES})
    stream.end_section()
    stream.section(1, name)  # a device's
    for data, said in (
        (migrated({"pc.ram": PAGES}, again=[(name, 1, page(2))]), "a block that it does not list"),
        (bytes(stream.data), "a device with a name of 64 bytes"),
    ):
        path = tmp_path / "guest.migrated"
        path.write_bytes(data)
        with pytest.raises(ImageError, match=said) as caught:
            images.open_image(str(path))
        assert not _shows(f"{caught.value} {caught.value!r}".encode("utf-8", "surrogateescape"))


_ABORT = """
import os, resource, sys
_, hard = resource.getrlimit(resource.RLIMIT_CORE)
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
if sys.argv[1] == "ksmdist":
    from ksmdist import cli
    cli.app = os.abort
    cli.main()
os.abort()
"""


def _dumped(who: str, folder: Path) -> bool:
    folder.mkdir()
    pid = os.posix_spawn(
        sys.executable, [sys.executable, "-c", f"import os; os.chdir({str(folder)!r})\n{_ABORT}", who], dict(os.environ)
    )
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    return os.WCOREDUMP(status) or any(folder.iterdir())


def test_a_command_that_crashes_leaves_no_core_dump(tmp_path: Path) -> None:
    assert not _dumped("ksmdist", tmp_path / "ksmdist")
    pattern = Path("/proc/sys/kernel/core_pattern").read_text(encoding="ascii").strip()
    if pattern.startswith(("|", "@", "/")) or not resource.getrlimit(resource.RLIMIT_CORE)[1]:
        unavailable(f"core dumps of other programs do not go to their directory here ({pattern!r})")
    assert _dumped("other", tmp_path / "other")


def _core_limit(_: int) -> int:
    return resource.getrlimit(resource.RLIMIT_CORE)[0]


@pytest.mark.ray
def test_no_page_bytes_in_what_ray_writes(
    paths: list[Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_umask: None,
) -> None:
    """All ways to confirm, on one Ray started as `ksmdist run` starts it; then pages are spilled on purpose."""
    import ray

    from ksmdist.engines.ray import RayEngine

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    engine = RayEngine(cpus=2)
    session = Path(ray.get_runtime_context().get_temp_dir()).parent
    try:
        assert stat.S_IMODE(session.stat().st_mode) == 0o700
        assert session.stat().st_uid == os.geteuid()
        for verify in VERIFY:
            _run(paths, tmp_path / verify, verify, "ray")
        limit = Stage("limit", _core_limit, str, any_node, figures_of_nothing)
        found: list[int] = []
        engine.run(limit, [0], lambda _, result: found.append(result))
        assert found == [1 if resource.getrlimit(resource.RLIMIT_CORE)[1] else 0]
        assert any(session.rglob("worker-*"))  # its logs
        assert leaks(session) == []
        assert leaks(tmp_path) == []
        logs = b"".join(path.read_bytes() for path in session.rglob("*") if path.is_file() and not path.is_symlink())
        assert len(logs) > 10_000
        assert not [form for form in key_forms() if form in logs]
        for verify in VERIFY:
            assert leaks(tmp_path / verify, strict=True) == []
            assert open_to_others(tmp_path / verify) == []
        # What is spilled is found, and in the directory.
        kept = [ray.put(np.frombuffer(MARKER * (1 << 20), np.uint8)) for _ in range(4)]
        until = time.monotonic() + 60
        while not leaks(session) and time.monotonic() < until:
            time.sleep(0.5)
        assert any("spill" in name for name in leaks(session))
        del kept
    finally:
        engine.close()
    shown = capfd.readouterr()
    assert not _shows((shown.out + shown.err).encode("utf-8", "surrogateescape"))
    assert not session.exists()
