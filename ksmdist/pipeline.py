"""The flow, once, top to bottom: images -> shards -> digests, classes -> ranges -> tree -> counters."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from ksmdist import classes, counters, digests, engines, images, shards, store, tree
from ksmdist.errors import ImageError, SettingsError
from ksmdist.images import Hole, ImageInfo
from ksmdist.settings import Settings
from ksmdist.shards import Shard
from ksmdist.tables import CLASSES, COUNTERS, HOLES, IMAGES, KINDS, SPECTRUM, STABLE_TREE
from ksmdist.version import __version__

__all__ = ["NoProgress", "Progress", "Run", "run"]


class Progress(Protocol):
    """Told what is done, as it is done."""

    def engine(self, name: str, why: str) -> None:
        """An engine was chosen."""

    def scanning(self, pages: int, page_size: int) -> None:
        """Scanning begins."""

    def scanned(self, pages: int) -> None:
        """So many pages more are scanned."""

    def merged(self, ranges: int) -> None:
        """One more of so many ranges is merged."""


class NoProgress:
    """Tells nobody."""

    def engine(self, name: str, why: str) -> None: ...
    def scanning(self, pages: int, page_size: int) -> None: ...
    def scanned(self, pages: int) -> None: ...
    def merged(self, ranges: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: where it is, the object `--json` prints, and its small tables.

    summary: keys as README.md lists them; images: table `images`; caveats: for people.
    """

    path: Path
    summary: dict[str, object]
    images: pa.Table
    caveats: tuple[str, ...]

    @property
    def holes(self) -> int:
        """Pages that could not be read; 0 means the counts are complete."""
        return int(np.sum(self.images.column("unreadable").to_numpy()))


@dataclass(frozen=True, slots=True)
class _Scanned:
    """What a scan tells the driver: by image number, classes, kinds, and holes."""

    images: dict[int, tuple[np.ndarray, np.ndarray]]
    holes: list[tuple[int, Hole]]
    pages: int


@functools.lru_cache(maxsize=4)
def _reopened(info: ImageInfo, format: str) -> images.Image:
    """The image, opened once in each worker; raises ImageError if it is not the file that was planned."""
    image = images.open_image(info.path, info.page_size, format)
    if image.info.fingerprint != info.fingerprint:
        raise ImageError("changed while it was scanned", info.path, "scan a copy, or stop what writes to it")
    return image


def _scan(
    infos: Sequence[ImageInfo], settings: Settings, ranges: int, group: tuple[Shard, ...]
) -> tuple[_Scanned, list[pa.Table]]:
    """Read, hash, classify and combine the pages of some shards: the map."""
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    holes: list[tuple[int, Hole]] = []
    content: list[pa.Table] = []
    for shard in group:
        info = infos[shard.image]
        by_class, by_kind = found.setdefault(
            shard.image, (np.zeros(len(CLASSES), np.int64), np.zeros(len(KINDS), np.int64))
        )
        for item in _reopened(info, info.format).batches(shard.start, shard.end):
            if isinstance(item, Hole):
                holes.append((shard.image, item))
                continue
            page = digests.digest_pages(item, info.page_size)
            classified = classes.classify(page, shard.image, settings.eligible, info.page_size)
            by_class += classified.classes
            by_kind += classified.kinds
            content.append(classified.content)
    scanned = _Scanned(found, holes, sum(shard.pages for shard in group))
    return scanned, tree.split(classes.combine(content), ranges)


@dataclass(frozen=True, slots=True)
class _Merged:
    """What a merge tells the driver of its range: small, whatever the range's size."""

    spectrum: pa.Table
    images: np.ndarray
    stable_copies: int


def _merge(image_ids: Sequence[str], out: Path, number: int, tables: list[pa.Table]) -> _Merged:
    """Merge one range and write its part of the stable tree: the reduce."""
    merged = tree.merge(tables, image_ids)
    store.write_table(merged.stable, STABLE_TREE, out, number)
    copies = int(np.sum(merged.stable.column("copies").to_numpy()))
    return _Merged(merged.spectrum, merged.images, copies)


