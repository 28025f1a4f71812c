"""What a worker does with one task of each stage: it reads, hands on to the pure stages, and writes.

Every function here may run twice, on two nodes at once even, and leaves the same bytes: a result is a
file that gets its name when it is whole, then its mark; a task that finds its mark is done (checkpoint.py).
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ksmdist import (
    checkpoint,
    checksums,
    classes,
    collisions,
    confirm,
    contents,
    digests,
    fleet,
    images,
    passes,
    store,
    tree,
)
from ksmdist.checkpoint import Written
from ksmdist.checksums import Stretch
from ksmdist.collisions import Confirmed
from ksmdist.columns import codes, present, values
from ksmdist.contents import Seen
from ksmdist.digests import Digester
from ksmdist.errors import ImageError, RunDirectoryError
from ksmdist.exposure import Exposed
from ksmdist.fleet import Source
from ksmdist.huge import HugeFrames
from ksmdist.images import Hole, ImageInfo, roots, stores
from ksmdist.images.uris import is_uri
from ksmdist.pairs import Pairs
from ksmdist.passes import Compared
from ksmdist.plan import Combination, Piece, Task
from ksmdist.reads import named_by_node, reopened
from ksmdist.scanned import Mapped, Opened, Scanned, add_hole
from ksmdist.settings import Settings
from ksmdist.tables import HUGE_FRAME, IMAGE_SET, RARE_CONTENT, SHARING, STABLE_TREE, TENANT_SET, WHATS
from ksmdist.totals import Merged
from ksmdist.tree import Owners

__all__ = [
    "Found",
    "Inspect",
    "Merge",
    "Reduced",
    "Related",
    "Result",
    "Scan",
    "checksum",
    "combine",
    "inspect",
    "is_checksummed",
    "is_scanned",
    "merge",
    "open_sources",
    "pass_file",
    "read_shards",
    "relate",
    "scan",
]


@dataclass(frozen=True, slots=True)
class Found:
    """Images that sources turned out to be, and files that were left out, each with why."""

    images: tuple[tuple[Source, ImageInfo, tuple[Hole, ...]], ...]
    left_out: tuple[tuple[str, str], ...]


def open_sources(settings: Settings, sources: Sequence[Source]) -> Found:
    """Look at sources on a node that has them: what images they are. No page is read. Raises ImageError."""
    look = functools.partial(_look, settings)
    if any(is_uri(source.uri) for source in sources):  # what takes time is waiting for a store
        found = list(stores.in_order(map(_waiting, [look] * len(sources), sources), len(sources)))
    else:
        found = [look(source) for source in sources]
    return Found(
        tuple(image for one in found for image in one.images), tuple(pair for one in found for pair in one.left_out)
    )


def _waiting(look: Callable[[Source], Found], source: Source) -> Callable[[object], Found]:
    return lambda _: look(source)


def _look(settings: Settings, source: Source) -> Found:
    with named_by_node(source.node):
        expanded = fleet.expand(source)
        found = []
        for one in expanded.sources:
            image = images.open_image(one.uri, settings.page_size, settings.format, one.base)
            try:
                # What the image itself names; read again, it must be the same files.
                for path in (image.info.path, *(part for part, _ in image.info.parts)):
                    roots.check(path, one.node, one.roots)
                found.append((one, image.info, image.holes))
            finally:
                image.close()
        return Found(tuple(found), expanded.left_out)


@dataclass(frozen=True, slots=True)
class Scan:
    """A task of the map: its shards, their images by number, and the combinations that may stand in its place.

    earlier: by image, how many passes were before, and where the checksums of the last of them are
    """

    task: Task
    images: Mapping[int, Opened]
    ancestors: tuple[tuple[int, int], ...] = ()
    earlier: Mapping[int, tuple[int, tuple[Stretch, ...]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """What a scan or a combination tells the driver; again: it was done before."""

    mapped: Mapped
    written: Written
    again: bool = False


Reader = Callable[[Sequence[str], Settings, Digester, Scan], tuple[Mapped, pa.Table, list[pa.Table]]]
"""Makes what the driver is told, the `shard_content` and the `checksums` of a task's shards: read_shards()."""


