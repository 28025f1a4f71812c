"""What a worker does to confirm that pages of one digest are one content: tasks of --verify hash and --verify bytes.

Scans name contents by their digests. Where two pages or more seem to be one content, find() says which pages to look
at. `hash`: witness() reads each image once more, by address, and agree() compares what another hash says of them.
`bytes`: a scan has compared its own pages, within(); ship() reads one page of each content where it is, and compare()
holds those of other tasks against it. What is found are digests of several contents: they are told apart by
scanning again (digests.Digester.collided).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ksmdist import checkpoint, collisions, tree
from ksmdist.collisions import NO_DIGESTS, Confirmed
from ksmdist.columns import arrow, present, values
from ksmdist.digests import Digester
from ksmdist.images import ImageInfo
from ksmdist.plan import Piece, Task
from ksmdist.reads import named_by_node, read_again
from ksmdist.settings import Settings
from ksmdist.tables import CANDIDATE, WITNESS

__all__ = [
    "Agree",
    "Chunk",
    "Compare",
    "Find",
    "Found",
    "Images",
    "Shipped",
    "Witness",
    "agree",
    "compare",
    "find",
    "ship",
    "within",
    "witness",
]

_CHUNK_CONTENTS = 4096  # whose pages are shipped at once: 16 MiB of 4 KiB pages


def within(content: Sequence[pa.Table], infos: Mapping[int, ImageInfo], page_size: int, most_bytes: int) -> Confirmed:
    """Compare the pages of a task's scan that have one digest, each with the first of them; find() counts the contents.

    content: `shard_content`, a row a page but for zero pages; most_bytes: of pages held at once.
    """
    found = collisions.claims(content, range(len(content)), page_size)
    edges = np.searchsorted(found.group, np.arange(found.contents + 1))
    step = max(1, most_bytes // page_size)
    total = Confirmed(collided=found.collided)
    for first in range(0, found.contents, step):
        rows = slice(edges[first], edges[min(first + step, found.contents)])
        looked = _compared(infos, found.image[rows], found.first[rows], found.group[rows] - first, page_size)
        total += looked.of(found.digest[rows])
    return total


@dataclass(slots=True)
class _Looked:
    """Pages compared: by group, which have one unlike the first; by row, which were read."""

    group: np.ndarray
    unlike: np.ndarray
    read: np.ndarray

    def of(self, digest: np.ndarray) -> Confirmed:
        """digest: uint8[n, 16], by row."""
        collided = np.zeros(len(self.unlike), np.int64)
        collided[self.group] = np.arange(len(self.group))
        return Confirmed(0, len(self.read), int((~self.read).sum()), digest[collided[self.unlike]])


def _compared(
    infos: Mapping[int, ImageInfo],
    image: np.ndarray,
    address: np.ndarray,
    group: np.ndarray,
    page_size: int,
    first: np.ndarray | None = None,
    has_first: np.ndarray | None = None,
) -> _Looked:
    """Read pages and hold each against the first of its group: uint8[groups, page_size], those that has_first."""
    groups = int(group.max()) + 1 if len(group) else 0
    if first is None or has_first is None:
        first, has_first = np.empty((groups, page_size), np.uint8), np.zeros(groups, bool)
    looked = _Looked(group, np.zeros(len(has_first), bool), np.zeros(len(group), bool))
    for places, rows in read_again(infos, image, address):
        of = group[places]
        new, at = np.unique(of, return_index=True)
        new, at = new[~has_first[new]], at[~has_first[new]]
        first[new] = rows[at]
        has_first[new] = True
        looked.unlike[of[collisions.differ(rows, first, of)]] = True
        looked.read[places] = True
    return looked


@dataclass(frozen=True, slots=True)
class Find:
    """A task of find: a piece of the digests, and where its range is in each scan's result, int64[tasks]."""

    piece: Piece
    start: np.ndarray
    end: np.ndarray


@dataclass(frozen=True, slots=True)
class Chunk:
    """Contents whose pages are compared together: where their candidates are in a file, first byte and end.

    nodes: (node of a content's first page, node of another that it is compared with), each pair once
    """

    piece: int
    start: int
    end: int
    nodes: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Found:
    """Candidates of a piece. offsets: int64[tasks + 1], of `hash`: where those of each task are; chunks: of `bytes`."""

    confirmed: Confirmed
    offsets: np.ndarray
    chunks: tuple[Chunk, ...]


