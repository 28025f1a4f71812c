"""The driver's part of the map: hand out scans, and have confirmed that equal digests are equal pages.

Digests that turn out to be of several contents are told apart by scanning once more with other digests in their
place, until none is left: so that a result has one content under one digest, whatever the digest is worth.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from ksmdist import checkpoint, confirm, engines, intake, plan, stages, store
from ksmdist.collisions import Confirmed
from ksmdist.digests import Digester
from ksmdist.engines import Engine, Stage
from ksmdist.errors import EngineError, RunDirectoryError
from ksmdist.images import Hole, ImageInfo
from ksmdist.plan import Plan
from ksmdist.scanned import Scanned
from ksmdist.settings import Settings
from ksmdist.tables import CANDIDATE, WITNESS
from ksmdist.timings import Clock, Progress

__all__ = ["Map", "Scans", "Written", "combine_all", "describe", "scan_all"]

_CHUNKS_AT_ONCE = 8  # whose pages are in the driver at the same time: 16 MiB each at the most

Task = TypeVar("Task")
Result = TypeVar("Result")


class Written:
    """Where the rows of a level's results are. rows: int64[ranges], of all; offsets: int64[results, ranges + 1]."""

    def __init__(self, results: int, ranges: int, keep: bool) -> None:
        self.rows = np.zeros(ranges, np.int64)
        self.offsets = np.zeros((results if keep else 0, ranges + 1), np.int64)

    def add(self, number: int, written: checkpoint.Written) -> None:
        """Note a result; where more are to come together first, its offsets are in its mark alone."""
        self.rows += written.rows
        if len(self.offsets):
            self.offsets[number] = written.offsets

    @property
    def total(self) -> int:
        """Rows in all."""
        return int(self.rows.sum())


@dataclass(slots=True)
class Scans:
    """What scans found. found: by image; holes: (image, hole); again: scans that were done before.

    digester: how contents are named in the end; confirmed: what was looked at for it, its collided all that were found
    """

    found: list[Scanned]
    holes: list[tuple[int, Hole]]
    written: Written
    digester: Digester
    again: int = 0
    confirmed: Confirmed = field(default_factory=Confirmed)


@dataclass(frozen=True, slots=True)
class Map:
    """What the map works on. tasks: the scans; infos: of all images; names: of all regions.

    keep: whether merges read the results of scans themselves, where `Written.offsets` are needed
    """

    planned: Plan
    tasks: Sequence[stages.Scan]
    infos: Sequence[ImageInfo]
    names: Sequence[str]
    directory: Path
    keep: bool
    runner: Engine
    progress: Progress
    clock: Clock


def scan_all(work: Map, digester: Digester) -> Scans:
    """Scan, confirm, and scan again as long as contents are found that have one digest.

    digester: with the seeds.
    """
    settings = work.planned.settings
    state = _State.read(work.directory)
    while True:
        digester = replace(digester, collided=state.collided)
        done = _scan(work, digester)
        if settings.verify == "none":
            return done
        if state.confirmed is None:
            found = _confirm(work, done) + done.confirmed
            said = f"{found.contents:,} contents by {settings.verify}, {found.pages:,} pages"
            work.clock.lap("confirm", said, work.progress)
            if found.collided.size:
                state = _State(state.collided | found.digests(), None)
                state.write(work.directory)
                work.progress.stage(f"confirm: {len(state.collided):,} digests are of several contents: scanning again")
                continue
            state = _State(state.collided, found)
            state.write(work.directory)
            checkpoint.drop_related(work.directory, CANDIDATE.name, WITNESS.name)
        assert state.confirmed is not None
        done.confirmed = replace(state.confirmed, collided=_rows(state.collided))
        return done


