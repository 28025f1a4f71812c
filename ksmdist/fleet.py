"""What is to be scanned and where it is: paths and URIs, patterns and folders, manifests of fleets.

A manifest is YAML (a list of entries, or `images:` with one) or Parquet, a row an entry, with the keys image,
uri, host, tenant, salt, kind, pass and base; only uri must be there. With a `host`, a path is of a file that the node
of that name alone has. What a manifest names lies in its own folder, or in a root that the user adds (images/roots.py).

Raises SettingsError: a manifest or a name that cannot be; ImageReadError: what is not there or cannot be listed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from ksmdist import images
from ksmdist.errors import ImageReadError, SettingsError
from ksmdist.images import folders, roots
from ksmdist.images.criu import is_checkpoint_part
from ksmdist.images.files import open_file
from ksmdist.images.headers import KINDS_OF_IMAGES
from ksmdist.images.uris import Uri, is_uri, local_path, parse_uri

__all__ = ["KEYS", "RAW_ENDINGS", "Expanded", "Source", "absolute", "expand", "parse", "read_manifest"]

KEYS = ("image", "uri", "host", "tenant", "salt", "kind", "pass", "base")
"""Keys of a manifest's entry, columns of a manifest in Parquet."""

RAW_ENDINGS = (".raw", ".mem", ".img", ".vmem", ".bin", ".dump", ".ram", ".core", "memory-ranges", "mem_file")
"""What a file without a magic must end in to be taken for memory where it was not named.

memory-ranges is Cloud Hypervisor's, mem_file what Firecracker's documents call theirs.
"""

_IMAGE_ENDINGS = (*RAW_ENDINGS, ".elf", ".arrow", ".kdump", ".lime", ".avml", ".save", ".vmss", ".vmsn", "vmcore")
"""What the name of a compressed file must end in, without the ending of its compression: or begin with core."""

_MOST_BYTES = 256 << 20  # of a manifest: a million entries are about 100 MiB
_MOST_ENTRIES = 1_000_000
_MOST_TEXT = {"uri": 4096, "base": 4096, "image": 1024, "host": 255, "tenant": 255, "salt": 255}


