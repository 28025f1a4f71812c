"""Whole processes, timed in turn: a measurement is the median of rounds in which each ran once."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Measured:
    """Median wall time, and the peak memory of the largest process of the tree."""

    seconds: float
    peak_mib: float
    spread: float


def once(command: Sequence[str]) -> tuple[float, float]:
    """Run a command to its end; (seconds, MiB). Raises CalledProcessError if it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds, usage.ru_maxrss / 1024


def compare(
    commands: Mapping[str, Sequence[Sequence[str]]], rounds: int, before: Callable[[], None]
) -> dict[str, Measured]:
    """Time each named sequence of commands, all of them in every round; `before` runs untimed before each.

    The first round warms up and is not counted.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, steps in commands.items():
            before()
            runs = [once(step) for step in steps]
            if number:
                found[name].append((sum(seconds for seconds, _ in runs), max(peak for _, peak in runs)))
    measured = {}
    for name, runs in found.items():
        seconds = sorted(taken for taken, _ in runs)
        median = statistics.median(seconds)
        measured[name] = Measured(median, max(peak for _, peak in runs), (seconds[-1] - seconds[0]) / median)
    return measured
