"""What the flow asks of an engine: run the tasks of a stage, on the nodes that have what they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Engine", "Machines", "Stage"]

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Stage(Generic[Task, Result]):
    """A stage of the flow: what is done with each of its tasks.

    name:     a word: open, scan, combine, merge
    function: picklable, pure but for the files it reads and writes, safe to run again; its result is small
    describe: what is done with a task, for who watches
    node:     the node that must run it, "" for any
    figures:  what a result counts (pages, rows, bytes), for metrics
    memory:   bytes a task may take at its peak, 0 for little
    threads:  whether tasks let go of Python's lock, so that threads run them at once
    """

    name: str
    function: Callable[[Task], Result]
    describe: Callable[[Task], str]
    node: Callable[[Task], str]
    figures: Callable[[Result], Mapping[str, int]]
    memory: int = 0
    threads: bool = True


@dataclass(frozen=True, slots=True)
class Machines:
    """What an engine runs on. nodes: their names; memory_a_cpu: bytes, of the node that has least."""

    nodes: frozenset[str]
    cpus: int
    memory_a_cpu: int


class Engine(Protocol):
    """Runs the tasks of stages; the same tasks give the same results in each engine."""

    name: str

    def machines(self) -> Machines:
        """What there is now; a cluster may grow and shrink."""

    def run(self, stage: Stage[Task, Result], tasks: Sequence[Task], on_done: Callable[[int, Result], None]) -> None:
        """Run every task of a stage, a bounded number at a time.

        on_done: called here with (index in tasks, result) as tasks end, in any order; the engine keeps no result.
        Raises what the function raised, and EngineError.
        """

    def close(self) -> None:
        """Let go of what the engine holds."""


def figures_of_nothing(_: Any) -> Mapping[str, int]:
    """For a stage that counts nothing."""
    return {}


def any_node(_: Any) -> str:
    """For a stage whose tasks run anywhere."""
    return ""