def scan(
    directory: Path, region_names: Sequence[str], settings: Settings, digester: Digester, read: Reader, scan: Scan
) -> Result:
    """Read, hash, classify and combine the pages of some shards, and write what they hold: the map."""
    number = scan.task.number
    mark = _mark(directory, settings, digester, scan)
    if mark is not None:
        return Result(mark[1], mark[0], True)
    assert settings.ranges is not None
    with named_by_node(scan.task.node):
        mapped, content, sums = read(region_names, settings, digester, scan)
    if settings.checksums:
        compared = {image: found.compared for image, found in mapped.images.items()}
        checksums.write(_checksums_file(directory, scan), sums, compared)
    parts = tree.split(content, settings.ranges)
    return Result(mapped, checkpoint.write_content(parts, directory, 0, number, _summary(mapped, digester)))


def _summary(mapped: Mapped, digester: Digester) -> dict[str, Any]:
    return mapped.as_json() | {"collided": len(digester.collided)}


def is_scanned(directory: Path, settings: Settings, digester: Digester, scan: Scan) -> bool:
    """Whether the task is done with these digests, and its result whole or part of a combination."""
    return _mark(directory, settings, digester, scan) is not None


def _checksums_file(directory: Path, scan: Scan) -> Path:
    return directory / "checksums" / f"{scan.task.number:05d}.parquet"


def _mark(directory: Path, settings: Settings, digester: Digester, scan: Scan) -> tuple[Written, Mapped] | None:
    """What the task has left, if it is done; what cannot be of this task is not: anyone may have written it."""
    if settings.checksums and checksums.read_summary(_checksums_file(directory, scan)) is None:
        return None
    superseded = any(checkpoint.content_file(directory, *result).exists() for result in scan.ancestors)
    mark = checkpoint.read_mark(directory, 0, scan.task.number, superseded)
    try:
        # Known digests of several contents only become more: as many are the same ones.
        if mark is None or len(mark[0].rows) != settings.ranges or mark[1]["collided"] != len(digester.collided):
            return None
        infos = {number: image.info for number, image in scan.images.items()}
        mapped = Mapped.from_json(mark[1], infos, settings)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return None
    return (mark[0], mapped) if mapped.pages == scan.task.pages else None


