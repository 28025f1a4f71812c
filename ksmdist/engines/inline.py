"""The engine that runs everything in this process: the reference, and the fastest for small inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from ksmdist.engines.base import Result, Summary, Task

__all__ = ["InlineEngine"]


class InlineEngine:
    """One task after the other, here."""

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
        results = []
        for number in range(ranges):
            results.append(reduce(number, mapped[number]))
            mapped[number] = []
            on_reduced(number)
        return results

    def close(self) -> None:
        """Nothing is held."""
