"""What a process holds, looked at again and again, and whether it grows: a line fitted to the samples."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LEAST_SAMPLES = 5
MIB = 1 << 20


@dataclass(slots=True)
class Series:
    """One quantity over time. bound: how much its fitted line may rise over the whole of what is measured."""

    name: str
    unit: str
    bound: float
    seconds: list[float] = field(default_factory=list)
    amounts: list[float] = field(default_factory=list)

    def add(self, second: float, amount: float) -> None:
        """A sample."""
        self.seconds.append(second)
        self.amounts.append(amount)

    def growth(self, warm_s: float) -> dict[str, Any]:
        """A line by least squares through the samples after `warm_s`.

        rise: of the line, from its first sample to its last; an_hour: its slope; scatter: standard deviation around it;
        held: whether rise is within the bound, None where there are too few samples to say.
        """
        kept = [(s, a) for s, a in zip(self.seconds, self.amounts, strict=True) if s >= warm_s]
        found: dict[str, Any] = {"name": self.name, "unit": self.unit, "bound": self.bound, "samples": len(kept)}
        if len(kept) < LEAST_SAMPLES:
            return found | dict.fromkeys(("first", "last", "most", "rise", "an_hour", "scatter", "held"))
        seconds, amounts = np.array(kept, float).T
        slope, start = np.polyfit(seconds - seconds[0], amounts, 1)
        line = start + slope * (seconds - seconds[0])
        rise = float(line[-1] - line[0])
        return found | {
            "first": round(float(line[0]), 2),
            "last": round(float(line[-1]), 2),
            "most": round(float(amounts.max()), 2),
            "rise": round(rise, 2),
            "an_hour": round(float(slope) * 3600, 2),
            "scatter": round(float((amounts - line).std()), 2),
            "held": rise <= self.bound,
        }


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds. rss, shared: MiB, shared being of memory files (RssShmem); the rest: how many.

    files: open ones, sockets apart.
    """

    rss: float
    shared: float
    files: int
    sockets: int
    threads: int


def held(pid: int) -> Held | None:
    """What a process holds now (proc(5)); None where it is gone."""
    try:
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        opened = []
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):  # closed meanwhile
                opened.append(os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:"))
        return Held(
            int(fields["VmRSS"].split()[0]) / 1024,
            int(fields["RssShmem"].split()[0]) / 1024,
            opened.count(False),
            opened.count(True),
            int(fields["Threads"]),
        )
    except (OSError, KeyError):
        return None


def descendants(pid: int) -> dict[int, str]:
    """State letter of every process below this one, by pid (proc_pid_stat(5))."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, IndexError):
                state, parent = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[:2]
                parents[int(entry)] = int(parent), state
    below: dict[int, str] = {}
    frontier = {pid}
    while frontier:
        frontier = {child for child, (parent, _) in parents.items() if parent in frontier and child not in below}
        below |= {child: parents[child][1] for child in frontier}
    return below


def folder_size(folder: Path) -> tuple[int, float]:
    """Files below a folder, and their MiB."""
    files, nbytes = 0, 0
    for at, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                nbytes += os.lstat(os.path.join(at, name)).st_size
                files += 1
    return files, nbytes / MIB


def table(grown: Sequence[Mapping[str, Any]]) -> str:
    """Rows of growth() in Markdown."""
    rows = [
        "| what | at first | at last | most | rise | an hour | may rise | holds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in grown:
        verdict = {True: "yes", False: "NO", None: "UNKNOWN"}[one["held"]]
        cells = ["" if one[key] is None else f"{one[key]:,.1f}" for key in ("first", "last", "most", "rise", "an_hour")]
        rows.append(f"| {one['name']}, {one['unit']} | {' | '.join(cells)} | {one['bound']:,.0f} | {verdict} |")
    return "\n".join(rows) + "\n"
