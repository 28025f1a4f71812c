"""What a worker does with one task of each stage: it reads, hands on to the pure stages, and writes.

Every function here may run twice, on two nodes at once even, and leaves the same bytes: a result is a
file that gets its name when it is whole, then its mark; a task that finds its mark is done (checkpoint.py).
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ksmdist import checkpoint, classes, digests, fleet, images, store, tree
from ksmdist.checkpoint import Written
from ksmdist.errors import ImageError, RunDirectoryError
from ksmdist.fleet import Source
from ksmdist.images import Hole, ImageInfo, stores
from ksmdist.images.files import check_unchanged
from ksmdist.images.uris import is_uri
from ksmdist.plan import Combination, Piece, Task
from ksmdist.scanned import Mapped, Opened, Scanned
from ksmdist.settings import Settings
from ksmdist.tables import STABLE_TREE
from ksmdist.totals import Merged, pack

__all__ = ["Found", "Merge", "Result", "Scan", "combine", "is_scanned", "merge", "open_sources", "read_shards", "scan"]


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
    with _named_by_node(source.node):
        expanded = fleet.expand(source)
        found = []
        for one in expanded.sources:
            image = images.open_image(one.uri, settings.page_size, settings.format)
            try:
                found.append((one, image.info, image.holes))
            finally:
                image.close()
        return Found(tuple(found), expanded.left_out)


class _named_by_node:  # noqa: N801  # reads as a statement
    """Errors about an image name the node that has it."""

    def __init__(self, node: str) -> None:
        self._node = node

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._node and isinstance(error, ImageError):
            raise type(error)(error.what, f"node://{self._node}{error.where}", error.hint) from None


@dataclass(frozen=True, slots=True)
class Scan:
    """A task of the map: its shards, their images by number, and the combinations that may stand in its place."""

    task: Task
    images: Mapping[int, Opened]
    ancestors: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Result:
    """What a scan or a combination tells the driver; again: it was done before."""

    mapped: Mapped
    written: Written
    again: bool = False


Reader = Callable[[Sequence[str], Settings, Scan], tuple[Mapped, pa.Table]]
"""Makes a task's `shard_content`, and what the driver is told, of its shards: read_shards()."""


def scan(directory: Path, region_names: Sequence[str], settings: Settings, read: Reader, scan: Scan) -> Result:
    """Read, hash, classify and combine the pages of some shards, and write what they hold: the map."""
    number = scan.task.number
    mark = _mark(directory, scan)
    if mark is not None:
        infos = {n: image.info for n, image in scan.images.items()}
        return Result(Mapped.from_json(mark[1], infos, settings), mark[0], True)
    assert settings.ranges is not None
    with _named_by_node(scan.task.node):
        mapped, content = read(region_names, settings, scan)
    parts = tree.split(content, settings.ranges)
    return Result(mapped, checkpoint.write_content(parts, directory, 0, number, mapped.as_json()))


def is_scanned(directory: Path, scan: Scan) -> bool:
    """Whether the task is done, and its result whole or part of a combination."""
    return _mark(directory, scan) is not None


def _mark(directory: Path, scan: Scan) -> tuple[Written, Any] | None:
    superseded = any(checkpoint.content_file(directory, *result).exists() for result in scan.ancestors)
    return checkpoint.read_mark(directory, 0, scan.task.number, superseded)


def read_shards(region_names: Sequence[str], settings: Settings, scan: Scan) -> tuple[Mapped, pa.Table]:
    """The pages of a task's shards -> what the driver is told, and their `shard_content`, combined."""
    found: dict[int, Scanned] = {}
    holes: list[tuple[int, Hole]] = []
    content: list[pa.Table] = []
    for shard in scan.task.shards:
        info = scan.images[shard.image].info
        scanned = found.setdefault(shard.image, Scanned.nothing(info, settings))
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
        check_unchanged(info.path, info.fingerprint)
    return Mapped(found, holes, scan.task.pages), classes.combine(content)


@functools.lru_cache(maxsize=4)
def _reopened(path: str, page_size: int, format: str, fingerprint: str) -> images.Image:
    """The image, opened once in each worker; raises ImageError if it is not the file that was planned."""
    image = images.open_image(path, page_size, format)
    if image.info.fingerprint != fingerprint:
        raise ImageError("changed while it was scanned", path, "scan a copy, or stop what writes to it")
    return image


def combine(directory: Path, ranges: int, combination: Combination) -> Result:
    """Combine results of the level below to one, a range at a time, and remove them: a step of the tree of merges."""
    level, number = combination.level, combination.number
    superseded = any(checkpoint.content_file(directory, *result).exists() for result in combination.ancestors)
    members = [(level - 1, n) for n in range(combination.first, combination.last)]
    mark = checkpoint.read_mark(directory, level, number, superseded)
    if mark is not None:
        written = mark[0]
    else:
        try:
            written = checkpoint.write_content(_combined(directory, ranges, members), directory, level, number, {})
        except RunDirectoryError:
            mark = checkpoint.read_mark(directory, level, number)  # of another worker at the same task
            if mark is None:
                # Where its members are gone too, the scans must be done again: without this file they are.
                checkpoint.drop_content(directory, [(level, number)])
                raise
            written = mark[0]
    checkpoint.drop_content(directory, members)
    return Result(Mapped({}, (), 0), written, mark is not None)


def _combined(directory: Path, ranges: int, members: Sequence[tuple[int, int]]) -> Iterator[pa.Table]:
    with closing(checkpoint.Results(directory, members)) as results:
        for number in range(ranges):
            yield classes.combine(results.range(number))


@dataclass(frozen=True, slots=True)
class Merge:
    """A task of the reduce: its piece, and where the range's rows are in each result, int64[results]."""

    piece: Piece
    start: np.ndarray
    end: np.ndarray


def merge(
    directory: Path,
    results: Sequence[tuple[int, int]],
    ranges: int,
    image_ids: Sequence[str],
    hosts: Sequence[str],
    task: Merge,
) -> Merged:
    """Merge one piece of the digests and write its part of the stable tree: the reduce."""
    piece = task.piece
    tables = []
    for table in checkpoint.read_range(directory, results, task.start, task.end):
        tables.append(table if piece.bits == 0 else checkpoint.compact(tree.narrow(table, ranges, piece)))
    rows = sum(map(len, tables))
    merged = tree.merge(tables, image_ids, hosts)
    store.write_table(merged.stable, STABLE_TREE, directory, piece.number)
    copies = int(np.sum(merged.stable.column("copies").to_numpy()))
    return Merged(
        merged.spectrum,
        pack(merged.image_spectrum),
        merged.patterns,
        merged.split,
        merged.images,
        merged.one_node,
        copies,
        rows,
    )