@dataclass(frozen=True, slots=True)
class Source:
    """An image to scan, or a pattern or folder of them.

    uri:          a path or URI, as the node that reads it opens it
    node:         the node that alone has it; "": every node sees it
    image_id, host, tenant, kind, pass_number: as the manifest says; "" and None: as the image says
    salt:         likewise; images with another salt share nothing under policy salt. Not to be shown
    base:         files that it is laid over, the lowest first, as the node that reads it opens them
    roots:        of a manifest's: where it and its bases must lie; no part of which image it is. Empty: anywhere
    """

    uri: str
    node: str = ""
    image_id: str = ""
    host: str = ""
    tenant: str = ""
    kind: str = ""
    pass_number: int | None = None
    base: tuple[str, ...] = ()
    salt: str = field(default="", repr=False)
    roots: tuple[Uri, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        return str(Uri("node", self.node, self.uri[1:])) if self.node else self.uri


@dataclass(frozen=True, slots=True)
class Expanded:
    """What a source stands for: files, by name; left_out: (URI, why) of what is there and is no image."""

    sources: tuple[Source, ...]
    left_out: tuple[tuple[str, str], ...] = ()


def parse(text: str) -> Source:
    """A path, a URI or node://NAME/path as a source."""
    if not text:
        raise SettingsError("is empty", "the image", "name a file")
    if not is_uri(text):
        return Source(text)
    uri = parse_uri(text)
    if uri.scheme == "node":
        return Source(f"/{uri.path}", node=uri.authority, host=uri.authority)
    return Source(local_path(text) or text)


def absolute(source: Source) -> Source:
    """The source with its path from the root: a worker's directory is another, as is that of who takes a run up."""
    if source.node:
        return source
    base = tuple(lower if is_uri(lower) else os.path.abspath(lower) for lower in source.base)
    if is_uri(source.uri):
        return replace(source, base=base)
    path = os.path.abspath(source.uri)
    return replace(source, uri=os.path.join(path, "") if source.uri.endswith("/") else path, base=base)


def read_manifest(path: str, more_roots: Sequence[str] = ()) -> list[Source]:
    """The entries of a manifest, in its order; path: of the file, or its URI in a store.

    more_roots: where its images may lie besides its own folder, as roots.root() takes them. What is in a store is
    asked here, before anything is opened; what is on a host only expand() can know, there.
    """
    allowed = (roots.root_of(path), *map(roots.root, more_roots))
    file = open_file(path)
    try:
        if file.nbytes > _MOST_BYTES:
            raise SettingsError(
                f"has {file.nbytes} bytes, more than {_MOST_BYTES}", path, "give several manifests, a run each"
            )
        data = file.read(0, file.nbytes)
    finally:
        file.close()
    entries = _parquet_entries(data, path) if data.startswith(b"PAR1") else _yaml_entries(data, path)
    found: list[Source] = []
    seen: dict[tuple[str, int], int] = {}
    for number, (where, fields) in enumerate(entries, 1):
        if number > _MOST_ENTRIES:
            raise SettingsError(f"has more than {_MOST_ENTRIES} entries", path, "give several manifests, a run each")
        where = f"{path}, entry {number}{where}"
        source = replace(_source(fields, path, where), roots=allowed)
        for named in (source.uri, *source.base):
            if local_path(named) is None:
                roots.check(named, "", allowed)
        if source.image_id:
            first = seen.setdefault((source.image_id, source.pass_number or 1), number)
            if first != number:
                raise SettingsError(
                    f"image {source.image_id!r}, pass {source.pass_number or 1}, is entry {first} already",
                    where,
                    "give each image once, or passes of their own numbers",
                )
        found.append(source)
    if not found:
        raise SettingsError("has no entries", path, "list the images: `- uri: /path/of/vm.raw`")
    return found


def _source(fields: Mapping[str, object], manifest: str, where: str) -> Source:
    """An entry, checked."""
    for key in fields:
        if key not in KEYS:
            raise SettingsError(f"has the unknown key {key!r}", where, f"use {', '.join(KEYS)}")
    text: dict[str, str] = {}
    for key in ("image", "uri", "host", "tenant", "salt", "kind", "base"):
        value = fields.get(key)
        if value is None:
            text[key] = ""
            continue
        if not isinstance(value, str):
            raise SettingsError(f"{key} is {_shown(value, key)}, not a text", where, "put it in quotes")
        if not value or not value.isprintable() or len(value) > _MOST_TEXT.get(key, 64):
            shown = _shown(value, key)
            raise SettingsError(f"{key} {shown} cannot be", where, "give a text of a line, or leave it out")
        text[key] = value
    number = fields.get("pass")
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or not 1 <= number < 1 << 31):
        raise SettingsError(f"pass is {_shown(number)}", where, "give 1, 2 and so on, or leave it out")
    if not text["uri"]:
        raise SettingsError("has no uri", where, "give the path or URI of the image")
    if text["kind"] and text["kind"] not in KINDS_OF_IMAGES:
        raise SettingsError(f"kind is {text['kind']!r}", where, f"use one of {', '.join(KINDS_OF_IMAGES)}")
    if number is not None and number > 1 and not text["image"]:
        raise SettingsError(f"pass {number} is of no image", where, "give the image, as its first pass has it")
    try:
        source = parse(text["uri"])
    except SettingsError as error:
        raise SettingsError(f"uri {error.where}: {error.what}", where, error.hint) from None
    host, base = text["host"], text["base"]
    if source.node:
        if host not in ("", source.node):
            raise SettingsError(f"host {host!r} is not the node of uri {text['uri']}", where, "leave host out")
    elif not is_uri(source.uri) and host:
        if not os.path.isabs(source.uri):
            raise SettingsError(f"uri {source.uri} is relative, on host {host!r}", where, "give the whole path")
        source = replace(source, node=host)
    elif not is_uri(source.uri):
        source = replace(source, uri=_beside(manifest, source.uri))
    if base and not is_uri(base):
        if source.node and not os.path.isabs(base):
            raise SettingsError(f"base {base} is relative, on host {source.node!r}", where, "give the whole path")
        base = base if source.node else _beside(manifest, base)
    return replace(
        source,
        image_id=text["image"],
        host=host or source.node,
        tenant=text["tenant"],
        salt=text["salt"],
        kind=text["kind"],
        pass_number=number,
        base=(base,) if base else (),
    )


def _beside(manifest: str, path: str) -> str:
    """A path that is relative to the manifest's folder, whole."""
    local = local_path(manifest)
    if local is not None:
        return os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(local)), path))
    if os.path.isabs(path):
        return path
    uri = parse_uri(manifest)
    return str(replace(uri, path=os.path.normpath(os.path.join(os.path.dirname(uri.path), path))))


