"""Table exposure, once contents are merged: rare contents are looked at where they are, then pairs of tenants counted.

A merge leaves what tenants share in files of the unfinished run (stages.merge). expose() is what the driver does with
them: of rare contents it holds MOST_RARE rows at the most, of pairs none. No byte of a page leaves a worker.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ksmdist import checkpoint, store
from ksmdist.columns import joined
from ksmdist.contents import entropy_classes
from ksmdist.digests import Digester
from ksmdist.engines import Engine, Stage, any_node
from ksmdist.errors import EngineError, ImageError
from ksmdist.exposure import MOST_RARE, TenantPairs, tenant_groups
from ksmdist.groups import count_rows
from ksmdist.reads import read_again
from ksmdist.scanned import Opened
from ksmdist.stages import Inspect
from ksmdist.tables import EXPOSURE, RARE_CONTENT, TENANT_SET
from ksmdist.timings import Progress

__all__ = ["expose"]

_LOOKS_A_TASK = 1024  # 4 MiB of 4 KiB pages
_UNKNOWN = 3


def look(digester: Digester, task: Inspect) -> np.ndarray:
    """int8[n]: the entropy_classes() of these contents; 3 where the page is there no more, or is another by now."""
    found = np.full(len(task.rows), _UNKNOWN, np.int8)
    for number in np.unique(task.image).tolist():
        mine = np.flatnonzero(task.image == number)
        try:
            for places, pages in read_again(task.infos, task.image[mine], task.address[mine]):
                same = (digester.digest(pages) == task.digest[mine[places]]).all(axis=1)
                found[mine[places[same]]] = entropy_classes(pages[same])
        except ImageError:  # it is gone: what was counted of it stands
            continue
    return found


@dataclass(frozen=True, slots=True)
class Expose:
    """A task of expose: tenants [first, last). entropy: as TenantPairs.table() takes it."""

    number: int
    first: int
    last: int
    entropy: np.ndarray


def count(directory: Path, names: Sequence[str], salted: bool, sets: np.ndarray, task: Expose) -> int:
    """Write what some tenants share with those after them as a part of table exposure; its rows.

    names: of all tenants, sorted; sets: int64[merges, 2], first byte and end of `tenant_set` in the file of each merge.
    """
    pairs = TenantPairs(task.first, task.last, len(names), salted)
    for number, span in enumerate(sets.tolist()):
        path = checkpoint.related_file(directory, TENANT_SET.name, number)
        pairs.add(checkpoint.read_batch(path, TENANT_SET.schema, *span))
    path = checkpoint.related_file(directory, EXPOSURE.name, task.number)
    written = checkpoint.write_related(path, EXPOSURE.schema, [pairs.table(names, task.entropy)])
    return int(written.rows.sum())


def expose(
    directory: Path,
    opened: Sequence[Opened],
    spans: np.ndarray,
    digester: Digester,
    task_memory: int,
    runner: Engine,
    progress: Progress,
) -> int:
    """Write table exposure. Returns how many rare contents were to be looked at and could not be read again.

    spans: int64[merges, 5], merges by digest: first byte and end of `tenant_set`, the same of `rare_content`, and how
    many rows that has. With fewer than two tenants the table is empty and nothing is run.
    """
    names = sorted({image.info.tenant for image in opened})
    if len(names) < 2:
        store.write_table(EXPOSURE.schema.empty_table(), EXPOSURE, directory)
        return 0
    rare = _rare(directory, spans[:, 2:])
    classes = _looked_at(rare, opened, digester, runner, progress)
    (tenant, other, entropy), contents = count_rows([joined([rare], "tenant"), joined([rare], "other"), classes])
    of, _ = count_rows([tenant, other])
    by_pair = np.zeros((len(of[0]), 6), np.int64)
    by_pair[:, 0], by_pair[:, 1] = of
    pair = np.cumsum(np.diff(tenant, prepend=-1).astype(bool) | np.diff(other, prepend=-1).astype(bool)) - 1
    by_pair[pair, 2 + entropy] = contents
    groups = tenant_groups(len(names))
    tasks = [Expose(number, *group, by_pair) for number, group in enumerate(itertools.pairwise(groups))]
    salted = len({image.salt for image in opened}) > 1
    runner.run(
        Stage(
            "expose",
            functools.partial(count, directory, names, salted, spans[:, :2]),
            lambda task: f"expose tenants [{task.first}, {task.last})",
            any_node,
            lambda rows: {"rows": rows},
            task_memory,
        ),
        tasks,
        lambda _number, _rows: None,
    )
    parts = [checkpoint.related_file(directory, EXPOSURE.name, task.number) for task in tasks]
    store.join_tables(parts, EXPOSURE, directory)
    return int((classes == _UNKNOWN).sum())


def _rare(directory: Path, spans: np.ndarray) -> pa.Table:
    """The rare contents with the lowest digests, MOST_RARE at the most. spans: int64[merges, 3], bytes and rows."""
    found, rows = [RARE_CONTENT.schema.empty_table()], 0
    for number, (start, end, count) in enumerate(spans.tolist()):
        if count and rows < MOST_RARE:
            path = checkpoint.related_file(directory, RARE_CONTENT.name, number)
            found.append(checkpoint.read_batch(path, RARE_CONTENT.schema, start, end).slice(0, MOST_RARE - rows))
            rows += len(found[-1])
    return pa.concat_tables(found)


def _looked_at(
    rare: pa.Table, opened: Sequence[Opened], digester: Digester, runner: Engine, progress: Progress
) -> np.ndarray:
    """int8[n]: the entropy class of each row of `rare_content`."""
    image, address, digest = (joined([rare], name) for name in ("image", "address", "digest"))
    classes = np.full(len(rare), _UNKNOWN, np.int8)
    nodes = np.array([opened[number].node for number in image.tolist()], object)
    there = runner.machines().nodes
    tasks = []
    for node in sorted(set(nodes.tolist())):
        rows = np.flatnonzero(nodes == node)
        rows = rows[np.lexsort((address[rows], image[rows]))]
        for at in range(0, len(rows) if not node or node in there else 0, _LOOKS_A_TASK):
            some = rows[at : at + _LOOKS_A_TASK]
            infos = {number: opened[number].info for number in np.unique(image[some]).tolist()}
            tasks.append(Inspect(node, infos, some, image[some].astype(np.int64), address[some], digest[some]))
    if not tasks:
        return classes

    def on_looked(number: int, found: np.ndarray) -> None:
        classes[tasks[number].rows] = found

    try:
        runner.run(
            Stage(
                "look",
                functools.partial(look, digester),
                lambda task: f"look at {len(task.rows)} rare contents",
                lambda task: task.node,
                lambda found: {"contents": len(found)},
                threads=False,
            ),
            tasks,
            on_looked,
        )
    except EngineError as error:  # a node has left: what is there is unknown, and a caveat says so
        progress.stage(f"look: {error}")
    return classes