def read_shards(
    region_names: Sequence[str], settings: Settings, digester: Digester, scan: Scan
) -> tuple[Mapped, pa.Table, list[pa.Table]]:
    """The pages of a task's shards -> what the driver is told, their `shard_content`, combined, and their checksums."""
    found: dict[int, Scanned] = {}
    holes: list[tuple[int, Hole]] = []
    content: list[pa.Table] = []
    sums: list[pa.Table] = []
    zero_digest = digester.of_word(0, settings.page_size)
    for shard in scan.task.shards:
        info = scan.images[shard.image].info
        scanned = found.setdefault(shard.image, Scanned.nothing(info, settings))
        regions = np.array([bisect.bisect_left(region_names, name) if name else -1 for name in info.regions], np.int32)
        image = reopened(info)
        for item in image.batches(shard.start, shard.end):
            if isinstance(item, Hole):
                add_hole(holes, shard.image, item, info.page_size)
                continue
            page = digests.digest_pages(item, info.page_size, digester)
            volatile = None
            if settings.checksums:
                volatile, of_batch, compared = _compared(item, shard.image, info.page_size, scan.earlier)
                scanned.compared.add(compared)
                sums.append(of_batch)
            classified = classes.classify(page, shard.image, settings, regions, zero_digest, volatile)
            scanned.add(classified)
            content.append(classified.content)
        images.check_unchanged(info)
    confirmed = Confirmed()
    if settings.verify == "hash":  # combining forgets which pages of one digest a word fills
        confirmed = Confirmed(collided=collisions.mixed(content))
    elif settings.verify == "bytes":
        assert settings.task_memory is not None
        infos = {number: image.info for number, image in scan.images.items()}
        confirmed = confirm.within(content, infos, settings.page_size, settings.task_memory // 8)
    mapped = Mapped(found, holes, scan.task.pages, confirmed)
    return mapped, classes.combine(content, settings.page_size), sums


def _compared(
    batch: pa.RecordBatch, image: int, page_size: int, earlier: Mapping[int, tuple[int, tuple[Stretch, ...]]]
) -> tuple[np.ndarray, pa.Table, Compared]:
    """Pages of a batch: which are volatile, their `checksums`, and how they compare with the pass before."""
    address, has_bytes = values(batch.column("address")), present(batch.column("content"))
    checksum = digests.checksum_pages(batch, page_size)
    count, stretches = earlier.get(image, (0, ()))
    before = None
    if count and len(address):
        before = checksums.read(stretches, int(address[0]), int(address[-1]))
    volatile, age, compared = passes.compare(address, checksum, has_bytes, before, count)
    return volatile, passes.checksums_table(image, address, checksum, age, has_bytes), compared


def pass_file(directory: Path, level: int, number: int) -> Path:
    """Where a task of earlier passes leaves its checksums. level: how many passes of these images were before."""
    return directory / "work" / f"pass-{level}-{number:05d}.parquet"


def is_checksummed(directory: Path, level: int, scan: Scan) -> bool:
    """Whether the task of an earlier pass is done."""
    return checksums.read_summary(pass_file(directory, level, scan.task.number)) is not None


def checksum(directory: Path, level: int, scan: Scan) -> dict[int, Compared]:
    """Checksum the pages of an earlier pass, and keep them for the next: how they compare with the one before.

    scan.images: as they are in this pass; level: how many of these passes were before.
    """
    path = pass_file(directory, level, scan.task.number)
    done = checksums.read_summary(path)
    if done is not None:
        return done
    found: dict[int, Compared] = {}
    sums: list[pa.Table] = []
    with named_by_node(scan.task.node):
        for shard in scan.task.shards:
            info = scan.images[shard.image].info
            of_image = found.setdefault(shard.image, Compared())
            image = reopened(info)
            for item in image.batches(shard.start, shard.end):
                if isinstance(item, Hole):
                    of_image.lost += item.pages
                    continue
                _, of_batch, compared = _compared(item, shard.image, info.page_size, scan.earlier)
                of_image.add(compared)
                sums.append(of_batch)
            images.check_unchanged(info)
    checksums.write(path, sums, found)
    return found


def combine(directory: Path, settings: Settings, combination: Combination) -> Result:
    """Combine results of the level below to one, a range at a time, and remove them: a step of the tree of merges."""
    level, number = combination.level, combination.number
    superseded = any(checkpoint.content_file(directory, *result).exists() for result in combination.ancestors)
    members = [(level - 1, n) for n in range(combination.first, combination.last)]
    mark = checkpoint.read_mark(directory, level, number, superseded)
    if mark is not None:
        written = mark[0]
    else:
        try:
            written = checkpoint.write_content(_combined(directory, settings, members), directory, level, number, {})
        except RunDirectoryError:
            mark = checkpoint.read_mark(directory, level, number)  # of another worker at the same task
            if mark is None:
                # Where its members are gone too, the scans must be done again: without this file they are.
                checkpoint.drop_content(directory, [(level, number)])
                raise
            written = mark[0]
    checkpoint.drop_content(directory, members)
    return Result(Mapped({}, (), 0), written, mark is not None)


def _combined(directory: Path, settings: Settings, members: Sequence[tuple[int, int]]) -> Iterator[pa.Table]:
    assert settings.ranges is not None
    with closing(checkpoint.Results(directory, members)) as results:
        for number in range(settings.ranges):
            yield classes.combine(results.range(number), settings.page_size)


@dataclass(frozen=True, slots=True)
class Merge:
    """A task of the reduce: its piece, and where the range's rows are in each result, int64[results]."""

    piece: Piece
    start: np.ndarray
    end: np.ndarray


@dataclass(frozen=True, slots=True)
class Reduced:
    """What a merge tells the driver.

    changing: the same with pages that changed between passes counted as if they had not; None where there are none.
    rows:     of `shard_content` that went in
    sets:     where its `image_set` is in its file; frames: where its `huge_frame` rows are, a batch a group of images
    exposed:  int64[5], where its `tenant_set` is, first byte and end, and its `rare_content`, and the rows of that
    """

    merged: Merged
    changing: Merged | None
    rows: int
    sets: Written
    frames: Written
    exposed: np.ndarray


def merge(
    directory: Path,
    results: Sequence[tuple[int, int]],
    settings: Settings,
    owners: Owners,
    groups: Sequence[int],
    task: Merge,
) -> Reduced:
    """Merge one piece of the digests and write its part of the stable tree, and what relate() takes: the reduce.

    groups: first image of each group of images, and the number of images.
    """
    piece = task.piece
    assert settings.ranges is not None
    tables = []
    for table in checkpoint.read_range(directory, results, task.start, task.end):
        tables.append(table if piece.bits == 0 else checkpoint.compact(tree.narrow(table, settings.ranges, piece)))
    rows = sum(map(len, tables))
    merged = tree.merge(tables, owners, settings.page_size, settings.contents, exposed_under=settings)
    store.write_table(merged.stable, STABLE_TREE, directory, piece.number)
    sets = checkpoint.write_related(
        checkpoint.related_file(directory, IMAGE_SET.name, piece.number), IMAGE_SET.schema, [merged.sets]
    )
    image = values(merged.frames.column("image").chunk(0)) if len(merged.frames) else np.zeros(0, np.int32)
    cuts = np.searchsorted(image, np.array(groups)).tolist()
    parts = [merged.frames.slice(low, high - low) for low, high in itertools.pairwise(cuts)]
    frames = checkpoint.write_related(
        checkpoint.related_file(directory, HUGE_FRAME.name, piece.number), HUGE_FRAME.schema, parts
    )
    exposed = _write_exposed(directory, owners, piece, merged.exposed)
    told = Merged.of(merged)
    if not any(bool(values(chunk).any()) for table in tables for chunk in table.column("volatile").chunks):
        return Reduced(told, None, rows, sets, frames, exposed)
    del merged
    changing = tree.merge(tables, owners, settings.page_size, 0, with_volatile=True)
    return Reduced(told, Merged.of(changing), rows, sets, frames, exposed)


def _write_exposed(directory: Path, owners: Owners, piece: Piece, exposed: Exposed) -> np.ndarray:
    """Reduced.exposed; where there is but one tenant there is no file, and it is zeros."""
    found = np.zeros(5, np.int64)
    if len(set(owners.tenants)) > 1:
        for at, (table, rows) in enumerate(((TENANT_SET, exposed.sets), (RARE_CONTENT, exposed.rare))):
            path = checkpoint.related_file(directory, table.name, piece.number)
            found[2 * at : 2 * at + 2] = checkpoint.write_related(path, table.schema, [rows]).offsets
        found[4] = len(exposed.rare)
    return found


@dataclass(frozen=True, slots=True)
class Related:
    """A task of relate: images [first, last), and where what it reads is in the files of each merge.

    sets, frames: int64[merges, 2], first byte and end
    within: int64[images, 2], contents that an image holds twice or more, and its pages with them
    """

    number: int
    first: int
    last: int
    sets: np.ndarray
    frames: np.ndarray
    within: np.ndarray


def relate(directory: Path, settings: Settings, image_ids: Sequence[str], task: Related) -> tuple[pa.Table, int]:
    """What some images share with those after them, written as a part of table `sharing`, and their huge frames.

    Returns their rows of table `huge`, and how many of `sharing` there are.
    """
    pairs = Pairs(task.first, task.last, len(image_ids))
    huge = HugeFrames(task.first, task.last)
    for number, (sets, frames) in enumerate(zip(task.sets.tolist(), task.frames.tolist(), strict=True)):
        path = checkpoint.related_file(directory, IMAGE_SET.name, number)
        pairs.add(checkpoint.read_batch(path, IMAGE_SET.schema, *sets))
        path = checkpoint.related_file(directory, HUGE_FRAME.name, number)
        huge.add(checkpoint.read_batch(path, HUGE_FRAME.schema, *frames))
    path = checkpoint.related_file(directory, SHARING.name, task.number)
    written = checkpoint.write_related(path, SHARING.schema, pairs.tables(image_ids, task.within))
    return huge.table(image_ids, settings.page_size // 8), int(written.rows.sum())


@dataclass(frozen=True, slots=True)
class Inspect:
    """A task of inspect, or of tenants.look: contents whose first page is to be read again.

    They are known by row of totals.Top, or of `rare_content`.

    infos: by number of the image; rows, image: int64[n]; address: uint64[n]; digest: uint8[n, 16]
    """

    node: str
    infos: Mapping[int, ImageInfo]
    rows: np.ndarray
    image: np.ndarray
    address: np.ndarray
    digest: np.ndarray


def inspect(digester: Digester, task: Inspect) -> dict[int, Seen]:
    """Read the first page of some contents again: what each is, by row; those whose page is there no more are left out.

    No byte of a page leaves it.
    """
    seen: dict[int, Seen] = {}
    there: list[tuple[int, str, bytes | None]] = []
    for number in np.unique(task.image).tolist():
        mine = np.flatnonzero(task.image == number)
        info = task.infos[number]
        try:
            image = reopened(info)
            found = image.find(task.address[mine])
            order = np.argsort(found)
            order = order[found[order] >= 0]
            for batch in image.take(found[order]):
                if not isinstance(batch, Hole):
                    there += _pages(batch, task.address[mine[order]], mine[order], info)
        except ImageError:  # it is gone, or another by now: what was counted of it stands
            continue
    for place, region, _ in (one for one in there if one[2] is None):  # zero pages that KSM had placed
        seen[int(task.rows[place])] = Seen(WHATS.index("zero"), "the zero page", region)
    there = [one for one in there if one[2] is not None]
    if there:
        rows = np.frombuffer(b"".join(data or b"" for _, _, data in there), np.uint8).reshape(len(there), -1)
        same = (digester.digest(rows) == task.digest[[place for place, _, _ in there]]).all(axis=1)
        for (place, region, _), as_read, what in zip(there, same.tolist(), contents.look(rows), strict=True):
            if as_read:
                seen[int(task.rows[place])] = Seen(*what, region)
    return seen


def _pages(
    batch: pa.RecordBatch, wanted: np.ndarray, places: np.ndarray, info: ImageInfo
) -> Iterator[tuple[int, str, bytes | None]]:
    """(place, region, bytes or None) of the pages of a batch that are wanted, by their address."""
    address = values(batch.column("address"))
    region, has_bytes = codes(batch.column("region")), present(batch.column("content"))
    rows = np.minimum(np.searchsorted(address, wanted), len(address) - 1)
    here = np.flatnonzero(address[rows] == wanted)
    content = batch.column("content")
    for place, row in zip(places[here].tolist(), rows[here].tolist(), strict=True):
        name = info.regions[region[row]] if region[row] >= 0 else ""
        yield place, name, content[row].as_py() if has_bytes[row] else None
