"""STUB until the real one is here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Source:
    """x"""

    uri: str
    node: str = ""
    image_id: str = ""
    host: str = ""
    tenant: str = ""
    kind: str = ""
    pass_number: int | None = None


@dataclass(frozen=True, slots=True)
class Expanded:
    """x"""

    sources: tuple[Source, ...]
    left_out: tuple[tuple[str, str], ...] = ()


def parse(text: str) -> Source:
    """x"""
    if text.startswith("node://"):
        name, _, path = text[7:].partition("/")
        return Source("/" + path, name, host=name)
    return Source(text)


def read_manifest(path: str) -> list[Source]:
    """x"""
    return []


def expand(source: Source) -> Expanded:
    """x"""
    return Expanded((source,))


def is_remote(uri: str) -> bool:
    """x"""
    return "://" in uri
