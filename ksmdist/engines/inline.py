"""The engine that runs everything in this process: the reference, and the fastest for small inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import pyarrow as pa

from ksmdist.engines.base import Result, Summary, Task

__all__ = ["InlineEngine"]


class InlineEngine:
    """Maps one task after the other; merges in a thread for each CPU.

    Hashing a page holds Python's lock and sorting does not, so threads win only for the merge.
    """

    name = "inline"

    def shuffle(
        self,
        map: Callable[[Task], tuple[Summary, list[pa.Table]]],
        tasks: Sequence[Task],
        reduce: Callable[[int, list[pa.Table]], Result],
        ranges: int,
        on_mapped: Callable[[int, Summary], None],
        on_reduced: Callable[[int], None],
    ) -> list[Result]:
        """See Engine.shuffle."""
        mapped: list[list[pa.Table]] = [[] for _ in range(ranges)]
        for number, task in enumerate(tasks):
            summary, tables = map(task)
            for into, table in zip(mapped, tables, strict=True):
                into.append(table)
            on_mapped(number, summary)
        results: dict[int, Result] = {}
        with ThreadPoolExecutor(min(ranges, len(os.sched_getaffinity(0)))) as pool:
            merging = {pool.submit(reduce, number, tables): number for number, tables in enumerate(mapped)}
            mapped.clear()
            try:
                for future in as_completed(merging):
                    results[merging[future]] = future.result()
                    on_reduced(merging[future])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [results[number] for number in range(ranges)]

    def close(self) -> None:
        """Nothing is held."""