def _opened(paths: Sequence[str], settings: Settings) -> list[tuple[str, ImageInfo, tuple[Hole, ...]]]:
    """(image id, info, holes known from the headers) of every image, sorted by id."""
    if not paths:
        raise SettingsError("no image was given", "IMAGE", "name one or more memory images")
    infos, holes = [], []
    for path in paths:
        image = images.open_image(path, settings.page_size, settings.format)
        infos.append(image.info)
        holes.append(image.holes)
        image.close()
    ids = images.image_ids(infos)
    return sorted(zip(ids, infos, holes, strict=True), key=lambda opened: opened[0])


def run(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    engine: str = "auto",
    address: str | None = None,
    progress: Progress | None = None,
) -> Run:
    """Scan memory images, merge what they share, count it as KSM would, and write the run directory.

    The tables written depend on the images and the settings alone: not on the engine, the number
    of workers, ranges or pages in a shard, nor on the order of the images.
    Raises KsmdistError; then nothing is left at `out`.
    """
    began = time.monotonic()
    settings = settings or Settings()
    progress = progress or NoProgress()
    opened = _opened([os.fspath(path) for path in paths], settings)
    ids = [image_id for image_id, _, _ in opened]
    infos = [info for _, info, _ in opened]
    total = sum(info.pages for info in infos)
    shard_pages = settings.shard_pages or shards.default_shard_pages(total)
    ranges = settings.ranges or shards.default_ranges(total)
    settings = replace(settings, shard_pages=shard_pages, ranges=ranges)
    planned = shards.plan_shards([info.pages for info in infos], shard_pages)
    tasks = shards.pack_shards(planned, shard_pages)
    choice = engines.choose(engine, address, total * settings.page_size)
    progress.engine(choice.name, choice.why)

    with ExitStack() as stack:
        directory = stack.enter_context(store.new_run(Path(out)))
        runner = engines.start(choice)
        stack.callback(runner.close)
        started = time.monotonic()
        by_class = np.zeros((len(infos), len(CLASSES)), np.int64)
        by_kind = np.zeros((len(infos), len(KINDS)), np.int64)
        holes = [(number, hole) for number, (_, _, known) in enumerate(opened) for hole in known]

        scanned = started

        def on_mapped(_: int, found: _Scanned) -> None:
            nonlocal scanned
            for image, (in_class, in_kind) in found.images.items():
                by_class[image] += in_class
                by_kind[image] += in_kind
            holes.extend(found.holes)
            progress.scanned(found.pages)
            scanned = time.monotonic()

        def on_reduced(_: int) -> None:
            progress.merged(ranges)

        progress.scanning(total, settings.page_size)
        merged = runner.shuffle(
            functools.partial(_scan, infos, settings, ranges),
            tasks,
            functools.partial(_merge, ids, directory.resolve()),
            ranges,
            on_mapped,
            on_reduced,
        )
        shares = np.zeros((len(infos), 4), np.int64)
        for part in merged:
            shares[part.images[:, 0]] += part.images[:, 1:]
        by_class[:, CLASSES.index("duplicate")] += shares[:, 0]
        by_class[:, CLASSES.index("unique")] += shares[:, 1]

        holes_table = _holes_table(holes, ids, settings.page_size)
        images_table = _images_table(ids, infos, holes_table, by_class, by_kind, shares[:, 2:])
        spectrum = tree.add_spectra([part.spectrum for part in merged])
        volatile = int(by_class[:, CLASSES.index("volatile")].sum())
        counted = counters.ksm_counters(spectrum, settings, volatile)
        stable_copies = sum(part.stable_copies for part in merged)
        known = sum(hole.pages for _, _, known in opened for hole in known)
        lost = sum(holes_table.column("pages").to_pylist()) - known
        identities = counters.check(images_table, spectrum, stable_copies, total, lost, counted, settings)

        store.write_table(images_table, IMAGES, directory)
        store.write_table(spectrum, SPECTRUM, directory)
        store.write_table(holes_table, HOLES, directory)
        store.write_table(counters.counters_table(counted, settings), COUNTERS, directory)
        summary = _summary(images_table, holes_table, spectrum, counted, settings) | {
            "engine": choice.name,
            "engine_why": choice.why,
            "run": os.fspath(out),
        }
        ended = time.monotonic()
        caveats = tuple(
            dict.fromkeys(
                f"{image_id}: {caveat}" for image_id, info in zip(ids, infos, strict=True) for caveat in info.caveats
            )
        )
        store.write_manifest(
            {
                "run_version": store.RUN_VERSION,
                "ksmdist": __version__,
                "settings": settings.as_dict(),
                "images": [asdict(info) | {"image_id": i} for i, info in zip(ids, infos, strict=True)],
                "engine": {"name": choice.name, "why": choice.why, "tasks": len(tasks), "shards": len(planned)},
                "timings": {
                    "start_s": round(started - began, 3),
                    "scan_s": round(scanned - started, 3),
                    "merge_s": round(ended - scanned, 3),
                },
                "identities": [asdict(identity) | {"holds": identity.holds} for identity in identities],
                "caveats": list(caveats),
                "summary": summary,
            },
            directory,
        )
    return Run(Path(out), summary, images_table, caveats)


