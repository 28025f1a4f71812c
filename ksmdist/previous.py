"""An earlier run of the same images, to tell what changed since: its checksums, or its images themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ksmdist import checksums, intake, store
from ksmdist.checksums import Stretch
from ksmdist.errors import RunDirectoryError, SettingsError
from ksmdist.fleet import Source
from ksmdist.images import roots
from ksmdist.passes import Compared, Pass
from ksmdist.plan import Task
from ksmdist.scanned import Opened
from ksmdist.tables import CHECKSUMS, IMAGES, KINDS, PASSES

__all__ = ["History", "Previous", "describe", "load", "sources"]


@dataclass(frozen=True, slots=True)
class Previous:
    """What an earlier run knows of this run's images, by their number here.

    rows:      of its table `passes`, with this run's numbers of images
    stretches: where the checksums of its last pass are
    """

    rows: Mapping[int, Sequence[Mapping[str, Any]]]
    stretches: Mapping[int, tuple[Stretch, ...]]


class History:
    """The passes of this run's images so far, and where the checksums of the last one of each are.

    rows: of table `passes` that another run has counted; passes: that this run has.
    lost: pages of earlier passes that could not be read, by image: they count as changed.
    """

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.passes: list[Pass] = []
        self.lost: dict[int, int] = {}
        self._last: dict[int, int] = {}  # number of the last pass that another run has counted
        self._earlier: dict[int, tuple[int, tuple[Stretch, ...]]] = {}

    @classmethod
    def of(cls, previous: Previous | None, image_ids: Sequence[str]) -> History:
        """What is known before this run reads anything."""
        self = cls()
        for image, stretches in (previous.stretches if previous is not None else {}).items():
            assert previous is not None
            rows = list(previous.rows[image])
            if not rows:
                pages = sum(stretch.rows for stretch in stretches)
                rows = [
                    {"image": image, "image_id": image_ids[image], "pass": 1, "pages": pages, "stable": pages}
                    | dict.fromkeys(("changed", "appeared", "gone"))
                ]
            self.rows += rows
            self._last[image] = rows[-1]["pass"]
            self._earlier[image] = (len(rows), stretches)
        return self

    @property
    def images(self) -> frozenset[int]:
        """Images that have a pass before."""
        return frozenset(self._earlier)

    def of_task(self, task: Task) -> dict[int, tuple[int, tuple[Stretch, ...]]]:
        """For the images of a task that have one: how many passes were before, and the checksums of the last."""
        return {shard.image: self._earlier[shard.image] for shard in task.shards if shard.image in self._earlier}

    def add(
        self,
        numbers: Mapping[int, int],
        compared: Sequence[Compared],
        stretches: Mapping[int, Sequence[Stretch]] | None = None,
    ) -> None:
        """Add a pass. numbers: of it, by image; stretches: its checksums, None for the last pass."""
        for image, number in numbers.items():
            count, before = self._earlier.get(image, (0, ()))
            if stretches is None and not count:
                continue  # an image of one pass
            pages = sum(stretch.rows for stretch in before) if count else None
            self.passes.append(Pass(image, self._last.get(image, 0) + number, compared[image], pages))
            if compared[image].lost:
                self.lost[image] = self.lost.get(image, 0) + compared[image].lost
            if stretches is not None:
                self._earlier[image] = (count + 1, tuple(stretches.get(image, ())))


def sources(path: Path, page_size: int, more_roots: Sequence[str] = ()) -> list[Source]:
    """The images of an earlier run that kept no checksums, to be read again; none where it did.

    A run may come from a stranger: its images must lie where the run does, or in one of more_roots, as those of a
    manifest must (fleet.read_manifest).
    Raises RunDirectoryError where it is no run, SettingsError where it has another page size.
    """
    manifest = store.read_manifest(path)
    other = manifest["settings"]["page_size"]
    if other != page_size:
        raise SettingsError(f"has pages of {other} bytes, these images of {page_size}", str(path), "give another run")
    if manifest["settings"]["checksums"]:
        return []
    allowed = (roots.root_of(str(path)), *map(roots.root, more_roots))
    return [
        Source(
            uri=image["path"],
            node=image["node"],
            image_id=image["image_id"],
            host=image["host"],
            tenant=image["tenant"],
            kind=image["kind"],
            base=tuple(image["base"]),
            roots=allowed,
        )
        for image in manifest["images"]
        if image["reached"]
    ]


def describe(path: Path, opened: Sequence[Opened]) -> dict[str, Any]:
    """What plan.json keeps of an earlier run: enough to know it again.

    opened: this run's images; where the earlier run kept no checksums, with its own as their first pass.
    Raises SettingsError where none of them is of that run, RunDirectoryError where one that is read again has changed.
    """
    manifest = store.read_manifest(path)
    was = {image["image_id"]: image["fingerprint"] for image in manifest["images"] if image["reached"]}
    here = [image for image in opened if image.image_id in was]
    if not here:
        raise SettingsError(
            "has none of these images", str(path), f"they go by their names: {', '.join(sorted(was)[:5])} are there"
        )
    kept = manifest["settings"]["checksums"]
    for image in here:
        if not kept and image.earlier and was[image.image_id] != image.earlier[0].info.fingerprint:
            raise RunDirectoryError(
                f"kept no checksums, and its image {image.earlier[0].info.path} has changed since",
                str(path),
                "run with --checksums what is to be compared with later",
            )
    return {"run": str(path), "checksums": kept, "fingerprint": _fingerprint(path)}


def _fingerprint(path: Path) -> str:
    try:
        return xxhash.xxh3_128_hexdigest(intake.read_bytes(path, "run.json"))
    except (OSError, ValueError):
        raise RunDirectoryError("is no run directory", str(path), "give a directory that `ksmdist run` wrote") from None


def load(described: Mapping[str, Any] | None, image_ids: Sequence[str]) -> Previous | None:
    """The passes and checksums that an earlier run kept of these images; None where there is none, or kept none.

    described: as describe() gave it. Raises RunDirectoryError.
    """
    if described is None or not described["checksums"]:
        return None
    path = Path(described["run"])
    manifest = store.read_manifest(path)
    if _fingerprint(path) != described["fingerprint"]:
        raise RunDirectoryError(
            "is another run than when this one was begun", str(path), "put it back, or begin anew with another -o"
        )
    number_of = {image_id: number for number, image_id in enumerate(image_ids)}
    renumbered = {
        before: number_of[image["image_id"]]
        for before, image in enumerate(manifest["images"])
        if image["image_id"] in number_of and image["reached"]
    }
    found = checksums.find([path / name for name in intake.names(path, CHECKSUMS.file)])
    _check_whole(path, found)
    stretches = {now: tuple(found.get(before, ())) for before, now in renumbered.items()}
    rows: dict[int, list[dict[str, Any]]] = {now: [] for now in renumbered.values()}
    for row in store.read_table(path, PASSES).to_pylist():
        now = renumbered.get(row["image"])
        if now is not None:
            rows[now].append(row | {"image": now})
    return Previous(rows, stretches)


def _check_whole(path: Path, found: Mapping[int, Sequence[Stretch]]) -> None:
    """Raises RunDirectoryError where there is no checksum for each page that has bytes."""
    for row in store.read_table(path, IMAGES).to_pylist():
        pages = sum(row[f"kind_{kind}"] for kind in KINDS)
        kept = sum(stretch.rows for stretch in found.get(row["scan_order"], ()))
        if pages != kept:
            raise RunDirectoryError(
                f"has checksums of {kept} of the {pages} pages of image {row['image_id']}",
                str(path),
                "run the earlier pass again, with --checksums",
            )
