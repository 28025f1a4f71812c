"""Which pages are scanned together: a function of the input, never of workers or arrival order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Shard", "default_ranges", "default_shard_pages", "pack_shards", "plan_shards"]

_MIN_SHARD_PAGES = 1 << 14
_MAX_SHARD_PAGES = 1 << 18
_MANY_SHARDS = 1 << 14
_MAX_RANGES = 1 << 10


@dataclass(frozen=True, slots=True)
class Shard:
    """Pages [start, end) of image number `image`, counted in the image's own order."""

    image: int
    start: int
    end: int

    @property
    def pages(self) -> int:
        """Pages in the shard."""
        return self.end - self.start


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def default_shard_pages(total_pages: int, most_pages: int = _MAX_SHARD_PAGES) -> int:
    """Pages in a shard: an eighth of the input, a power of two from 2**14 to 2**18, or more for a petabyte.

    A task of Ray has a fixed cost, which a shard must outweigh; a shard of 2**18 pages is 1 GiB. Where that
    would be more than 2**14 shards they are larger, up to most_pages (a power of two).
    """
    wanted = min(_MAX_SHARD_PAGES, _power_of_two(-(-total_pages // 8)))
    many = _power_of_two(-(-total_pages // _MANY_SHARDS))
    return max(_MIN_SHARD_PAGES, min(most_pages, max(wanted, many)))


def default_ranges(total_pages: int) -> int:
    """Digest ranges: a power of two that grows with the root of the input, 8 at 2**22 pages, at most 1024.

    Each task sends a table to each range, so that ranges cost as many times as there are tasks.
    """
    return min(_MAX_RANGES, _power_of_two(math.isqrt(max(0, total_pages - 1) >> 17) + 1))


def plan_shards(pages: Sequence[int], shard_pages: int) -> list[Shard]:
    """Cut images of these many pages into shards of at most `shard_pages`, in order."""
    return [
        Shard(image, start, min(start + shard_pages, count))
        for image, count in enumerate(pages)
        for start in range(0, count, shard_pages)
    ]


def pack_shards(shards: Sequence[Shard], shard_pages: int) -> list[tuple[Shard, ...]]:
    """Group neighbouring shards until each group but the last of a run holds about `shard_pages`.

    A fleet of ten thousand small images must not become ten thousand tasks.
    """
    groups: list[tuple[Shard, ...]] = []
    group: list[Shard] = []
    for shard in shards:
        if group and sum(member.pages for member in group) + shard.pages > shard_pages:
            groups.append(tuple(group))
            group = []
        group.append(shard)
    if group:
        groups.append(tuple(group))
    return groups