def _file(directory: Path, name: str, number: int) -> Path:
    return checkpoint.related_file(directory, name, number)


def find(directory: Path, settings: Settings, nodes: Sequence[str], tasks: int, task: Find) -> Found:
    """Which pages of a piece of the digests must be looked at. nodes: of each image; tasks: how many scans."""
    assert settings.ranges is not None
    tables, numbers = [], []
    for scan in range(tasks):
        span = slice(scan, scan + 1)
        for table in checkpoint.read_range(directory, [(0, scan)], task.start[span], task.end[span]):
            tables.append(tree.narrow(table, settings.ranges, task.piece))
            numbers.append(scan)
    claims = collisions.claims(tables, numbers, settings.page_size)
    del tables
    found = collisions.candidates(claims, settings.verify == "hash")
    looked = Confirmed(claims.contents, len(found.group), 0, claims.collided)
    path = _file(directory, CANDIDATE.name, task.piece.number)
    if settings.verify == "hash":
        edges = np.searchsorted(found.task, np.arange(tasks + 1)).tolist()
        parts = (found.table(slice(low, high)) for low, high in itertools.pairwise(edges))
        return Found(looked, checkpoint.write_related(path, CANDIDATE.schema, parts).offsets, ())
    by_group = np.argsort(found.group, kind="stable")  # of each the first task's page comes first
    number = np.unique(found.group[by_group], return_inverse=True)[1] // _CHUNK_CONTENTS
    edges = np.searchsorted(number, np.arange(int(number[-1]) + 2 if len(number) else 1)).tolist()
    rows = [by_group[low:high] for low, high in itertools.pairwise(edges)]
    offsets = checkpoint.write_related(path, CANDIDATE.schema, map(found.table, rows)).offsets.tolist()
    chunks = []
    for at, (low, high) in zip(rows, itertools.pairwise(offsets), strict=True):
        node = np.array([nodes[image] for image in found.image[at].tolist()], object)
        first = _firsts(found.group[at])
        other = first != np.arange(len(at))
        pairs = set(zip(node[first[other]].tolist(), node[other].tolist(), strict=True))
        chunks.append(Chunk(task.piece.number, low, high, tuple(sorted(pairs))))
    return Found(looked, np.zeros(0, np.int64), tuple(chunks))


def _firsts(group: np.ndarray) -> np.ndarray:
    """int64[n]: the first row of each row's group. group: of rows in which a group's stand together."""
    new = np.ones(len(group), bool)
    new[1:] = np.diff(group) != 0
    return np.asarray(np.flatnonzero(new)[np.cumsum(new) - 1])


@dataclass(frozen=True, slots=True)
class Witness:
    """A task of witness: of a scan's candidates. spans: int64[pieces, 2], where they are in each piece's file."""

    task: Task
    infos: Mapping[int, ImageInfo]
    spans: np.ndarray


def witness(directory: Path, digester: Digester, task: Witness) -> tuple[np.ndarray, int]:
    """Read the candidates of a scan again, and leave what another hash says of them for agree(), a batch a piece.

    Returns where the batches are, int64[pieces + 1], and how many pages could not be read.
    """
    parts = [
        checkpoint.read_batch(_file(directory, CANDIDATE.name, number), CANDIDATE.schema, *span)
        for number, span in enumerate(task.spans.tolist())
    ]
    digest, image, address = (
        np.concatenate([values(chunk) for part in parts for chunk in part.column(name).chunks])
        for name in CANDIDATE.schema.names
    )
    said, read = np.zeros((len(digest), 16), np.uint8), np.zeros(len(digest), bool)
    with named_by_node(task.task.node):
        for places, rows in read_again(task.infos, image.astype(np.int64), address):
            said[places] = digester.witness(rows)
            read[places] = True
    edges = np.cumsum([0, *map(len, parts)]).tolist()
    tables = (
        pa.Table.from_arrays(
            [arrow(digest[low:high]), arrow(said[low:high], null=~read[low:high])], schema=WITNESS.schema
        )
        for low, high in itertools.pairwise(edges)
    )
    path = _file(directory, WITNESS.name, task.task.number)
    return checkpoint.write_related(path, WITNESS.schema, tables).offsets, int((~read).sum())


