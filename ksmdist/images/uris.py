"""Names of images: paths, URIs of object stores, `file://`, and `node://NAME/path` of one node's own files.

A text with a scheme is a URI; all else is a path. Paths in URIs are percent-encoded. A `?` begins a query
only where `key=value` follows up to the end, since it is a wildcard as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from ksmdist.errors import SettingsError

__all__ = ["STORES", "Uri", "is_uri", "local_path", "parse_uri"]

STORES = ("s3", "gs", "abfss", "hdfs")
"""Schemes of object stores."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_QUERY = re.compile(r"\?([A-Za-z_][\w-]*=[^?&]*(?:&[A-Za-z_][\w-]*=[^?&]*)*)\Z")
_SECRETS = re.compile(
    r"(secret|password|token|signature|credential|[a-z_-]key|access_?key|account_?key|^sas|^sig$)", re.I
)
_QUERY_KEYS = {"s3": ("region", "endpoint_override", "scheme")}


@dataclass(frozen=True, slots=True)
class Uri:
    """A URI in parts. authority: bucket, host or node; path: decoded, without its first slash."""

    scheme: str
    authority: str
    path: str
    query: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        path = self.path.replace("%", "%25")
        if _QUERY.search(path):  # a name that would be read as a query
            path = path.replace("?", "%3F")
        query = "&".join(f"{key}={value}" for key, value in self.query)
        return f"{self.scheme}://{self.authority}/{path}" + (f"?{query}" if query else "")

    @property
    def name(self) -> str:
        """What it names: decoded, without the query."""
        return f"{self.scheme}://{self.authority}/{self.path}"


def is_uri(text: str) -> bool:
    """Whether it has a scheme."""
    return _SCHEME.match(text) is not None


def parse_uri(text: str) -> Uri:
    """Take a URI apart. Raises SettingsError: an unknown scheme, no bucket, host or path, a password in it."""
    found = _SCHEME.match(text)
    scheme = found[1].lower() if found else ""
    if found is None or scheme not in ("file", "node", *STORES):
        raise SettingsError(
            f"has the unknown scheme {scheme!r}", text, f"use a path, file://, node://NAME/path, {_listed()}"
        )
    rest = text[found.end() :]
    query: tuple[tuple[str, str], ...] = ()
    asked = _QUERY.search(rest) if scheme in STORES else None
    if asked:
        rest = rest[: asked.start()]
        query = tuple((key, unquote(value)) for key, _, value in (p.partition("=") for p in asked[1].split("&")))
    authority, _, path = rest.partition("/")
    user, at, _ = authority.rpartition("@")
    if ":" in user or (at and scheme == "s3") or any(_SECRETS.search(key) or "@" in value for key, value in query):
        # The text itself is not shown: it would be in the log of the run.
        raise SettingsError(
            "has a password or key in it, which run.json and logs would keep",
            f"{scheme}://...@{authority[len(user) + 1 :]}/{path}" if at else f"{scheme}://{authority}/{path}",
            "give it to the store's client instead: the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, "
            "GOOGLE_APPLICATION_CREDENTIALS), its configuration files or the instance's role",
        )
    for key, _ in query:
        if scheme in _QUERY_KEYS and key not in _QUERY_KEYS[scheme]:
            raise SettingsError(f"has the unknown query key {key}", text, f"use {', '.join(_QUERY_KEYS[scheme])}")
    if scheme == "file":
        if authority not in ("", "localhost"):
            raise SettingsError(f"names the host {authority}", text, f"write node://{authority}/{path}")
    elif not authority:
        raise SettingsError("names no bucket, host or node", text, f"write {scheme}://NAME/path")
    if "\0" in unquote(path) or (not path and scheme in ("file", "node")):
        raise SettingsError("names no file", text, f"write {scheme}://{authority}/path")
    return Uri(scheme, authority, unquote(path), query)


def local_path(text: str) -> str | None:
    """The path on this host of a path or a file:// URI; None for what is elsewhere."""
    if not is_uri(text):
        return text
    uri = parse_uri(text)
    return f"/{uri.path}" if uri.scheme == "file" else None


def _listed() -> str:
    return ", ".join(f"{scheme}://" for scheme in STORES[:-1]) + f" or {STORES[-1]}://"
