"""The flow, once, top to bottom: images -> shards -> digests, classes -> ranges -> tree -> counters."""

from __future__ import annotations

import bisect
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

from ksmdist import classes, counters, digests, engines, identities, images, shards, store, tree
from ksmdist.classes import Classified
from ksmdist.counters import Prediction
from ksmdist.errors import ImageError, SettingsError
from ksmdist.images import Hole, ImageInfo
from ksmdist.mappings import Patterns, add_patterns, mark_split
from ksmdist.runs import Run
from ksmdist.settings import Settings
from ksmdist.shards import Shard
from ksmdist.sharing import Sharing
from ksmdist.tables import (
    CLASSES,
    COUNTERS,
    HOLES,
    IMAGES,
    KINDS,
    KSM_STAT,
    PASSED_OVER,
    REASONS,
    REGIONS,
    STABLE_TREE,
    TABLES,
    WHATIF,
    ZERO_COLORS,
)
from ksmdist.version import __version__
from ksmdist.whatif import grid

__all__ = ["NoProgress", "Progress", "run"]


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


@dataclass(slots=True)
class _Scanned:
    """What a scan tells the driver of an image: pages by class, kind, region and colour of the zero page."""

    classes: np.ndarray
    kinds: np.ndarray
    regions: np.ndarray
    colors: np.ndarray
    framed: int = 0

    @classmethod
    def nothing(cls, info: ImageInfo, settings: Settings) -> _Scanned:
        return cls(
            np.zeros(len(CLASSES), np.int64),
            np.zeros(len(KINDS), np.int64),
            np.zeros((len(info.regions) + 1, len(REASONS)), np.int64),
            np.zeros((settings.zero_page_colors, 2), np.int64),
        )

    def add(self, other: _Scanned | Classified) -> None:
        self.classes += other.classes
        self.kinds += other.kinds
        self.regions += other.regions
        self.colors += other.colors
        self.framed += other.framed


@dataclass(frozen=True, slots=True)
class _Mapped:
    """What a task tells the driver: its images by number, and holes."""

    images: dict[int, _Scanned]
    holes: list[tuple[int, Hole]]
    pages: int


@functools.lru_cache(maxsize=4)
def _reopened(path: str, page_size: int, format: str, fingerprint: str) -> images.Image:
    """The image, opened once in each worker; raises ImageError if it is not the file that was planned."""
    image = images.open_image(path, page_size, format)
    if image.info.fingerprint != fingerprint:
        raise ImageError("changed while it was scanned", path, "scan a copy, or stop what writes to it")
    return image


def _scan(
    infos: Sequence[ImageInfo],
    region_names: Sequence[str],
    settings: Settings,
    ranges: int,
    group: tuple[Shard, ...],
) -> tuple[_Mapped, list[pa.Table]]:
    """Read, hash, classify and combine the pages of some shards: the map."""
    found: dict[int, _Scanned] = {}
    holes: list[tuple[int, Hole]] = []
    content: list[pa.Table] = []
    for shard in group:
        info = infos[shard.image]
        scanned = found.setdefault(shard.image, _Scanned.nothing(info, settings))
        regions = np.array([bisect.bisect_left(region_names, name) if name else -1 for name in info.regions], np.int32)
        image = _reopened(info.path, info.page_size, info.format, info.fingerprint)
        for item in image.batches(shard.start, shard.end):
            if isinstance(item, Hole):
                holes.append((shard.image, item))
                continue
            page = digests.digest_pages(item, info.page_size)
            classified = classes.classify(page, shard.image, settings, regions)
            scanned.add(classified)
            content.append(classified.content)
    mapped = _Mapped(found, holes, sum(shard.pages for shard in group))
    return mapped, tree.split(classes.combine(content), ranges)


@dataclass(frozen=True, slots=True)
class _Merged:
    """What a merge tells the driver of its range: small, whatever the range's size."""

    spectrum: np.ndarray
    image_spectrum: np.ndarray
    patterns: Patterns
    split: np.ndarray
    images: np.ndarray
    stable_copies: int