@dataclass(frozen=True, slots=True)
class Agree:
    """A task of agree: a piece. spans: int64[tasks, 2], where it is in each scan's file."""

    spans: np.ndarray


def agree(directory: Path, task: Agree) -> np.ndarray:
    """Digests of a piece, uint8[m, 16], whose pages have several witnesses."""
    parts = [
        checkpoint.read_batch(_file(directory, WITNESS.name, number), WITNESS.schema, *span)
        for number, span in enumerate(task.spans.tolist())
        if span[0] < span[1]
    ]
    chunks = [part.column(name).chunks for part in parts for name in ("digest", "witness")]
    digest, said = ([chunk for each in chunks[which::2] for chunk in each] for which in (0, 1))
    if not digest:
        return NO_DIGESTS
    return collisions.contradicted(
        np.concatenate([values(chunk) for chunk in digest]),
        np.concatenate([values(chunk) for chunk in said]),
        np.concatenate([present(chunk) for chunk in said]),
    )


@dataclass(frozen=True, slots=True)
class Shipped:
    """Pages, on their way to another node. place: int64[k], contents of the chunk; rows: uint8[k, page_size]."""

    place: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class Images:
    """Those of the run, by number: what is known of each, and the node that has it."""

    infos: Sequence[ImageInfo]
    nodes: Sequence[str]

    def on(self, node: str, image: np.ndarray) -> dict[int, ImageInfo]:
        """Those among `image`, int64[n], that are on a node, by number."""
        return {n: self.infos[n] for n in np.unique(image).tolist() if self.nodes[n] == node}


@dataclass(frozen=True, slots=True)
class Compare:
    """A task of ship, or of compare: the first pages of a chunk's contents, or all others, that are on one node.

    shipped: first pages that are on other nodes
    """

    chunk: Chunk
    node: str
    shipped: tuple[Shipped, ...] = ()


def _rows_of(directory: Path, chunk: Chunk) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """digest, image, address of a chunk's candidates; the content each is of, from 0; whether it is its first page."""
    path = _file(directory, CANDIDATE.name, chunk.piece)
    table = checkpoint.read_batch(path, CANDIDATE.schema, chunk.start, chunk.end)
    digest, image, address = (values(table.column(name).chunk(0)) for name in CANDIDATE.schema.names)
    new = np.ones(len(digest), bool)
    new[1:] = (digest[1:] != digest[:-1]).any(axis=1)
    return digest, image.astype(np.int64), address, np.cumsum(new) - 1, new


def ship(directory: Path, images: Images, task: Compare) -> Shipped:
    """Read the first pages of a chunk's contents that are on this node: the only page bytes that leave a worker."""
    _, image, address, content, first = _rows_of(directory, task.chunk)
    infos = images.on(task.node, image)
    at = np.flatnonzero(first & np.isin(image, list(infos)))
    places, parts = [], []
    with named_by_node(task.node):
        for place, rows in read_again(infos, image[at], address[at]):
            places.append(content[at[place]])
            parts.append(rows.copy())
    if not parts:
        return Shipped(np.zeros(0, np.int64), np.zeros((0, 0), np.uint8))
    return Shipped(np.concatenate(places), np.concatenate(parts))


def compare(directory: Path, page_size: int, images: Images, task: Compare) -> Confirmed:
    """Hold the pages of a chunk that are on this node against the first of their contents."""
    digest, image, address, content, new = _rows_of(directory, task.chunk)
    first = np.empty((int(content[-1]) + 1, page_size), np.uint8)
    has_first = np.zeros(len(first), bool)
    infos = images.on(task.node, image)
    here = np.isin(image, list(infos))
    with named_by_node(task.node):
        at = np.flatnonzero(new & here)
        for place, rows in read_again(infos, image[at], address[at]):
            first[content[at[place]]] = rows
            has_first[content[at[place]]] = True
        for shipped in task.shipped:
            if len(shipped.place):
                first[shipped.place] = shipped.rows
                has_first[shipped.place] = True
        at = np.flatnonzero(here & ~new)
        lost = int((~has_first[np.unique(content[at])]).sum())
        looked = _compared(infos, image[at], address[at], content[at], page_size, first, has_first)
    told = looked.of(digest[at])
    return Confirmed(0, 0, told.unread + lost, told.collided)
