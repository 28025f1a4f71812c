"""The flow, once, top to bottom: images -> shards -> digests, classes -> ranges -> tree -> counters.

This is what the driver does: it plans, hands out tasks, adds up what they tell, and writes the small
tables. It touches no page, and no table that grows with pages; stages.py is what workers do.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ksmdist import checkpoint, checksums, engines, keys, outcome, plan, roster, runs, scans, stages, store, tenants
from ksmdist import previous as earlier_run
from ksmdist.checkpoint import Checkpoint
from ksmdist.contents import Seen
from ksmdist.digests import Digester
from ksmdist.engines import Engine, Stage
from ksmdist.errors import EngineError, KsmdistError, RunDirectoryError, SettingsError
from ksmdist.fleet import Source
from ksmdist.images.uris import is_uri
from ksmdist.keys import Key
from ksmdist.passes import Compared
from ksmdist.plan import Estimate, Plan
from ksmdist.previous import History
from ksmdist.runs import Run
from ksmdist.scanned import Opened, filtered_images
from ksmdist.settings import Settings
from ksmdist.tables import KSM_STAT, REGIONS, SHARING, TABLES
from ksmdist.timings import Clock, NoProgress, Progress, metrics
from ksmdist.totals import Totals
from ksmdist.tree import Owners
from ksmdist.version import __version__

__all__ = ["Planned", "estimate", "resume", "run"]

_START_S = 0.3  # of a process: its imports


def run(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    engine: str = "auto",
    address: str | None = None,
    progress: Progress | None = None,
    manifest: str | None = None,
    strict: bool = False,
    previous: str | os.PathLike[str] | None = None,
    base: Sequence[str | os.PathLike[str]] = (),
    key: Key | None = None,
    manifest_roots: Sequence[str | os.PathLike[str]] = (),
) -> Run:
    """Scan memory images, merge what they share, count it as KSM would, and write the run directory.

    paths: of images, or URIs, globs and directories (fleet.py); manifest: a file that names more, in its own folder
    or in one of manifest_roots: folders, node://NAME/dir, URIs of stores, or / for anywhere. So are images that
    `previous` kept no checksums of, which are read again.
    Images of a node that is not in the cluster are holes; with strict, an EngineError.
    base: files that the images of `paths` are laid over, the lowest first: a hole in them is unchanged memory.
    previous: an earlier run of these images, by image id: pages that changed since are volatile. So are those that
    changed since the pass before, where the manifest has several passes of an image.
    key: that the hashes are seeded with; None: the user's, as keys.load() finds or makes it.
    The tables written depend on the images and the settings alone: not on the engine, the number
    of workers, ranges or pages in a shard, nor on the order of the images, nor on what failed on the way.
    Raises KsmdistError; then nothing is left at `out`, and what tasks have finished is in `out`.partial,
    which resume() takes up, as does the same run() again.
    """
    clock = Clock()
    settings = settings or Settings()
    progress = progress or NoProgress()
    key = key or keys.load()
    checkpoint.check_free(_absolute(out))
    before = None if previous is None else Path(os.path.abspath(previous))
    roots = [os.fspath(root) for root in manifest_roots]
    more = [] if before is None else earlier_run.sources(before, settings.page_size, roots)
    with roster.opened(
        paths, manifest, settings, engine, address, progress, clock, strict, more, base, manifest_roots
    ) as looked:
        opened, left_out, choice, runner = looked
        described_run = None if before is None else earlier_run.describe(before, opened)
        if described_run is not None or any(image.earlier for image in opened):
            settings = replace(settings, checksums=True)
        machines = runner.machines()
        settings = plan.fill(settings, sum(image.info.pages for image in opened), machines.memory_a_cpu)
        described = {
            "settings": settings.as_dict(),
            "images": [image.as_json() for image in opened],
            "left_out": [list(pair) for pair in left_out],
            "previous": described_run,
            "key": key.fingerprint,
        }
        return _run(Checkpoint.begin(_absolute(out), described), Path(out), key, runner, choice, progress, clock)


def resume(
    out: str | os.PathLike[str],
    engine: str = "auto",
    address: str | None = None,
    progress: Progress | None = None,
    task_memory: int | None = None,
    key: Key | None = None,
) -> Run:
    """Take up the unfinished run that was to be at `out`: tasks that are finished are not done again.

    task_memory: for merges on other machines than those it was begun on, bytes. key: as run() has it; it must be the
    one that the run was begun with. Raises KsmdistError, as run() does.
    """
    clock = Clock()
    progress = progress or NoProgress()
    key = key or keys.load()
    held = Checkpoint.resume(_absolute(out))
    if held.complete:
        held.finish()
        held.close()
        return runs.load(out)
    settings, opened, _, _ = _planned(held)
    try:
        keys.check_same(key, held.plan["key"], str(out))
    except BaseException:
        held.close()
        raise
    if task_memory is not None:
        held.plan["settings"] = replace(settings, task_memory=task_memory).as_dict()
    try:
        nbytes = (sum(image.info.pages for image in opened) + _earlier_pages(opened)) * settings.page_size
        choice = engines.choose(engine, address, nbytes, unpack_s=roster.unpack_s(opened, settings.page_size))
        progress.engine(choice.name, choice.why)
        runner = engines.start(choice)
        clock.lap("start", choice.name, progress)
    except BaseException:
        held.close()
        raise
    try:
        return _run(held, Path(out), key, runner, choice, progress, clock)
    finally:
        runner.close()


@dataclass(frozen=True, slots=True)
class Planned:
    """What run() would do: the settings it would fill in, what it would take, on what; images that are out of reach.

    filtered: as key `filtered` of a run's summary.
    """

    settings: Settings
    estimate: Estimate
    engine: engines.Choice
    missing: tuple[str, ...]
    filtered: list[dict[str, Any]]


def estimate(
    paths: Sequence[str | os.PathLike[str]],
    settings: Settings | None = None,
    engine: str = "auto",
    address: str | None = None,
    manifest: str | None = None,
    cpus: int | None = None,
    base: Sequence[str | os.PathLike[str]] = (),
    manifest_roots: Sequence[str | os.PathLike[str]] = (),
) -> Planned:
    """What run() would do, and what it would take. No page is read.

    cpus: of a cluster that is to be; None for what there is. base, manifest_roots: as run() has them.
    """
    settings = settings or Settings()
    nothing: list[Source] = []
    with roster.opened(
        paths, manifest, settings, engine, address, NoProgress(), Clock(), False, nothing, base, manifest_roots
    ) as looked:
        opened, _, choice, runner = looked
        machines = runner.machines()
        pages = [image.info.pages for image in opened]
        settings = plan.fill(settings, sum(pages), machines.memory_a_cpu)
        planned = plan.plan(pages, [image.node for image in opened], settings)
        missing = tuple(image.image_id for image in opened if not image.reached)
        every = [one for image in opened for one in (image, *image.earlier)]
        remote = sum(image.info.pages for image in every if is_uri(image.info.path))
        if cpus is not None:
            choice = engines.Choice("ray", choice.address, f"a cluster of {cpus} CPUs was named")
        start_s = engines.RAY_START_S if choice.name == "ray" and not choice.address else _START_S
        count = cpus or machines.cpus
        cluster = choice.address is not None or cpus is not None
        found = planned.estimate(
            pages,
            remote,
            count,
            choice.name != "inline",
            start_s,
            cluster,
            _earlier_pages(opened),
            roster.packed_pages(opened),
        )
        return Planned(settings, found, choice, missing, filtered_images(opened))


def _planned(held: Checkpoint) -> tuple[Settings, list[Opened], list[tuple[str, str]], dict[str, Any] | None]:
    """What plan.json says: settings, images, files left out, the run before.

    Raises RunDirectoryError where it is not what run() wrote.
    """
    try:
        return (
            Settings(**held.plan["settings"]),
            [Opened.from_json(image) for image in held.plan["images"]],
            [(str(name), str(why)) for name, why in held.plan["left_out"]],
            held.plan["previous"],
        )
    except (KeyError, TypeError, ValueError, SettingsError) as error:
        held.close()
        raise RunDirectoryError(
            f"has a plan.json that is not what it should be: {error}", str(held.directory), "remove it, and run again"
        ) from None


def _run(
    held: Checkpoint,
    out: Path,
    key: Key,
    runner: Engine,
    choice: engines.Choice,
    progress: Progress,
    clock: Clock,
) -> Run:
    """All that follows the plan; on failure what is finished is kept, and the error says so."""
    settings, opened, left_out, previous = _planned(held)
    planned = plan.plan([image.info.pages for image in opened], [image.node for image in opened], settings)
    try:
        done = _flow(held, out, key, planned, opened, left_out, previous, runner, choice, progress, clock)
        held.finish()
    except BaseException as error:
        finished, complete = held.finished(), held.complete
        tasks = len(planned.tasks) + sum(len(_plan_pass(n, opened, settings).tasks) for n in range(_passes(opened)))
        if held.close() and isinstance(error, KsmdistError) and not complete:
            cluster = f" --address {choice.address}" if choice.address else ""
            raise type(error)(
                error.what,
                error.where,
                f"{error.hint}; {finished} of {tasks} tasks are done and kept: ksmdist run --resume {out}{cluster}",
            ) from None
        raise
    held.close()
    return done


def _flow(
    held: Checkpoint,
    out: Path,
    key: Key,
    planned: Plan,
    opened: Sequence[Opened],
    left_out: Sequence[tuple[str, str]],
    previous: Mapping[str, Any] | None,
    runner: Engine,
    choice: engines.Choice,
    progress: Progress,
    clock: Clock,
) -> Run:
    settings, directory = planned.settings, held.directory.resolve()
    assert settings.ranges is not None
    assert settings.task_memory is not None
    infos = [image.info for image in opened]
    ids = [image.image_id for image in opened]
    total = sum(info.pages for info in infos)

    # Passes before the one that is counted.
    history = History.of(earlier_run.load(previous, ids), ids)
    progress.scanning(total + _earlier_pages(opened), settings.page_size)
    for number in range(_passes(opened)):
        _earlier_pass(number, history, directory, opened, settings, runner, progress)
        clock.lap("checksum", f"pass {number + 1}", progress)

    # Map.
    names = sorted({name for info in infos for name in info.regions if name})
    levels = plan.combinations(len(planned.tasks), settings.fan_in)
    tasks = [
        stages.Scan(
            task,
            {shard.image: opened[shard.image] for shard in task.shards},
            plan.ancestors(levels, task.number),
            history.of_task(task),
        )
        for task in planned.tasks
    ]
    known = [(number, hole) for number, image in enumerate(opened) for hole in image.holes]
    work = scans.Map(planned, tasks, infos, names, directory, not levels, runner, progress, clock)
    mapped = scans.scan_all(work, key.digester)
    found, holes, digester = mapped.found, known + mapped.holes, mapped.digester
    written = scans.combine_all(levels, directory, settings, mapped.written, runner, progress, clock)
    history.add({number: image.number for number, image in enumerate(opened)}, [one.compared for one in found])
    results = [(len(levels), number) for number in range(len(levels[-1] if levels else tasks))]

    # Reduce. Merges that an earlier driver finished are done again, and may have cut the ranges otherwise.
    held.drop_parts()
    pieces = plan.cut_ranges(written.rows, plan.share(settings.task_memory))
    merges = [
        stages.Merge(piece, written.offsets[:, piece.range], written.offsets[:, piece.range + 1]) for piece in pieces
    ]
    groups = plan.groups([info.pages for info in infos])
    salts = [image.salt for image in opened]
    owners = Owners(ids, [info.host for info in infos], [info.tenant for info in infos], salts)
    totals = Totals(len(infos), settings.contents)
    changing = Totals(len(infos), 0) if history.images else None
    sets = np.zeros((len(pieces), 2), np.int64)
    frames = np.zeros((len(pieces), len(groups)), np.int64)
    exposed = np.zeros((len(pieces), 5), np.int64)

    def on_merged(number: int, reduced: stages.Reduced) -> None:
        totals.add(reduced.merged)
        if changing is not None:
            changing.add(reduced.changing or reduced.merged)
        sets[number], frames[number] = reduced.sets.offsets, reduced.frames.offsets
        exposed[number] = reduced.exposed
        progress.merged(len(pieces))

    runner.run(
        Stage(
            "merge",
            functools.partial(stages.merge, directory, results, settings, owners, groups),
            functools.partial(_describe_merge, len(pieces)),
            engines.any_node,
            lambda reduced: {"rows": reduced.rows},
            settings.task_memory,
        ),
        merges,
        on_merged,
    )
    clock.lap("merge", f"{len(pieces)} ranges, {written.total:,} rows", progress)

    # What images share with each other, and what the contents merged most are.
    relations = [
        stages.Related(number, first, last, sets, frames[:, number : number + 2], totals.shares[:, [4, 2]])
        for number, (first, last) in enumerate(itertools.pairwise(groups))
    ]
    huge = _relate(relations, directory, ids, settings, runner)
    seen = _inspect(outcome.looks(totals.top, opened), digester, runner, progress)
    unseen = tenants.expose(directory, opened, exposed, digester, settings.task_memory, runner, progress)
    clock.lap("relate", f"{len(relations)} tasks, {len(seen):,} contents looked at", progress)

    # Count.
    done = outcome.Outcome(
        settings=settings,
        opened=opened,
        left_out=left_out,
        region_names=names,
        found=found,
        holes=holes,
        pages=total,
        totals=totals,
        changing=changing,
        huge=huge,
        seen=seen,
        unseen=unseen,
        history=history,
        previous=None if previous is None else previous["run"],
        confirmed=mapped.confirmed,
        key=key.fingerprint,
    )
    tables = done.tables()
    for name, table in tables.items():
        store.write_table(table, TABLES[name], directory)
    parts = [checkpoint.related_file(directory, SHARING.name, number) for number in range(len(relations))]
    store.join_tables(parts, SHARING, directory)
    clock.lap("count", f"{len(done.sharing.spectrum):,} rows of the spectrum", progress)

    engine = {"name": choice.name, "why": choice.why, "tasks": len(tasks), "shards": planned.shards}
    summary = done.summary() | {"engine": choice.name, "engine_why": choice.why, "run": os.fspath(out)}
    laps = clock.laps
    store.write_text(metrics(laps, summary, len(tasks), len(pieces), mapped.again), directory, "metrics.prom")
    timings = {
        "start_s": round(laps.get("open", 0) + laps["start"], 3),
        "checksum_s": round(laps.get("checksum", 0), 3),
        "scan_s": round(laps["scan"], 3),
        "confirm_s": round(laps.get("confirm", 0), 3),
        "combine_s": round(laps.get("combine", 0), 3),
        "merge_s": round(laps["merge"] + laps["relate"] + laps["count"], 3),
    }
    manifest = done.manifest() | {"ksmdist": __version__, "engine": engine, "timings": timings, "summary": summary}
    store.write_manifest(manifest, directory)
    return Run(out, summary, settings, done.sharing, tables[REGIONS.name], tables[KSM_STAT.name], done.caveats)


def _relate(
    tasks: Sequence[stages.Related], directory: Path, image_ids: Sequence[str], settings: Settings, runner: Engine
) -> list[pa.Table]:
    """Leave the parts of table `sharing` in files; the parts of table `huge`."""
    assert settings.task_memory is not None
    found: dict[int, tuple[pa.Table, int]] = {}
    runner.run(
        Stage(
            "relate",
            functools.partial(stages.relate, directory, settings, image_ids),
            lambda task: f"relate images [{task.first}, {task.last})",
            engines.any_node,
            lambda result: {"rows": result[1]},
            settings.task_memory,
        ),
        tasks,
        found.__setitem__,
    )
    return [found[number][0] for number in range(len(tasks))]


def _inspect(
    looks: Sequence[stages.Inspect], digester: Digester, runner: Engine, progress: Progress
) -> dict[int, Seen]:
    """What the contents merged most are, by row; without those whose image is gone, or its node."""
    seen: dict[int, Seen] = {}
    nodes = runner.machines().nodes
    try:
        runner.run(
            Stage(
                "inspect",
                functools.partial(stages.inspect, digester),
                lambda task: f"inspect {len(task.rows)} contents",
                lambda task: task.node,
                lambda result: {"contents": len(result)},
                threads=False,
            ),
            [task for task in looks if not task.node or task.node in nodes],
            lambda _, result: seen.update(result),
        )
    except EngineError as error:  # a node has left: all is counted, and a caveat says what is not known
        progress.stage(f"inspect: {error}")
    return seen


def _absolute(out: str | os.PathLike[str]) -> Path:
    """The run directory, whatever `.` and `..` are in its name; a symbolic link stays one, and is refused."""
    path = os.path.abspath(out)
    return Path(path if os.path.islink(path) else os.path.realpath(path))


def _passes(opened: Sequence[Opened]) -> int:
    """Most passes that an image has before its last."""
    return max((len(image.earlier) for image in opened), default=0)


def _earlier_pages(opened: Sequence[Opened]) -> int:
    return sum(earlier.info.pages for image in opened for earlier in image.earlier)


def _of_pass(level: int, opened: Sequence[Opened]) -> dict[int, Opened]:
    """Images that have a later pass than `level`, from 0, as they are in it, by number."""
    return {number: image.earlier[level] for number, image in enumerate(opened) if len(image.earlier) > level}


def _plan_pass(level: int, opened: Sequence[Opened], settings: Settings) -> Plan:
    images = _of_pass(level, opened)
    sizes = [images[number].info.pages if number in images else 0 for number in range(len(opened))]
    nodes = [images[number].node if number in images else "" for number in range(len(opened))]
    return plan.plan(sizes, nodes, settings)


def _earlier_pass(
    level: int,
    history: History,
    directory: Path,
    opened: Sequence[Opened],
    settings: Settings,
    runner: Engine,
    progress: Progress,
) -> None:
    """Checksum pass `level`, from 0, of the images that have a later one, and compare it with the one before."""
    images, planned = _of_pass(level, opened), _plan_pass(level, opened, settings)
    found = [Compared() for _ in opened]

    def on_checksummed(task: int, result: Mapping[int, Compared]) -> None:
        for number, compared in result.items():
            found[number].add(compared)
        progress.scanned(planned.tasks[task].pages)

    runner.run(
        Stage(
            "checksum",
            functools.partial(stages.checksum, directory, level),
            lambda scan: f"pass {level + 1}: {scans.describe(scan)}",
            lambda scan: "" if stages.is_checksummed(directory, level, scan) else scan.task.node,
            lambda result: {"pages": sum(compared.pages for compared in result.values())},
            planned.scan_memory,
            False,
        ),
        [
            stages.Scan(
                task, {shard.image: images[shard.image] for shard in task.shards}, earlier=history.of_task(task)
            )
            for task in planned.tasks
        ],
        on_checksummed,
    )
    files = [stages.pass_file(directory, level, task.number) for task in planned.tasks]
    history.add({number: image.number for number, image in images.items()}, found, checksums.find(files))


def _describe_merge(pieces: int, merge: stages.Merge) -> str:
    return f"merge range {merge.piece.number + 1}/{pieces}"