def _shown(value: object, key: str = "") -> str:
    if key == "salt":
        return f"(a {type(value).__name__}, which is not shown)"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _parquet_entries(data: bytes, path: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        schema = file.schema_arrow
        for field in schema:
            kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            if field.name not in KEYS:
                raise SettingsError(f"has the unknown column {field.name!r}", path, f"use {', '.join(KEYS)}")
            is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            if not (pa.types.is_integer(kind) if field.name == "pass" else is_text):
                wanted = "integers" if field.name == "pass" else "strings"
                raise SettingsError(f"column {field.name} is {field.type}", path, f"write it as {wanted}")
        if "uri" not in schema.names:
            raise SettingsError("has no column uri", path, "give the paths or URIs of the images in it")
        for batch in file.iter_batches():
            yield from (("", row) for row in batch.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise SettingsError(f"is no Parquet file: {str(error).splitlines()[0]}", path, "write it again") from None


def _yaml_entries(data: bytes, path: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    """(", line N", fields) of each entry.

    By the parser's events: 100,000 entries are 1 s of them, 15 s to load; and what is no plain list of plain
    entries, such as an alias, is refused where it stands.
    """
    import yaml

    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise SettingsError(f"is no YAML: {error.reason} at byte {error.start}", path, "write it in UTF-8") from None
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    resolvers: Any = yaml.SafeLoader.yaml_implicit_resolvers
    wrong = SettingsError("is no list of images", path, "write `- uri: ...` for each, or `images:` and that list")

    def line_of(event: Any) -> int:
        return int(event.start_mark.line) + 1

    def refuse(event: Any, what: str, hint: str) -> SettingsError:
        return SettingsError(what, f"{path}, line {line_of(event)}", hint)

    def next_event() -> Any:
        event = next(events)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise refuse(event, "has an anchor or alias (& or *)", "write it out, or put the text in quotes")
        if getattr(event, "tag", None):
            raise refuse(event, f"has the tag {event.tag}", "leave it out")
        return event

    def value_of(event: Any) -> object:
        if event.style:  # in quotes
            return event.value
        for tag, expression in resolvers.get(event.value[:1], ()):
            if expression.match(event.value):
                kind = str(tag).rpartition(":")[2]
                if kind == "null":
                    return None
                if kind == "int" and event.value.isdecimal() and len(event.value) < 19:
                    return int(event.value)
                return _Other(event.value, kind)
        return event.value

    def entry() -> dict[str, object]:
        fields: dict[str, object] = {}
        while not isinstance(event := next_event(), yaml.MappingEndEvent):
            value = next_event()
            if not isinstance(event, yaml.ScalarEvent):
                raise refuse(event, "has a key that is no text", f"use {', '.join(KEYS)}")
            if not isinstance(value, yaml.ScalarEvent):
                raise refuse(value, f"{event.value} is a list or mapping", "give one value")
            if event.value in fields:
                raise refuse(event, f"has the key {event.value} twice", "give it once")
            fields[event.value] = value_of(value)
        return fields

    events: Iterator[Any] = iter(yaml.parse(text, Loader=loader))
    try:
        next_event()  # the stream's start
        if isinstance(next_event(), yaml.StreamEndEvent):
            return
        top = next_event()
        if isinstance(top, yaml.MappingStartEvent):
            key = next_event()
            if getattr(key, "value", None) != "images":
                raise wrong
            top = next_event()
            wrapped = True
        else:
            wrapped = False
        if not isinstance(top, yaml.SequenceStartEvent):
            raise wrong
        while not isinstance(event := next_event(), yaml.SequenceEndEvent):
            if not isinstance(event, yaml.MappingStartEvent):
                raise refuse(event, "is an entry that is no mapping", "write `- uri: ...`")
            yield f" (line {line_of(event)})", entry()
        if wrapped and not isinstance(event := next_event(), yaml.MappingEndEvent):
            raise refuse(event, f"has the unknown key {getattr(event, 'value', '')!r} beside images", "leave it out")
        next_event()  # the document's end
        if not isinstance(event := next_event(), yaml.StreamEndEvent):
            raise refuse(event, "has a second document", "put all images in one list")
    except yaml.YAMLError as error:
        mark: Any = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SettingsError(f"is no YAML: {what}", where, "write `- uri: ...` for each image") from None


@dataclass(frozen=True, slots=True)
class _Other:
    """A value of YAML's that no key takes: a date, a truth value."""

    text: str
    kind: str

    def __repr__(self) -> str:
        return f"the {self.kind} {self.text}"


def expand(source: Source) -> Expanded:
    """The files a source stands for: those that match its pattern or are in its folder, or itself.

    A name that is there is no pattern. Of a folder only the files directly in it are taken. Where no part of
    a name was given (a folder, `*`), a file must be known for an image by its first bytes or its ending. To
    be called on the source's node, which an ImageReadError does not name. Raises SettingsError for what is outside
    of the source's roots, links resolved.
    """
    for named in (source.uri, *source.base):
        roots.check(named, source.node, source.roots)
    there = folders.folders_of(source.uri)
    entry = None if there.path.endswith("/") else there.entry(there.path)
    if there.path.endswith("/") or (entry is not None and entry.is_folder):
        found, known, left_out = _in_folder(source, there)
    elif entry is not None:
        return Expanded((source,))
    elif folders.has_wildcard(there.path):
        matches = folders.matching(there, there.path)
        _check_entries(source, there, matches)
        left_out = [
            (there.uri(e.path), "is a folder: end it with / to scan what is in it") for e in matches if e.is_folder
        ]
        found = [e for e in matches if not e.is_folder]
        known = bool(there.path.rpartition("/")[2].strip("*?"))
        if not matches:
            raise ImageReadError("matches no file", source.uri, "check the pattern; put it in quotes for the shell")
    else:
        raise ImageReadError(
            "cannot be opened: No such file or directory", source.uri, "check the path and the permissions"
        )
    if not known:
        found, unknown = _known(there, found)
        left_out += unknown
    if not found:
        named = "; ".join(f"{uri} {why}" for uri, why in left_out[:3]) or "it is empty"
        raise ImageReadError(f"holds no image: {named}", source.uri, "name the image files themselves")
    if source.image_id and len(found) > 1:
        raise SettingsError(
            f"is {len(found)} files, and one image: {source.image_id!r}", str(source), "give each file an entry"
        )
    named_files = sorted((replace(source, uri=there.uri(entry.path)) for entry in found), key=lambda s: s.uri)
    return Expanded(tuple(named_files), tuple(sorted(left_out)))


def _is_pagemap(name: str) -> bool:
    return name.startswith("pagemap-") and name.endswith(".img")


def _is_packed_image(name: str) -> bool:
    """Whether a compressed file's name says that it is an image, as systemd's cores do."""
    inner = name.rpartition(".")[0]
    return inner.endswith(_IMAGE_ENDINGS) or inner.startswith(("core.", "vmcore"))


def _in_folder(source: Source, there: folders.Folders) -> tuple[list[folders.Entry], bool, list[tuple[str, str]]]:
    found: list[folders.Entry] = []
    left_out: list[tuple[str, str]] = []
    entries = there.list(there.path)
    if not entries and there.entry(there.path) is None:
        raise ImageReadError("cannot be opened: no such folder", source.uri, "check the path and the permissions")
    for entry in entries:
        if entry.name == "run.json" and not entry.is_folder:
            raise SettingsError("is a run directory of ksmdist", str(source), "name images, or the folder they are in")
        if entry.name.startswith("."):
            left_out.append((there.uri(entry.path), "is hidden"))
        elif entry.is_folder:
            left_out.append((there.uri(entry.path), "is a folder: name it too, or use **"))
        else:
            found.append(entry)
    _check_entries(source, there, found)
    return found, False, left_out


def _check_entries(source: Source, there: folders.Folders, entries: Sequence[folders.Entry]) -> None:
    """Raises SettingsError where one is a link out of the roots, before any is opened."""
    for entry in entries:
        roots.check(there.uri(entry.path), source.node, source.roots)


def _known(
    there: folders.Folders, entries: Sequence[folders.Entry]
) -> tuple[list[folders.Entry], list[tuple[str, str]]]:
    """Which of these files are images by their first bytes or endings, and why the others are not."""
    found: list[folders.Entry] = []
    left_out: list[tuple[str, str]] = []
    special = [entry for entry in entries if entry.nbytes < 0]
    left_out += [(there.uri(entry.path), "is not a regular file") for entry in special]
    files = [entry for entry in entries if entry.nbytes >= 0]
    # A checkpoint of CRIU is a folder: the pages of its pagemaps are in other files of it, which are no images.
    checkpoints = {entry.path.rpartition("/")[0] for entry in files if _is_pagemap(entry.name)}
    files = [
        entry
        for entry in files
        if entry.path.rpartition("/")[0] not in checkpoints
        or not (entry.name.endswith(".img") or is_checkpoint_part(entry.name))
        or _is_pagemap(entry.name)
    ]
    for entry, head in zip(files, there.heads(files), strict=True):
        why = images.why_no_image(head, entry.name.endswith(RAW_ENDINGS), _is_packed_image(entry.name))
        if why:
            left_out.append((there.uri(entry.path), why))
        else:
            found.append(entry)
    return found, left_out
