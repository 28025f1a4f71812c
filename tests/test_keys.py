"""The site key: where it comes from, what it changes, and where it never is."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

import ksmdist
from ksmdist import checkpoint, keys, pipeline, stages
from ksmdist.errors import RunDirectoryError, SettingsError
from ksmdist.settings import Settings

from .conftest import ZERO, MakeImage, invoke, key_forms, page

OTHER = "c3" * keys.KEY_BYTES
Tables = Callable[[Path], dict[str, bytes]]


def tables(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.parquet"))}


def key_file(path: Path, text: str = OTHER, mode: int = 0o600) -> Path:
    path.write_text(text + "\n")
    path.chmod(mode)
    return path


def test_the_site_key_is_made_once_and_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(keys.VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    one, two = keys.load(), keys.load()
    path = keys.site_file(os.environ)
    assert one == two
    assert path == tmp_path / "config" / "ksmdist" / "key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["key"]
    path.unlink()
    assert keys.load().fingerprint != one.fingerprint
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keys.site_file(os.environ) == tmp_path / ".config" / "ksmdist" / "key"


def test_where_a_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = keys.load(key_file(tmp_path / "key"))
    assert given.fingerprint == keys.Key.of(bytes.fromhex(OTHER)).fingerprint
    monkeypatch.setenv(keys.VARIABLE, OTHER.upper())
    assert keys.load().fingerprint == given.fingerprint
    assert keys.load(no_key=True).fingerprint is None
    with pytest.raises(SettingsError, match="leave one out"):
        keys.load(tmp_path / "key", no_key=True)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_key_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(SettingsError, match="by others"):
        keys.load(key_file(tmp_path / "key", mode=mode))


@pytest.mark.parametrize("text", ["", "12", "g" * 64, OTHER + "00", "ä" * 64])
def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="is no key") as caught:
        keys.load(key_file(tmp_path / "key", text))
    assert not text or text not in str(caught.value).replace("key", "")
    monkeypatch.setenv(keys.VARIABLE, text)
    with pytest.raises(SettingsError, match="is no key"):
        keys.load()


def test_other_things_than_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        keys.load(tmp_path / "none")
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(SettingsError, match="is no regular file"):
        keys.load(tmp_path / "fifo")


def test_seeds_are_of_their_key_and_of_nothing_else() -> None:
    one, other = keys.Key.of(bytes(32)), keys.Key.of(bytes(31) + b"\1")
    assert one.digester.seed != other.digester.seed
    assert one.digester.witness_seed != other.digester.witness_seed
    assert one.fingerprint != other.fingerprint
    assert 0 <= one.digester.witness_seed < 1 << 32
    assert str(one.digester.seed) not in repr(one)
    assert keys.NO_KEY.digester.seed == keys.NO_KEY.digester.witness_seed == 0


def test_runs_under_one_key_are_alike_and_under_others_are_not(make_raw: MakeImage, tmp_path: Path) -> None:
    images = [make_raw("a.raw", [ZERO, page(1), page(2), page(1)]), make_raw("b.raw", [page(2), page(3)])]
    own = key_file(tmp_path / "key")
    for name, options in (("one", ()), ("two", ()), ("other", ("--key-file", str(own))), ("none", ("--no-key",))):
        done = invoke("run", *map(str, images), "-o", str(tmp_path / name), "--engine", "inline", *options)
        assert done.exit_code == 0, done.output
    runs = {name: tables(tmp_path / name) for name in ("one", "two", "other", "none")}
    assert runs["one"] == runs["two"]
    alike = {name for name in runs["one"] if runs["one"][name] == runs["other"][name]}
    assert {name.partition("/")[0] for name in set(runs["one"]) - alike} <= {"stable_tree", "contents.parquet"}
    assert runs["other"] != runs["one"] != runs["none"] != runs["other"]
    said = [json.loads((tmp_path / name / "run.json").read_text())["key"] for name in ("one", "other", "none")]
    assert said == [keys.load().fingerprint, keys.load(own).fingerprint, None]
    for a, b in (("one", "other"), ("one", "none"), ("none", "other")):
        with pytest.raises(RunDirectoryError, match="they cannot be compared"):
            invoke("diff", str(tmp_path / a), str(tmp_path / b))
    assert invoke("diff", str(tmp_path / "one"), str(tmp_path / "two")).exit_code == 0


def test_a_run_is_not_taken_up_under_another_key(
    make_raw: MakeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_raw("a.raw", [page(1), page(1), ZERO])
    with monkeypatch.context() as patch:
        patch.setattr(stages, "merge", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ksmdist.run([image], tmp_path / "out", engine="inline")
    assert checkpoint.unfinished(tmp_path / "out")
    other = keys.Key.of(bytes.fromhex(OTHER))
    for key in (other, keys.NO_KEY):
        with pytest.raises(RunDirectoryError, match="was made under key"):
            pipeline.resume(tmp_path / "out", engine="inline", key=key)
        with pytest.raises(RunDirectoryError, match="another key"):
            ksmdist.run([image], tmp_path / "out", Settings(), engine="inline", key=key)
    assert pipeline.resume(tmp_path / "out", engine="inline").complete


def test_the_key_is_in_no_file_of_a_run(make_raw: MakeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_raw("a.raw", [page(1), page(1), ZERO])
    needles = key_forms()
    with monkeypatch.context() as patch:
        patch.setattr(stages, "merge", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ksmdist.run([image], tmp_path / "left", engine="inline")
    ksmdist.run([image], tmp_path / "out", engine="inline")
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != image]
    assert len(files) > 20
    for path in files:
        data = path.read_bytes()
        assert not any(needle in data for needle in needles), path
