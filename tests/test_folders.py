"""Folders on this host: what is listed, whatever lies in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ksmdist.images.folders import Entry, folders_of, matching


def test_links_that_lead_to_themselves_or_up(tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "up").symlink_to(".")
    (tmp_path / "one").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    at = str(tmp_path)
    expected = [
        Entry(f"{at}/{name}", is_folder, nbytes)
        for name, is_folder, nbytes in (
            ("gone", False, -1),
            ("one", False, 1),
            ("pipe", False, -1),
            ("self", False, -1),
            ("up", True, -1),
        )
    ]
    folders = folders_of(at)
    for found in (folders.list(at), folders.list(at, deep=True), matching(folders, f"{at}/**")):
        assert sorted(found, key=lambda entry: entry.path) == expected


def test_folders_deeper_than_calls_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    Path("guest.raw").write_bytes(b"x")
    os.chdir(tmp_path)
    try:
        found = matching(folders_of("**"), "**")
        assert len(found) == 1201
        assert matching(folders_of("**"), "**/guest.raw") == [Entry("d/" * 1200 + "guest.raw", False, 1)]
    finally:  # rmtree() would not go as deep
        for _ in range(1200):
            os.chdir("d")
        Path("guest.raw").unlink()
        for _ in range(1200):
            os.chdir("..")
            os.rmdir("d")
