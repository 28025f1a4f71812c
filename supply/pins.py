"""What is pinned, with which hashes, and what of it the program needs to run."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["LOCKS", "ROOT", "Pin", "Wanted", "project", "read_pins", "runtime"]

ROOT = Path(__file__).parents[1]

LOCKS: tuple[str, ...] = ("constraints.txt", "supply/uv.txt", "fuzz/atheris.txt")
"""Files of pins: what make setup installs; what make lock and make fuzz install besides."""

_PYTHONS = ("3.11", "3.12", "3.13")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Pin:
    """A requirement of a lock file: one version, where `marker` holds ("" anywhere), one of these files (sha256)."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A package that the program needs to run: its pins and what it needs itself.

    optional: only an extra wants it; direct: pyproject.toml names it
    """

    name: str
    pins: tuple[Pin, ...]
    needs: tuple[str, ...]
    optional: bool
    direct: bool


def read_pins(path: Path) -> list[Pin]:
    """The pins of a lock file; raises ValueError, naming the line, where one is not a version with hashes."""
    pins = []
    lines = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    for line in filter(None, (line.partition("#")[0].strip() for line in lines)):
        hashes = tuple(_HASH.findall(line))
        text = _HASH.sub("", line).strip()
        try:
            found = Requirement(text)
        except ValueError as error:
            raise ValueError(f"{path.name}: {text!r} is no requirement: {error}") from None
        (exact, *more) = [*found.specifier] or [None]
        if exact is None or more or exact.operator != "==" or "*" in exact.version or found.url or found.extras:
            raise ValueError(f"{path.name}: {text!r} is not pinned to one version")
        if not hashes:
            raise ValueError(f"{path.name}: {text!r} has no hashes")
        pins.append(Pin(canonicalize_name(found.name), exact.version, str(found.marker or ""), tuple(sorted(hashes))))
    return pins


def project() -> Mapping[str, object]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def runtime(pins: Iterable[Pin]) -> list[Wanted]:
    """What the wheel needs on Linux, by name: its dependencies, theirs, and those of its extras.

    Asks the packages that are installed what they need; raises ValueError for one that is not, or is not pinned.
    """
    by_name: dict[str, tuple[Pin, ...]] = {}
    for pin in pins:
        by_name[pin.name] = (*by_name.get(pin.name, ()), pin)
    table = project()["project"]
    assert isinstance(table, dict)
    extras = [text for texts in table.get("optional-dependencies", {}).values() for text in texts]
    found: dict[str, Wanted] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    for texts, optional in ((table["dependencies"], False), (extras, True)):
        queue = _names(texts, frozenset())
        direct = {name for name, _ in queue}
        while queue:
            name, wanted = queue.pop()
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            if name not in by_name:
                raise ValueError(f"{name} is needed to run and not pinned")
            try:
                needs = _names(metadata.requires(name) or (), wanted)
            except metadata.PackageNotFoundError:
                raise ValueError(f"{name} is not installed: what it needs is not known") from None
            before = found.get(name)
            all_needs = {need for need, _ in needs} | set(() if before is None else before.needs)
            is_optional = optional and (before is None or before.optional)
            is_direct = name in direct or (before is not None and before.direct)
            found[name] = Wanted(name, by_name[name], tuple(sorted(all_needs)), is_optional, is_direct)
            queue += needs
    return sorted(found.values(), key=lambda one: one.name)


def _names(texts: Iterable[str], wanted: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    """Names and extras of requirements that hold on Linux, with one of these extras or none."""
    found: list[tuple[str, frozenset[str]]] = []
    for text in texts:
        need = Requirement(text)
        if need.marker is None or _holds(need.marker, wanted):
            found.append((canonicalize_name(need.name), frozenset(need.extras)))
    return found


def _holds(marker: Marker, extras: frozenset[str]) -> bool:
    here = {name: str(value) for name, value in default_environment().items()}
    linux = here | {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    return any(
        marker.evaluate(linux | {"python_version": python, "python_full_version": f"{python}.0", "extra": extra})
        for python in _PYTHONS
        for extra in ("", *extras)
    )
