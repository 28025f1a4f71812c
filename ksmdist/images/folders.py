"""What is in folders, on this host or in an object store: listed, matched against patterns, known by first bytes.

Wildcards as a shell has them: `*`, `?` and `[...]` within a name, `**` for folders at any depth; a name that
begins with a dot is matched by none.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from threading import Event
from typing import Protocol

from ksmdist.errors import ImageReadError, SettingsError
from ksmdist.images import stores
from ksmdist.images.files import LocalFile
from ksmdist.images.uris import Uri, local_path, parse_uri

__all__ = ["HEAD_BYTES", "Entry", "Folders", "folders_of", "has_wildcard", "matching"]

HEAD_BYTES = 64
"""Bytes of a file that tell its format."""

_WILDCARD = re.compile(r"[*?[]")
_IN_FLIGHT = 16  # small requests


@dataclass(frozen=True, slots=True)
class Entry:
    """Something in a folder. path: whole, as its file system has it; nbytes: -1 for what is no regular file."""

    path: str
    is_folder: bool
    nbytes: int = 0

    @property
    def name(self) -> str:
        """Its last part."""
        return self.path.rstrip("/").rpartition("/")[2]


class Folders(Protocol):
    """The folders of a file system. path: of the pattern or folder that was asked for."""

    path: str

    def entry(self, path: str) -> Entry | None:
        """What is at a path; None if nothing is."""

    def list(self, path: str, deep: bool = False) -> Sequence[Entry]:
        """What is in a folder, deep: and below; nothing if there is no such folder. Raises ImageReadError."""

    def heads(self, entries: Sequence[Entry]) -> Iterator[bytes]:
        """The first HEAD_BYTES of files."""

    def uri(self, path: str) -> str:
        """How images.open_image() is given a path."""


class _LocalFolders:
    def __init__(self, path: str) -> None:
        self.path = path

    def entry(self, path: str) -> Entry | None:
        if not os.path.exists(path):
            return None
        return Entry(path, os.path.isdir(path))

    def list(self, path: str, deep: bool = False) -> Sequence[Entry]:
        found: list[Entry] = []
        todo = [path]
        while todo:  # no recursion: folders may lie deeper than calls
            folder = todo.pop()
            try:
                with os.scandir(folder or ".") as items:
                    inside = list(items)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise ImageReadError(
                    f"cannot be listed: {os.strerror(error.errno or 0)}", folder, "check the permissions"
                ) from None
            for item in inside:
                is_folder, size = False, -1
                with suppress(OSError):  # gone since, or a link that leads to itself
                    is_folder = item.is_dir()
                    size = item.stat().st_size if item.is_file() else -1
                found.append(Entry(f"{folder.rstrip('/')}/{item.name}" if folder else item.name, is_folder, size))
                if deep and is_folder and not item.is_symlink():  # a link may lead back up
                    todo.append(found[-1].path)
        return found

    def heads(self, entries: Sequence[Entry]) -> Iterator[bytes]:
        for entry in entries:
            file = LocalFile(entry.path)
            try:
                yield file.read(0, HEAD_BYTES)
            finally:
                file.close()

    def uri(self, path: str) -> str:
        return path


class _StoredFolders:
    def __init__(self, uri: Uri) -> None:
        self._uri = uri
        self._store, self.path = stores.store_of(uri)
        self._root = self.path[: len(self.path) - len(uri.path)]

    def entry(self, path: str) -> Entry | None:
        from pyarrow.fs import FileType  # here: see stores

        found = stores.patiently(lambda _: self._store.get_file_info(path.rstrip("/")), self.uri(path), stores.RULES)
        if found.type == FileType.NotFound:
            return None
        return Entry(path.rstrip("/"), found.type == FileType.Directory, found.size or 0)

    def list(self, path: str, deep: bool = False) -> Sequence[Entry]:
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(path.rstrip("/"), allow_not_found=True, recursive=deep)
        found = stores.patiently(lambda _: self._store.get_file_info(selector), self.uri(path), stores.RULES)
        return [
            Entry(info.path, info.type == FileType.Directory, info.size or 0)
            for info in found
            if not (info.type == FileType.Directory and info.path.rstrip("/") == path.rstrip("/"))
        ]

    def heads(self, entries: Sequence[Entry]) -> Iterator[bytes]:
        return stores.in_order((functools.partial(self._head, entry) for entry in entries), _IN_FLIGHT)

    def _head(self, entry: Entry, stop: Event) -> bytes:
        def read(_: int) -> bytes:
            with self._store.open_input_file(entry.path) as file:
                head: bytes = file.read_at(min(HEAD_BYTES, file.size()), 0)
                return head

        return stores.patiently(read, self.uri(entry.path), stores.RULES, stop) if entry.nbytes else b""

    def uri(self, path: str) -> str:
        return str(replace(self._uri, path=path.removeprefix(self._root)))


def folders_of(uri: str) -> Folders:
    """The file system that a path or URI is in; raises SettingsError, ImageReadError."""
    local = local_path(uri)
    if local is None and has_wildcard(parse_uri(uri).authority):
        raise SettingsError("has a wildcard in the bucket's name", uri, "name the bucket")
    return _LocalFolders(local) if local is not None else _StoredFolders(parse_uri(uri))


def has_wildcard(path: str) -> bool:
    """Whether a path is a pattern, if it is not the name of something."""
    return _WILDCARD.search(path) is not None


def matching(folders: Folders, pattern: str) -> list[Entry]:
    """What matches a pattern, by path, each once."""
    parts = pattern.split("/")
    plain = next(number for number, part in enumerate(parts) if has_wildcard(part))
    base = "/".join(parts[:plain]) or ("/" if pattern.startswith("/") else "")
    found = {entry.path: entry for entry in _below(folders, base, parts[plain:])}
    return [found[path] for path in sorted(found)]


def _below(folders: Folders, base: str, parts: Sequence[str]) -> Iterator[Entry]:
    """What below folder `base` matches these parts of a pattern, listed a level at a time up to a `**`."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        start = len(base.rstrip("/")) + 1 if base else 0
        for entry in folders.list(base, deep=True):
            if _fits(entry.path[start:].rstrip("/").split("/"), parts):
                yield entry
        return
    if has_wildcard(part):
        found = [entry for entry in folders.list(base) if _fits([entry.name], [part])]
    else:
        path = f"{base.rstrip('/')}/{part}" if base else part
        entry_there = None if rest else folders.entry(path)
        found = [Entry(path, True)] if rest else [entry_there] if entry_there else []
    for entry in found:
        if not rest:
            yield entry
        elif entry.is_folder:
            yield from _below(folders, entry.path, rest)


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the names of a path fit the parts of a pattern; `**` is any folders or none, at its end any file."""
    if not parts:
        return not names
    if parts[0] == "**":
        shown = next((n for n, name in enumerate(names) if name.startswith(".")), len(names))
        if len(parts) == 1:
            return bool(names) and shown == len(names)
        return any(_fits(names[n:], parts[1:]) for n in range(min(shown, len(names) - 1) + 1))
    if not names or (names[0].startswith(".") and not parts[0].startswith(".")):
        return False
    return fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])
