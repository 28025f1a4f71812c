"""What the flow asks of an engine: one map and one reduce, with a shuffle between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import pyarrow as pa

__all__ = ["Engine", "Result", "Summary", "Task"]

Task = TypeVar("Task")
Summary = TypeVar("Summary")
Result = TypeVar("Result")


class Engine(Protocol):
    """Runs `map` over tasks and `reduce` over ranges; the same inputs give the same outputs in each."""

    name: str

    def shuffle(
        self,
        map: Callable[[Task], tuple[Summary, list[pa.Table]]],
        tasks: Sequence[Task],
        reduce: Callable[[int, list[pa.Table]], Result],
        ranges: int,
        on_mapped: Callable[[int, Summary], None],
        on_reduced: Callable[[int], None],
    ) -> list[Result]:
        """Map every task to a summary and `ranges` tables; reduce each range's tables, in task order.

        map, reduce: picklable, pure but for the files they read and write, safe to run again.
        on_mapped: called here with (task number, summary) as tasks end, in any order.
        on_reduced: called here with the range's number as ranges end.
        Returns the results by range. Raises what map or reduce raised, and EngineError.
        """

    def close(self) -> None:
        """Let go of what the engine holds."""
