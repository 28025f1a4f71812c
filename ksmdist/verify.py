"""A prediction beside the kernel: an experiment run on this host's own KSM, figure by figure.

Nothing is rounded and nothing tolerated: the memory is there before the first scan, the scans are
counted, ksmd stands between two of them when it is read. Interfaces: /sys/kernel/mm/ksm,
/proc/PID/ksm_stat (6.1; ksm_mergeable 6.14), `KSM:` of /proc/PID/smaps (6.7), VmFlags `mg`.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO, TypedDict

from ksmdist import pipeline
from ksmdist.capture import capture
from ksmdist.errors import EngineError
from ksmdist.layouts import Experiment, Running, running
from ksmdist.settings import KERNELS, Kernel, Settings
from ksmdist.sysfs import Ksm

__all__ = [
    "COUNTERS",
    "PROCESS_FIGURES",
    "Comparison",
    "Predict",
    "Prediction",
    "Row",
    "live",
    "mergeable_processes",
    "predict_captured",
    "predict_live",
    "process_figures",
    "render",
    "verify",
]

COUNTERS = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "pages_skipped",
    "pages_scanned",
    "ksm_zero_pages",
    "stable_node_chains",
    "stable_node_dups",
    "general_profit",
    "full_scans",
)
"""What is compared of /sys/kernel/mm/ksm, where the kernel has it."""

PROCESS_FIGURES = ("ksm_rmap_items", "ksm_zero_pages", "ksm_merging_pages", "ksm_process_profit", "smaps_ksm_pages")
"""What is compared of a process: its ksm_stat, and the pages smaps shows on KSM pages."""

_BY_SCANS = ("pages_scanned", "full_scans")  # a prediction of the end does not say how many scans it took
_SINCE_BOOT = ("pages_scanned", "pages_skipped")


class Prediction(TypedDict):
    """The figures of COUNTERS, and those of PROCESS_FIGURES for each process, in the order of the pids."""

    counters: Mapping[str, int]
    processes: Sequence[Mapping[str, int]]


Predict = Callable[[Sequence[int], Experiment | None], Prediction]
"""Predicts from the memory of the processes with these pids; the experiment is None for running ones."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: `scope` is `kernel` or the process, `name` as the kernel has it; pages, profits in bytes."""

    scope: str
    name: str
    predicted: int
    kernel: int

    @property
    def difference(self) -> int:
        """Predicted minus kernel."""
        return self.predicted - self.kernel


@dataclass(frozen=True, slots=True)
class Comparison:
    """All figures of a prediction beside the kernel's."""

    rows: tuple[Row, ...]

    @property
    def equal(self) -> bool:
        """Whether there is something to compare and no figure differs."""
        return bool(self.rows) and not self.different

    @property
    def different(self) -> tuple[Row, ...]:
        """The rows that differ."""
        return tuple(row for row in self.rows if row.difference)

    def describe(self) -> str:
        """The answer in a sentence."""
        if self.equal:
            return f"All {len(self.rows)} figures are as predicted."
        return f"{len(self.different)} of {len(self.rows)} figures differ from the prediction."

    def as_dict(self) -> dict[str, object]:
        """As `--json` prints it."""
        return {"equal": self.equal, "rows": [asdict(row) | {"difference": row.difference} for row in self.rows]}


def predict_captured(pids: Sequence[int], experiment: Experiment | None) -> Prediction:
    """ksmdist's own prediction: the processes captured, and a run on their images."""
    assert experiment is not None
    settings = Settings(
        page_size=mmap.PAGESIZE,
        use_zero_pages=experiment.use_zero_pages,
        max_page_sharing=experiment.max_page_sharing,
        merge_across_nodes=experiment.merge_across_nodes,
        full_scans=experiment.full_scans,
        smart_scan=experiment.smart_scan,
        kernel=_kernel(),
    )
    counters, figures = _predicted(pids, settings)
    shown = {**counters, "full_scans": experiment.full_scans}
    return {
        "counters": {name: value for name, value in shown.items() if value is not None},
        "processes": [figures[pid] for pid in pids],
    }


def predict_live(pids: Sequence[int], experiment: Experiment | None) -> Prediction:
    """Running processes, under the knobs KSM has now, once converged; all that is mergeable here is captured."""
    ksm = Ksm()
    limit = ksm.read("max_page_sharing")
    settings = Settings(
        page_size=mmap.PAGESIZE,
        use_zero_pages=bool(ksm.read("use_zero_pages")),
        max_page_sharing=limit,
        merge_across_nodes="merge_across_nodes" not in ksm.knobs() or bool(ksm.read("merge_across_nodes")),
        kernel=_kernel(),
    )
    counters, figures = _predicted(sorted({*pids, *mergeable_processes()}), settings)
    return {
        "counters": {name: value for name, value in counters.items() if value is not None},
        "processes": [figures[pid] for pid in pids],
    }