def _merge(image_ids: Sequence[str], hosts: Sequence[str], out: Path, number: int, tables: list[pa.Table]) -> _Merged:
    """Merge one range and write its part of the stable tree: the reduce."""
    merged = tree.merge(tables, image_ids, hosts)
    store.write_table(merged.stable, STABLE_TREE, out, number)
    copies = int(np.sum(merged.stable.column("copies").to_numpy()))
    return _Merged(merged.spectrum, merged.image_spectrum, merged.patterns, merged.split, merged.images, copies)


def _opened(paths: Sequence[str], settings: Settings) -> list[tuple[str, ImageInfo, tuple[Hole, ...]]]:
    """(image id, info, holes known from the headers) of every image, in the order in which KSM scans them."""
    if not paths:
        raise SettingsError("no image was given", "IMAGE", "name one or more memory images")
    infos, holes = [], []
    for path in paths:
        image = images.open_image(path, settings.page_size, settings.format)
        infos.append(image.info)
        holes.append(image.holes)
        image.close()
    ids = images.image_ids(infos)
    return sorted(zip(ids, infos, holes, strict=True), key=lambda opened: (opened[1].scan_order, opened[0]))


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
        found = [_Scanned.nothing(info, settings) for info in infos]
        holes = [(number, hole) for number, (_, _, known) in enumerate(opened) for hole in known]

        scanned = started

        def on_mapped(_: int, mapped: _Mapped) -> None:
            nonlocal scanned
            for image, of_image in mapped.images.items():
                found[image].add(of_image)
            holes.extend(mapped.holes)
            progress.scanned(mapped.pages)
            scanned = time.monotonic()

        def on_reduced(_: int) -> None:
            progress.merged(ranges)

        progress.scanning(total, settings.page_size)
        region_names = sorted({name for info in infos for name in info.regions if name})
        merged = runner.shuffle(
            functools.partial(_scan, infos, region_names, settings, ranges),
            tasks,
            functools.partial(_merge, ids, [info.host for info in infos], directory.resolve()),
            ranges,
            on_mapped,
            on_reduced,
        )
        shares = np.zeros((len(infos), 4), np.int64)
        for part in merged:
            shares[part.images[:, 0]] += part.images[:, 1:]

        holes_table = _holes_table(holes, ids, settings.page_size)
        images_table = _images_table(ids, infos, holes_table, found, shares)
        sharing = Sharing.of(
            images_table,
            region_names,
            tree.add_rows([part.spectrum for part in merged]),
            tree.add_rows([part.image_spectrum for part in merged]),
            mark_split(
                add_patterns([part.patterns for part in merged]), np.concatenate([part.split for part in merged])
            ),
        )
        prediction = counters.predict(sharing, settings)
        stable_copies = sum(part.stable_copies for part in merged)
        known = sum(hole.pages for _, _, known in opened for hole in known)
        lost = sum(holes_table.column("pages").to_pylist()) - known
        checked = identities.check(sharing, prediction, settings, stable_copies, total, lost)

        written = sharing.tables() | {
            IMAGES.name: images_table,
            HOLES.name: holes_table,
            REGIONS.name: _regions_table(infos, found),
            ZERO_COLORS.name: _colors_table(found),
            COUNTERS.name: counters.counters_table(prediction.counters, settings),
            KSM_STAT.name: counters.ksm_stat_table(prediction, sharing, settings),
            WHATIF.name: grid(sharing, settings),
        }
        for name, table in written.items():
            store.write_table(table, TABLES[name], directory)
        summary = _summary(sharing, holes_table, prediction, settings) | {
            "zero_colors": written[ZERO_COLORS.name].to_pylist(),
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
                "images": [_of_manifest(info, i) for i, info in zip(ids, infos, strict=True)],
                "engine": {"name": choice.name, "why": choice.why, "tasks": len(tasks), "shards": len(planned)},
                "timings": {
                    "start_s": round(started - began, 3),
                    "scan_s": round(scanned - started, 3),
                    "merge_s": round(ended - scanned, 3),
                },
                "identities": [asdict(identity) | {"holds": identity.holds} for identity in checked],
                "caveats": list(caveats),
                "summary": summary,
            },
            directory,
        )
    return Run(Path(out), summary, settings, sharing, written[REGIONS.name], written[KSM_STAT.name], caveats)


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


