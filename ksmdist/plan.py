"""What a run will do, before it does it: shards, tasks, ranges, and what they take. A function of sizes alone.

The sizing rule: a merge takes at most MERGE_BYTES a row and a scan SCAN_BYTES a page besides one
batch; both stay below `task_memory`, whatever the size of the input. docs/scale.md has the measurements.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from ksmdist.errors import SettingsError
from ksmdist.settings import LEAST_TASK_MEMORY, Settings
from ksmdist.shards import Shard, default_ranges, default_shard_pages, pack_shards, plan_shards

__all__ = [
    "Combination",
    "Estimate",
    "Piece",
    "Plan",
    "Task",
    "ancestors",
    "combinations",
    "cut_ranges",
    "fill",
    "groups",
    "plan",
    "share",
]

MERGE_BYTES = 480
"""Peak bytes a row of `shard_content` costs the task that merges it (benchmarks/scale.py)."""

SCAN_BYTES = 400
"""Peak bytes a page costs the task that scans it, besides the batch of pages (benchmarks/scale.py)."""

ROW_BYTES = 71
"""Bytes a row of `shard_content` takes on disk, with what merges make of it for relate (benchmarks/scale.py)."""

CHECKSUM_BYTES = 5
"""Bytes that a page's checksum takes on disk."""

PROCESS_BYTES = 160 << 20
"""A process with Python, numpy, Arrow and ksmdist in it, before it does anything (benchmarks/scale.py)."""

MOST_IMAGE_BYTES = 2800 << 10
"""What an image of 4 GiB that shares at random with 255 others costs the driver (benchmarks/scale.py)."""

BATCH_MEMORY = 128 << 20
"""The batch of pages that a scan reads, mapped or in flight from an object store."""

MOST_TASK_MEMORY = 1 << 30

SCAN_S_PER_GIB, MERGE_S_PER_ROW = 0.18, 5.0e-7
"""Seconds of one CPU: to scan a GiB of cached pages, and to merge a row (benchmarks/rates.py, scale.py)."""

UNPACK_S_PER_GIB = 1.4
"""Seconds more for a GiB of pages that lie compressed one by one, with zlib as QEMU does (benchmarks/readers.py)."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task of the map: neighbouring shards, and the node that alone has their images ("" for any)."""

    number: int
    shards: tuple[Shard, ...]
    node: str = ""

    @property
    def pages(self) -> int:
        """Pages in its shards."""
        return sum(shard.pages for shard in self.shards)