def _rows(digests: frozenset[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(sorted(digests)), np.uint8).reshape(-1, 16)


@dataclass(frozen=True, slots=True)
class _State:
    """What is known of collisions, for a driver that takes the run up. confirmed: of all, once nothing collides."""

    collided: frozenset[bytes] = frozenset()
    confirmed: Confirmed | None = None

    @classmethod
    def read(cls, directory: Path) -> _State:
        try:
            fields = intake.read_json(directory, "work/confirmed.json")
            confirmed = fields["confirmed"]
            return cls(
                frozenset(map(bytes.fromhex, fields["collided"])),
                None if confirmed is None else Confirmed.from_json(confirmed),
            )
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunDirectoryError(
                f"has a confirmed.json that is not what it should be: {error}",
                str(directory),
                "remove it, and run again",
            ) from None

    def write(self, directory: Path) -> None:
        fields = {
            "collided": sorted(digest.hex() for digest in self.collided),
            "confirmed": None if self.confirmed is None else self.confirmed.as_json(),
        }
        store.write_text(json.dumps(fields), directory / "work", "confirmed.json")


def _scan(work: Map, digester: Digester) -> Scans:
    settings = work.planned.settings
    assert settings.ranges is not None
    written = Written(len(work.tasks), settings.ranges, work.keep or settings.verify != "none")
    done = Scans([Scanned.nothing(info, settings) for info in work.infos], [], written, digester)

    def on_scanned(number: int, result: stages.Result) -> None:
        for image, of_image in result.mapped.images.items():
            done.found[image].add(of_image)
        done.holes.extend(result.mapped.holes)
        done.confirmed += result.mapped.confirmed
        done.written.add(number, result.written)
        done.again += result.again
        work.progress.scanned(0 if digester.collided else result.mapped.pages)

    directory = work.directory  # all that node_of() takes along: it goes to workers with the stage

    def node_of(scan: stages.Scan) -> str:
        """The node that must scan it: any, where that is done, and well, and only its mark has to be read."""
        if not scan.task.node or not stages.is_scanned(directory, settings, digester, scan):
            return scan.task.node
        return ""

    _need_nodes(work.runner, work.tasks, node_of)
    work.runner.run(
        Stage(
            "scan",
            functools.partial(stages.scan, work.directory, work.names, settings, digester, stages.read_shards),
            describe,
            node_of,
            _figures,
            work.planned.scan_memory,
            False,
        ),
        work.tasks,
        on_scanned,
    )
    pages = sum(scan.task.pages for scan in work.tasks)
    kept = f", {done.again} of them finished before" if done.again else ""
    said = f"{len(work.tasks)} tasks{kept}, {pages:,} pages"
    work.clock.lap("scan", said, work.progress, pages * settings.page_size)
    return done


def _need_nodes(runner: Engine, scans: Sequence[stages.Scan], node_of: Callable[[stages.Scan], str]) -> None:
    """Raises EngineError where a node that must scan something is not there."""
    wanted = {scan.task.node for scan in scans if scan.task.node}
    missing = wanted - runner.machines().nodes if wanted else set()
    for scan in scans:
        if scan.task.node in missing and node_of(scan):
            raise EngineError(
                "has images of this run, and is not in the cluster",
                f"node {scan.task.node}",
                "start Ray there, and give the cluster with --address",
            )


def describe(scan: stages.Scan) -> str:
    """A scan, for who watches."""
    first, last = scan.task.shards[0], scan.task.shards[-1]
    where = f"{scan.images[first.image].image_id} [{first.start}, {first.end})"
    if first is last:
        return f"scan {where}"
    return f"scan {where} to {scan.images[last.image].image_id} [{last.start}, {last.end})"


def _confirm(work: Map, done: Scans) -> Confirmed:
    """Look at pages again of all that seems to be held twice or more."""
    settings = work.planned.settings
    assert settings.task_memory is not None
    if not work.tasks:
        return Confirmed()
    pieces = plan.cut_ranges(done.written.rows, plan.share(settings.task_memory))
    offsets = done.written.offsets
    nodes = [""] * len(work.infos)
    for scan in work.tasks:
        for shard in scan.task.shards:
            nodes[shard.image] = scan.task.node
    found = _run(
        work.runner,
        Stage(
            "find",
            functools.partial(confirm.find, work.directory, settings, nodes, len(work.tasks)),
            lambda task: f"find what to confirm in range {task.piece.number + 1}/{len(pieces)}",
            engines.any_node,
            lambda result: {"pages": result.confirmed.pages},
            settings.task_memory,
        ),
        [confirm.Find(piece, offsets[:, piece.range], offsets[:, piece.range + 1]) for piece in pieces],
    )
    total = sum((one.confirmed for one in found), Confirmed())
    if settings.verify == "bytes":
        chunks = [chunk for one in found for chunk in one.chunks]
        return total + _compare(work, chunks, confirm.Images(work.infos, nodes))
    return total + _witness(work, [one.offsets for one in found], done.digester)


def _witness(work: Map, offsets: Sequence[np.ndarray], digester: Digester) -> Confirmed:
    """Another hash of the candidates; offsets: of each piece, where those of each scan are."""
    whole = np.stack(offsets)
    tasks = [
        confirm.Witness(
            scan.task,
            {shard.image: work.infos[shard.image] for shard in scan.task.shards},
            whole[:, number : number + 2],
        )
        for number, scan in enumerate(work.tasks)
    ]
    said = _run(
        work.runner,
        Stage(
            "witness",
            functools.partial(confirm.witness, work.directory, digester),
            lambda task: f"confirm contents of scan {task.task.number}",
            lambda task: task.task.node,
            lambda result: {"unread": result[1]},
            work.planned.scan_memory,
            False,
        ),
        tasks,
    )
    at = np.stack([one[0] for one in said])
    collided = _run(
        work.runner,
        Stage(
            "agree",
            functools.partial(confirm.agree, work.directory),
            lambda task: "compare hashes of a range",
            engines.any_node,
            lambda result: {"collided": len(result)},
            work.planned.scan_memory,
        ),
        [confirm.Agree(at[:, number : number + 2]) for number in range(len(offsets))],
    )
    return Confirmed(0, 0, sum(one[1] for one in said), np.concatenate(collided))


def _compare(work: Map, chunks: Sequence[confirm.Chunk], images: confirm.Images) -> Confirmed:
    """Compare the pages of chunks of contents, on the nodes that have them; first pages on others are shipped."""
    total = Confirmed()
    for some in _batched(chunks):
        away = [
            (number, node)
            for number, chunk in enumerate(some)
            for node in sorted({first for first, other in chunk.nodes if first != other})
        ]
        pages = _run(
            work.runner,
            Stage(
                "ship",
                functools.partial(confirm.ship, work.directory, images),
                lambda task: f"read contents that {task.node} has",
                lambda task: task.node,
                lambda result: {"pages": len(result.place)},
                work.planned.scan_memory,
                False,
            ),
            [confirm.Compare(some[number], node) for number, node in away],
        )
        tasks = []
        for number, chunk in enumerate(some):
            for node in sorted({other for _, other in chunk.nodes}):
                firsts = {first for first, other in chunk.nodes if other == node and first != node}
                shipped = [one for (of, at), one in zip(away, pages, strict=True) if of == number and at in firsts]
                tasks.append(confirm.Compare(chunk, node, tuple(shipped)))
        compared = _run(
            work.runner,
            Stage(
                "compare",
                functools.partial(confirm.compare, work.directory, work.planned.settings.page_size, images),
                lambda task: "compare the pages of contents",
                lambda task: task.node,
                lambda result: {"unread": result.unread},
                work.planned.scan_memory,
                False,
            ),
            tasks,
        )
        total = sum(compared, total)
    return total


def _batched(chunks: Sequence[confirm.Chunk]) -> Iterator[Sequence[confirm.Chunk]]:
    """All at once where no page is shipped, else a few: the driver has their pages."""
    step = _CHUNKS_AT_ONCE
    if all(first == other for chunk in chunks for first, other in chunk.nodes):
        step = max(1, len(chunks))
    return (chunks[at : at + step] for at in range(0, len(chunks), step))


def _run(runner: Engine, stage: Stage[Task, Result], tasks: Sequence[Task]) -> list[Result]:
    """The results of a stage, in the order of its tasks."""
    results: dict[int, Result] = {}
    if tasks:
        runner.run(stage, tasks, results.__setitem__)
    return [results[number] for number in range(len(tasks))]


def combine_all(
    levels: Sequence[Sequence[plan.Combination]],
    directory: Path,
    settings: Settings,
    written: Written,
    runner: Engine,
    progress: Progress,
    clock: Clock,
) -> Written:
    """The tree of merges, where there are many results: what is left is where the last level's are."""
    assert settings.ranges is not None
    for level in levels:
        written = Written(len(level), settings.ranges, keep=level is levels[-1])

        def on_combined(number: int, result: stages.Result, into: Written = written) -> None:
            into.add(number, result.written)

        runner.run(
            Stage(
                "combine",
                functools.partial(stages.combine, directory, settings),
                lambda c: f"combine {c.number} of level {c.level}: results [{c.first}, {c.last})",
                engines.any_node,
                _figures,
                settings.task_memory or 0,
            ),
            level,
            on_combined,
        )
        clock.lap("combine", f"{len(level)} tasks, {written.total:,} rows left", progress)
    return written


def _figures(result: stages.Result) -> Mapping[str, int]:
    return {"pages": result.mapped.pages, "rows": int(result.written.rows.sum())}