def _predicted(
    pids: Sequence[int], settings: Settings
) -> tuple[Mapping[str, int | None], dict[int, Mapping[str, int]]]:
    """The counters of a run on the processes' images, and the rows of its ksm_stat by pid."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        captured = capture(pids, folder / "images", mergeable_only=True, pause=True)
        run = pipeline.run([image.path for image in captured], folder / "run", settings, "inline")
        stats = {row["image_id"]: row for row in run.ksm_stat.to_pylist()}
    figures: dict[int, Mapping[str, int]] = {
        image.pid: {
            name: stats[image.image_id][name] for name in PROCESS_FIGURES if stats[image.image_id][name] is not None
        }
        for image in captured
    }
    return run.summary["counters"], figures


def _kernel() -> Kernel:
    """The newest of settings.KERNELS that this kernel is not older than; the oldest if it is older than all."""
    here = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
    known = [kernel for kernel in KERNELS if tuple(map(int, kernel.split("."))) <= here]
    return known[-1] if known else KERNELS[0]


def verify(experiment: Experiment, predict: Predict, ksm: Ksm | None = None) -> Comparison:
    """Run an experiment on this host's KSM and compare every figure with the prediction.

    predict is called once all pages are there, before KSM is switched on. Every knob is put back and
    every process ended, however this ends. Raises EngineError where KSM is absent or not writable,
    other processes have mergeable memory, or ksmd does not do its scans.
    """
    ksm = ksm or Ksm()
    with ksm.restored():
        _refuse_company()
        ksm.unmerge()
        try:
            _set_knobs(ksm, experiment)
            with running(experiment.processes) as processes:
                return _run(experiment, processes, predict, ksm)
        finally:
            ksm.unmerge()  # what ended processes leave behind stays counted until then


def _run(experiment: Experiment, processes: Sequence[Running], predict: Predict, ksm: Ksm) -> Comparison:
    pids = [process.pid for process in processes]
    prediction = predict(pids, experiment)
    before = ksm.counters()
    names: Sequence[str] = COUNTERS
    if experiment.full_scans is None:
        ksm.converge()
        names = [name for name in COUNTERS if name not in _BY_SCANS]
    else:
        ksm.scan(experiment.full_scans)
    counted = ksm.counters()
    figures = [process_figures(pid) for pid in pids]
    for name in _SINCE_BOOT:
        if name in counted:
            counted[name] -= before[name]
    counters = _rows("kernel", names, prediction["counters"], counted)
    return Comparison(counters + _process_rows(pids, prediction, figures))


def live(pids: Sequence[int], predict: Predict) -> Comparison:
    """Compare the figures of running processes with a prediction; no knob is written.

    The kernel's figures are read last. They lag behind the memory by up to one full scan, smaps does
    not; under smart_scan unmerged pages count in ksm_rmap_items all the same.
    Raises EngineError where a process has gone or is not ours to look at.
    """
    prediction = predict(pids, None)
    return Comparison(_process_rows(pids, prediction, [process_figures(pid) for pid in pids]))


def process_figures(pid: int) -> dict[str, int]:
    """A process's figures by the names of PROCESS_FIGURES; raises EngineError."""
    directory = Path("/proc") / str(pid)
    try:
        stat = dict(line.split(maxsplit=1) for line in _lines(directory / "ksm_stat"))
        merged_kb = sum(int(line.split()[1]) for line in _lines(directory / "smaps") if line.startswith("KSM:"))
    except OSError as error:
        raise EngineError(
            f"cannot be looked at: {os.strerror(error.errno or 0)}",
            f"process {pid}",
            "name a running process, and be root",
        ) from None
    figures = {name: int(stat[name]) for name in PROCESS_FIGURES if name in stat}
    return figures | {"smaps_ksm_pages": merged_kb * 1024 // mmap.PAGESIZE}


def mergeable_processes() -> list[int]:
    """Pids of all processes with mergeable memory that we may look at, ascending."""
    pids = sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if _is_mergeable(Path("/proc") / str(pid))]


def _is_mergeable(directory: Path) -> bool:
    try:
        for line in _lines(directory / "ksm_stat"):
            if line.startswith("ksm_mergeable:"):
                return line.split()[1] == "yes"
        return any(line.startswith("VmFlags:") and "mg" in line.split() for line in _lines(directory / "smaps"))
    except OSError:  # it has gone meanwhile
        return False


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _refuse_company() -> None:
    others = mergeable_processes()
    if others:
        raise EngineError(
            "other processes have mergeable memory, which KSM would count too",
            "processes " + ", ".join(map(str, others)),
            "stop them or choose another host",
        )


_WITHOUT_KNOB = {"smart_scan": 0, "merge_across_nodes": 1}


def _set_knobs(ksm: Ksm, experiment: Experiment) -> None:
    """A kernel without a knob does as _WITHOUT_KNOB says, which may be what is wanted."""
    present = ksm.knobs()
    for name, value in experiment.knobs().items():
        if name in present or _WITHOUT_KNOB.get(name) != value:
            ksm.write(name, value)


def _rows(scope: str, names: Sequence[str], predicted: Mapping[str, int], kernel: Mapping[str, int]) -> tuple[Row, ...]:
    """A figure the kernel has must have been predicted: a missing one would pass as equal."""
    return tuple(Row(scope, name, predicted[name], kernel[name]) for name in names if name in kernel)


def _process_rows(pids: Sequence[int], prediction: Prediction, figures: Sequence[Mapping[str, int]]) -> tuple[Row, ...]:
    rows: tuple[Row, ...] = ()
    for pid, predicted, kernel in zip(pids, prediction["processes"], figures, strict=True):
        rows += _rows(f"process {pid}", PROCESS_FIGURES, predicted, kernel)
    return rows


def render(comparison: Comparison, out: TextIO) -> None:
    """Print a comparison: the answer first, then each figure."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=out, width=None if out.isatty() else 100, highlight=False, markup=False)
    console.print(comparison.describe())
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("figure")
    for heading in ("predicted", "kernel", "difference"):
        table.add_column(heading, justify="right")
    scope = None
    for row in comparison.rows:
        numbers = (f"{row.predicted:,}", f"{row.kernel:,}", f"{row.difference:+,}" if row.difference else "0")
        table.add_row(row.scope if row.scope != scope else "", row.name, *numbers)
        scope = row.scope
    console.print(table)
