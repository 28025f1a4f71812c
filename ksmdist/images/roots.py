"""Where files may lie: the roots that a manifest may name files in, and the folder that an image's other files are in.

A manifest, like an image, may come from a stranger, who must not choose what else is read: another user's dump, a
device, a bucket that only we may read. So paths are compared once links are resolved, where the file is opened.
It is no defence against who may swap a link or folder at that moment: whoever writes in a root is trusted with it.
"""

from __future__ import annotations

import os
import posixpath
import shlex
from collections.abc import Sequence
from dataclasses import replace

from ksmdist.errors import ImageReadError, SettingsError
from ksmdist.images.folders import has_wildcard
from ksmdist.images.uris import Uri, is_uri, local_path, parse_uri

__all__ = ["OPTION", "check", "check_beside", "is_inside", "root", "root_of"]

OPTION = "--manifest-root"
"""The option of `ksmdist run` and `plan` that names one more."""

_ALL_NODES = "*"
_ANYWHERE = Uri("file", _ALL_NODES, "")


def root(text: str) -> Uri:
    """What the option names. A folder: there, on every node; node://NAME/DIR: on that one; /: everything, stores too.

    A URI of a store: what is below it, by the same query. Raises SettingsError.
    """
    if not text:
        raise SettingsError("is empty", OPTION, "name a folder or URI, or / for all")
    local = local_path(text)
    if local is not None:
        return Uri("file", _ALL_NODES, os.path.abspath(local).lstrip("/"))
    uri = parse_uri(text)
    if ".." in uri.path.split("/"):
        raise SettingsError(f"{text} has .. in it", OPTION, "write it without")
    return replace(uri, path=_plain(uri.path))


def root_of(manifest: str) -> Uri:
    """The root that a manifest has by itself: its folder, there where it is, not on single nodes."""
    local = local_path(manifest)
    if local is not None:
        return Uri("file", "", os.path.dirname(os.path.abspath(local)).lstrip("/"))
    uri = parse_uri(manifest)
    return replace(uri, path=_plain(posixpath.dirname(uri.path)))


def check(path: str, node: str, roots: Sequence[Uri]) -> None:
    """Raises SettingsError where a path or URI, or of a pattern the folder that it begins in, is in none of the roots.

    To be called on `node`, if there is one; of a path all links are resolved. No roots: from no manifest.
    """
    if not roots or _ANYWHERE in roots:
        return
    local = local_path(path)
    if local is None:
        _check_stored(path, roots)
        return
    pattern = has_wildcard(local) and not os.path.lexists(local)
    named = _fixed(local) if pattern else local
    is_folder = pattern or named.endswith("/") or os.path.isdir(named)
    real = os.path.realpath(named)
    folder = real if is_folder else os.path.dirname(real)
    asked = [(real, folder)]
    if not is_folder:  # of a link into a root its folder is asked as well: files beside an image are opened there
        beside = os.path.realpath(os.path.dirname(named) or ".")
        asked.append((beside, beside))
    for real, folder in asked:
        if any(_has(one, real, node) for one in roots):
            continue
        whole = os.path.abspath(named)
        leads = "" if real in (whole, os.path.dirname(whole)) else f", leads to {real}"
        given = str(Uri("node", node, local.lstrip("/"))) if node else path
        wanted = f"{OPTION} {shlex.quote(folder)}"
        if node:
            there = str(Uri("node", node, folder.lstrip("/") or "."))
            wanted = f"{OPTION} {shlex.quote(there)}, or for every node {wanted}"
        raise _outside(given, leads, roots, wanted)


def _check_stored(text: str, roots: Sequence[Uri]) -> None:
    uri = parse_uri(text)
    if uri.path.startswith("/") or {".", ".."} & set(uri.path.split("/")):  # to some stores they are names
        raise SettingsError("has //, /./ or /../ in it, in a manifest", text, "write it without")
    plain = _plain(_fixed(uri.path) if has_wildcard(uri.path) else uri.path)
    for one in roots:
        # The query says which server is asked, with our credentials.
        same = (one.scheme, one.authority, sorted(one.query)) == (uri.scheme, uri.authority, sorted(uri.query))
        if same and is_inside(f"/{plain}", f"/{one.path}"):
            return
    folder = plain if has_wildcard(uri.path) or text.endswith("/") else posixpath.dirname(plain)
    raise _outside(text, "", roots, f"{OPTION} {shlex.quote(str(replace(uri, path=folder)))}")


def _outside(given: str, leads: str, roots: Sequence[Uri], wanted: str) -> SettingsError:
    shown = [f"/{one.path}" if one.scheme == "file" else str(one) for one in roots[:5]]
    return SettingsError(
        f"is named by a manifest or an earlier run{_line(leads)} and is outside of what it may name: "
        + ", ".join(shown),
        _line(given),
        f"if it is to be read, add {_line(wanted)}",
    )


def _line(text: str) -> str:
    """A text with names of files in it, which a stranger may have chosen, as one that is printed as it is."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _has(one: Uri, real: str, node: str) -> bool:
    """Whether a root has a path of this host, of which `node` is the name that the manifest gives, if any."""
    names = (node, _ALL_NODES) if one.scheme == "file" else (node,)
    is_here = one.scheme in ("file", "node") and one.authority in names
    return is_here and is_inside(real, os.path.realpath(f"/{one.path}"))


def is_inside(path: str, folder: str) -> bool:
    """Whether a whole path is a folder's own or below it; no link is resolved."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _fixed(pattern: str) -> str:
    """The folder that a pattern begins in."""
    parts = pattern.split("/")
    plain = next(number for number, part in enumerate(parts) if has_wildcard(part))
    return "/".join(parts[:plain]) or ("/" if pattern.startswith("/") else "")


def _plain(path: str) -> str:
    """A path of a URI without empty parts, dots, and slashes at its ends."""
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def check_beside(path: str, file: str) -> None:
    """Raises ImageReadError where `path`, which an image in file `file` names, is a link out of that file's folder.

    A folder below it may be a link, as CRIU's `parent` is one, to a folder beside that of the image.
    """
    if is_uri(path) and local_path(path) is None:
        return
    path, file = local_path(path) or path, local_path(file) or file
    own = os.path.realpath(os.path.dirname(file) or ".")
    folder = os.path.realpath(os.path.dirname(path) or ".")
    above = os.path.dirname(own)
    if folder != own and not (is_inside(folder, above) and folder != above):
        raise ImageReadError(
            f"is in {_line(folder)}, which an image may not lead to: it is not beside {_line(own)}",
            path,
            "copy it beside the image's folder, if the image is yours",
        )
    real = os.path.realpath(path)
    if not is_inside(real, folder):
        raise ImageReadError(
            f"is a link to {_line(real)}, out of the folder of the image that names it",
            path,
            "put the file itself there, if the image is yours",
        )
