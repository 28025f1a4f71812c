"""How a run goes, on stderr: a bar on a terminal, a line a stage in a log."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

__all__ = ["Bar", "Log"]


class Bar:
    """A progress bar on a terminal: shards, then ranges; pages, GiB/s and the time left. doing: what is done first."""

    def __init__(self, err: TextIO, doing: str = "scanning") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bars: Bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]} {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(file=err),
            transient=True,
        )
        self._doing = doing
        self._page_size = 0
        self._task: TaskID | None = None
        self._merging = False

    def engine(self, name: str, why: str) -> None:
        """Say which engine runs, and why."""
        self._bars.console.print(f"engine: {name} ({why})", highlight=False)

    def scanning(self, pages: int, page_size: int) -> None:
        """Start the bar."""
        self._page_size = page_size
        self._bars.start()
        self._task = self._bars.add_task(self._doing, total=pages, unit="pages", rate="")

    def scanned(self, pages: int) -> None:
        """Move it on."""
        assert self._task is not None
        self._bars.update(self._task, advance=pages)
        speed = self._bars.tasks[0].speed or 0
        self._bars.update(self._task, rate=f"{speed * self._page_size / (1 << 30):.2f} GiB/s")

    def merged(self, ranges: int) -> None:
        """Go over to the ranges, one more done."""
        if not self._merging:
            self._merging = True
            self._task = self._bars.add_task("merging", total=ranges, unit="ranges", rate="")
        assert self._task is not None
        self._bars.update(self._task, advance=1)

    def stage(self, line: str) -> None:
        """A bar says enough."""

    def close(self) -> None:
        """Take the bar away."""
        self._bars.stop()


class Log:
    """A line for each stage, for who reads it later: a job's log."""

    def __init__(self, err: TextIO) -> None:
        self._err = err

    def engine(self, name: str, why: str) -> None:
        """Say which engine runs, and why."""
        self.stage(f"engine: {name} ({why})")

    def scanning(self, pages: int, page_size: int) -> None:
        """Say nothing: it is not done."""

    def scanned(self, pages: int) -> None:
        """Say nothing: one task is no news."""

    def merged(self, ranges: int) -> None:
        """Say nothing: one range is no news."""

    def stage(self, line: str) -> None:
        """Say what is done."""
        with suppress(OSError):  # a full disk under the log is no reason to end the run
            print(f"ksmdist: {line}", file=self._err, flush=True)

    def close(self) -> None:
        """Nothing is held."""