@dataclass(frozen=True, slots=True)
class Combination:
    """Results `first` to `last` (exclusive) of level `level` - 1, combined to result `number` of `level`.

    ancestors: (level, number) of the combinations that stand for this one once they are done.
    """

    level: int
    number: int
    first: int
    last: int
    ancestors: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """One task of the reduce: digests of range `range` whose next `bits` leading bits are `index`."""

    number: int
    range: int
    bits: int
    index: int
    rows: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run is expected to take: bytes, seconds. rows: of scan results, at most a page each.

    scan_bytes, merge_bytes: memory of a worker process at its peak; driver_bytes: of the driver.
    work_bytes: disk for the results of scans, until the run is done.
    earlier_pages: of passes before the last.
    read_bytes: read from object stores; network_bytes: all that may cross the network, scan results too.
    """

    pages: int
    earlier_pages: int
    images: int
    shards: int
    tasks: int
    combine_tasks: int
    ranges: int
    rows: int
    scan_bytes: int
    merge_bytes: int
    driver_bytes: int
    work_bytes: int
    read_bytes: int
    network_bytes: int
    cpus: int
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """By name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings with nothing left open, and the tasks of the map."""

    settings: Settings
    shards: int
    tasks: tuple[Task, ...]

    @property
    def scan_memory(self) -> int:
        """Bytes that a task of the map takes at its peak."""
        return BATCH_MEMORY + max((task.pages for task in self.tasks), default=0) * SCAN_BYTES

    def estimate(
        self,
        pages: Sequence[int],
        remote_pages: int,
        cpus: int,
        scan_on_all: bool,
        start_s: float,
        cluster: bool,
        earlier_pages: int = 0,
        packed_pages: int = 0,
    ) -> Estimate:
        """What it will take on `cpus` CPUs, with no more known than the sizes of the images.

        scan_on_all: whether scans run on all of them, as merges do; remote_pages: pages in object stores.
        earlier_pages: of earlier passes, which are read, and whose checksums are kept meanwhile.
        packed_pages: of all of these, pages that lie compressed one by one.
        Every page is taken for a content of its own, which bounds memory, disk and network from above.
        The time is that of pages that are in the page cache.
        """
        total = sum(pages)
        assert self.settings.task_memory is not None
        assert self.settings.ranges is not None
        combine_tasks = sum(map(len, combinations(len(self.tasks), self.settings.fan_in)))
        rounds = 1 + len(combinations(len(self.tasks), self.settings.fan_in))
        rows_a_piece = min(-(-total // self.settings.ranges), share(self.settings.task_memory))
        gib = (total + earlier_pages) * self.settings.page_size / (1 << 30)
        packed_gib = packed_pages * self.settings.page_size / (1 << 30)
        read = remote_pages * self.settings.page_size
        work = total * ROW_BYTES + earlier_pages * CHECKSUM_BYTES
        return Estimate(
            pages=total,
            earlier_pages=earlier_pages,
            images=len(pages),
            shards=self.shards,
            tasks=len(self.tasks),
            combine_tasks=combine_tasks,
            ranges=self.settings.ranges,
            rows=total,
            scan_bytes=PROCESS_BYTES + self.scan_memory,
            merge_bytes=PROCESS_BYTES + rows_a_piece * MERGE_BYTES,
            driver_bytes=PROCESS_BYTES
            + len(self.tasks) * 1024
            + sum(min(count * 200, MOST_IMAGE_BYTES) for count in pages) * (len(pages) > 1),
            work_bytes=work * (2 if combine_tasks else 1),
            read_bytes=read,
            network_bytes=read + (2 * rounds * work if cluster else 0),
            cpus=cpus,
            seconds=start_s
            + (gib * SCAN_S_PER_GIB + packed_gib * UNPACK_S_PER_GIB) / (cpus if scan_on_all else 1)
            + rounds * total * MERGE_S_PER_ROW / cpus,
        )


def share(task_memory: int) -> int:
    """Rows that a merge may take in."""
    return max(1, task_memory // MERGE_BYTES)


def fill(settings: Settings, total_pages: int, memory_a_cpu: int) -> Settings:
    """The settings with shard_pages, ranges and task_memory decided, where they are not.

    memory_a_cpu: bytes of memory for each CPU, on the node that has least. Half of it, a power of two up
    to 1 GiB, is a task's: nodes with 2 GiB a CPU or more all give the same plan.
    """
    memory = settings.task_memory
    if memory is None:
        memory = min(MOST_TASK_MEMORY, max(LEAST_TASK_MEMORY, 1 << max(0, (memory_a_cpu // 2).bit_length() - 1)))
    most_pages = (memory - BATCH_MEMORY) // SCAN_BYTES
    if settings.shard_pages is not None and settings.shard_pages > most_pages:
        raise SettingsError(
            f"{settings.shard_pages} pages take more than the {memory >> 20} MiB of a task",
            "shard_pages",
            f"use {most_pages} or less, or set a larger task_memory",
        )
    shard_pages = settings.shard_pages or default_shard_pages(total_pages, 1 << (most_pages.bit_length() - 1))
    enough = max(1, -(-total_pages // share(memory)))
    ranges = settings.ranges or max(default_ranges(total_pages), min(1 << 16, 1 << (enough - 1).bit_length()))
    return replace(settings, task_memory=memory, shard_pages=shard_pages, ranges=ranges)


def plan(pages: Sequence[int], nodes: Sequence[str], settings: Settings) -> Plan:
    """Cut images of these many pages, on these nodes ("" for all), into tasks. settings: as fill() gives them."""
    assert settings.shard_pages is not None
    shards = sorted(plan_shards(pages, settings.shard_pages), key=lambda shard: nodes[shard.image])
    tasks: list[Task] = []
    for node, of_node in itertools.groupby(shards, lambda shard: nodes[shard.image]):
        for group in pack_shards(list(of_node), settings.shard_pages):
            tasks.append(Task(len(tasks), group, node))
    return Plan(settings, len(shards), tuple(tasks))


def combinations(results: int, fan_in: int) -> list[list[Combination]]:
    """The tree of merges: levels of combinations, until no more than `fan_in` results are left."""
    levels: list[list[Combination]] = []
    while results > fan_in:
        level = len(levels) + 1
        # As few as it takes for the next level to be within fan_in, so that rows are written seldom.
        group = min(fan_in, max(2, -(-results // fan_in)))
        firsts = range(0, results, group)
        levels.append([Combination(level, n, at, min(at + group, results)) for n, at in enumerate(firsts)])
        results = len(levels[-1])
    return [
        [replace(combination, ancestors=ancestors(levels[above:], combination.number)) for combination in level]
        for above, level in enumerate(levels, 1)
    ]


def ancestors(levels: Sequence[Sequence[Combination]], number: int) -> tuple[tuple[int, int], ...]:
    """The combinations, (level, number) upwards, that stand for a result of the level below once they are done."""
    found = []
    for level in levels:
        number //= level[0].last - level[0].first
        found.append((level[0].level, number))
    return tuple(found)


_GROUP_PAIRS = 1 << 21  # of images, counted in one task: 48 MiB of sums
_GROUP_PAGES = 1 << 26  # each group reads all sets of images again: few groups


def groups(pages: Sequence[int]) -> list[int]:
    """Images of these many pages -> the first image of each group that is related in one task, and their number.

    A function of the sizes alone: so many images that what each shares with all others fits into a task.
    """
    most = max(1, _GROUP_PAIRS // max(1, len(pages)))
    starts, count = [0], 0
    for number, image in enumerate(pages):
        if number > starts[-1] and (number - starts[-1] >= most or count + image > _GROUP_PAGES):
            starts.append(number)
            count = 0
        count += image
    return [*starts, len(pages)]


def cut_ranges(rows: np.ndarray, most_rows: int) -> list[Piece]:
    """int64[ranges] rows of each range -> the tasks of the reduce: a range that has more rows is split.

    By the next bits of its digests, which are uniform. What one content alone has is never split.
    """
    pieces: list[Piece] = []
    for number, count in enumerate(rows.tolist()):
        bits = (max(1, -(-count // most_rows)) - 1).bit_length()
        for index in range(1 << bits):
            pieces.append(Piece(len(pieces), number, bits, index, count >> bits))
    return pieces
