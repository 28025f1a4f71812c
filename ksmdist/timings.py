"""How a run goes, told as it goes: progress, seconds of each stage, and metrics at the end; never for a table."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Clock", "NoProgress", "Progress", "metrics"]


class Progress(Protocol):
    """Told what is done, as it is done."""

    def engine(self, name: str, why: str) -> None:
        """An engine was chosen."""

    def scanning(self, pages: int, page_size: int) -> None:
        """Scanning begins."""

    def scanned(self, pages: int) -> None:
        """So many pages more are scanned."""

    def merged(self, ranges: int) -> None:
        """One more of so many ranges is merged."""

    def stage(self, line: str) -> None:
        """A stage is done: what, how much, how long."""


class NoProgress:
    """Tells nobody."""

    def engine(self, name: str, why: str) -> None: ...
    def scanning(self, pages: int, page_size: int) -> None: ...
    def scanned(self, pages: int) -> None: ...
    def merged(self, ranges: int) -> None: ...
    def stage(self, line: str) -> None: ...


@dataclass(slots=True)
class Clock:
    """Seconds of each stage, for run.json, metrics.prom and the log: never for a table."""

    began: float = field(default_factory=time.monotonic)
    laps: dict[str, float] = field(default_factory=dict)

    def lap(self, stage: str, done: str, progress: Progress, page_bytes: int = 0) -> None:
        """A stage has ended."""
        took = time.monotonic() - self.began
        self.began += took
        self.laps[stage] = self.laps.get(stage, 0.0) + took
        speed = f", {page_bytes / took / (1 << 30):.2f} GiB/s" if page_bytes and took else ""
        progress.stage(f"{stage}: {done} in {took:.2f} s{speed}")


def metrics(laps: Mapping[str, float], summary: Mapping[str, Any], tasks: int, pieces: int, again: int) -> str:
    """The run in Prometheus' text format (prometheus.io, exposition formats 0.0.4).

    Three lines a metric, written here: importing prometheus_client would cost every run's start 40 ms.
    """
    holes = summary["holes"]
    metrics: list[tuple[str, str, dict[str, float]]] = [
        ("stage_seconds", "Time that a stage of the run took.", {f'{{stage="{k}"}}': v for k, v in laps.items()}),
        ("tasks", "Tasks of the run.", {'{stage="scan"}': tasks, '{stage="merge"}': pieces}),
        ("tasks_taken_up", "Scans that an earlier driver had finished.", {"": again}),
        ("pages", "Pages scanned, by class.", {f'{{class="{k}"}}': v for k, v in summary["pages"].items()}),
        ("holes", "Ranges of pages that could not be read.", {"": holes["ranges"]}),
        ("images_out_of_reach", "Images whose node was not in the cluster.", {"": len(holes["images"])}),
    ]
    lines = []
    for name, doc, samples in metrics:
        lines += [f"# HELP ksmdist_run_{name} {doc}", f"# TYPE ksmdist_run_{name} gauge"]
        lines += [f"ksmdist_run_{name}{labels} {value:.9g}" for labels, value in samples.items()]
    return "\n".join(lines) + "\n"