def _holes_table(holes: Sequence[tuple[int, Hole]], ids: Sequence[str], page_size: int) -> pa.Table:
    """The `holes` table: sorted, and neighbours with one reason joined, however the shards cut them."""
    joined: list[tuple[int, Hole]] = []
    for image, hole in sorted(holes, key=lambda found: (found[0], found[1].address)):
        before, last = joined[-1] if joined else (-1, hole)
        if (before, last.address + last.pages * page_size, last.reason) == (image, hole.address, hole.reason):
            joined[-1] = (image, replace(last, pages=last.pages + hole.pages))
        else:
            joined.append((image, hole))
    rows = [{"image_id": ids[image], **asdict(hole)} for image, hole in joined]
    return pa.Table.from_pylist(rows, schema=HOLES.schema)


def _images_table(
    ids: Sequence[str],
    infos: Sequence[ImageInfo],
    holes: pa.Table,
    by_class: np.ndarray,
    by_kind: np.ndarray,
    shared: np.ndarray,
) -> pa.Table:
    unreadable = dict.fromkeys(ids, 0)
    for row in holes.to_pylist():
        unreadable[row["image_id"]] += row["pages"]
    columns: dict[str, object] = {
        "image_id": ids,
        "kind": [info.kind for info in infos],
        "format": [info.format for info in infos],
        "host": [info.host for info in infos],
        "tenant": [info.tenant for info in infos],
        "total": by_class.sum(axis=1),
        "absent": [info.pages_absent for info in infos],
        "unreadable": [unreadable[image_id] for image_id in ids],
    }
    columns |= {name: by_class[:, code] for code, name in enumerate(CLASSES)}
    columns |= {f"kind_{name}": by_kind[:, code] for code, name in enumerate(KINDS)}
    columns |= {"shared_within": shared[:, 0], "shared_with_others": shared[:, 1]}
    return pa.Table.from_pydict(columns, schema=IMAGES.schema)


def _summary(
    images_table: pa.Table,
    holes: pa.Table,
    spectrum: pa.Table,
    counted: counters.Counters,
    settings: Settings,
) -> dict[str, object]:
    """The object `ksmdist run --json` prints. Keys are a promise: they are added to, none goes."""

    def total(column: str) -> int:
        return int(np.sum(images_table.column(column).to_numpy()))

    kernel = asdict(counted)
    merges = {
        "zero": kernel.pop("zero_merges"),
        "content": kernel.pop("content_merges"),
        "saved_bytes": kernel.pop("saved_bytes"),
    }
    return {
        "pages": {name: total(name) for name in ("total", "absent", *CLASSES)},
        "kinds": {name: total(f"kind_{name}") for name in KINDS},
        "contents": counters.contents(spectrum),
        "merges": merges,
        "counters": kernel,
        "holes": {"ranges": len(holes), "pages": total("unreadable")},
        "settings": settings.as_dict(),
    }
