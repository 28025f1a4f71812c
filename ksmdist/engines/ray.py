"""The Ray engine: Ray Core tasks, on this machine or a running cluster. The only import of Ray.

Ray Data's group-by was measured ten times slower than tasks that merge sorted arrays.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError, RayTaskError

from ksmdist.engines.base import Result, Summary, Task
from ksmdist.errors import EngineError, KsmdistError

__all__ = ["RayEngine"]

_TASKS_A_CPU = 4  # in flight: enough that no worker waits for the driver, few enough to bound memory
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


@functools.cache
def _keep_freed_memory() -> None:
    """Let this worker's malloc keep up to 256 MiB for the next task, where the C library is glibc.

    Its results gone to the object store, a worker would give the rest back after every task and
    fault it in again: combining a GiB's rows took 35 ms so, and takes 21.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)


def _map(function: Callable[[Any], tuple[Any, list[pa.Table]]], task: Any) -> tuple[Any, ...]:
    _keep_freed_memory()
    summary, tables = function(task)
    return (summary, *tables)


def _reduce(function: Callable[[int, list[pa.Table]], Any], number: int, *tables: pa.Table) -> Any:
    return function(number, list(tables))


class RayEngine:
    """Tasks on Ray: a cluster at `address`, or one started here with a process for each CPU.

    Raises EngineError where Ray cannot be reached or started.
    """

    name = "ray"

    def __init__(self, address: str | None = None, cpus: int | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        local: dict[str, Any] = {} if address else {"num_cpus": cpus, "include_dashboard": False}
        try:
            ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **local)
        except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
            raise EngineError(
                f"Ray cannot be reached or started: {(str(error) or type(error).__name__).splitlines()[0]}",
                address or "local",
                "check the address, that its Ray has this version, and that RAY_AUTH_MODE and the token are the "
                "cluster's, or use --engine inline",
            ) from None
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self._in_flight = max(2, int(resources.get("CPU", 1))) * _TASKS_A_CPU

    def shuffle(
        self,
        map: Callable[[Task], tuple[Summary, list[pa.Table]]],
        tasks: Sequence[Task],
        reduce: Callable[[int, list[pa.Table]], Result],
        ranges: int,
        on_mapped: Callable[[int, Summary], None],
        on_reduced: Callable[[int], None],
    ) -> list[Result]:
        """See Engine.shuffle. Tables stay in Ray's object store: the driver sees summaries and results only."""
        try:
            map_fn, reduce_fn = ray.put(map), ray.put(reduce)
            scan: Any = ray.remote(_map).options(name="scan", num_returns=1 + ranges)
            tables: list[list[Any]] = [[] for _ in range(len(tasks))]

            def start_map(number: int) -> Any:
                summary, *parts = scan.remote(map_fn, tasks[number])
                tables[number] = parts
                return summary

            self._drain(len(tasks), start_map, on_mapped)

            merge = ray.remote(_reduce).options(name="merge")
            results: list[Any] = [None] * ranges

            def start_reduce(number: int) -> Any:
                return merge.remote(reduce_fn, number, *[parts[number] for parts in tables])

            def keep(number: int, result: Any) -> None:
                results[number] = result
                for parts in tables:
                    parts[number] = None
                on_reduced(number)

            self._drain(ranges, start_reduce, keep)
            return results
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, KsmdistError):
                raise cause from None
            raise
        except RayError as error:
            raise EngineError(
                f"Ray lost the work: {str(error).splitlines()[0]}", "ray", "run it again, or use --engine inline"
            ) from None

    def _drain(self, count: int, start: Callable[[int], Any], done: Callable[[int, Any], None]) -> None:
        """Start `count` tasks, a bounded number at a time, and hand each result on as it comes."""
        running: dict[Any, int] = {}
        started = 0
        while running or started < count:
            while started < count and len(running) < self._in_flight:
                running[start(started)] = started
                started += 1
            ready, _ = ray.wait(list(running), num_returns=1)
            for ref in ready:
                number = running.pop(ref)
                done(number, ray.get(ref))

    def close(self) -> None:
        """Leave the cluster, or stop the one started here."""
        ray.shutdown()