def _of_manifest(info: ImageInfo, image_id: str) -> dict[str, object]:
    """What run.json says of an image: not its regions, which have a table."""
    told = asdict(info) | {"image_id": image_id, "ksm_stat": dict(info.ksm_stat)}
    return {name: value for name, value in told.items() if name not in ("regions", "passed_over")}


def _images_table(
    ids: Sequence[str], infos: Sequence[ImageInfo], holes: pa.Table, found: Sequence[_Scanned], shares: np.ndarray
) -> pa.Table:
    unreadable = dict.fromkeys(ids, 0)
    for row in holes.to_pylist():
        unreadable[row["image_id"]] += row["pages"]
    by_class = np.stack([scanned.classes for scanned in found])
    by_kind = np.stack([scanned.kinds for scanned in found])
    by_class[:, CLASSES.index("duplicate")] += shares[:, 0]
    by_class[:, CLASSES.index("unique")] += shares[:, 1]
    columns: dict[str, object] = {
        "scan_order": np.arange(len(ids), dtype=np.int32),
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
    columns |= {"shared_within": shares[:, 2], "shared_with_others": shares[:, 3]}
    columns |= {"frames_known": [scanned.framed for scanned in found]}
    return pa.Table.from_pydict(columns, schema=IMAGES.schema)


def _regions_table(infos: Sequence[ImageInfo], found: Sequence[_Scanned]) -> pa.Table:
    """The `regions` table; pages that are absent for no reason given are of no region."""
    rows = []
    for number, (info, scanned) in enumerate(zip(infos, found, strict=True)):
        by_region: dict[str, dict[str, int]] = {}
        said = sum(pages for _, _, pages in info.passed_over)
        passed_over = [*info.passed_over, ("", "absent", max(0, info.pages_absent - said))]
        counted = [
            (region, reason, pages)
            for region, counts in zip([*info.regions, ""], scanned.regions.tolist(), strict=True)
            for reason, pages in zip(REASONS, counts, strict=True)
        ]
        for region, reason, pages in [*passed_over, *counted]:
            if pages:
                row = by_region.setdefault(region, dict.fromkeys((*PASSED_OVER, "absent", *REASONS), 0))
                row[reason] += pages
        rows += [{"image": number, "region": region or None, **by_region[region]} for region in sorted(by_region)]
    return pa.Table.from_pylist(rows, schema=REGIONS.schema)


def _colors_table(found: Sequence[_Scanned]) -> pa.Table:
    total = sum(scanned.colors for scanned in found)
    assert isinstance(total, np.ndarray)
    columns = {"color": np.arange(len(total), dtype=np.int32), "zero": total[:, 0], "zero_mapped_fault": total[:, 1]}
    return pa.Table.from_pydict(columns, schema=ZERO_COLORS.schema)


def _summary(sharing: Sharing, holes: pa.Table, prediction: Prediction, settings: Settings) -> dict[str, object]:
    """The object `ksmdist run --json` prints. Keys are a promise: they are added to, none goes."""
    pages = {name: int(sharing.of_images(name).sum()) for name in ("total", "absent", *CLASSES)}
    return {
        "pages": pages,
        "kinds": {name: int(sharing.of_images(f"kind_{name}").sum()) for name in KINDS},
        "contents": counters.contents(sharing),
        **counters.summary(prediction, settings),
        "holes": {"ranges": len(holes), "pages": int(sharing.of_images("unreadable").sum())},
        "settings": settings.as_dict(),
    }
